"""What a service watches: a span for every request and each of its stages.

Nothing here is global: hooks are given to `load`, and what they write to is given to them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from magihuman.runtime.errors import InvalidRequestError, outcome_of

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from prometheus_client import CollectorRegistry

REQUEST = "request"  # the span around all others of a request
STAGE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Hooks(Protocol):
    """Anything that wants to know of stages. What it raises ends the request."""

    def span(self, name: str, request: int) -> AbstractContextManager[object]:
        """A context around one stage, entered in the thread that runs it; it sees its exception.

        name: "request", "queue" (each wait), or a stage as in `Video.timings_s`. request: its
        number in this engine, in the order of arrival, from 1.
        """


@contextmanager
def spans(hooks: Iterable[Hooks], name: str, request: int) -> Iterator[None]:
    """A context around the spans of all hooks, entered in order."""
    with ExitStack() as entered:
        for each in hooks:
            entered.enter_context(each.span(name, request))
        yield


class NvtxHooks:
    """Ranges for Nsight Systems. Needs a PyTorch built for CUDA."""

    def __init__(self) -> None:
        import torch

        if torch.version.cuda is None:
            raise InvalidRequestError(
                "NvtxHooks need a PyTorch built for CUDA, and this one is not; leave them out"
            )

    def span(self, name: str, request: int) -> AbstractContextManager[object]:
        """A range named `stage #request`."""
        import torch

        return torch.cuda.nvtx.range(f"{name} #{request}")


class OpenTelemetryHooks:
    """Spans `magihuman.STAGE` below the caller's own. Needs the extra `[otel]`."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("magihuman")

    @contextmanager
    def span(self, name: str, request: int) -> Iterator[None]:
        """A span with the request's number and, around the whole request, its outcome."""
        with self._tracer.start_as_current_span(f"magihuman.{name}") as span:
            span.set_attribute("magihuman.request", request)
            try:
                yield
            except BaseException as error:
                if name == REQUEST:
                    span.set_attribute("magihuman.outcome", outcome_of(error))
                raise
            if name == REQUEST:
                span.set_attribute("magihuman.outcome", outcome_of(None))


class PrometheusHooks:
    """A histogram of seconds by stage and a counter of requests by outcome. Needs `[metrics]`.

    Give one to every engine of a process rather than one to each: a registry takes a name once.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._seconds = Histogram(
            "magihuman_stage_seconds",
            "Seconds of each stage of a request, and of the request.",
            ["stage"],
            registry=registry,
            buckets=STAGE_BUCKETS_S,
        )
        self._requests = Counter(
            "magihuman_requests",
            "Requests by how they ended: done, cancelled, rejected, failed.",
            ["outcome"],
            registry=registry,
        )
        self._running = Gauge(
            "magihuman_requests_in_progress",
            "Requests that have not ended.",
            registry=registry,
            multiprocess_mode="livesum",  # of a dead process, nothing is in progress
        )

    @contextmanager
    def span(self, name: str, request: int) -> Iterator[None]:
        """Time the stage; count the request."""
        start = time.perf_counter()
        error: BaseException | None = None
        if name == REQUEST:
            self._running.inc()
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._seconds.labels(name).observe(time.perf_counter() - start)
            if name == REQUEST:
                self._running.dec()
                self._requests.labels(outcome_of(error)).inc()
