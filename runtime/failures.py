"""What an error says of the device: that memory ran out, or that it has failed for good."""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from magihuman.runtime.errors import DeviceError, EngineUnusable
from magihuman.runtime.queueing import Line


class PeerLost(RuntimeError):  # noqa: N818 - a state, as EngineUnusable
    """A process that shares the work has ended, or is no longer in step with this one."""


class Failures:
    """What went wrong on a device, and what is left of it.

    Attributes:
        first: what CUDA said when the device failed for good, or what became of a process that
            shares the work; None for as long as nothing did.
    """

    def __init__(self, device: torch.device, line: Line) -> None:
        """line: of those who want the device; closed once it has failed."""
        self.first: str | None = None
        self._device, self._line = device, line
        self._failed = str(device)

    @contextmanager
    def guard(
        self, advice: Callable[[], str] | None, stream: torch.cuda.Stream | None = None
    ) -> Iterator[None]:
        """Turn what is raised by work on the device into what it means.

        advice: frees memory and tells what fits then; None where another request has the device.
        stream: that the work is launched on, by default the current one.
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
                self._line.refuse(self.unusable)
                raise self.unusable() from error
            if advice is not None and is_out_of_memory(error):
                forget(error)
                raise DeviceError(
                    f"{self._device} ran out of memory: {advice()} ({error})"
                ) from error
            raise

    def unusable(self) -> EngineUnusable:
        """What every request is told from then on."""
        return EngineUnusable(
            f"{self._failed} has failed for good in this process, and this engine with it; load"
            f" again in a new process. The first failure: {self.first}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or the host, however it is told."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )


def is_cuda_error(error: BaseException) -> bool:
    """Other than a lack of memory."""
    is_told = isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )
    return is_told and not is_out_of_memory(error)


def forget(error: BaseException | None) -> None:
    """Drop what the frames of an error hold: the tensors that filled the memory."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)


def abandon(error: BaseException | None) -> None:
    """Keep what the frames of an error hold for as long as the process lives.

    Of tensors that two streams have used, and of pinned ones, PyTorch records an event when they
    are freed. On a device that has failed that raises, in a destructor, which ends the process
    (pytorch/pytorch#178154).
    """
    for each in _chain(error):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(list(frame.f_locals.values())))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that were being handled as it was raised."""
    while error is not None:
        yield error
        error = error.__context__


def cuda_failure(
    error: BaseException, device: torch.device, stream: torch.cuda.Stream | None = None
) -> str | None:
    """What CUDA says where it has failed for good, None where it has not.

    Such errors come back with every call, whatever was raised first; so the stream (by default the
    current one) is waited for.
    """
    if is_cuda_error(error):
        return str(error)
    if device.type == "cuda":
        try:
            (stream or torch.cuda.current_stream(device)).synchronize()
        except RuntimeError as found:
            return str(found)
    return None
