"""A torch device: which one is meant, and what an error says of it."""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Iterator

import torch

from magihuman.runtime.errors import DeviceError, InvalidRequestError


class PeerLost(RuntimeError):  # noqa: N818 - a state, as EngineUnusable
    """A process that shares the work has ended, or is no longer in step with this one."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left, however the error says so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )


def is_cuda_error(error: BaseException) -> bool:
    """Whether CUDA raised it, for another reason than a lack of memory."""
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
        except RuntimeError as failure:
            return str(failure)
    return None


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; without one the first GPU, or the CPU.

    Raises:
        InvalidRequestError: it is neither cpu nor cuda.
        DeviceError: there is no such GPU here.
    """
    if device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        if not isinstance(device, (str, torch.device)):  # builds for CUDA take numbers, others not
            raise TypeError("neither a name nor a device")
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidRequestError(f"device must be cpu, cuda or cuda:N, got {device!r}") from error
    if target.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (target.index or 0) >= count:
            raise DeviceError(
                f"{target} is not there: this PyTorch sees {count} GPU(s); use device='cpu'"
            )
        return torch.device("cuda", target.index or 0)
    if target.type != "cpu":
        raise InvalidRequestError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    return target
