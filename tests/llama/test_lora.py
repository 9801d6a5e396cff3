"""Adapters: where they go, what they compute, folding in, ranks, and PEFT's files both ways."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoModelForCausalLM

import generate
from llama import checkpoint, lora, lora_files, nf4, parallel
from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.generation import lay_out_for_decoding
from llama.lora_config import PROJECTIONS, LoRAConfig, from_peft, target_names, to_peft
from llama.model import Llama
from llama.tokenizer import Tokenizer

# peft asks transformers by a name that the latter has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

RANKS = Path(__file__).with_name("lora_ranks.py")


def adapted(config: LlamaConfig, adapter: LoRAConfig, packed: bool = False, dtype: Any = torch.float32) -> Llama:
    """A model with adapters that do something: B is not 0."""
    model = Llama(config)
    model.init_weights(0)
    model.to(dtype)
    if packed:
        nf4.replace(model.layers)
    lora.apply(model, adapter)
    lora.init_weights(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in lora.adapters(model):
            if name.endswith("lora_B"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def tokens_of(config: LlamaConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(3))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["v_proj", "q_proj"], ("q", "v")),
        (["q", "down"], ("q", "down")),
        (['["q_proj",', '"up_proj"]'], ("q", "up")),
        (["q_proj,k_proj"], ("q", "k")),
        (["all"], PROJECTIONS),
        (["all-linear"], PROJECTIONS),
    ],
)
def test_targets_in_every_spelling(given: list[str], want: tuple[str, ...]) -> None:
    assert target_names(given) == want


@pytest.mark.parametrize("given", [["lm_head"], ["q_proj", "attn"], [], ["[]"]])
def test_targets_that_are_none(given: list[str]) -> None:
    with pytest.raises(ValueError, match=r"LoRA: .*; there are q_proj, k_proj, .*, and all"):
        target_names(given)


@pytest.mark.parametrize(
    "wrong", [{"r": 0}, {"r": True}, {"r": 8, "alpha": 0}, {"r": 8, "dropout": 1.0}, {"r": 8, "alpha": float("nan")}]
)
def test_settings_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"LoRA: (r|alpha|dropout) is .*; it must be"):
        LoRAConfig(**wrong)


def test_scales() -> None:
    assert LoRAConfig(8, 16).scale == 2
    assert LoRAConfig(16, 16, rslora=True).scale == 4


# --- arithmetic -----------------------------------------------------------------------------------


def test_only_adapters_train_and_the_base_keeps_its_names(tiny_config: LlamaConfig) -> None:
    base = {name: p.shape for name, p in Llama(tiny_config).named_parameters()}
    model = adapted(tiny_config, LoRAConfig(4, targets=("q", "v", "down")))
    found = {name: p.shape for name, p in model.named_parameters()}
    assert base.items() <= found.items()
    assert found.keys() - base.keys() == {name for name, _ in lora.adapters(model)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == found.keys() - base.keys()
    assert len(list(lora.adapters(model))) == 2 * 3 * tiny_config.n_layers
    assert found["layers.1.attn.v.lora_A"] == (4, 32)
    assert found["layers.1.attn.v.lora_B"] == (16, 4)


def test_the_formula_and_its_gradients(tiny_config: LlamaConfig) -> None:
    """Against the definition in fp64, and the same gradients."""
    module = adapted(tiny_config, LoRAConfig(4, 12)).layers[0].attn.q
    x = torch.randn(5, 32, requires_grad=True)
    parts = [t.detach().double().requires_grad_() for t in (x, module.weight, module.lora_A, module.lora_B)]
    want = parts[0] @ parts[1].T + 12 / 4 * (parts[0] @ parts[2].T) @ parts[3].T
    got = module(x)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    want.square().sum().backward()
    got.square().sum().backward()
    for ours, theirs in zip((x, None, module.lora_A, module.lora_B), parts, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    assert module.weight.grad is None


def test_a_new_adapter_changes_nothing_and_is_peft_s_draw(tiny_config: LlamaConfig) -> None:
    plain, model = Llama(tiny_config), Llama(tiny_config)
    for m in (plain, model):
        m.init_weights(0)
    lora.apply(model, LoRAConfig(8, targets=PROJECTIONS))
    lora.init_weights(model, 5)
    tokens = tokens_of(tiny_config)
    assert torch.equal(plain(tokens), model(tokens))
    values = torch.cat([p.flatten() for name, p in lora.adapters(model) if name.endswith("gate.lora_A")])
    bound = 1 / 32**0.5  # kaiming_uniform(a=sqrt(5)) of 32 inputs
    assert values.abs().max() <= bound
    assert abs(values.std() - bound / 3**0.5) < 0.1 * bound
    first, second = (dict(lora.adapters(model))[f"layers.{i}.attn.q.lora_A"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_dropout_is_the_step_s_own(tiny_config: LlamaConfig) -> None:
    model = adapted(tiny_config, LoRAConfig(4, dropout=0.5))
    tokens = tokens_of(tiny_config)
    still = model(tokens)
    assert torch.equal(still, model(tokens)), "no dropout in evaluation"
    model.train()

    def logits(*step: int) -> torch.Tensor:
        lora.seed_dropout(*step)
        return model(tokens)

    first = logits(42, 7, 0)
    assert torch.equal(first, logits(42, 7, 0))
    for other in ((42, 8, 0), (42, 7, 1), (43, 7, 0)):
        assert not torch.equal(first, logits(*other))
    assert not torch.equal(first, still)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does it
@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_and_compiled_blocks_agree(tiny_config: LlamaConfig, packed: bool) -> None:
    """Dropout and all; a compiled block is one graph without breaks."""
    model = adapted(tiny_config, LoRAConfig(4, dropout=0.5, targets=("q", "o", "up")), packed).train()
    block = model.layers[0]
    x = torch.randn(2, 9, 32, requires_grad=True)
    rotation = model._rotation_at(0, 9, None, x.device)

    def gradients(run: Any) -> list[torch.Tensor]:
        lora.seed_dropout(0, 1, 0)
        return list(torch.autograd.grad(run(x, rotation).square().sum(), [x, *(p for _, p in lora.adapters(block))]))

    want = gradients(block)
    again = gradients(lambda *args: recompute(block, *args, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for a, b in zip(want, gradients(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- folding in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_merged_weights_are_rounded_once(tiny_config: LlamaConfig, dtype: torch.dtype, packed: bool) -> None:
    model = adapted(tiny_config, LoRAConfig(4, 12, targets=("k", "down")), packed, dtype)
    module = model.layers[1].mlp.down
    base = module.dense() if packed else module.weight.float()
    want = (base + 12 / 4 * (module.lora_B.float() @ module.lora_A.float())).to(dtype)
    streamed = dict(lora.merged_tensors(model))
    untouched = model.layers[1].mlp.up.dense() if packed else model.layers[1].mlp.up.weight
    lora.merge(model)
    assert (
        [name for name, _ in model.named_parameters()]
        == list(streamed)
        == [name for name, _ in Llama(tiny_config).named_parameters()]
    )
    for name, p in model.named_parameters():
        assert torch.equal(p, streamed[name].to(dtype)), name
    assert torch.equal(model.layers[1].mlp.down.weight, want)
    assert type(model.layers[1].mlp.down) is torch.nn.Linear
    assert torch.equal(model.layers[1].mlp.up.weight, untouched.to(dtype))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("packed", [False, True])
def test_merged_logits_are_the_adapter_s(
    tiny_config: LlamaConfig, dtype: torch.dtype, bound: float, packed: bool
) -> None:
    model = adapted(tiny_config, LoRAConfig(4, targets=PROJECTIONS), packed, dtype)
    plain = Llama(tiny_config)
    plain.init_weights(0)
    tokens = tokens_of(tiny_config)
    before = model(tokens).float()
    assert (before - plain(tokens)).abs().max() > 5 * bound, "adapters that do nothing show nothing"
    lora.merge(model)
    assert (model(tokens).float() - before).abs().max() <= bound


def test_folding_ignores_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: (seen.append(torch.get_float32_matmul_precision()), product(a, b))[1],
    )
    torch.set_float32_matmul_precision("high")
    try:
        lora.folded(torch.ones(2, 2), torch.ones(1, 2), torch.ones(2, 1), 1.0)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


@pytest.mark.parametrize("packed", [False, True])
def test_laying_out_for_decoding_keeps_adapters(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """Linears are only put together, or replaced, where they are nothing more than linears."""
    monkeypatch.setattr("llama.few_rows.SMALLEST", 1)
    config = LlamaConfig(64, 2, 4, 2, 96, 64, max_seq_len=32)
    model = adapted(config, LoRAConfig(4, targets=("q", "up")), packed)
    tokens = tokens_of(config)[:1, :4]
    before = model(tokens)
    lay_out_for_decoding(model)
    assert hasattr(model.layers[0].mlp.up, "lora_A")
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-5)


# --- ranks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    config = LlamaConfig(32, 2, 4, 2, 48, small_tokenizer.vocab_size, max_seq_len=128)
    model = Llama(config)
    model.init_weights(0)
    path = tmp_path_factory.mktemp("base") / "model"
    checkpoint.save_model(path, model.named_parameters(), config, small_tokenizer, ChatFormat("dialogue", ""))
    return path


def test_two_ranks_adapt_as_one(base: Path, tmp_path: Path) -> None:
    """Values, training, merged weights and saved adapters of a sharded model, 16 and 4 bits, recomputed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    started = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
        command = [sys.executable, str(RANKS), str(base), str(tmp_path / "2")]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    spec = importlib.util.spec_from_file_location("lora_ranks", RANKS)
    assert spec is not None
    assert spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    try:
        one = alone.scenario(base, tmp_path / "1")
    finally:
        parallel.shutdown()
    out = [process.communicate(timeout=120)[0] for process in started]
    two = json.loads(out[0])
    assert all(process.returncode == 0 for process in started)
    assert one["names"] == two["names"]
    for bits in ("16", "4"):
        a, b = (load_file(tmp_path / n / bits / "adapter_model.safetensors") for n in ("1", "2"))
        assert a.keys() == b.keys()
        assert any(v.abs().max() > 0 for k, v in a.items() if "lora_B" in k), "nothing was trained"
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)
        for x, y in zip(one[f"merged {bits}"], two[f"merged {bits}"], strict=True):
            assert abs(x - y) <= 1e-5
    assert two["sharded"] == [True, False], "adapters are sharded, packed weights are not"


