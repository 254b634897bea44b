"""CUDA graphs of any model: recorded, kept, given up.

`pool` records them into one memory pool and `budget` says which to give up at its limit.
`addresses` checks that nothing a graph reads has moved; `recorded` reads a graph's kernels back.
"""

from magihuman.graphs.cuda_graphs import pool
from magihuman.graphs.cuda_graphs.addresses import addresses, check_addresses
from magihuman.graphs.cuda_graphs.pool import Captures, bucket_of
from magihuman.graphs.cuda_graphs.recorded import NoBindingsError, Recorded, bindings, recorded

__all__ = [
    "Captures",
    "NoBindingsError",
    "Recorded",
    "addresses",
    "bindings",
    "bucket_of",
    "check_addresses",
    "pool",
    "recorded",
]
