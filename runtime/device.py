"""A torch device: which one is meant, what an error says of it, and what a host may have set."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import traceback
from collections.abc import Iterator
from typing import Any

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


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Run as in a process where nobody has set anything of torch, and leave all as it was.

    What a thread has of its own is set aside: autocast, a default device, inference mode and
    gradients. So is, for all threads, how matrix products and convolutions in fp32 are rounded and
    chosen (`_Rounding`). The default dtype is not: it belongs to all threads of the host, whose own
    tensors would get another meanwhile. So whoever makes a tensor here says its dtype.
    """
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(_rounding.published())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                scopes.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            scopes.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled():  # what is made in it cannot be changed outside it
            scopes.enter_context(torch.inference_mode(False))
        scopes.enter_context(torch.no_grad())
        yield


class _Rounding:
    """The settings of the process that decide the bits of products in fp32.

    Matrix products are in full fp32, convolutions of cuDNN in TF32, and cuDNN chooses without
    timing: PyTorch's defaults. The first who needs them sets them where they differ, and the last
    puts back what it found, unless somebody else has set something since.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: dict[str, Any] | None = None
        self._during: dict[str, Any] | None = None

    @contextlib.contextmanager
    def published(self) -> Iterator[None]:
        """Have the settings with which the models were published, from any thread."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._set()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._put_back()

    def _set(self) -> None:
        found = self._read()
        is_default = (
            {found["cuda.matmul"], found["mkldnn.matmul"], found["mkldnn.conv"]} <= {"none", "ieee"}
            and {found["cudnn.conv"], found["cudnn.rnn"]} == {"tf32"}
            and not found["benchmark"]
        )
        if is_default:
            return
        self._before = found
        for name in ("", "mkldnn", "cudnn"):
            self._write(name, "none")
        torch.set_float32_matmul_precision("highest")
        self._write("mkldnn.conv", "none")
        # Through the older flag, which PyTorch refuses to read where it differs from the newer.
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False
        self._during = self._read()

    def _put_back(self) -> None:
        before, during = self._before, self._during
        self._before = self._during = None
        if before is None or self._read() != during:
            return
        if before["older"] is not None:
            torch.set_float32_matmul_precision(before["older"])
        else:
            self._write("cuda.matmul", "none")
            self._write("mkldnn.matmul", "none")
        for name in ("", "mkldnn", "cudnn", "cuda.matmul", "mkldnn.matmul", "mkldnn.conv"):
            self._write(name, before[name])
        if before["older cudnn"] is not None:
            torch.backends.cudnn.allow_tf32 = before["older cudnn"]
        for name in ("cudnn.conv", "cudnn.rnn"):
            self._write(name, before[name])
        torch.backends.cudnn.benchmark = before["benchmark"]

    def _read(self) -> dict[str, Any]:
        """All of the settings by name; the older are None where the newer were set by hand."""
        found = {name: place.fp32_precision for name, place in self._places().items()}
        found["benchmark"] = torch.backends.cudnn.benchmark
        try:
            found["older"] = torch.get_float32_matmul_precision()
        except RuntimeError:
            found["older"] = None
        try:
            found["older cudnn"] = torch.backends.cudnn.allow_tf32
        except RuntimeError:
            found["older cudnn"] = None
        return found

    def _write(self, name: str, value: str) -> None:
        """Set one where it is not so already: what is set no longer follows those above it."""
        place = self._places()[name]
        if place.fp32_precision != value:
            place.fp32_precision = value

    def _places(self) -> dict[str, Any]:
        """What holds each precision; those named later follow those named before, unless set."""
        backends: Any = torch.backends
        return {
            "": backends,
            "mkldnn": backends.mkldnn,
            "cudnn": backends.cudnn,
            "cuda.matmul": backends.cuda.matmul,
            "mkldnn.matmul": backends.mkldnn.matmul,
            "mkldnn.conv": backends.mkldnn.conv,
            "cudnn.conv": backends.cudnn.conv,
            "cudnn.rnn": backends.cudnn.rnn,
        }


_rounding = _Rounding()
