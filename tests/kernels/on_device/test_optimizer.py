"""AdamW kernel: against fp64, split weights against whole ones, moments rounded at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import optimizer, reference

Check = Callable[..., None]
Normal = Callable[..., Tensor]
F32, BF16 = torch.float32, torch.bfloat16
NUMBERS = {
    "keep": 1 - 1e-2 * 0.1,
    "rate": 1e-2 / (1 - 0.9**3),
    "beta1": 0.9,
    "beta2": 0.999,
    "root": (1 - 0.999**3) ** 0.5,
    "eps": 1e-8,
}


def exact_adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, scale: float) -> dict[str, Tensor]:
    w, g, m, v = (t.double() for t in (w, g * scale, m, v))
    c = NUMBERS
    m = c["beta1"] * m + (1 - c["beta1"]) * g
    v = c["beta2"] * v + (1 - c["beta2"]) * g * g
    return {"w": w * c["keep"] - c["rate"] * m / (v.sqrt() / c["root"] + c["eps"]), "m": m, "v": v}


def one(device: torch.device, value: float = 1.0) -> Tensor:
    return torch.full((), value, device=device)


def run(step: Callable[..., None], w: Tensor, g: Tensor, m: Tensor, v: Tensor, **how: Any) -> dict[str, Tensor]:
    """A step on copies; split: on halves, joined again."""
    w, m, v = w.clone(), m.to(how.get("moments", F32)).clone(), v.to(how.get("moments", F32)).clone()
    high, low = reference.split(w) if how.get("halves") else (w, None)
    step(high, low, g, m, v, one(w.device, how.get("scale", 1.0)), **NUMBERS, seed=how.get("seed", 0))
    return {"w": high if low is None else reference.joined(high, low), "m": m, "v": v}


def state(normal: Normal, n: int, gradient: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return normal(n), normal(n, seed=1, dtype=gradient), normal(n, seed=2).mul(0.1), normal(n, seed=3).square().mul(0.1)


@pytest.mark.parametrize("n", [1, 63, optimizer.BLOCK, 2 * optimizer.BLOCK + 17])
@pytest.mark.parametrize("gradient", [F32, BF16])
def test_a_step(n: int, gradient: torch.dtype, normal: Normal, no_worse: Check) -> None:
    w, g, m, v = state(normal, n, gradient)
    ours, torchs = (run(step, w, g, m, v, scale=0.5) for step in (optimizer.adamw, reference.adamw))
    for name, exact in exact_adamw(w, g, m, v, 0.5).items():
        no_worse(name, ours[name], torchs[name], exact)


def test_halves_hold_every_bit(normal: Normal) -> None:
    """Split weights after a step are those of whole fp32 weights, bit for bit, in either implementation."""
    w, g, m, v = state(normal, 3000, BF16)
    for step in (optimizer.adamw, reference.adamw):
        whole, halves = run(step, w, g, m, v), run(step, w, g, m, v, halves=True)
        for name in whole:
            assert torch.equal(whole[name].view(torch.int32), halves[name].view(torch.int32)), name


def test_any_fp32_is_its_halves(device: torch.device) -> None:
    """Half-way cases, both signs, subnormals, the largest, zeros, infinities; the upper half is the nearest bf16."""
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0)).int()
    odd = torch.tensor([0x3F808000, 0x3F818000, 0x00008000, 0x00000001, 0x7F7FFFFF, 0x7F800000, 0], dtype=torch.int64)
    bits = torch.cat((bits, odd.int(), (odd - 2**31).int())).to(device)
    x = bits.view(F32)
    high, low = reference.split(x)
    assert torch.equal(reference.joined(high, low).view(torch.int32), bits)
    finite = x.isfinite() & x.bfloat16().isfinite()
    assert torch.equal((high.float() - x).abs()[finite], (x.bfloat16().float() - x).abs()[finite]), "not the nearest"


def test_moments_rounded_at_random_are_right_on_average(normal: Normal, device: torch.device) -> None:
    """Kernel and reference draw the same bits; over many seeds the mean is the fp32 moment, which nearest misses."""
    n, seeds = 512, 300
    w, g, m, v = state(normal, n)
    m, v = m.bfloat16().float(), v.bfloat16().float()
    exact = exact_adamw(w, g, m, v, 1.0)
    sums = {
        "m": torch.zeros(n, dtype=torch.float64, device=device),
        "v": torch.zeros(n, dtype=torch.float64, device=device),
    }
    for seed in range(seeds):
        step = reference.adamw if seed else optimizer.adamw
        drawn = run(step, w, g, m, v, moments=BF16, seed=seed * 0x9E3779B)
        for name, total in sums.items():
            total += drawn[name].double()
            unit = 2.0 ** torch.floor(torch.log2(exact[name].abs())) * 2**-7
            assert ((drawn[name].double() - exact[name]).abs() < unit * 1.001).all(), "more than a unit off"
    for name, total in sums.items():
        unit = 2.0 ** torch.floor(torch.log2(exact[name].abs())) * 2**-7
        off = ((total / seeds - exact[name]) / unit).abs()
        # A rounding at random has a standard deviation of half a unit at most; five of them for the mean of so many.
        assert off.max() < 5 * 0.5 / seeds**0.5, (name, off.max())
    again = [run(step, w, g, m, v, moments=BF16, seed=7) for step in (optimizer.adamw, reference.adamw)]
    for name in sums:
        assert (again[0][name] != again[1][name]).float().mean() < 0.01, "other random bits"


def test_bf16_moments_decay(device: torch.device) -> None:
    """Without a gradient v halves in 693 steps; rounded to nearest it would stay where it is."""
    w, g = torch.ones(64, device=device), torch.zeros(64, device=device)
    m, v = torch.zeros(64, device=device).bfloat16(), torch.ones(64, device=device).bfloat16()
    for t in range(693):
        reference.adamw(w, None, g, m, v, one(device), **NUMBERS, seed=t * 0x9E3779B1 & 0x7FFFFFFF)
    assert v.float().mean().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal((torch.ones(1).bfloat16() * 0.999).bfloat16(), torch.ones(1).bfloat16())


def test_like_torch_over_many_steps(normal: Normal, device: torch.device) -> None:
    """Ten steps with decay beside torch.optim.AdamW in fp64."""
    from llama.optimizer import SplitAdamW

    kernels.use("triton")
    try:
        values = normal(5, 7)
        p = torch.nn.Parameter(values.bfloat16())
        ours = SplitAdamW([{"params": [p], "weight_decay": 0.1}], {p: "p"}, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        ours.assign(p, values)
        exact = torch.nn.Parameter(values.double())
        theirs = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for t in range(10):
            g = normal(5, 7, seed=t, dtype=BF16)
            p.grad, exact.grad = g, g.double()
            ours.step()
            theirs.step()
        torch.testing.assert_close(ours.master(p).double(), exact.detach(), rtol=2e-6, atol=2e-6)
        assert torch.equal(p.detach(), reference.split(ours.master(p))[0])
    finally:
        kernels.use("auto")


def test_places_beyond_two_to_the_31(vast: Callable[..., Tensor], normal: Normal, device: torch.device) -> None:
    """The last numbers of a tensor whose addresses pass 2^31: the kernel counts places in 64 bits."""
    if device.type == "cpu":
        pytest.skip("needs a CUDA device: 2^31 numbers, one by one")
    n = 2**31 + 64
    w, g = torch.zeros(n, device=device, dtype=BF16), torch.zeros(n, device=device, dtype=BF16)
    low, m, v = torch.zeros_like(w, dtype=torch.int16), torch.zeros_like(w), torch.zeros_like(w)
    g[-1] = 1
    optimizer.adamw(w, low, g, m, v, one(device), **NUMBERS, seed=0)
    assert w[-1] != 0
    assert not w[:-1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": torch.zeros(4, dtype=torch.int32)}, "weight torch.bfloat16 with low half torch.int32"),
        ({"low": None}, "with low half None"),
        ({"gradient": torch.zeros(5)}, r"gradient \(5,\) is no flat contiguous tensor"),
        ({"exp_avg": torch.zeros(8)[::2]}, "exp_avg"),
        ({"exp_avg_sq": torch.zeros(4).double()}, "moments torch.float32 and torch.float64"),
        ({"scale": torch.zeros((), device="meta")}, "scale on meta"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor | None], message: str) -> None:
    arguments = {
        "weight": torch.zeros(4, dtype=BF16),
        "low": torch.zeros(4, dtype=torch.int16),
        "gradient": torch.zeros(4),
        "exp_avg": torch.zeros(4),
        "exp_avg_sq": torch.zeros(4),
        "scale": torch.ones(()),
    }
    with pytest.raises(ValueError, match=message):
        kernels.adamw(**{**arguments, **change}, **NUMBERS, seed=0)