# --- PEFT -----------------------------------------------------------------------------------------


def their_logits(base: Path, adapter: Path, tokens: torch.Tensor) -> torch.Tensor:
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        return theirs.eval()(tokens).logits


@pytest.mark.parametrize(
    "adapter",
    [LoRAConfig(4, 8, 0.1), LoRAConfig(3, 5, targets=PROJECTIONS), LoRAConfig(4, 8, targets=("o",), rslora=True)],
    ids=["default", "all", "rslora"],
)
def test_ours_opens_in_peft(base: Path, tmp_path: Path, adapter: LoRAConfig) -> None:
    config = checkpoint.load_config(base)
    model = adapted(config, adapter)
    lora_files.save_adapter(tmp_path / "adapter", model, adapter, base, ChatFormat("plain"))
    tokens = tokens_of(config)
    got, want = their_logits(base, tmp_path / "adapter", tokens), model(tokens)
    assert (want - checkpoint.load_model(base)(tokens)).abs().max() > 1e-2
    assert (got - want).abs().max() <= 1e-5
    opened = checkpoint.load_model(base).eval()
    lora_files.add_adapter(opened, tmp_path / "adapter")
    assert torch.equal(opened(tokens), want)
    assert lora_files.load_config(tmp_path / "adapter") == adapter
    assert lora_files.base_of(tmp_path / "adapter") == base.resolve()


