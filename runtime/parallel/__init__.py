"""Several processes on one request.

A `Team` starts them, keeps them in step and notices one that ends. On top of it, the transformers'
rows are shared (Ulysses), and so are the windows of frames.
"""

from magihuman.runtime.parallel.context_parallel import ContextParallel, share
from magihuman.runtime.parallel.team import PeerFailed, Team

__all__ = [
    "ContextParallel",
    "PeerFailed",
    "Team",
    "share",
]
