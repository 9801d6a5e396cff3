"""A small LLaMA through the kernels: the same loss, gradients and text as through plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import kernels
from llama.cache import KVCache
from llama.chat import IGNORE
from llama.config import LlamaConfig
from llama.model import Llama

Check = Callable[..., None]
CONFIG = LlamaConfig(64, 2, 4, 2, 96, 101, max_seq_len=128)


@pytest.fixture(autouse=True)
def auto_again() -> Iterator[None]:
    yield
    kernels.use("auto")


def build(device: torch.device, dtype: torch.dtype) -> Llama:
    model = Llama(CONFIG)
    model.init_weights(3)
    return model.to(device, dtype)


def batch(device: torch.device) -> dict[str, object]:
    """Two packed rows of three documents, half of the tokens supervised."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 60), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[torch.rand(2, 60, generator=generator) < 0.5] = IGNORE
    start = torch.tensor([[0] * 25 + [25] * 1 + [26] * 34, [0] * 40 + [40] * 10 + [50] * 10], dtype=torch.int32)
    end = torch.tensor([[25] * 25 + [26] * 1 + [60] * 34, [40] * 40 + [50] * 10 + [60] * 10], dtype=torch.int32)
    return {
        "tokens": tokens.to(device),
        "targets": targets.to(device),
        "documents": (start.to(device), end.to(device)),
    }


def trained(model: Llama, backend: str, inputs: dict[str, object]) -> dict[str, Tensor]:
    kernels.use(backend)
    model.zero_grad()
    loss, count = model(**inputs)
    (loss / count).backward()
    return {"loss": loss.detach()[None], **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_every_gradient(dtype: torch.dtype, device: torch.device, no_worse: Check) -> None:
    inputs = batch(device)
    model = build(device, dtype)
    ours = trained(model, "triton", inputs)
    again = trained(model, "triton", inputs)
    torchs = trained(model, "torch", inputs)
    exact = trained(model.double(), "torch", inputs)
    for name, value in ours.items():
        assert torch.equal(value, again[name]), f"{name} differs from run to run"
        if name != "loss":  # one number: its error is luck
            no_worse(name, value, torchs[name], exact[name].double())
    luck = max(1e-6, torch.finfo(dtype).eps / 32)
    assert abs(ours["loss"] - exact["loss"]) <= 1.3 * abs(torchs["loss"] - exact["loss"]) + luck * exact["loss"]


def test_prompt_and_steps_through_a_cache(device: torch.device, no_worse: Check) -> None:
    """Prefill of two rows, one of them padded at the left, then single steps: logits as without a cache."""
    model = build(device, torch.float32).eval()
    tokens = batch(device)["tokens"]
    results = {}
    with torch.inference_mode():
        for name, backend, m in (
            ("ours", "triton", model),
            ("torch", "torch", model),
            ("exact", "torch", build(device, torch.float32).double()),
        ):
            kernels.use(backend)
            cache = KVCache(CONFIG, 2, 64, device, m.embed.weight.dtype)
            cache.first = torch.tensor([0, 7], dtype=torch.int32, device=device)
            logits = [m(tokens[:, :50], cache=cache, last_only=True)]
            logits += [m(tokens[:, t : t + 1], cache=cache) for t in range(50, 60)]
            results[name] = torch.cat(logits, 1)
    no_worse("logits", results["ours"], results["torch"], results["exact"])


def test_greedy_ids_are_the_same(device: torch.device) -> None:
    """Forty tokens chosen one by one, each from a cache that holds the ones before."""
    model = build(device, torch.float32).eval()
    chosen = {}
    with torch.inference_mode():
        for backend in ("triton", "torch"):
            kernels.use(backend)
            cache = KVCache(CONFIG, 1, 64, device)
            tokens, ids = torch.tensor([[5, 9, 2, 44, 17]], device=device), []
            for _ in range(40):
                tokens = model(tokens, cache=cache, last_only=True).argmax(-1)
                ids.append(int(tokens))
            chosen[backend] = ids
    assert chosen["triton"] == chosen["torch"]
    assert len(set(chosen["torch"])) > 1
