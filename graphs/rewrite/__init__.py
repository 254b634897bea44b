"""Finding a function in a graph, and putting something else there.

`pattern` traces a reference function and replaces every occurrence of it. `arguments` reads and
replaces what operators are called with, by the names in their schemas. `report` keeps what each
step found and how long it took.
"""

from magihuman.graphs.rewrite.arguments import ArgumentError, arguments, call, with_arguments
from magihuman.graphs.rewrite.pattern import Build, replace
from magihuman.graphs.rewrite.report import CompileError, CompileReport

__all__ = [
    "ArgumentError",
    "Build",
    "CompileError",
    "CompileReport",
    "arguments",
    "call",
    "replace",
    "with_arguments",
]
