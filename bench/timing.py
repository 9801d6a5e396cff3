"""How long device work takes, without what it costs to ask for it; what the machine can do at best.

Used by the kernel benches. On CUDA a pass first puts the device to sleep, queues its calls behind the sleep and reads
events around them: the device never waits for Python, however slow a call is to launch. Whether that held is checked
at every pass (the first event must not have happened when the last call is queued) and reported. On a CPU, a stand-in
for tests: the wall clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[int], object]  # the i-th call of a pass: i picks the inputs, so that they are not in the cache

PASS_SECONDS = 2e-3  # device time of a pass, at least
MOST_CALLS = 24  # of a pass: the launch queue holds about 1,000 launches
CYCLES_PER_SECOND = 2e9
LONGEST_SLEEP = 0.25
L2_BYTES = 64 * 2**20  # where torch does not say


class Pass(NamedTuple):
    """One pass: seconds of the device per call, and whether the device never waited for a launch."""

    seconds: float
    queued: bool


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        """Return when the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def run(self, call: Call, n: int, sleep: float = 0.0) -> Pass:
        """One pass of n calls, queued while the device sleeps for so many seconds."""
        if not self.cuda:
            begin = time.perf_counter()
            for i in range(n):
                call(i)
            return Pass((time.perf_counter() - begin) / n, True)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(max(1, int(sleep * CYCLES_PER_SECOND)))
        first.record()
        for i in range(n):
            call(i)
        last.record()
        queued = not first.query()
        last.synchronize()
        return Pass(first.elapsed_time(last) / 1e3 / n, queued)

    def asking(self, call: Call, n: int) -> float:
        """Seconds of the CPU per call, not waiting for the device."""
        self.wait()
        begin = time.perf_counter()
        for i in range(n):
            call(i)
        asked = (time.perf_counter() - begin) / n
        self.wait()
        return asked


class Timed:
    """A call being timed: how many make a pass, how long the device must sleep to have them queued, the passes."""

    def __init__(self, clock: Clock, call: Call) -> None:
        self.clock, self.call = clock, call
        call(0)  # compiles, fills caches
        clock.wait()
        once = clock.run(call, 1).seconds
        self.n = max(1, min(MOST_CALLS, math.ceil(PASS_SECONDS / max(once, 1e-9)))) if clock.cuda else 1
        # Also leaves the allocator with blocks for every call of a pass.
        self.sleep = min(LONGEST_SLEEP, 2 * self.n * clock.asking(call, self.n) + 1e-3)
        self.passes: list[Pass] = []

    def once(self) -> None:
        """One more pass; asleep for longer if the launches were not all queued in time."""
        for _ in range(3):
            done = self.clock.run(self.call, self.n, self.sleep)
            if done.queued or self.sleep >= LONGEST_SLEEP:
                break
            self.sleep = min(LONGEST_SLEEP, 2 * self.sleep)
        self.passes.append(done)

    @property
    def seconds(self) -> float:
        """Median of the passes."""
        return statistics.median(p.seconds for p in self.passes)

    @property
    def queued(self) -> bool:
        """Whether most passes measured the device alone."""
        return sum(p.queued for p in self.passes) * 2 > len(self.passes)


def sets_beyond_cache(device: torch.device, footprint: int) -> int:
    """How many sets of buffers, of so many bytes each, a pass must go round so that none is found in the L2 cache."""
    cache = L2_BYTES
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or L2_BYTES
    return max(1, min(8, math.ceil(3 * cache / max(1, footprint))))


def copy_bytes_per_second(clock: Clock, size: int, passes: int) -> float:
    """Bytes read plus bytes written by a copy from device memory to device memory, the best that moving bytes gets."""
    pairs = [torch.randint(0, 256, (2, size), dtype=torch.uint8, device=clock.device) for _ in range(2)]

    def copy(i: int) -> None:
        target, source = pairs[i % len(pairs)]
        target.copy_(source)

    return 2 * size / _median(clock, copy, passes)


def product_flops(clock: Clock, n: int, dtype: torch.dtype, passes: int) -> float:
    """FLOP/s of torch's (n, n) x (n, n) product on random numbers, the best that Tensor Cores get."""
    a, b = (torch.randn(n, n, dtype=torch.float32, device=clock.device).to(dtype) for _ in range(2))
    return 2 * n**3 / _median(clock, lambda i: a @ b, passes)


def _median(clock: Clock, call: Call, passes: int) -> float:
    timed = Timed(clock, call)
    for _ in range(passes):
        timed.once()
    return timed.seconds


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Device memory that a call needs at its worst, beyond what lay there before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call(0)
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


def poison(device: torch.device, size: int) -> None:
    """Leave NaN in memory that the allocator will hand out next: a result that is not written shows as NaN."""
    if device.type == "cuda":
        junk: Tensor = torch.full((size // 4,), math.nan, device=device)
        torch.cuda.synchronize(device)
        del junk


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
