"""From a plain model to a replayed CUDA graph: capture, rewrite, replay.

`trace` takes a forward pass as one graph, `rewrite` puts operators where it finds reference
functions, `cuda_graphs` records and replays. `transformer`, `decoder` and `text` are the three
models that go this way; `support` says where they can, and `explain` what it changes.
"""
