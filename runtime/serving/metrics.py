"""What Prometheus reads: this process's own figures, and those of the engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, generate_latest, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from magihuman.runtime.serving.jobs import Jobs

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own


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


def of_processes(folder: Path) -> bytes:
    """Add up what processes with `FOLDER_VARIABLE` have written there, also those that ended."""
    for file in folder.glob("gauge_live*_*.db"):
        process = int(file.stem.rpartition("_")[2])
        if not _is_running(process):
            multiprocess.mark_process_dead(process, str(folder))
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, str(folder))
    return generate_latest(registry)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
