"""What went wrong on the device of an engine, what is left of it, and what would fit there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from magihuman.runtime.device import PeerLost, abandon, cuda_failure, forget, is_out_of_memory
from magihuman.runtime.engine.queue import RequestQueue
from magihuman.runtime.errors import DeviceError, EngineUnusable
from magihuman.runtime.memory import estimate
from magihuman.runtime.pipeline import Pipeline


class Failures:
    """Keeps what CUDA said when the device failed, and tells every request since.

    Attributes:
        first: what CUDA said when the device failed for good, or what became of a process that
            shares the work; None for as long as nothing did.
    """

    def __init__(self, device: torch.device, queue: RequestQueue) -> None:
        """queue: of the requests for the device; refuses all of them once it has failed."""
        self.first: str | None = None
        self._device, self._queue = device, queue
        self._failed = str(device)

    @contextmanager
    def guard(
        self, advice: Callable[[], str] | None, stream: torch.cuda.Stream | None = None
    ) -> Iterator[None]:
        """Turn what is raised by work on the device into what it means.

        Args:
            advice: frees memory and tells what fits then; None where another request has the
                device.
            stream: that the work is launched on, by default the current one.

        Raises:
            EngineUnusable: the device has failed for good; the queue refuses all requests then.
            DeviceError: it ran out of memory, where there is advice.
        """
        try:
            yield
        except BaseException as error:
            is_lost = isinstance(error, PeerLost)
            failure = str(error) if is_lost else cuda_failure(error, self._device, stream)
            if failure is not None:
                if self.first is None:
                    self._failed = "context_parallel" if is_lost else self._failed
                    self.first = failure
                if not is_lost:
                    abandon(error)
                self._queue.refuse(self.unusable)
                raise self.unusable() from error
            if advice is not None and is_out_of_memory(error):
                forget(error)
                raise DeviceError(
                    f"{self._device} ran out of memory: {advice()} ({error})"
                ) from error
            raise

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Make the device current in this thread, which is where its kernels go."""
        if self._device.type != "cuda":
            yield
            return
        before = torch.cuda.current_device()
        torch.cuda.set_device(self._device)
        try:
            yield
        finally:
            if self.first is None:  # else this would raise in place of what says so
                torch.cuda.set_device(before)

    def unusable(self) -> EngineUnusable:
        """The error that every request gets once the device has failed."""
        return EngineUnusable(
            f"{self._failed} has failed for good in this process, and this engine with it; load"
            f" again in a new process. The first failure: {self.first}"
        )


def advice(pipeline: Pipeline) -> str:
    """Free what can be freed, and tell what fits then, for a request that ran out of memory."""
    for captured in pipeline.components.captured:
        captured.release()
    if pipeline.device.type == "cuda":
        torch.cuda.empty_cache()
    dit = pipeline.components.dit.config
    rows = max(dit.mlp_widths(layer)[0] for layer in range(dit.num_layers))
    free = estimate.free_bytes(pipeline.device)
    return estimate.advice(pipeline.request, pipeline.variant, pipeline.sr, rows, free)
