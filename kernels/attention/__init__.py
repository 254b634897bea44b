"""Attention and what stands right before and after it.

`gluon` (bf16) and `fp8` are written for Hopper and share `tiles`, `triton` needs Hopper or later;
`portable` is for every GPU from sm_80 on, over bf16 and e4m3. `backends` names all and measures
which is fastest for a shape. `qk_norm_rope` and `qkv_fp8` lay out queries, keys and values and
share `rotary`, `head_gate` is for kernels that cannot apply the gate themselves.
"""