@pytest.fixture(scope="module")
def saved_by_peft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "k_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    path = tmp_path_factory.mktemp("peft") / "theirs"
    model.save_pretrained(path)
    return path


@pytest.fixture
def theirs(saved_by_peft: Path, tmp_path: Path) -> Path:
    """An adapter that peft saved, to do with as one likes."""
    shutil.copytree(saved_by_peft, tmp_path / "theirs")
    return tmp_path / "theirs"


def test_peft_s_opens_here_and_in_generate(base: Path, theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint.load_model(base).eval()
    tokens = tokens_of(model.config)
    plain = model(tokens)
    lora_files.add_adapter(model, theirs)
    want = their_logits(base, theirs, tokens)
    assert (want - plain).abs().max() > 1e-2
    assert (model(tokens) - want).abs().max() <= 1e-5
    lora.merge(model)
    assert (model(tokens) - want).abs().max() <= 1e-5
    flags = [
        "--adapter",
        str(theirs),
        "--prompt",
        "pain in the chest",
        "--temperature",
        "0",
        "--max_new_tokens",
        "8",
        "--json",
    ]
    texts = []
    for start in (["--checkpoint", str(base)], []):  # the second: over the base that the adapter names
        assert generate.main([*start, *flags]) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert generate.main(["--checkpoint", str(base), *flags[2:]]) == 0
    assert texts[0] == texts[1] != json.loads(capsys.readouterr().out)["token_ids"]


def change_config(path: Path, **keys: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def change_tensors(path: Path, change: Any) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: change_config(p, use_dora=True), "adapter_config.json: use_dora is True; adapters that use it"),
        (lambda p: change_config(p, bias="all"), "bias is 'all'; only none"),
        (lambda p: change_config(p, modules_to_save=["lm_head"]), "modules_to_save is .*lm_head"),
        (lambda p: change_config(p, rank_pattern={"q_proj": 2}), "rank_pattern is "),
        (lambda p: change_config(p, layers_to_transform=[1]), "layers_to_transform is "),
        (lambda p: change_config(p, something_new=1), "something_new is 1"),
        (lambda p: change_config(p, init_lora_weights="pissa"), "init_lora_weights is 'pissa'; it changes the base"),
        (lambda p: change_config(p, peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
        (lambda p: change_config(p, target_modules=".*q_proj"), "target_modules is '.*q_proj'; a list"),
        (lambda p: change_config(p, target_modules=["q_proj", "lm_head"]), "'lm_head' is no projection"),
        (lambda p: change_config(p, r=None), "r is None"),
        (lambda p: change_config(p, r=5), r"down_proj.lora_A.weight is 4 x 48; .* make it 5 x 48"),
        (lambda p: change_config(p, target_modules=["q_proj", "k_proj"]), "unexpected: .*down_proj.* \\(4\\)"),
        (lambda p: change_config(p, target_modules=["all-linear"]), r"missing: .*v_proj.* \(16\)"),
        (lambda p: change_tensors(p, lambda t: t[FIRST].fill_(float("inf"))), "down_proj.* has NaN or infinite"),
        (lambda p: change_tensors(p, lambda t: t.update({FIRST: t[FIRST].int()})), "is I32; only F32"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"version https://git-lfs"), "Git LFS pointer"),
        (
            lambda p: (p / "adapter_model.safetensors").rename(p / "adapter_model.bin"),
            "only adapter_model.bin, a pickle; resave it",
        ),
        (lambda p: (p / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda p: shutil.rmtree(p), "no such directory"),
    ],
)
def test_adapters_that_do_not_open_are_named(
    base: Path, theirs: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(theirs)
    with pytest.raises(ValueError, match=message) as e:
        lora_files.add_adapter(checkpoint.load_model(base), theirs)
    assert str(theirs) in str(e.value)
    assert "\n" not in str(e.value)


def test_generate_says_what_is_wrong_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--checkpoint", str(base), "--adapter", str(tmp_path), "--prompt", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: has no adapter_config.json")


def test_generate_warns_of_another_base(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one that the adapters name and that is here; not of a copy, nor of what is not here to compare."""
    config = checkpoint.load_config(base)
    model = adapted(config, LoRAConfig(4))
    tokenizer = checkpoint.load_tokenizer(base)
    other, copy, adapter = tmp_path / "other", tmp_path / "copy", tmp_path / "adapter"
    weights = Llama(config)
    weights.init_weights(5)
    checkpoint.save_model(other, weights.named_parameters(), config, tokenizer, ChatFormat("plain"))
    shutil.copytree(base, copy)
    lora_files.save_adapter(adapter, model, LoRAConfig(4), base)
    for given, warned in ((base, False), (copy, False), (other, True)):
        flags = ["--checkpoint", str(given), "--adapter", str(adapter), "--prompt", "x", "--max_new_tokens", "1"]
        assert generate.main(flags) == 0
        told = capsys.readouterr().err
        assert (
            f"warning: {adapter} was made for {base.resolve()}, whose weights are not those of {given}" in told
        ) is (warned)
    for name in ("meta-llama/Llama-2-7b-hf", str(tmp_path), None):  # on a hub, without weights, not said
        lora_files.save_adapter(tmp_path / f"of {bool(name)} {len(str(name))}", model, LoRAConfig(4), base)
        config_file = tmp_path / f"of {bool(name)} {len(str(name))}" / "adapter_config.json"
        config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "base_model_name_or_path": name}))
        assert lora_files.other_base(config_file.parent, other) is None


def test_saved_adapters_are_checked_and_whole(base: Path, tmp_path: Path) -> None:
    adapter = LoRAConfig(4)
    model = adapted(checkpoint.load_config(base), adapter)
    path = tmp_path / "adapter"
    lora_files.save_adapter(path, model, adapter, base)
    data = bytearray((path / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: differs from what was written"):
        lora_files.add_adapter(checkpoint.load_model(base), path)
    with torch.no_grad():
        model.layers[0].attn.q.lora_B.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layers.0.attn.q.lora_B has NaN"):
        lora_files.save_adapter(tmp_path / "other", model, adapter, base)
    assert not (tmp_path / "other").exists()


def test_settings_go_to_peft_s_words_and_back() -> None:
    for c in (LoRAConfig(8), LoRAConfig(2, 1.5, 0.25, PROJECTIONS, rslora=True)):
        words = to_peft(c, "base")
        assert from_peft(json.loads(json.dumps(words))) == c
        assert peft.LoraConfig(**words).r == c.r
