"""Which attention kernels can run is a query that never launches one."""

from __future__ import annotations

import importlib.metadata
from math import prod
from pathlib import Path

import pytest
import torch

from magihuman.kernels.attention import backends

pytest.importorskip("triton")
from magihuman.kernels import ops
from magihuman.kernels.jit import cache, measured
from magihuman.kernels.linear import routes
from magihuman.kernels.linear.matmul_sm90 import Epilogue
from magihuman.kernels.target import HOPPER, PORTABLE, Target

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_without_a_gpu_there_is_none() -> None:
    assert backends.usable(128, CPU) == []
    assert backends.why_not("gluon", 128, CPU) == "it needs a GPU"
    assert "there are gluon, triton, fa3, cudnn" in str(backends.why_not("flash", 128, CPU))
    with pytest.raises(RuntimeError, match="gluon: it needs a GPU; triton: it needs a GPU"):
        backends.fastest(10, 4, 2, 64, CPU)


@pytest.mark.parametrize(
    ("capability", "dim", "triton", "expected"),
    [
        ((9, 0), 128, "3.6.0", {"gluon": None, "triton": None, "cudnn": None}),
        ((9, 0), 96, "3.6.0", {"gluon": "32, 64 or 128", "triton": "not 96", "cudnn": None}),
        ((9, 0), 128, "3.7.1", {"gluon": "triton 3.6, whose Gluon changes", "triton": None}),
        ((10, 0), 128, "3.6.0", {"gluon": "sm_90, this GPU is sm_100", "triton": None}),
        ((8, 0), 128, "3.6.0", {"gluon": "sm_80", "triton": "sm_80", "cudnn": None}),
        ((7, 5), 128, "3.6.0", {"cudnn": "sm_80", "portable sm_80": "sm_80 or newer"}),
        ((12, 0), 128, "3.9.0", {"gluon": "sm_90", "portable sm_120": None}),
        ((8, 6), 96, "3.6.0", {"portable sm_86": "not 96"}),
    ],
)
def test_reasons(
    capability: tuple[int, int],
    dim: int,
    triton: str,
    expected: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The machine is made up; the rules are the real ones."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton)
    for name, reason in expected.items():
        reason_given = backends.why_not(name, dim, GPU)
        assert reason_given is None if reason is None else reason in str(reason_given)
    assert "fa3-fwd is not installed" in str(backends.why_not("fa3", dim, GPU))


@pytest.mark.parametrize(
    ("capability", "triton", "target", "everywhere", "narrow"),
    [
        ((9, 0), "3.6.0", Target(HOPPER, (9, 0)), backends.NAMES, "gluon"),
        ((9, 0), "3.7.0", Target(HOPPER, (9, 0)), backends.NAMES, "portable sm_90"),
        ((9, 0), "3.6.0", Target(PORTABLE, (9, 0)), ("portable sm_90",), "portable sm_90"),
        ((9, 0), "3.6.0", Target(PORTABLE, (8, 6)), ("portable sm_86",), "portable sm_86"),
        ((8, 7), "3.6.0", Target(PORTABLE, (8, 7)), ("portable sm_86",), "portable sm_86"),
        ((8, 0), "3.6.0", Target(PORTABLE, (8, 0)), ("portable sm_80",), "portable sm_80"),
        ((12, 1), "3.9.0", Target(PORTABLE, (12, 1)), ("portable sm_120",), "portable sm_120"),
    ],
)
def test_every_gpu_has_attention_of_each_kind(
    capability: tuple[int, int],
    triton: str,
    target: Target,
    everywhere: tuple[str, ...],
    narrow: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Frame-local attention, and that over e4m3, too: where Gluon's cannot run, by the portable
    kernel.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton)
    assert backends.names_for(target) == everywhere
    assert backends.local_for(target, 128, GPU) == narrow
    assert backends.why_not(narrow, 128, GPU) is None
    if target.is_portable:  # one needs no timing
        assert backends.fastest(4266, 40, 8, 128, GPU, target) == everywhere[0]


def test_a_kernel_without_room_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's mask is rows x rows, for which a limit may leave no room."""
    times: dict[str, float] = {"gluon": 2.0, "triton": 1.0}

    def milliseconds(name: str, *shape: object) -> float:
        if name not in times:
            raise torch.OutOfMemoryError("tried to allocate 1.68 GiB")
        return times[name]

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(measured, "machine_key", lambda device: {"gpu": "one"})
    monkeypatch.setattr(
        backends, "usable", lambda dim, device, target: ["gluon", "triton", "cudnn"]
    )
    monkeypatch.setattr(backends, "_milliseconds", milliseconds)
    assert backends.fastest(30_000, 40, 8, 128, GPU) == "triton"
    times.clear()
    with pytest.raises(torch.OutOfMemoryError, match=r"1\.68 GiB"):
        backends.fastest(30_001, 40, 8, 128, GPU)


def test_cudnn_is_not_tried_on_long_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where nothing else can run."""
    asked: list[str] = []

    def milliseconds(name: str, *shape: object) -> float:
        asked.append(name)
        return 1.0

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(measured, "machine_key", lambda device: {"gpu": "one"})
    monkeypatch.setattr(backends, "_milliseconds", milliseconds)
    can: list[str] = ["gluon", "triton", "cudnn"]
    monkeypatch.setattr(backends, "usable", lambda dim, device, target: list(can))
    assert backends.fastest(backends.LONG_ROWS, 40, 8, 128, GPU) == "gluon"
    assert backends.fastest(backends.LONG_ROWS - 1, 40, 8, 128, GPU) == "gluon"
    assert asked == ["gluon", "triton", *can]
    can[:] = ["cudnn"]
    assert backends.fastest(backends.LONG_ROWS, 40, 8, 128, GPU) == "cudnn"


@pytest.mark.parametrize("epilogue", ["store", "gelu7", "swiglu7", "add"])
@pytest.mark.parametrize("fp8", [False, True])
def test_measuring_a_product_takes_no_more_than_it_computes(
    epilogue: Epilogue, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only an addition has a stream: one in fp32 beside an activation would pass a limit."""
    sizes: list[int] = []
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *shape, **options: sizes.append(prod(shape)) or zeros(*shape)
    )
    monkeypatch.setattr(
        routes, "quantize_rows", lambda x, dtype: (x.to(torch.float8_e4m3fn), x.float()[:, 0])
    )
    x, weight = torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(32, 16)
    scale = torch.ones(32) if fp8 else None
    routes._runner(epilogue, x, weight, None, 32, scale)
    assert sum(sizes) == (3 * 32 if epilogue == "add" else 0)


