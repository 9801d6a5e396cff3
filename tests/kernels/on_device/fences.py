"""Memory that tells on a kernel: what it allocates is poisoned before it is written and fenced on both sides.

A kernel that reads what nobody wrote gets NaN (or the largest integer); one that reads past an end gets NaN; one that
writes past an end breaks a fence, which verify() finds. Without fences an interpreted kernel's stray write corrupts
the heap and shows, if at all, as a crash somewhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

full = torch.full  # torch's own: its name in torch is replaced while a test runs
FENCE_BYTES = 4096  # each side; a multiple of every alignment that a launch looks at
INTACT = 0xFF  # in every byte: NaN in all floating types, -1 in all integers
HELD_BYTES = 2**28  # fenced memory kept alive before it is checked and let go
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
FILLED = ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like", "new_full")


class Fences:
    """Fenced tensors, and the check that all fences stand."""

    def __init__(self) -> None:
        self.held: list[tuple[str, Tensor]] = []
        self.bytes = 0

    def copy(self, tensor: Tensor, name: str = "a copied tensor") -> Tensor:
        """The same numbers, sizes and strides in fenced memory; gaps between strided rows hold poison."""
        fenced = self.like(tensor, name)
        fenced.detach().copy_(tensor.detach())
        return fenced.requires_grad_(tensor.requires_grad) if tensor.requires_grad else fenced

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """Poisoned memory of the same device, type, sizes and strides."""
        reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        count = reach if tensor.numel() else 0
        size = count * tensor.element_size()
        raw = full((2 * FENCE_BYTES + size,), INTACT, dtype=torch.uint8, device=tensor.device)
        # A storage of its own, starting between the fences: to torch no view of anything, nor at an offset.
        inner = torch.from_dlpack(raw[FENCE_BYTES : FENCE_BYTES + size])
        fenced = torch.tensor([], dtype=tensor.dtype, device=tensor.device)
        fenced.set_(inner.untyped_storage(), 0, tensor.shape, tensor.stride())
        if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex and count:
            largest = 1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
            fenced.as_strided((count,), (1,)).fill_(largest)
        self.held.append((f"{name}, {tuple(tensor.shape)} {tensor.dtype}", raw))
        self.bytes += raw.numel()
        if self.bytes > HELD_BYTES:
            self.verify()
        return fenced

    def verify(self) -> None:
        """Fail where something was written outside a fenced tensor; let all of them go."""
        held, self.held, self.bytes = self.held, [], 0
        for name, raw in held:
            before, after = raw[:FENCE_BYTES], raw[-FENCE_BYTES:]
            for side, fence in (("before", before), ("after", after)):
                broken = (fence != INTACT).nonzero().flatten()
                assert not len(broken), (
                    f"written {side} the memory of {name}: {len(broken)} bytes, the first "
                    f"{FENCE_BYTES - int(broken[-1]) if side == 'before' else int(broken[0]) + 1} bytes outside"
                )

    def around(self, allocate: Callable[..., Tensor], poison: bool) -> Callable[..., Tensor]:
        """The allocation function, giving fenced memory wherever it is called by running code, not by a tracer."""

        def allocate_fenced(*args: Any, **kwargs: Any) -> Tensor:
            plain = allocate(*args, **kwargs)
            if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None or type(plain) is not Tensor:
                return plain
            ordinary = plain.layout == torch.strided and plain.device.type in ("cpu", "cuda")
            if not ordinary or kwargs.get("out") is not None or plain.is_pinned():
                return plain
            name = f"what torch.{allocate.__name__} gave"
            fenced = self.like(plain, name) if poison else self.copy(plain, name)
            return fenced.requires_grad_() if plain.requires_grad else fenced

        return allocate_fenced

    def patches(self) -> list[tuple[Any, str, Callable[..., Tensor]]]:
        """(owner, name, replacement) of every allocation function of torch."""
        found = []
        for names, poison in ((EMPTY, True), (FILLED, False)):
            for name in names:
                owner = torch.Tensor if name.startswith("new_") else torch
                found.append((owner, name, self.around(getattr(owner, name), poison)))
        return found
