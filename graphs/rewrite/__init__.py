"""Finding a function in a graph, and putting something else there.

`pattern` traces a reference function and replaces every occurrence of it.
"""

from magihuman.graphs.rewrite.pattern import Build, replace
from magihuman.graphs.rewrite.report import CompileError, Report

__all__ = [
    "Build",
    "CompileError",
    "Report",
    "replace",
]
