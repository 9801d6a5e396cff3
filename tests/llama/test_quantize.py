"""llama/quantize.py: what rounding loses, and that compensation loses less; the model on disk and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kernels
from llama import checkpoint, quantize
from llama.chat import ChatFormat
from llama.config import LlamaConfig
from llama.layout import entries
from llama.model import Llama
from llama.quantize import Packed, QuantisedLinear, Scheme
from llama.tokenizer import Tokenizer

INT8, INT4 = Scheme(8, 0), Scheme(4, 32)
CONFIG = LlamaConfig(64, 2, 4, 2, 96, 100, max_seq_len=128)


def unpacked(packed: Packed, bits: int) -> Tensor:
    return kernels.dequantise(packed.codes, packed.scales, bits, torch.float64)


def whole_numbers(packed: Packed, bits: int) -> Tensor:
    ones = torch.ones_like(packed.scales)
    return kernels.dequantise(packed.codes, ones, bits, torch.float64)


def random_model(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Llama:
    model = Llama(config)
    model.init_weights(0)
    return model.to(dtype).eval()


def quantised_model(scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> Llama:
    model = random_model(dtype=dtype)
    quantize.replace(model.layers, lambda _, linear: quantize.nearest(linear.weight, scheme), scheme.bits)
    return model


# --- one weight -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([INT8, INT4, Scheme(4, 64), Scheme(4, 128)]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 2**20),
    st.sampled_from([1e-6, 1.0, 300.0]),
)
def test_every_number_becomes_the_nearest_of_its_groups_steps(
    scheme: Scheme, out: int, groups: int, seed: int, size: float
) -> None:
    width = 128 * groups
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * size
    packed = quantize.nearest(weight, scheme)
    G = scheme.groups(width)
    assert packed.scales.shape == (out, G)
    assert packed.codes.shape == (out, width * scheme.bits // 8)
    scales = packed.scales.double().repeat_interleave(width // G, dim=1)
    top = 2 ** (scheme.bits - 1)
    lost = (weight.double() - unpacked(packed, scheme.bits)).abs()
    steps = (weight.double() / scales).clamp(-top, top - 1)
    least = (steps - steps.round()).abs() * scales.abs() + (weight.double() / scales - steps).abs() * scales.abs()
    assert (lost <= least + 1e-5 * scales.abs()).all()


@pytest.mark.parametrize("scheme", [INT8, INT4])
def test_searched_scales_lose_less_than_the_largest_numbers(scheme: Scheme) -> None:
    weight = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    top = 2 ** (scheme.bits - 1) - 1
    groups = weight.view(50, scheme.groups(256), -1)
    scales = groups.abs().amax(-1, keepdim=True) / top
    naive = ((groups / scales).round() * scales - groups).square().sum(-1)
    searched = (unpacked(quantize.nearest(weight, scheme), scheme.bits) - weight).square().view(groups.shape).sum(-1)
    assert (searched <= naive * 1.1).all()  # bf16 scales against fp32 ones
    assert searched.mean() < (0.99 if scheme.bits == 8 else 0.9) * naive.mean()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[0, 40] = 3.0
    assert torch.equal(unpacked(quantize.nearest(weight, INT4), 4), weight.double())


def test_the_largest_number_keeps_its_sign_and_the_extra_step() -> None:
    """-8 to 7: the scale's sign is free, so the largest may be met exactly on either side."""
    weight = torch.tensor([[8.0] + [1.0] * 31, [-8.0] + [1.0] * 31])
    packed = quantize.nearest(weight, INT4)
    assert torch.equal(unpacked(packed, 4), weight.double())
    assert packed.scales.flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("scheme", [INT8, INT4, Scheme(4, 128)])
def test_compensation_loses_less_of_the_products(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 128, generator=generator)
    mix = torch.randn(128, 128, generator=generator) * torch.linspace(0.1, 3, 128)
    x = torch.randn(2000, 128, generator=generator) @ mix
    exact = x @ weight.t()
    errors = [
        (x.double() @ unpacked(packed, scheme.bits).t() - exact).square().mean().item()
        for packed in (quantize.nearest(weight, scheme), quantize.compensated(weight, x.t() @ x, scheme))
    ]
    assert errors[1] < 0.8 * errors[0]


