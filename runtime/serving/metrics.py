"""What Prometheus reads: this process's own figures, and those of the engines."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.messages import Figures

SILENT_S = 120.0  # of an engine on another machine, which is then believed to have ended
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# prometheus_client's own. Figures would be mapped files, and a full disk kills who writes to those.
FOLDER_VARIABLES = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")


class JobsCollector(Collector):
    """Jobs by status, as they are when asked."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        """Yield the number of jobs of each status, and of those queued again."""
        held = GaugeMetricFamily("magihuman_videos", "Videos kept, by status.", labels=["status"])
        for status, count in self._jobs.count().items():
            held.add_metric([status.value], count)
        yield held
        yield CounterMetricFamily(
            "magihuman_videos_requeued",
            "Videos put back in line because their engine had gone.",
            value=self._jobs.requeued,
        )


class Metrics:
    """The figures of the process that speaks HTTP, and those of the engines after them."""

    def __init__(self, jobs: Jobs, engines: Callable[[], bytes]) -> None:
        """engines: returns the figures of the engines, as text."""
        self._registry = CollectorRegistry()
        self._registry.register(JobsCollector(jobs))
        self._engines = engines
        self._answers = Counter(
            "magihuman_http_requests",
            "Answers, by method, route and status.",
            ["method", "route", "status"],
            registry=self._registry,
        )

    def count(self, method: str, route: str, status: int) -> None:
        """Count one more answer."""
        known = method if method in METHODS else "other"  # clients may send any word
        self._answers.labels(known, route, str(status)).inc()

    def text(self) -> bytes:
        """Return all figures in the text format of Prometheus."""
        return generate_latest(self._registry) + self._engines()


class EngineFigures(Collector):
    """Figures of all engines, added up, in memory: a disk that is full costs none.

    What an engine has counted stays after its process; what it was doing does not.
    """

    def __init__(self) -> None:
        self._latest: dict[str, Figures] = {}
        self._noted_s: dict[str, float] = {}  # when something was heard last
        self._ended: list[Metric] = []
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def note(self, figures: Figures) -> None:
        """Take what an engine has counted, unless something later has come before."""
        known = self._latest.get(figures.engine)
        if figures.engine in self._noted_s and known is None:
            return  # it is counted among those that have ended
        self._noted_s[figures.engine] = time.monotonic()
        if known is None or known.order < figures.order:
            self._latest[figures.engine] = figures

    def collect(self) -> Iterator[Metric]:
        """Yield the sum of each figure."""
        for name, figures in list(self._latest.items()):
            if not self._is_there(figures):
                del self._latest[name]
                counted = [family for family in figures.families if family.type != "gauge"]
                self._ended = _sums([*self._ended, *counted])
        families = [family for figures in self._latest.values() for family in figures.families]
        yield from _sums([*self._ended, *families])

    def _is_there(self, figures: Figures) -> bool:
        """Whether an engine runs; of one on another machine, whether it has said so lately."""
        if figures.node == platform.node():
            return _is_running(figures.process)
        return time.monotonic() - self._noted_s[figures.engine] < SILENT_S

    def text(self) -> bytes:
        """Return the figures in the text format of Prometheus."""
        return generate_latest(self._registry)


def _sums(families: Iterable[Metric]) -> list[Metric]:
    """Add up samples of the same name and labels, but for times at which counting began."""
    found: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in families:
        found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        sums = values.setdefault(family.name, {})
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                key = sample.name, tuple(sample.labels.items())
                sums[key] = sums.get(key, 0.0) + sample.value
    for name, family in found.items():
        for (sample_name, labels), value in values[name].items():
            family.add_sample(sample_name, dict(labels), value)
    return list(found.values())


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
