"""NF4: the levels, packing against the definition, the frozen product, and 7B's bytes from its shapes."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama import checkpoint, lora, nf4
from llama.config import PRESETS, LlamaConfig
from llama.lora_config import LoRAConfig
from llama.model import Llama
from llama.nf4 import BLOCK, LEVELS, SCALES, NF4Linear, Packed, dequantise, quantise


def normal_quantile(p: float) -> float:
    return math.sqrt(2) * torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)).item()


def test_levels_are_bitsandbytes_and_follow_from_the_paper() -> None:
    """bitsandbytes' table was made by its create_normal_map: quantiles of a normal distribution, 8 on one side, 9 with
    0 on the other, the outermost at probability 0.9677083, divided by the largest."""
    offset = 0.9677083
    positive = [normal_quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-normal_quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    want = sorted([*positive, 0.0, *negative])
    assert max(abs(a - b / max(want)) for a, b in zip(LEVELS, want, strict=True)) < 1e-6
    assert LEVELS[7] == 0.0
    assert (LEVELS[0], LEVELS[1], LEVELS[8], LEVELS[14], LEVELS[15]) == (
        -1.0,
        -0.6961928009986877,
        0.07958029955625534,
        0.7229568362236023,
        1.0,
    )


def by_definition(weight: Tensor) -> tuple[list[int], list[float]]:
    """Level of every number and scale of every block, one at a time in Python's doubles."""
    numbers = weight.double().reshape(-1).tolist()
    indices, scales = [], []
    for at in range(0, len(numbers), BLOCK):
        block = numbers[at : at + BLOCK]
        scale = max(map(abs, block))
        scales.append(scale)
        for x in block:
            q = x / scale if scale else 0.0
            indices.append(min(range(16), key=lambda i: abs(LEVELS[i] - q)))
    return indices, scales


def unpacked(codes: Tensor) -> list[int]:
    return [half for byte in codes.tolist() for half in (byte >> 4, byte & 15)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_the_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(24, 128) * torch.logspace(-6, 3, 24)[:, None]).to(dtype)
    weight[3] = 0
    weight[4, :64] = -weight[4, :64].abs()  # a block whose largest magnitude is negative
    indices, scales = by_definition(weight)
    packed = quantise(weight, double=False)
    assert packed.scales.double().tolist() == scales
    assert unpacked(packed.codes) == indices
    assert packed.steps.numel() == packed.mean.numel() == 0
    values = dequantise(packed)
    levels = torch.tensor(LEVELS)
    want = levels[torch.tensor(indices)].view(-1, BLOCK) * torch.tensor(scales, dtype=torch.float32)[:, None]
    assert torch.equal(values, want.view(-1))
    assert torch.equal(dequantise(packed, torch.bfloat16), values.bfloat16())
    assert not values.view(24, 128)[3].any()


