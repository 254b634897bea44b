"""Portable kernels compiled for each architecture without one of its GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from ahead import BF16, E4M3, PORTABLE, build, spills

from magihuman.kernels.attention import portable
from magihuman.kernels.target import SHARED_KIB, Capability, Target, name_of

CAPABILITIES: list[Capability] = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=name_of)
@pytest.mark.parametrize("name", PORTABLE)
def test_portable_kernels_spill_nothing_and_fit_the_shared_memory(
    name: str, capability: Capability, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the model's full size, with the tiles that this architecture gets."""
    case = PORTABLE[name]
    if capability < case.since:
        pytest.skip(f"it is for {name_of(case.since)} and later")
    compiled = build(
        monkeypatch, case.module, case.kernel, lambda: case.launch(capability), capability
    )
    assert compiled.metadata.target.arch == 10 * capability[0] + capability[1]
    assert spills(compiled, tmp_path) == 0
    assert compiled.metadata.shared <= Target("portable", capability).shared_bytes


@pytest.mark.parametrize("capability", SHARED_KIB, ids=name_of)
def test_every_architecture_has_tiles(capability: Capability) -> None:
    """Its own, or those of an earlier one with no more shared memory."""
    bf16 = portable.tile_of(capability, BF16)
    assert bf16 in portable.BF16_TILES.values()
    if capability < (8, 9):
        with pytest.raises(ValueError, match=r"tiles for sm_89, .*, and none that fit sm_8"):
            portable.tile_of(capability, E4M3)
    else:
        assert portable.tile_of(capability, E4M3) in portable.E4M3_TILES.values()
