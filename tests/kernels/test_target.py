"""Which kernels a GPU gets: Hopper its own, unless others are asked for; all others the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from magihuman.kernels import target
from magihuman.kernels.linear import matmul_portable, routes
from magihuman.kernels.target import Target, target_of

GPU = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("capability", "asked", "expected"),
    [
        ((8, 0), "auto", "portable"),
        ((8, 9), "auto", "portable"),
        ((9, 0), "auto", "hopper"),
        ((9, 0), "portable", "portable"),
        ((10, 0), "auto", "portable"),
        ((12, 0), "portable", "portable"),
    ],
)
def test_hopper_alone_has_kernels_of_its_own(
    capability: tuple[int, int], asked: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is made up; the rules are real."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = target_of(asked, GPU)
    assert (chosen.kernels, chosen.capability) == (expected, capability)
    assert chosen.is_portable == (expected == "portable")
    assert target_of(asked, GPU, (8, 6)) == Target(chosen.kernels, (8, 6))


def test_what_is_no_set_of_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels must be one of auto, portable, got 'hopper'"):
        target_of("hopper", GPU)  # type: ignore[arg-type]  # as a caller may


@pytest.mark.parametrize(
    ("capability", "kib", "name"),
    [
        ((8, 0), 163, "sm_80"),
        ((8, 6), 99, "sm_86"),
        ((8, 9), 99, "sm_89"),
        ((9, 0), 227, "sm_90"),
        ((12, 1), 99, "sm_121"),
        ((13, 7), 99, "sm_137"),  # of which nothing is known yet
    ],
)
def test_shared_memory(capability: tuple[int, int], kib: int, name: str) -> None:
    given = Target(target.PORTABLE, capability)
    assert (given.shared_bytes, given.architecture) == (1024 * kib, name)


def test_portable_products_know_no_tile_of_hopper() -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        portable = routes.names_for(Target(target.PORTABLE, (9, 0)), dtype)
        assert not set(portable) & set(routes.TILES)
        hopper = routes.names_for(Target(target.HOPPER, (9, 0)), dtype)
        assert set(routes.TILES) <= set(hopper) and hopper == routes.names_for(None, dtype)


def test_int8_runs_by_portable_tiles_on_hopper_too() -> None:
    hopper = routes.names_for(Target(target.HOPPER, (9, 0)), torch.int8)
    assert hopper == routes.names_for(Target(target.PORTABLE, (9, 0)), torch.int8)
    assert hopper and set(hopper) <= set(matmul_portable.TILES)


@pytest.mark.parametrize("capability", [*target.SHARED_KIB, (13, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_every_architecture_has_tiles_of_products(
    capability: tuple[int, int], dtype: torch.dtype
) -> None:
    """That fit it; and PyTorch's product where operands are bf16."""
    given = Target(target.PORTABLE, capability)
    names = routes.names_for(given, dtype)
    assert (names[0] == routes.LIBRARY) == (dtype == torch.bfloat16)
    tiles = [matmul_portable.TILES[name] for name in names if name != routes.LIBRARY]
    assert len(tiles) > 1
    assert all(tile.shared_bytes <= given.shared_bytes for tile in tiles)
