"""Between the processes that share a sequence.

`exchange` swaps rows for heads and back around attention, `head_pack` has the copies before and
after it.
`peers` exchanges between GPUs that can write to each other's memory, which `rooms` maps.
"""