def test_without_correlation_there_is_nothing_to_compensate() -> None:
    weight = torch.randn(8, 300 // 4 * 4, generator=torch.Generator().manual_seed(2))
    for scheme in (INT8,):
        alone = quantize.nearest(weight, scheme)
        same = quantize.compensated(weight, torch.eye(weight.shape[1]), scheme)
        assert torch.equal(alone.scales, same.scales)
        assert torch.equal(alone.codes, same.codes)


def test_inputs_that_never_came_and_hessians_without_inverse() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))  # 3 rows: a Hessian of rank 3
    x[:, 10] = 0
    packed = quantize.compensated(weight, x.t() @ x, INT4)
    back = unpacked(packed, 4)
    assert torch.isfinite(back).all()
    assert (back[:, 10] == 0).all()
    with pytest.raises(ValueError, match="activations are not finite"):
        quantize.compensated(weight, torch.full((64, 64), math.nan), INT4)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_numbers_come_back(bits: int) -> None:
    top = 2 ** (bits - 1)
    q = torch.arange(-top, top, dtype=torch.int8).view(-1, 16).contiguous()
    packed = Packed(quantize.pack(q, bits), torch.ones(len(q), 1))
    assert torch.equal(whole_numbers(packed, bits), q.double())


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 0), (4, 16), (3, 32), (4, 256)])
def test_schemes_that_are_not_to_be_had(bits: int, group: int) -> None:
    with pytest.raises(ValueError, match="are not to be had"):
        Scheme(bits, group)


# --- a model --------------------------------------------------------------------------------------


def batches(n: int = 6, length: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 100, (1, length), generator=generator) for _ in range(n)]


