"""Blocks that travel compute as they do in place, and two berths are all they take."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from llama import checkpoint, layout, placement
from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.generation import stream
from llama.model import Llama
from llama.offload import BERTHS, offload, travellers
from llama.quantize import Scheme, nearest, replace
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0)


def made(n_layers: int, *, quantised: bool = False) -> Llama:
    model = Llama(LlamaConfig(32, n_layers, 4, 2, 64, 97, max_seq_len=64))
    model.init_weights(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "norm" in name else 10)
    if quantised:
        replace(model.layers, lambda _, linear: nearest(linear.weight, Scheme(4, 32)), 4)
    return model.eval()


@pytest.mark.parametrize(("n_layers", "count"), [(5, 5), (5, 2), (4, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("quantised", [False, True])
def test_logits_are_identical(n_layers: int, count: int, quantised: bool) -> None:
    model = made(n_layers, quantised=quantised)
    want = list(stream(model, [1, 2, 3], GREEDY, 12))
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        logits = model(tokens)
    ferry = offload(model, list(model.layers), "cpu", count)
    assert list(stream(model, [1, 2, 3], GREEDY, 12)) == want
    with torch.inference_mode():
        assert torch.equal(model(tokens), logits)
    # 13 passes; what fits into the berths is fetched once. The next pass's first block is sent for already.
    assert ferry.loads == (13 * count + 1 if count > BERTHS else count)


def test_two_berths_and_no_more() -> None:
    """A block computes from a berth; all others lie at home, and the next one's weights are in the other berth."""
    model = made(5)
    held = copy.deepcopy(model.state_dict())
    ferry = offload(model, list(model.layers), "cpu", 4)
    berths = [{t.data_ptr() for t in berth} for berth in ferry.berths]
    assert len(berths) == BERTHS
    seen: list[tuple[int, int]] = []

    def look(i: int) -> None:
        where = [{p.data_ptr() for p in layer.parameters()} for layer in model.layers]
        inside = [j for j, places in enumerate(where) if places in berths]
        assert inside == [i]
        assert ferry.aboard[1 - berths.index(where[i])] == i % 4  # of the travelling ones, the first is layer 1
        seen.append((i, ferry.loads))

    for i, layer in enumerate(model.layers):
        if i > 0:
            layer.attn.register_forward_pre_hook(lambda *_, i=i: look(i))
    with torch.inference_mode():
        for _ in range(2):
            model(torch.tensor([[1, 2]]))
    assert [i for i, _ in seen] == [1, 2, 3, 4] * 2
    assert all(torch.equal(t, held[name]) for name, t in model.state_dict().items())


def test_a_pass_that_is_broken_off_does_no_harm() -> None:
    model = made(4)
    with torch.inference_mode():
        want = model(torch.tensor([[1, 2]]))
        offload(model, list(model.layers), "cpu", 4)
        hook = model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.tensor([[1, 2]]))
        hook.remove()
        assert torch.equal(model(torch.tensor([[1, 2]])), want)


def test_as_few_travel_as_must() -> None:
    assert travellers(32, 10, 100, 420) == 0
    assert travellers(32, 10, 100, 419) == 32 - 31 + BERTHS
    assert travellers(32, 10, 100, 120) == 32
    assert travellers(32, 10, 100, 119) is None


# --- what generate.py makes of it -----------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, small_tokenizer: Tokenizer) -> Path:
    config = LlamaConfig(32, 4, 4, 2, 64, small_tokenizer.vocab_size, max_seq_len=64)
    model = Llama(config)
    model.init_weights(0)
    tensors = model.state_dict()
    named = ((e.name, tensors[e.name]) for e in layout.entries(config))
    checkpoint.save_model(tmp_path / "model", named, config, small_tokenizer, ChatFormat())
    return tmp_path / "model"


def test_sizes_are_those_of_the_tensors(folder: Path) -> None:
    model = checkpoint.load_model(folder)
    block, rest, cache = checkpoint.sizes(folder, None, 10)
    assert block == sum(4 * p.numel() for p in model.layers[0].parameters())
    assert 4 * block + rest == sum(4 * p.numel() for p in model.parameters())
    assert cache == 2 * 4 * 2 * 10 * 8 * 4
    assert checkpoint.sizes(folder, torch.bfloat16, 10)[0] == block / 2


def test_what_does_not_fit_is_said_before_it_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, rest, cache = checkpoint.sizes(folder, None, placement.POSITIONS)
    whole = rest + cache + placement.MARGIN + 4 * block

    def count(free: int, asked: placement.Offload) -> int:
        monkeypatch.setattr(placement, "free_memory", lambda device: free)
        return placement.count_travelling(folder, "cuda", None, asked)

    assert count(whole, None) == count(whole, "auto") == 0
    assert count(whole - 1, "auto") == 3
    assert count(0, 2) == 2
    with pytest.raises(ValueError, match=r"model needs 0.5 GB and cuda has 0.\d GB free: --offload keeps .* int4"):
        count(whole - 1, None)
    with pytest.raises(ValueError, match=r"0.0 GB free: even with --offload; `python convert_weights.py .* int4"):
        count(1000, "auto")
    with pytest.raises(ValueError, match="--offload 5: the model has 4 blocks"):
        count(0, 5)


def test_a_gpu_that_is_asked_for_by_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[str] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [placement.found(d) for d in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    assert current == ["cuda:1"]


def test_on_a_device_it_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want = list(stream(placement.on_device(folder, "cpu", None, "auto", None, None), [1, 2], GREEDY, 8))
    monkeypatch.setattr(placement, "free_memory", lambda device: 0)
    model = placement.on_device(folder, "cpu", None, "auto", None, 3)
    assert list(stream(model, [1, 2], GREEDY, 8)) == want
    assert capsys.readouterr().err == "3 of 4 blocks travel to cpu for every token\n"
