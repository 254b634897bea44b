"""How long work takes, and how much energy, on a GPU that has done nothing else for a while.

A GPU that draws what it may lowers its clock, so that a call alone takes less than one of many.
NVML's energy counter moves every few tens of milliseconds: power is its slope from one movement
to a later one, with work queued all the time, and a call's energy is power times its duration.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness import nvml
from harness.measure import Timed, rounds, synchronize
from harness.measure import device as measure_device

WARM_S, SUSTAINED_S = 0.15, 0.45
ROUNDS = 2
BATCH_MS = 50  # of work that is queued at once; two are in the queue
POLL_S = 0.002
REST_S = 2.0
TICK_S = 0.5  # longest wait for the counter to move


@dataclass(frozen=True)
class Reading:
    """What a call took; None where NVML could not be asked.

    Attributes:
        ms: device milliseconds; on the CPU the host's.
        watts: of the whole card.
        mhz: clock of the streaming multiprocessors.
        throttle: share of the time that each reason kept the clock from being higher.
    """

    ms: float
    watts: float | None = None
    mhz: float | None = None
    throttle: dict[str, float] | None = None

    @property
    def joules(self) -> float | None:
        """Energy of the call."""
        return None if self.watts is None else self.watts * self.ms / 1e3

    def figures(self) -> dict[str, Any]:
        """For a JSON."""
        return {**asdict(self), "joules": self.joules}


class Samples:
    """What NVML says in the course of time."""

    def __init__(self, gpu: nvml.Gpu) -> None:
        self.ticks: list[tuple[float, float]] = []  # seconds and joules where the counter moved
        self.clocks_mhz: list[int] = []
        self.reasons = collections.Counter[str]()
        self.asked = 0  # times that reasons were given
        self._gpu, self._last = gpu, gpu.energy_j()

    def take(self) -> None:
        """Ask once."""
        joules, now = self._gpu.energy_j(), time.perf_counter()
        if joules is not None and joules != self._last:
            self.ticks.append((now, joules))
            self._last = joules
        clock, reasons = self._gpu.sm_mhz(), self._gpu.throttle_reasons()
        if clock is not None:
            self.clocks_mhz.append(clock)
        if reasons is not None:
            self.reasons.update(reasons)
            self.asked += 1

    def reading(self, ms: float) -> Reading:
        """Of calls that took so long each."""
        clock = statistics.mean(self.clocks_mhz) if self.clocks_mhz else None
        shares = {name: count / self.asked for name, count in self.reasons.most_common()}
        return Reading(ms, self._watts(), clock, shares if self.asked else None)

    def _watts(self) -> float | None:
        if len(self.ticks) < 2:
            return None
        (begin_s, begin_j), (end_s, end_j) = self.ticks[0], self.ticks[-1]
        return (end_j - begin_j) / (end_s - begin_s)


def sustained(
    run: Callable[[], object],
    gpu: nvml.Gpu,
    calls: int = 1,
    seconds: float = SUSTAINED_S,
    warm_s: float = WARM_S,
) -> Reading:
    """One of the `calls` that `run` makes, in the midst of many.

    `run` queues work on the current stream and does not wait for it. On the CPU it is called once.
    """
    timed = Timed(run, measure_device())
    timed()
    if not torch.cuda.is_available():
        return Reading(timed.times_ms[0] / calls)
    timed()  # the first may have compiled
    batch = max(1, int(BATCH_MS / timed.times_ms[-1]))
    _queue(run, batch, warm_s, lambda: None)
    samples = Samples(gpu)
    return samples.reading(_queue(run, batch, seconds, samples.take) / calls)


def _queue(
    run: Callable[[], object], batch: int, seconds: float, poll: Callable[[], object]
) -> float:
    """Milliseconds of a run, with the queue never empty until `seconds` are over."""
    start, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    start_s, count, before = time.perf_counter(), 0, start
    while time.perf_counter() < start_s + seconds:
        for _ in range(batch):
            run()
        count += batch
        last = torch.cuda.Event(enable_timing=True)
        last.record()
        _wait(before, poll)
        before = last
    _wait(last, poll)
    return float(start.elapsed_time(last)) / count


def _wait(event: torch.cuda.Event, poll: Callable[[], object]) -> None:
    """Until the GPU has come to an event; polls once at least."""
    poll()
    while not event.query():
        poll()
        time.sleep(POLL_S)
    event.synchronize()


def in_turns(
    runs: Mapping[str, Callable[[], object]], gpu: nvml.Gpu, calls: int = 1
) -> dict[str, Reading]:
    """`sustained` of each run, the medians of several turns."""
    found: dict[str, list[Reading]] = {name: [] for name in runs}
    for _ in range(rounds(ROUNDS)):
        for name, run in runs.items():
            found[name].append(sustained(run, gpu, calls))
    return {name: typical(readings) for name, readings in found.items()}


def typical(readings: Sequence[Reading]) -> Reading:
    """The median of each figure, and the mean share of each reason."""
    known = [reading.throttle for reading in readings if reading.throttle is not None]
    names = dict.fromkeys(name for shares in known for name in shares)
    shares = {name: statistics.mean(one.get(name, 0.0) for one in known) for name in names}
    return Reading(
        statistics.median(reading.ms for reading in readings),
        _median([reading.watts for reading in readings]),
        _median([reading.mhz for reading in readings]),
        shares if known else None,
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def after_rest(
    run: Callable[[], object], gpu: nvml.Gpu, device: torch.device, repeats: int
) -> tuple[float, float | None]:
    """Milliseconds and joules of a run before which the GPU has rested, medians.

    Joules are counted from one movement of the counter to the first after the run.
    """
    timed, joules = Timed(run, device), list[float | None]()
    for _ in range(rounds(repeats)):
        synchronize()
        time.sleep(REST_S if device.type == "cuda" else 0)
        before = tick_j(gpu)
        timed()
        after = tick_j(gpu)
        joules.append(None if before is None or after is None else after - before)
    return statistics.median(timed.times_ms), _median(joules)


def tick_j(gpu: nvml.Gpu) -> float | None:
    """Joules of the counter when it next moves, or after a while, if it does not."""
    first = now = gpu.energy_j()
    end_s = time.perf_counter() + TICK_S
    while first is not None and now == first and time.perf_counter() < end_s:
        now = gpu.energy_j()
    return now
