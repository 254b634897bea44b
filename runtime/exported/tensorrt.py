"""TensorRT, whichever of its two flavours is installed, and the Turbo VAE on engines of it.

Full TensorRT makes and runs engines on the GPU at hand. TensorRT-RTX makes them without a GPU, for
compute capabilities 7.5 to 8.9 and 12.x, and does not run on Hopper. Both have the same interface.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magihuman.runtime.config import LATENT_MEAN, LATENT_STD
from magihuman.runtime.errors import CheckpointError, DeviceError
from magihuman.runtime.exported.manifest import (
    INPUT,
    OUTPUT,
    Builder,
    Exported,
    check_builder,
    check_sources,
    is_exported,
    read_manifest,
)
from magihuman.runtime.model import decode_windows, window_kinds
from magihuman.runtime.weights import turbo_vae_files

log = logging.getLogger("magihuman")

FULL, RTX = "tensorrt", "tensorrt_rtx"


def flavour_for(sm: int, device_sm: int | None) -> str:
    """The flavour that makes or runs engines for `sm` here, or a `DeviceError` that says why none.

    device_sm: of the GPU at hand, None without one.
    """
    if sm == device_sm and importlib.util.find_spec(FULL) is not None:
        return FULL
    if importlib.util.find_spec(RTX) is None:
        raise DeviceError(
            "TensorRT must be installed: tensorrt-rtx (pip install 'magihuman[tensorrt]'), or"
            " tensorrt from NVIDIA's index on the GPU that is to run the engines; neither is here"
        )
    if f"SM{sm}" not in capabilities():
        raise DeviceError(
            f"TensorRT-RTX makes engines for {', '.join(capabilities())}, got sm_{sm}; full"
            f" TensorRT makes them, on a GPU of sm_{sm}"
        )
    return RTX


def capabilities() -> list[str]:
    """The compute capabilities TensorRT-RTX knows, as SM89."""
    names = library(RTX).ComputeCapability.__members__
    return [name for name in names if name.startswith("SM")]


@functools.cache
def library(flavour: str) -> Any:
    """The module of a flavour of TensorRT, imported when it is first asked for."""
    return importlib.import_module(flavour)


@functools.cache
def logger(flavour: str) -> Any:
    """Passes TensorRT's messages on to this package's logger. One a process, as TensorRT wants."""
    trt = library(flavour)
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in levels:
                log.log(levels[severity], "%s: %s", flavour, message)

    return Logger()


def device_sm(device: torch.device | None = None) -> int | None:
    """Compute capability of a GPU, by default the first, as 89 for 8.9; None where it is none."""
    if (device is not None and device.type != "cuda") or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class WindowEngine:
    """One engine at one size: input and output at fixed addresses, run on the current stream.

    `run` starts work and waits for nothing, so it may be captured into a CUDA graph.

    Attributes:
        input: [1, 48, t, H, W] in the engine's dtype; write latents there before `run`.
        output: [1, 3, frames, 16 H, 16 W] in the same; overwritten by the next `run`.
    """

    def __init__(
        self, trt: Any, engine: Any, shape: tuple[int, ...], dtype: torch.dtype, scratch: Tensor
    ) -> None:
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if trt.__name__ == RTX:
            # By default it goes on compiling for a new shape while it runs, which a graph cannot.
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            self._context = engine.create_execution_context(config)
        else:
            self._context = engine.create_execution_context(strategy)
        self._scratch = scratch  # kept alive as long as the context points there
        self._context.set_device_memory(scratch.data_ptr(), scratch.nbytes)
        if not self._context.set_input_shape(INPUT, shape):
            raise CheckpointError(f"the engine refuses latents of shape {list(shape)}")
        frames = tuple(self._context.get_tensor_shape(OUTPUT))
        self.input = torch.zeros(shape, dtype=dtype, device=scratch.device)
        self.output = torch.zeros(frames, dtype=dtype, device=scratch.device)
        self._context.set_tensor_address(INPUT, self.input.data_ptr())
        self._context.set_tensor_address(OUTPUT, self.output.data_ptr())

    def run(self) -> None:
        """Start `input` -> `output` on torch's current stream."""
        stream = torch.cuda.current_stream(self.input.device)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise DeviceError("TensorRT could not start the engine; its messages are in the log")


class TensorRTVAE:
    """Windowed decoder of normalised latents on TensorRT engines, in place of `TurboVAE`."""

    def __init__(self, exported: Exported, device: torch.device) -> None:
        sm = device_sm(device)
        if sm is None:
            raise DeviceError(f"TensorRT engines need a CUDA device, got {device}")
        if exported.config is None:
            raise CheckpointError(f"{exported.folder} must hold the video decoder, got the audio's")
        self.config = exported.config
        self.exported, self._device = exported, device
        self._trt = trt = library(flavour_for(sm, sm))
        check_builder(exported, Builder(trt.__name__, trt.__version__, sm))
        self._runtime = runtime = trt.Runtime(logger(trt.__name__))  # outlives its engines
        with torch.cuda.device(device):
            self._engines = {
                graph.engine: _deserialized(runtime, exported.folder / str(graph.engine))
                for graph in exported.graphs
            }
        # Windows run one after another, so that all share the memory of the hungriest.
        needed = max(engine.device_memory_size_v2 for engine in self._engines.values())
        self._scratch = torch.empty(max(needed, 1), dtype=torch.uint8, device=device)
        shape = (1, -1, 1, 1, 1)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).to(exported.dtype).view(shape)
            for values in (LATENT_MEAN, LATENT_STD)
        )
        self._firsts = {k: w.is_first for k, w in window_kinds(exported.config).items()}
        self._bound: dict[tuple[bool, tuple[int, ...]], WindowEngine] = {}

    def windows(self, z: Tensor) -> Iterator[Tensor]:
        """As `TurboVAE.windows`: [1, 48, T, H, W] normalised to [1, 3, frames, 16 H, 16 W] each."""
        self.exported.check_size(*z.shape[3:])
        z = z.to(self._device).float() * self._std.float() + self._mean.float()
        return decode_windows(self._decode, z.to(self.exported.dtype), self.config)

    def bound(self, is_first: bool, shape: tuple[int, ...]) -> WindowEngine:
        """The engine of a window, its addresses fixed when it is first asked for."""
        key = (is_first, shape)
        if key not in self._bound:
            latents, rows, columns = shape[2:]
            graph = next(
                graph
                for graph in self.exported.graphs
                if self._firsts[graph.kind] == is_first
                and graph.takes(latents=latents, height=rows, width=columns)
            )
            engine, dtype = self._engines[graph.engine], self.exported.dtype
            with torch.cuda.device(self._device):
                self._bound[key] = WindowEngine(self._trt, engine, shape, dtype, self._scratch)
        return self._bound[key]

    def _decode(self, latents: Tensor, is_first: bool) -> Tensor:
        engine = self.bound(is_first, tuple(latents.shape))
        engine.input.copy_(latents)
        engine.run()
        return engine.output.clone()


def load_engines(folder: Path, published: Path, device: torch.device) -> TensorRTVAE:
    """An exported decoder; where the published one is there too, it must be of its weights."""
    if not is_exported(folder):
        raise CheckpointError(
            f"{folder} must hold engines for vae='tensorrt', with their manifest; magihuman export"
            " writes them"
        )
    exported = read_manifest(folder)
    if published.is_dir() and not is_exported(published):
        check_sources(exported, list(turbo_vae_files(published)))
    return TensorRTVAE(exported, device)


def _deserialized(runtime: Any, path: Path) -> Any:
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise CheckpointError(f"{path} is refused by TensorRT; its messages are in the log")
    return engine
