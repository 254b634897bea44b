"""What a captured CUDA graph holds, read back from the driver through cuda-bindings."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch


class NoBindingsError(ImportError):
    """The package that reads graphs is not installed."""


@dataclass(frozen=True)
class Recorded:
    """Nodes by kind (kernel, memset, memcpy, ...) and kernels by name, child graphs included.

    Names are the driver's: a Triton kernel's is its function's, a C++ kernel's is mangled.
    """

    nodes: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)

    def by_readable_name(self) -> Counter[str]:
        """Kernels by qualified name, without what C++ ones are instantiated for."""
        kernels: Counter[str] = Counter()
        for name, count in self.kernels.items():
            kernels[_qualified(name)] += count
        return kernels


def bindings() -> Any:
    """The module `cuda.bindings.driver`.

    Raises:
        NoBindingsError: it is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NoBindingsError(
            "reading a captured graph needs the package cuda-bindings, which is not installed;"
            " pip install 'magihuman[cuda]'"
        ) from error
    return driver


def recorded(graph: torch.cuda.CUDAGraph) -> Recorded:
    """What was captured into `graph`, which must have been made with `keep_graph=True`.

    Raises:
        NoBindingsError: cuda-bindings is not installed.
    """
    driver = bindings()
    result = Recorded()
    _read(driver, driver.CUgraph(init_value=graph.raw_cuda_graph()), result)
    return result


def _qualified(kernel: str) -> str:
    """The qualified name in a mangled one; other names stay as they are."""
    if not kernel.startswith("_ZN"):
        return kernel
    parts, rest = [], kernel[3:]
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        parts.append(rest[match.end() : end])
        rest = rest[end:]
    return "::".join(part for part in parts if not part.startswith("_GLOBAL__N")) or kernel


def _read(driver: Any, graph: Any, result: Recorded) -> None:
    """Add the nodes of a graph, and of its child graphs, to the result."""
    _, count = _call(driver.cuGraphGetNodes, graph)
    nodes, count = _call(driver.cuGraphGetNodes, graph, count)
    for node in nodes[:count]:
        (kind,) = _call(driver.cuGraphNodeGetType, node)
        name = kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()
        result.nodes[name] += 1
        if name == "kernel":
            result.kernels[_kernel_name(driver, node)] += 1
        elif name == "graph":
            (child,) = _call(driver.cuGraphChildGraphNodeGetGraph, node)
            _read(driver, child, result)


def _kernel_name(driver: Any, node: Any) -> str:
    """The name of the kernel that a node launches: a node holds a function of a module or, as
    libraries launch it, a kernel of no context.
    """
    (parameters,) = _call(driver.cuGraphKernelNodeGetParams, node)
    if int(parameters.func):
        (name,) = _call(driver.cuFuncGetName, parameters.func)
    else:
        (name,) = _call(driver.cuKernelGetName, parameters.kern)
    return str(name.decode())


def _call(function: Any, *arguments: Any) -> tuple[Any, ...]:
    """The results of a driver call after its status, which must be success."""
    status, *results = function(*arguments)
    if status.name != "CUDA_SUCCESS":
        raise RuntimeError(f"{function.__name__} failed: {status.name}")
    return tuple(results)