def test_measurements_are_kept_by_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"gpu": "one"}
    monkeypatch.setattr(measured, "machine_key", lambda device: dict(machine))
    kept = measured.Measurements(GPU, tmp_path)
    assert kept.get("a") is None
    kept.put("a", {"x": 1.5, "y": 2.0})
    kept.put("b", {"x": 3.0})
    assert measured.Measurements(GPU, tmp_path).get("a") == {"x": 1.5, "y": 2.0}
    machine["gpu"] = "two"
    assert measured.Measurements(GPU, tmp_path).get("a") is None
    machine["gpu"] = "one"
    (file,) = tmp_path.iterdir()
    cache.write(measured.KIND, file.name, b"{damaged", tmp_path)
    assert measured.Measurements(GPU, tmp_path).get("a") is None
    file.write_text("{damaged")
    assert measured.Measurements(GPU, tmp_path).get("a") is None
    unwritable = measured.Measurements(GPU, file)  # a file where the folder should be
    unwritable.put("a", {"x": 1.0})
    assert unwritable.get("a") is None


def test_what_is_unset_is_refused_on_a_gpu() -> None:
    """Which would come here; nothing is launched before a kernel is chosen."""
    x, weight = torch.ones(3, 16), torch.ones(32, 16)
    operands = (
        routes.Quantized(x, torch.ones(3)),
        routes.Quantized(weight, torch.ones(32)),
    )
    calls = {
        "linear": lambda route: routes.linear(x, weight, None, route),
        "activation": lambda route: routes.linear_activation(x, weight, None, "gelu7", 128, route),
        "add": lambda route: routes.linear_add(torch.ones(3, 32), x, weight, None, route),
        "fp8": lambda route: routes.scaled_linear(*operands, None, route),
        "fp8 activation": lambda route: routes.scaled_linear_activation(
            *operands, None, "gelu7", 128, torch.bfloat16, route
        ),
        "fp8 add": lambda route: routes.scaled_linear_add(
            torch.ones(3, 32), *operands, None, route
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="must be chosen before it runs on a GPU, got 'unset'"):
            call(ops.UNSET)
        kind = "e4m3 must be one of" if name.startswith("fp8") else "bf16 must be one of library,"
        with pytest.raises(ValueError, match=rf"{kind} 128x192, .*portable 128x.* got 'any'"):
            call("any")
        if name.startswith("fp8"):
            with pytest.raises(ValueError, match=r"e4m3 must be one of 128x192, .* got 'library'"):
                call(routes.LIBRARY)
    integers = (routes.Quantized(one.values.to(torch.int8), one.scale) for one in operands)
    with pytest.raises(ValueError, match=r"int8 must be one of portable 128x.*got '128x192'"):
        routes.scaled_linear(*integers, None, "128x192")
    q, gate, length = torch.ones(3, 1, 16), torch.ones(3, 1), torch.tensor(3)
    with pytest.raises(ValueError, match="must be chosen before it runs on a GPU, got 'unset'"):
        backends.run(ops.UNSET, q, q, q, gate, length)
    with pytest.raises(ValueError, match="one of gluon, triton, fa3, cudnn, got 'any'"):
        backends.run("any", q, q, q, gate, length)
    for name in (ops.UNSET, "any", "triton"):
        with pytest.raises(ValueError, match=f"must be chosen .*gluon or one of .*got '{name}'"):
            backends.run_fp8(name, q, q, q, (gate, gate), gate, length, None)