def test_levels_come_back_as_they_were() -> None:
    """What is a level times a power of two is kept exactly, whichever of a byte's halves it is in."""
    block = torch.tensor(LEVELS).repeat(BLOCK // 16)
    weight = torch.stack([block * 2.0**i for i in (-20, 0, 5)] + [block.flip(0)])
    packed = quantise(weight, double=False)
    assert torch.equal(dequantise(packed).view_as(weight), weight)
    assert unpacked(packed.codes)[:16] == list(range(16))
    assert packed.codes[0].item() == 0x01, "the first of two numbers is in the high half"


def test_double_quantisation_is_the_definition() -> None:
    torch.manual_seed(1)
    weight = torch.randn(300, 2 * BLOCK) * torch.rand(300, 1)
    single, double = quantise(weight, double=False), quantise(weight)
    assert torch.equal(single.codes, double.codes)
    mean = single.scales.mean()
    assert double.mean.item() == mean
    assert double.scales.dtype == torch.int8
    assert len(double.steps) == math.ceil(600 / SCALES)
    for i, step in enumerate(double.steps.tolist()):
        part = (single.scales - mean)[i * SCALES : (i + 1) * SCALES]
        assert step == pytest.approx(part.abs().max().item() / 127, rel=1e-6)
        error = double.scales[i * SCALES : (i + 1) * SCALES].float() * step - part
        assert error.abs().max().item() <= step * 0.5001
    scales = double.scales.float() * double.steps.repeat_interleave(SCALES)[:600] + mean
    values = torch.tensor(LEVELS)[torch.tensor(unpacked(single.codes))].view(-1, BLOCK) * scales[:, None]
    assert torch.equal(dequantise(double), values.view(-1))


def test_error_on_normal_weights_is_nf4_s() -> None:
    """Root mean square 9.2 % of the weights' (2 % more than that would be another code), double quantised or not."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    for double in (False, True):
        error = (dequantise(quantise(weight, double)).view_as(weight) - weight).square().mean().sqrt()
        assert 0.090 < (error / weight.square().mean().sqrt()).item() < 0.094


def test_unpacking_copies_its_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each copy from the CPU waits for everything before it."""
    packed = quantise(torch.randn(4096))
    with torch.inference_mode():
        want = dequantise(packed)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a copy"))
    assert torch.equal(dequantise(packed), want)


def test_chunks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(99, 1024)
    want = [(quantise(weight, double), dequantise(quantise(weight, double))) for double in (False, True)]
    monkeypatch.setattr(nf4, "CHUNK", BLOCK * SCALES)
    for double, (packed, values) in zip((False, True), want, strict=True):
        again = quantise(weight, double)
        assert all(torch.equal(a, b) for a, b in zip(again, packed, strict=True))
        assert torch.equal(dequantise(again), values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_is_refused(bad: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantise(weight)


def test_widths_that_blocks_do_not_fill_are_refused() -> None:
    with pytest.raises(ValueError, match=r"NF4: 100 numbers are no whole blocks of 64; .*--base_bits 16"):
        quantise(torch.randn(10, 10))


# --- the frozen linear ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_unpacked_weight(dtype: torch.dtype) -> None:
    parent = torch.nn.Sequential(torch.nn.Linear(128, 48, bias=False, dtype=dtype))
    weight = parent[0].weight.detach()
    nf4.replace(parent)
    module = parent[0]
    assert isinstance(module, NF4Linear)
    want = dequantise(quantise(weight), dtype).view(48, 128)
    assert torch.equal(module.dense().to(dtype), want)
    x, y = (torch.randn(3, 5, 128, dtype=dtype, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_()
    y.requires_grad_()
    out, plain = module(x), F.linear(y, want)
    assert torch.equal(out, plain)
    out.sum().backward()
    plain.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert module.weight.grad is None
    assert not module.weight.requires_grad


def test_only_the_packed_weight_is_kept_for_backward() -> None:
    module = NF4Linear(256, 512, torch.float32, "cpu")
    module.fill(torch.randn(512, 256))
    kept: list[Tensor] = []
    x = torch.randn(7, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        module(x)
    mine = {t.data_ptr() for t in module.packed() if t.numel()}
    assert {t.data_ptr() for t in kept if t.numel()} == mine
    assert sum(t.nbytes for t in kept) < 0.13 * 512 * 256 * 4


def test_operators_are_sound() -> None:
    parts = quantise(torch.randn(48, 128))
    torch.library.opcheck(nf4._product, (torch.randn(2, 128), *parts, 48))
    torch.library.opcheck(nf4._product_backward, (torch.randn(2, 48), *parts))


def test_a_model_is_packed_tensor_by_tensor_as_it_is_read(
    tiny_config: LlamaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Llama(tiny_config)
    model.init_weights(0)
    checkpoint.save_model(tmp_path / "model", model.named_parameters(), tiny_config, None, None)
    with torch.device("meta"):
        packed = Llama(tiny_config)
    nf4.replace(packed.layers)
    packed.to_empty(device="cpu")
    alive: list[int] = []
    read = checkpoint.Weights.read

    def counted(self: checkpoint.Weights, *args: object) -> Tensor:
        values = read(self, *args).clone()  # type: ignore[arg-type]
        alive.append(1)
        weakref.finalize(values, alive.pop)
        assert len(alive) <= 2, "one is being packed while the next is read"
        return values

    monkeypatch.setattr(checkpoint.Weights, "read", counted)
    checkpoint.load_weights(packed, tmp_path / "model", nf4.assigner(packed, checkpoint.copied))
    for (name, module), plain in zip(packed.named_modules(), model.modules(), strict=True):
        if isinstance(module, NF4Linear):
            assert torch.equal(module.dense(), dequantise(quantise(plain.weight)).view_as(plain.weight)), name
        elif hasattr(module, "weight"):
            assert torch.equal(module.weight, plain.weight), name
    assert type(packed.head) is torch.nn.Linear


def test_weights_that_are_no_numbers_are_named(tiny_config: LlamaConfig) -> None:
    model = Llama(tiny_config)
    nf4.replace(model.layers)
    assign = nf4.assigner(model, checkpoint.copied)
    with pytest.raises(ValueError, match=r"^layers\.1\.mlp\.up\.weight: NaN"):
        assign(model.layers[1].mlp.up.weight, torch.full((48, 32), float("nan")))


# --- 7B on one card -------------------------------------------------------------------------------


def bytes_of(model: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_7b_trains_in_6_gb() -> None:
    """ChatDoctor's LoRA run over a 4-bit LLaMA-7B, micro-batch 4 of 256 tokens, from the shapes of the very modules.

    The model is built on meta; a block runs on tensors without memory, and what it keeps for backward is counted, which
    with --gradient_checkpointing is there once, and for the other blocks their input alone. In plain PyTorch, which
    keeps more than the Triton kernels do.
    """
    config, B, T = PRESETS["7b"], 4, 256
    with torch.device("meta"):
        model = Llama(config)
    model.to(torch.bfloat16)
    nf4.replace(model.layers)
    base = bytes_of(model)
    assert base <= 4.2e9
    lora.apply(model, LoRAConfig(8, 16, 0.05, ("q", "v")))
    trained = sum(p.numel() for _, p in lora.adapters(model))
    assert trained == 32 * 2 * 8 * (4096 + 4096)
    # fp32 adapters, their bf16 copy, fp32 and bf16 gradients, two fp32 moments.
    adapters = trained * (4 + 2 + 4 + 2 + 8)

    block = model.layers[0].train()
    own = {t.untyped_storage()._cdata for t in (*block.parameters(), *block.buffers())}
    kept: dict[int, int] = {}
    holding: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            holding.append(t)  # or another could come to lie at the same place
        return t

    x = torch.empty(B, T, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    rotation = torch.empty(T, 64, device="meta"), torch.empty(T, 64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block(x, rotation)
    stream = x.numel() * 2
    one = sum(kept.values())
    assert one > 12 * stream, "a block keeps its projections' inputs and outputs"
    activations = config.n_layers * stream + one
    # Beside them, at the worst moment: the widest weight unpacked, with a chunk's fp32 numbers, byte indices and bytes,
    # and in the MLP's backward a handful of F-wide gradients.
    widest = 11008 * 4096 * 2 + nf4.CHUNK * (4 + 4 + 2 + 4)
    passing = 6 * B * T * 11008 * 2
    # The loss: dx, and logits of 2,048 rows at most, in bf16 and fp32 (kernels/loss.py; all rows of this micro-batch).
    loss = B * T * (4096 * 2 + config.vocab_size * (2 + 4))
    total = base + adapters + activations + widest + passing + loss
    assert total <= 6e9, f"{total / 1e9:.2f} GB"


def test_packed_bytes_a_number() -> None:
    n = 4096 * 4096
    sizes = [
        sum(math.prod(shape) * dtype.itemsize for shape, dtype in nf4.packed_shapes(n, double).values())
        for double in (True, False)
    ]
    assert sizes[0] / n == pytest.approx(1 / 2 + 1 / 64 + 1 / 4096, rel=1e-6)
    assert sizes[1] / n == 1 / 2 + 1 / 16
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in quantise(torch.randn(64, 320))._asdict().items()}
    assert shapes == nf4.packed_shapes(64 * 320)
    assert Packed._fields == tuple(shapes)
