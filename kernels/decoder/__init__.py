"""What the video decoder does between its convolutions.

`reference` has the functions, `ops` the operators, `channel_norm` and `frames` the kernels. The
convolutions are cuDNN's.
"""
