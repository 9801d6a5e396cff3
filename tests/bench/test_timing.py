"""The clock on a CPU, and on a simulated device whose work takes a known time, however slow the launches are."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from bench import timing

CPU = torch.device("cpu")
MS = 1e-3


class Device:
    """A GPU and the CPU that feeds it: a launch costs the CPU, work waits for the work before it."""

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0

    def queue(self, work: float, launch: float = 0.0) -> None:
        self.now += launch
        self.busy_until = max(self.busy_until, self.now) + work

    def wait(self, _: object = None) -> None:
        self.now = max(self.now, self.busy_until)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Stands in for CUDA."""
    device = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(device.now, device.busy_until)

        def query(self) -> bool:
            return device.now >= self.at

        def synchronize(self) -> None:
            device.now = max(device.now, self.at)

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.wait)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.queue(cycles / timing.CYCLES_PER_SECOND))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: device.now))
    return device


@pytest.fixture
def clock(device: Device) -> timing.Clock:
    return timing.Clock(torch.device("cuda"))


def test_on_a_cpu_it_is_the_wall_clock() -> None:
    seen: list[int] = []

    def call(i: int) -> None:
        seen.append(i)
        time.sleep(0.01)

    clock = timing.Clock(CPU)
    done = clock.run(call, 3)
    assert seen == [0, 1, 2]
    assert done.queued
    assert 0.01 <= done.seconds < 0.1
    assert clock.asking(call, 2) >= 0.01


@pytest.mark.parametrize("launch", [0.01 * MS, 0.5 * MS, 5 * MS])
def test_device_work_is_timed_without_its_launches(device: Device, clock: timing.Clock, launch: float) -> None:
    timed = timing.Timed(clock, lambda i: device.queue(0.3 * MS, launch))
    for _ in range(3):
        timed.once()
    assert timed.queued
    assert timed.seconds == pytest.approx(0.3 * MS)
    assert len(timed.passes) == 3


def test_a_device_that_waits_for_launches_is_noticed(
    device: Device, clock: timing.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "LONGEST_SLEEP", 1 * MS)
    timed = timing.Timed(clock, lambda i: device.queue(0.3 * MS, 5 * MS))
    timed.once()
    assert not timed.queued
    assert timed.seconds > 1 * MS


def test_the_sleep_grows_until_all_launches_are_queued(device: Device, clock: timing.Clock) -> None:
    cost = 0.01 * MS
    timed = timing.Timed(clock, lambda i: device.queue(1 * MS, cost))
    before, cost = timed.sleep, 2 * timed.sleep
    timed.once()
    assert timed.sleep > before
    assert timed.queued


@pytest.mark.parametrize(("work", "calls"), [(10 * MS, 1), (0.5 * MS, 4), (0.001 * MS, timing.MOST_CALLS)])
def test_a_pass_has_as_many_calls_as_it_needs(device: Device, clock: timing.Clock, work: float, calls: int) -> None:
    assert timing.Timed(clock, lambda i: device.queue(work)).n == calls


def test_the_median_counts() -> None:
    timed = timing.Timed(timing.Clock(CPU), lambda i: None)
    timed.passes = [timing.Pass(s, q) for s, q in ((3.0, False), (1.0, True), (2.0, True))]
    assert (timed.seconds, timed.queued) == (2.0, True)
    timed.passes[1] = timing.Pass(1.0, False)
    assert not timed.queued


@pytest.mark.parametrize(("footprint", "sets"), [(0, 8), (2**20, 8), (40 * 2**20, 5), (2**30, 1)])
def test_sets_of_buffers_go_beyond_the_cache(footprint: int, sets: int) -> None:
    assert timing.sets_beyond_cache(CPU, footprint) == sets
    assert sets == 8 or sets * footprint >= 3 * timing.L2_BYTES


def test_the_devices_own_cache_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, sets in ((2**20, 3), (0, 8)):  # 0: torch does not know
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, n=size: SimpleNamespace(L2_cache_size=n))
        assert timing.sets_beyond_cache(torch.device("cuda"), 2**20) == sets


def test_ceilings_count_bytes_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []

    def half_a_second(clock: timing.Clock, call: Callable[[int], object], passes: int) -> float:
        ran.append(call(0))
        return 0.5

    monkeypatch.setattr(timing, "_median", half_a_second)
    clock = timing.Clock(CPU)
    assert timing.copy_bytes_per_second(clock, 1000, 2) == 2 * 1000 / 0.5
    assert timing.product_flops(clock, 8, torch.float32, 2) == 2 * 8**3 / 0.5
    assert ran[1].shape == (8, 8)


def test_a_cpu_has_no_peak_and_no_poison() -> None:
    timing.poison(CPU, 2**40)
    assert timing.peak_bytes(lambda i: None, CPU) is None
    assert timing.installed("torch")
    assert timing.installed("no-such-package") is None
