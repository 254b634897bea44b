"""Reading a graph, from a stand-in for the driver that answers as cuda-bindings does."""

from __future__ import annotations

import enum
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from magihuman.graphs.cuda_graphs.recorded import NoBindingsError, Recorded, recorded

CAT = "_ZN2at6native40_GLOBAL__N__0a1b2c3d_8_Shape_cu_deadbeef20CatArrayBatchedCopy_IfEEvPT_"


class Status(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class Kind(enum.Enum):
    CU_GRAPH_NODE_TYPE_KERNEL = 0
    CU_GRAPH_NODE_TYPE_MEMSET = 2
    CU_GRAPH_NODE_TYPE_GRAPH = 4


# A node is its kind and, for a kernel, the handles of its function and its kernel.
KERNEL, MEMSET, CHILD = Kind
GRAPHS: dict[int, list[tuple[Any, ...]]] = {
    7: [(KERNEL, 1, 0), (KERNEL, 1, 0), (MEMSET,), (KERNEL, 0, 2), (CHILD, 8)],
    8: [(KERNEL, 3, 0), (MEMSET,)],
    9: [],
}
FUNCTIONS = {1: b"_attention", 3: CAT.encode()}
KERNELS = {2: b"nvjet_sm90_tst_64x8"}


class Driver:
    CUgraph = staticmethod(lambda init_value: init_value)

    @staticmethod
    def cuGraphGetNodes(graph: int, count: int = 0) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, GRAPHS[graph][:count], len(GRAPHS[graph])

    @staticmethod
    def cuGraphNodeGetType(node: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, node[0]

    @staticmethod
    def cuGraphChildGraphNodeGetGraph(node: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, node[1]

    @staticmethod
    def cuGraphKernelNodeGetParams(node: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, SimpleNamespace(func=node[1], kern=node[2])

    @staticmethod
    def cuFuncGetName(handle: int) -> tuple[Any, ...]:  # noqa: N802
        if handle not in FUNCTIONS:
            return Status.CUDA_ERROR_INVALID_VALUE, None
        return Status.CUDA_SUCCESS, FUNCTIONS[handle]

    @staticmethod
    def cuKernelGetName(handle: int) -> tuple[Any, ...]:  # noqa: N802
        return Status.CUDA_SUCCESS, KERNELS[handle]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("cuda.bindings")
    package.driver = Driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)


def graph(handle: int) -> Any:
    return SimpleNamespace(raw_cuda_graph=lambda: handle)


@pytest.mark.usefixtures("driver")
def test_nodes_of_a_graph_and_its_children() -> None:
    found = recorded(graph(7))
    assert found.nodes == Counter(kernel=4, memset=2, graph=1)
    assert found.kernels == Counter({"_attention": 2, "nvjet_sm90_tst_64x8": 1, CAT: 1})
    assert recorded(graph(9)) == Recorded()


@pytest.mark.usefixtures("driver")
def test_a_failing_call_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FUNCTIONS, 3)
    with pytest.raises(RuntimeError, match="cuFuncGetName failed: CUDA_ERROR_INVALID_VALUE"):
        recorded(graph(7))


def test_readable_names() -> None:
    add = "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_15CUDAFunctor_addIfEEEEviT0_"
    square = "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11pow_functorEEEviT0_"
    found = Recorded(kernels=Counter({"_swiglu7": 3, CAT: 1, add: 2, square: 5, "_ZNK3x": 1}))
    assert found.by_readable_name() == Counter(
        {
            "_swiglu7": 3,
            "at::native::CatArrayBatchedCopy_": 1,
            "at::native::vectorized_elementwise_kernel": 7,
            "_ZNK3x": 1,
        }
    )


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(NoBindingsError, match=r"pip install 'magihuman\[cuda\]'"):
        recorded(graph(7))
