"""Fragmented MP4: a clip that plays while it is made.

`boxes` lays fragments out, `writer` encodes windows of a clip and writes them.
"""

from magihuman.runtime.media.fragments.writer import Fragments, FragmentWriter

__all__ = ["FragmentWriter", "Fragments"]
