"""Rewrites of the video decoder.

`blocks` puts operators in channels-last layout for its blocks, `joins` moves biases and additions
into the operator that reads their sum, `trim` leaves out frames that are thrown away, and `crop`
what a band of the picture does not need.
"""
