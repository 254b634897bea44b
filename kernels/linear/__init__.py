"""Matrix products and what follows them.

`matmul_sm90` is the product for Hopper, with an activation or an addition in its epilogue, and
`matmul_portable` that for all GPUs; `routes` measures which way is fastest for a shape. `quantize`
makes rows in 8 bits, `activations` the activation by itself. `scaled` has what the operators over 8
bits compute.
"""
