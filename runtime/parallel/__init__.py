"""Several processes on one request.

`team` starts them, keeps them in step and notices one that ends. On top of it, `context_parallel`
shares the transformers' rows (Ulysses) and the windows of frames.
"""

from magihuman.runtime.parallel.context_parallel import ContextParallel, share
from magihuman.runtime.parallel.team import PeerFailed, Team, refuse_second

__all__ = [
    "ContextParallel",
    "PeerFailed",
    "Team",
    "refuse_second",
    "share",
]
