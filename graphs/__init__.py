"""From a plain model to a replayed CUDA graph: capture, rewrite, replay."""
