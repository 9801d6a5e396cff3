"""The seam with the Triton backend: every operation reaches its kernel, and what cannot is refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import launch, reference

Normal = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def triton(device: torch.device) -> Iterator[None]:
    kernels.use("triton", device)
    yield
    kernels.use("auto")


class Operators(TorchDispatchMode):
    """Names of our operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func.namespace == "chatdoctor":
            self.seen.add(func._opname)
        return func(*args, **(kwargs or {}))


def operations(normal: Normal, device: torch.device) -> dict[str, tuple[Callable[..., object], tuple, set[str]]]:
    """Each operation's seam function, arguments that need no gradient, and operators that it must reach."""
    q, k = normal(1, 6, 4, 16), normal(1, 6, 2, 16, seed=1)
    start = torch.tensor([[0, 0, 2, 2, 2, 5]], dtype=torch.int32, device=device)
    end = torch.tensor([[2, 2, 5, 5, 5, 6]], dtype=torch.int32, device=device)
    x, weight = normal(6, 32), normal(32, seed=2)
    angles = normal(6, 8, seed=3)
    targets = torch.arange(6, device=device)
    codes = torch.arange(640, device=device).to(torch.uint8).view(40, 16)
    return {
        "rms_norm": (kernels.rms_norm, (x, weight, 1e-5), {"rms_norm"}),
        "add_rms_norm": (kernels.rms_norm, (x, weight, 1e-5, normal(6, 32, seed=4)), {"add_rms_norm"}),
        "rope": (kernels.rope, (q, k, angles.cos(), angles.sin()), {"rope"}),
        "swiglu": (kernels.swiglu, (x, normal(6, 32, seed=5)), {"swiglu"}),
        "attention": (kernels.attention, (q, k, k), {"attention_forward"}),
        "packed": (kernels.attention, (q, k, k, (start, end)), {"attention_forward"}),
        "decode": (kernels.attention, (q[:, 5:], k, k), {"attention_decode"}),
        "decode_codes": (
            lambda q, k, *s: kernels.attention(q, k, k, scales=s),
            (q[:, 5:], k.mul(40).round().char(), k[..., 0].abs() / 40, k[..., 1].abs() / 40),
            {"attention_decode"},
        ),
        "many_over_codes": (
            lambda q, k, *s: kernels.attention(q, k, k, scales=s),
            (q, k.mul(40).round().char(), k[..., 0].abs() / 40, k[..., 1].abs() / 40),
            {"attention_forward"},
        ),
        "loss": (kernels.linear_cross_entropy, (x, normal(40, 32, seed=6), targets), {"linear_cross_entropy"}),
        "codes": (kernels.quantised_linear, (x, codes, normal(40, 1, seed=7).mul(0.01), 4), {"quantised_linear"}),
    }


NAMES = (
    "rms_norm",
    "add_rms_norm",
    "rope",
    "swiglu",
    "attention",
    "packed",
    "decode",
    "decode_codes",
    "many_over_codes",
    "loss",
    "codes",
)


