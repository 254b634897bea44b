"""ONNX to a TensorRT engine, through the builder of either flavour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from magihuman.kernels.jit import cache
from magihuman.runtime.errors import DeviceError, MagiHumanError
from magihuman.runtime.exported import (
    FULL,
    INPUT,
    Builder,
    Dims,
    device_sm,
    flavour_for,
    library,
    logger,
)

KIND = "tensorrt"  # in the cache

OnStep = Callable[[int, int], None]  # (steps done, of how many)


class BuildError(MagiHumanError):
    """TensorRT could not make an engine of a graph."""


def builder_for(sm: int | None) -> Builder:
    """Return what makes engines here, for this compute capability or that of the GPU at hand."""
    here = device_sm()
    wanted = here if sm is None else sm
    if wanted is None:
        raise DeviceError("sm must be given on a machine without a GPU, as in --sm 89")
    flavour = flavour_for(wanted, here)
    return Builder(flavour, library(flavour).__version__, wanted)


def build_engine(
    onnx_path: Path,
    shape: tuple[Dims, ...],
    builder: Builder,
    workspace_bytes: int,
    on_step: OnStep = lambda done, of: None,
) -> bytes:
    """Build the serialized engine of a graph whose one input has these fewest, best, most sizes.

    Strongly typed: it computes in the dtypes that the graph has.
    """
    trt = library(builder.flavour)
    log = logger(builder.flavour)
    trt_builder = trt.Builder(log)
    network = trt_builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BuildError(f"{builder.flavour} cannot read {onnx_path.name}: {errors}")
    config = trt_builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    monitor = config.progress_monitor = _monitor(trt, on_step)
    if any(low != high for low, _, high in shape):
        profile = trt_builder.create_optimization_profile()
        profile.set_shape(INPUT, *zip(*shape, strict=True))
        config.add_optimization_profile(profile)
    if builder.flavour == FULL:
        content = _timed(trt, trt_builder, network, config, builder)
    else:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{builder.sm}"), 0)
        content = trt_builder.build_serialized_network(network, config)
    if monitor.raised is not None:
        raise monitor.raised
    if content is None:
        raise BuildError(
            f"{builder} cannot make an engine of {onnx_path.name}; its messages are in the log"
        )
    return bytes(content)


def _timed(trt: Any, trt_builder: Any, network: Any, config: Any, builder: Builder) -> Any:
    """Build with the timings of earlier builds, and keep those of this one.

    TensorRT-RTX times nothing while it builds, and has no such cache.
    """
    key = f"{builder.version}-sm{builder.sm}"
    take_timings(config, cache.read(KIND, key))
    content = trt_builder.build_serialized_network(network, config)
    timings = config.get_timing_cache()
    if timings is not None:
        cache.write(KIND, key, bytes(timings.serialize()))
    return content


def take_timings(config: Any, kept: bytes | None) -> None:
    """Give a builder's configuration the timings that were kept, or none where TensorRT refuses
    them.
    """
    for content in (kept or b"", b""):
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
            return


def _monitor(trt: Any, on_step: OnStep) -> Any:
    """Report the outermost phase. What is raised meanwhile, also by Ctrl-C, ends the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: tuple[str, int] | None = None
            self.raised: BaseException | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost = (name, steps)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                if self.outermost is not None and name == self.outermost[0]:
                    on_step(step + 1, self.outermost[1])
            except BaseException as error:  # TensorRT would print it and go on
                self.raised = error
            return self.raised is None

        def phase_finish(self, name: str) -> None:
            if self.outermost is not None and name == self.outermost[0] and self.raised is None:
                on_step(self.outermost[1], self.outermost[1])

    return Monitor()
