"""Kernels compiled at run time, and choices measured at run time.

`nvrtc` compiles and launches CUDA C++, `measured` keeps timings of candidates, `cache` is where
both lie on disk. `language` is Triton, for files that must be importable without it.
"""

UNSET = "unset"  # of a choice between kernels: not made yet
