"""Attention by other implementations, by name: what ours is compared with.

Called by the seam (kernels.use(NAME)) and the benches. Each is f(q, k, v, documents=None) -> o in our layout (B, T,
heads, K), causal, with grouped queries: the meaning of reference.attention. why_not(NAME) says what an implementation
lacks here; what it cannot do with the tensors at hand it refuses with ValueError.

What a peer needs to know about packed documents (their borders, a mask) is made once per `start` tensor, on the host,
and kept as long as that tensor lives: the layers of a model share it, and a bench does not time it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.reference import Documents

Attention = Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]


class Peer(NamedTuple):
    """An implementation, and where it can be used."""

    attend: Attention
    documents: bool  # packed documents
    cuda_only: bool
    module: str  # what must be importable
    remedy: str  # where it is not


def sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """torch's scaled_dot_product_attention with the kernel of torch's choice; documents as a dense mask."""
    T, S = q.shape[1], k.shape[1]
    if documents is not None:
        return _sdpa(q, k, v, mask=_kept(documents[0], f"mask {T}", lambda start: _mask(start, T)))
    if 1 < T < S:  # torch would count the diagonal from the first key
        columns = torch.arange(S, device=q.device)
        return _sdpa(q, k, v, mask=columns <= columns[S - T :, None])
    return _sdpa(q, k, v, causal=T > 1)


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """FlashAttention-2 as built into torch."""
    return _fused("sdpa_flash", SDPBackend.FLASH_ATTENTION, q, k, v, documents)


def cudnn(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """cuDNN's attention, through torch."""
    return _fused("cudnn", SDPBackend.CUDNN_ATTENTION, q, k, v, documents)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """The flash-attn package (Dao 2023), its varlen function for documents."""
    import flash_attn as package

    _half_only("flash_attn", q)
    if documents is None:
        return package.flash_attn_func(q, k, v, causal=True)
    borders, longest = _packed("flash_attn", q, k, documents)
    o = package.flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), borders, borders, longest, longest, causal=True
    )
    return o.view_as(q)


def varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """torch's variable-length attention (FlashAttention-2): every document, or row, a sequence."""
    _half_only("varlen", q)
    borders, longest = _packed("varlen", q, k, documents)
    attend = _varlen(q.shape[2] != k.shape[2])
    o = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), borders, borders, longest, longest)
    return o.view_as(q)


def flex(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """torch's FlexAttention with a mask of the documents: compiled on CUDA, elsewhere eager and forward only."""
    T, S = q.shape[1], k.shape[1]
    if T != S:
        raise ValueError(f"flex: {T} queries over {S} positions: it takes whole rows only; use sdpa")
    mask = _causal_blocks(T, q.device) if documents is None else _kept(documents[0], "blocks", _document_blocks)
    # Heads before rows, as torch wants them: a view.
    attend = _flex(q.device.type == "cuda")
    o = attend(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=q.shape[2] != k.shape[2])
    return o.transpose(1, 2)


PEERS = {
    "sdpa": Peer(sdpa, True, False, "torch", ""),
    "sdpa_flash": Peer(sdpa_flash, False, True, "torch", ""),
    "cudnn": Peer(cudnn, False, True, "torch", ""),
    "flash_attn": Peer(flash_attn, True, True, "flash_attn", "pip install flash-attn"),
    "varlen": Peer(varlen, True, True, "torch.nn.attention.varlen", "install torch 2.10 or newer"),
    "flex": Peer(flex, True, False, "torch.nn.attention.flex_attention", "install torch 2.5 or newer"),
}
NAMES = tuple(PEERS)


@cache
def why_not(name: str, device: torch.device | None = None, documents: bool = False) -> str | None:
    """Why this implementation cannot be used, as a clause with the remedy; None when it can.

    device: where the tensors lie, by default on the GPU if there is one. documents: whether packed documents are to be
    attended. ValueError for a name that is not there.
    """
    if name not in PEERS:
        raise ValueError(f"kernels: no attention called {name!r}; there are {', '.join(NAMES)}")
    peer = PEERS[name]
    if peer.cuda_only and not (torch.cuda.is_available() and (device is None or device.type == "cuda")):
        where = "torch finds none" if device is None else f"the tensors are on {device.type}"
        return f"{name} needs a CUDA device, and {where}: use --device cuda, or sdpa"
    if not _installed(peer.module):
        return f"{name} is not installed: {peer.remedy}, or use sdpa"
    return _no_documents(name) if documents and not peer.documents else None


def attention(name: str, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """reference.attention by the implementation of that name. ValueError where it cannot."""
    if (why := why_not(name, q.device, documents is not None)) is not None:
        raise ValueError(f"attention: {why}")
    return PEERS[name].attend(q, k, v, documents)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it would lie in
        return False


def _no_documents(name: str) -> str:
    return f"{name} knows no packed documents: use varlen or flex, or train with --packing none"


def _fused(name: str, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    if documents is not None:
        raise ValueError(_no_documents(name))
    _half_only(name, q)
    T, S = q.shape[1], k.shape[1]
    if 1 < T < S:
        raise ValueError(f"{name}: {T} queries over {S} positions: it takes whole rows or one query; use sdpa")
    with sdpa_kernel(backend):
        return _sdpa(q, k, v, causal=T > 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    o = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]
    )
    return o.transpose(1, 2)


def _half_only(name: str, q: Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}; use sdpa")


def _packed(name: str, q: Tensor, k: Tensor, documents: Documents | None) -> tuple[Tensor, int]:
    """Where each sequence of the flattened rows begins, the last one's end behind it, and the longest's length."""
    B, T = q.shape[:2]
    if k.shape[1] != T:
        raise ValueError(f"{name}: {T} queries over {k.shape[1]} positions: it takes whole rows only; use sdpa")
    if documents is None:
        return torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device), T
    return _kept(documents[0], "borders", _borders)


def _borders(start: Tensor) -> tuple[Tensor, int]:
    B, T = start.shape
    first = (start == torch.arange(T, device=start.device)).flatten().nonzero().flatten()
    borders = F.pad(first, (0, 1), value=B * T).int()
    return borders, int(borders.diff().max())


def _mask(start: Tensor, T: int) -> Tensor:
    """True where a query may look: (B, 1, T, S) for the last T of S positions."""
    S = start.shape[1]
    columns = torch.arange(S, device=start.device)
    return ((columns <= columns[S - T :, None]) & (columns >= start[:, S - T :, None]))[:, None]


_plans = WeakTensorKeyDictionary()


def _kept(start: Tensor, what: str, make: Callable[[Tensor], Any]) -> Any:
    """make(start), made once for as long as this tensor lives and is not written to."""
    version = 0 if start.is_inference() else start._version
    plans = _plans.setdefault(start, {})
    if (what, version) not in plans:
        plans[what, version] = make(start.detach())  # another object: a plan must not keep its own key alive
    return plans[what, version]


@cache
def _varlen(grouped: bool) -> Callable[..., Tensor]:
    """torch's function, told what its version must be: is_causal in 2.10, a window since 2.11, groups in 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "enable_gqa" in takes:
        options["enable_gqa"] = grouped
    return partial(varlen_attn, **options)


@cache
def _flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # A graph for every shape: with sizes left open the kernel would not be the best FlexAttention has.
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def _document_blocks(start: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    B, T = start.shape

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= start[b, i])

    return create_block_mask(visible, B, None, T, T, device=start.device)


@cache
def _causal_blocks(T: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    return create_block_mask(visible, None, None, T, T, device=device)
