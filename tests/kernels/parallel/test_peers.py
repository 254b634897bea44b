"""The kernels that write to the memory of other GPUs, compiled without one.

What they send is tested on a GPU, in tests/gpu/kernels/test_peers.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings")
pytest.importorskip("triton")

from ahead import resource_usage

from magihuman.kernels.jit import nvrtc
from magihuman.kernels.parallel import peers

COPIES = [
    (("PACK", pack), ("VECTOR", vector), ("ELEMENT", element))
    for pack, vector, element in ((0, 16, 2), (1, 16, 2), (1, 8, 4), (1, 2, 2))
]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("name", "macros"), [*(("exchange", macros) for macros in COPIES), ("exchange_qkv", ())]
)
def test_kernels_compile_without_spills(
    name: str, macros: tuple[tuple[str, int], ...], architecture: str, tmp_path: Path
) -> None:
    """And leave room for two blocks on a multiprocessor, as they are launched."""
    if name == "exchange_qkv" and architecture < "sm_89":
        pytest.skip("has no e4m3")
    code = nvrtc.compile_cubin(peers.source_of(name, macros), architecture, tmp_path)
    usage = resource_usage(code, tmp_path)
    assert re.findall(r"(?:LOCAL|STACK):(\d+)", usage) == ["0", "0"]
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    assert registers * peers.THREADS * peers.BLOCKS_EACH <= 65536