def flat(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_reaches_its_kernel_and_agrees(name: str, normal: Normal, device: torch.device) -> None:
    f, arguments, wanted = operations(normal, device)[name]
    with Operators() as operators:
        ours = flat(f(*arguments))
    assert any(seen.startswith(w) for w in wanted for seen in operators.seen), operators.seen
    kernels.use("torch")
    with Operators() as operators:
        torchs = flat(f(*arguments))
    assert not operators.seen
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_through_the_seam_without_graph_breaks(name: str, normal: Normal, device: torch.device) -> None:
    f, arguments, _ = operations(normal, device)[name]
    torch._dynamo.reset()  # it allows a function, here the one below, 8 graphs
    compiled = torch.compile(lambda *a: f(*a), fullgraph=True, backend="aot_eager")
    for a, b in zip(flat(compiled(*arguments)), flat(f(*arguments)), strict=True):
        assert torch.equal(a, b)


def test_what_is_asked_of_the_device_is_no_part_of_a_graph(
    normal: Normal, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking for triton and asking the driver cannot be traced; nor could this."""
    asked: list[object] = []
    if device.type == "cpu":
        monkeypatch.setattr(launch, "interpreting", lambda: asked.append(Path(__file__).stat()) or True)
    else:
        monkeypatch.setattr(launch, "_why_not_cuda", lambda index: asked.append(Path(__file__).stat()))
    torch._dynamo.reset()
    x = normal(4, 6)
    torch.compile(kernels.swiglu, fullgraph=True, backend="eager")(x, x)
    assert asked


def test_a_gradient_goes_through_the_forward_that_has_one(normal: Normal) -> None:
    """Few queries behind a cache, but wanted with a gradient."""
    q, k = normal(1, 1, 2, 16).requires_grad_(), normal(1, 6, 2, 16, seed=1)
    with Operators() as operators:
        kernels.attention(q, k, k).sum().backward()
    assert "attention_forward" in operators.seen
    assert q.grad is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: kernels.attention(*[n(1, 4, 2, 136)] * 3), "a head of 136 does not fit.*use the torch backend"),
        (lambda n: kernels.attention(*[n(1, 4, 2, 18)] * 3), "a head of 18 does not fit.*multiples of 4"),
        (lambda n: kernels.attention(*[n(1, 4, 2, 12, dtype=torch.float16)] * 3), "multiples of 8 up to 128"),
        (
            lambda n: kernels.attention(n(1, 4, 2, 32).transpose(2, 3), *[n(1, 4, 32, 2)] * 2),
            r"a head of 2 does not fit|contiguous",
        ),
        (lambda n: kernels.attention(n(1, 4, 16, 32).mT, *[n(1, 4, 32, 16)] * 2), r"call \.contiguous\(\)"),
        (lambda n: kernels.attention(*[n(1, 4, 2, 17)[..., 1:]] * 3), r"multiples of 4 before it: call \.contiguous"),
        (
            lambda n: kernels.attention(*[n(1, 4, 2, 24).view(-1)[1:129].view(1, 4, 2, 16)] * 3),
            r"multiple of 16 bytes: call \.contiguous",
        ),
        (lambda n: kernels.swiglu(n(4, 6).T, n(4, 6).T), r"swiglu: the last dimension.*\.contiguous\(\)"),
        (lambda n: kernels.rms_norm(n(4, 6).T, n(4), 1e-5), r"rms_norm: the last dimension"),
        (lambda n: kernels.rms_norm(n(4, 6), n(6, dtype=torch.bfloat16), 1e-5), "float32 on .*bfloat16 on"),
        (lambda n: kernels.swiglu(n(4, 6).double(), n(4, 6).double()), "float64 has no kernel"),
        (lambda n: kernels.rms_norm(n(1, 16400), n(16400), 1e-5), "16400"),
        (lambda n: kernels.linear_cross_entropy(n(4, 6), n(5, 6).half(), n(4).long()), r"float16 on.*use \.to\(\)"),
    ],
)
def test_what_no_kernel_can_do_is_one_sentence_with_a_remedy(
    call: Callable[[Normal], object], message: str, normal: Normal
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call(normal)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_elsewhere_than_on_a_gpu_triton_is_refused(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    for call in (lambda: kernels.use("triton", where), lambda: kernels.swiglu(*[torch.ones(2, device=where)] * 2)):
        with pytest.raises(
            ValueError, match=f"triton was asked for, but the tensors are on {where}.*use --device cuda"
        ):
            call()


def test_auto_falls_back_where_no_kernel_fits(
    normal: Normal, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """A head of 136 in auto goes to PyTorch; asked for by name it is an error (above)."""
    kernels.use("auto")
    q = normal(1, 4, 2, 136)
    torch.testing.assert_close(kernels.attention(q, q, q), reference.attention(q, q, q))


def test_describe_names_triton(device: torch.device) -> None:
    import triton

    said = kernels.describe(device)
    assert said.startswith(f"kernels: triton {triton.__version__} ")
    assert "interpreter" in said if device.type == "cpu" else "sm_" in said
