"""Matrix products and what follows them.

`matmul_sm90` is the product for Hopper, with an activation or an addition in its epilogue; `routes`
measures which way is fastest for a shape. `quantize` makes e4m3 rows, `activations` the activation
by itself.
"""
