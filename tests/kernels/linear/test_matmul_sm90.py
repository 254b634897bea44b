"""The Hopper product compiled without a Hopper: every tile that a route uses, with every epilogue.

What it computes is tested on a GPU, in tests/gpu/kernels/test_matmul.py.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.bindings")
pytest.importorskip("triton")

from ahead import resource_usage

from magihuman.kernels.jit import cache, nvrtc
from magihuman.kernels.linear import routes
from magihuman.kernels.linear.matmul_sm90 import (
    BARRIER_BYTES,
    CONSUMERS,
    DEPTH_BYTES,
    EPILOGUES,
    FP8,
    PANEL,
    PANEL_BYTES,
    ROWS,
    SHARED_BYTES,
    STAGES,
    Epilogue,
    Tile,
    compile_tiles,
    out_dtypes,
    ring_panels,
    source,
)

OUTPUTS = [(epilogue, dtype) for epilogue in EPILOGUES for dtype in out_dtypes(epilogue)]
# Of bf16 operands no pass asks for e4m3.
CASES = [(*out, fp8) for out in OUTPUTS for fp8 in (False, True) if fp8 or out[1] != FP8]


@pytest.mark.parametrize("route", routes.TILES)
@pytest.mark.parametrize(("epilogue", "out_dtype", "fp8"), CASES)
def test_every_kernel_compiles_without_spills(
    route: str, epilogue: Epilogue, out_dtype: torch.dtype, fp8: bool, tmp_path: Path
) -> None:
    text = source(routes.TILES[route], epilogue, fp8, out_dtype)
    code = nvrtc.compile_cubin(text, "sm_90a", tmp_path)
    usage = resource_usage(code, tmp_path)
    assert re.findall(r"(?:LOCAL|STACK):(\d+)", usage) == ["0", "0"]
    # 168 a thread at launch, which the warp groups then share out as 104, 200 and 200.
    assert re.search(r"REG:168\b", usage)


def test_a_compiler_that_is_not_found_makes_it_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc as bindings

    def fail() -> None:
        raise RuntimeError("libnvrtc.so is not found")

    nvrtc.is_available.cache_clear()
    assert nvrtc.is_available()
    monkeypatch.setattr(bindings, "nvrtcVersion", fail)
    nvrtc.is_available.cache_clear()
    assert not nvrtc.is_available()
    monkeypatch.undo()
    nvrtc.is_available.cache_clear()


NOTHING = 'extern "C" __global__ void nothing() {}'


def test_kept_code_is_used_again(tmp_path: Path) -> None:
    code = nvrtc.compile_cubin(NOTHING, "sm_90a", tmp_path)
    other = nvrtc.compile_cubin(NOTHING.replace("nothing", "other"), "sm_90a", tmp_path / "other")
    (kept,) = tmp_path.glob("*[0-9a-f]")
    cache.write(nvrtc.KIND, kept.name, other, tmp_path)
    assert nvrtc.compile_cubin(NOTHING, "sm_90a", tmp_path) == other != code
    assert nvrtc.compile_cubin(NOTHING, "sm_90", tmp_path) not in (other, code)


@pytest.mark.parametrize(
    "damage",
    [
        lambda code: b"",
        lambda code: b"kept",
        lambda code: code[:40],
        lambda code: code[: len(code) // 2],
        lambda code: code[:-1],
        lambda code: bytes(len(code)),
        lambda code: random.Random(0).randbytes(len(code)),
        lambda code: Path(sys.executable).resolve().read_bytes(),  # for another machine
    ],
)
def test_what_is_no_code_for_a_gpu_is_compiled_again(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    """Also where it was kept as anything is."""
    code = nvrtc.compile_cubin(NOTHING, "sm_90a", tmp_path)
    (kept,) = tmp_path.iterdir()
    cache.write(nvrtc.KIND, kept.name, damage(code), tmp_path)
    assert nvrtc.compile_cubin(NOTHING, "sm_90a", tmp_path) == code
    assert cache.read(nvrtc.KIND, kept.name, tmp_path) == code


def test_a_mistake_comes_with_the_compilers_words(tmp_path: Path) -> None:
    with pytest.raises(nvrtc.CudaError, match=r"(?s)does not compile for sm_90a.*undefined_thing"):
        nvrtc.compile_cubin(
            'extern "C" __global__ void f() { undefined_thing(); }', "sm_90a", tmp_path
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tile", routes.TILES.values(), ids=routes.TILES)
@pytest.mark.parametrize("fp8", [False, True])
def test_panels_fit_the_shared_memory(tile: Tile, fp8: bool) -> None:
    panels = ring_panels(tile, fp8)
    whole = CONSUMERS * tile.columns // PANEL
    blocks = STAGES * DEPTH_BYTES * (ROWS + tile.columns)
    scales = CONSUMERS * tile.columns * 4 if fp8 else 0
    barriers = 2 * 8 * (STAGES + panels)
    assert barriers <= BARRIER_BYTES
    assert blocks + panels * PANEL_BYTES + scales + BARRIER_BYTES <= SHARED_BYTES
    # With less than one consumer's part each would wait for the epilogue of its own.
    assert whole // CONSUMERS <= panels <= whole


def test_tiles_compiled_side_by_side_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    tiles = list(routes.TILES.values())[:2]
    compile_tiles(tiles, "store", False, torch.bfloat16)
    names = [path.name for path in (tmp_path / nvrtc.KIND).iterdir()]
    kept = {cache.read(nvrtc.KIND, name) for name in names}
    assert len(kept) == 2
    text = source(tiles[0], "store", False, torch.bfloat16)
    assert nvrtc.compile_cubin(text, "sm_90a") in kept