def test_calibration_rounds_every_linear_of_the_blocks_for_its_inputs() -> None:
    model, plain = random_model(), random_model()
    done: list[int] = []
    quantize.calibrate(model, list(model.layers), batches(), INT4, lambda: done.append(1))
    found = {name for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    assert found == {name for name, m in plain.named_modules() if isinstance(m, nn.Linear) and name != "head"}
    assert len(done) == len(found) == 14
    rounded = random_model()
    quantize.replace(rounded.layers, lambda _, linear: quantize.nearest(linear.weight, INT4), 4)
    with torch.no_grad():
        exact, errors = [plain(b) for b in batches()], []
        for other in (rounded, model):
            errors.append(sum((other(b) - e).square().mean().item() for b, e in zip(batches(), exact, strict=True)))
    assert errors[1] < 0.8 * errors[0]


def test_linears_that_share_an_input_share_a_hessian() -> None:
    model = random_model()
    inputs = quantize._first_inputs(model, model.layers[0], batches(1))
    names = quantize._sharing_inputs(model.layers[0], *inputs[0])
    assert names == [["attn.q", "attn.k", "attn.v"], ["attn.o"], ["mlp.gate", "mlp.up"], ["mlp.down"]]


def test_later_linears_know_what_the_earlier_ones_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hessian of o comes from the rounded q, k, v; that of the second block from the whole rounded first."""
    seen: list[Tensor] = []
    right = quantize.compensated

    def watched(weight: Tensor, hessian: Tensor, *rest: Any) -> Packed:
        seen.append(hessian.clone())
        return right(weight, hessian, *rest)

    monkeypatch.setattr(quantize, "compensated", watched)
    model = random_model()
    quantize.calibrate(model, list(model.layers), batches(2), INT4)
    x: list[Tensor] = []
    hook = model.layers[1].mlp.down.register_forward_pre_hook(lambda _, a: x.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        for b in batches(2):
            model(b)
    hook.remove()
    hessian = sum(part.t() @ part for part in x)
    torch.testing.assert_close(seen[-1], hessian, rtol=1e-4, atol=1e-6)


def test_calibration_needs_texts() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="no calibration texts"):
        quantize.calibrate(model, list(model.layers), [], INT4)


# --- on disk --------------------------------------------------------------------------------------


def save(path: Path, model: Llama, scheme: Scheme, tokenizer: Tokenizer | None = None, **more: Any) -> None:
    def tensors() -> Any:
        for e in entries(model.config):
            module = model.get_submodule(e.name.rpartition(".")[0])
            yield e.name, Packed(module.codes, module.scales) if isinstance(module, QuantisedLinear) else module.weight

    checkpoint.save_model(path, tensors(), model.config, tokenizer, ChatFormat(), scheme=scheme, **more)


@pytest.mark.parametrize("scheme", [INT8, INT4])
@pytest.mark.parametrize("shard", [checkpoint.MAX_SHARD_BYTES, 20_000])
def test_a_quantised_model_comes_back_bit_for_bit(tmp_path: Path, scheme: Scheme, shard: int) -> None:
    model = quantised_model(scheme)
    save(tmp_path / "m", model, scheme, max_shard_bytes=shard)
    assert checkpoint.load_scheme(tmp_path / "m") == scheme
    again = checkpoint.load_model(tmp_path / "m")
    for name, t in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name
    wide = checkpoint.load_model(tmp_path / "m", dtype=torch.float32)
    assert wide.layers[0].attn.q.scales.dtype == wide.embed.weight.dtype == torch.float32


def saved_with(tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    save(tmp_path / "m", quantised_model(INT4), INT4)
    (tmp_path / "m/manifest.json").unlink()
    tensors = load_file(tmp_path / "m/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
    return tmp_path / "m"


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}_scale"), "missing: .*q_proj.weight_scale"),
        (lambda t: t.update({Q: torch.zeros(64, 64)}), "unexpected: .*q_proj.weight"),
        (lambda t: t.update({f"{Q}_packed": t[f"{Q}_packed"][:, :-1].contiguous()}), "is 64 x 7, but .* makes it 64 x"),
        (lambda t: t.update({f"{Q}_packed": t[f"{Q}_packed"].float()}), "is F32; only I32 is read"),
        (lambda t: t.update({f"{Q}_shape": torch.tensor([64, 32])}), "_shape says 64 x 32, but config.json makes it"),
        (lambda t: t[f"{Q}_scale"].fill_(math.nan), "_scale has NaN or infinite values"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(saved_with(tmp_path, change))


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "m", quantised_model(INT4), INT4)
    file = tmp_path / "m/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        checkpoint.load_model(tmp_path / "m")


def weights(**change: Any) -> dict[str, Any]:
    d = quantize.to_json(INT4)
    d["config_groups"]["group_0"]["weights"] |= change
    return d


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'; only compressed-tensors"),
        ("int4", "'int4'; only"),
        ({**weights(), "format": "marlin-24"}, "only compressed-tensors"),
        ({**weights(), "ignore": []}, "every linear but lm_head"),
        ({**weights(), "config_groups": {}}, "every linear but lm_head"),
        (weights(symmetric=False), "only compressed-tensors"),
        (weights(actorder="group"), "only compressed-tensors"),
        (weights(type="float"), "only compressed-tensors"),
        (weights(num_bits=3), "3 bits in groups of 32 are not to be had"),
        (weights(num_bits="4"), "num_bits '4'"),
        (weights(group_size=None), "group_size None"),
        (weights(group_size=16), "groups of 16 are not to be had"),
    ],
)
def test_other_quantisations_are_refused(tmp_path: Path, stated: Any, message: str) -> None:
    save(tmp_path / "m", quantised_model(INT4), INT4)
    (tmp_path / "m/manifest.json").unlink()
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(tmp_path / "m")


@pytest.mark.parametrize("scheme", [INT8, INT4, Scheme(4, 128)])
def test_schemes_survive_json(scheme: Scheme) -> None:
    assert quantize.from_json(json.loads(json.dumps(quantize.to_json(scheme)))) == scheme


def test_quantised_weights_do_not_train(tmp_path: Path) -> None:
    save(tmp_path / "m", quantised_model(INT4), INT4)
    with pytest.raises(ValueError, match="quantised weights do not train"):
        checkpoint.load_weights(random_model(), tmp_path / "m")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", [INT8, INT4])
def test_transformers_opens_it_with_the_same_logits(tmp_path: Path, scheme: Scheme) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    save(tmp_path / "m", quantised_model(scheme), scheme)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ours = checkpoint.load_model(tmp_path / "m", dtype=torch.float32)
    tokens = batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
