"""Rewrites of the transformer, a file each, in the order in which `compile` runs them.

Each traces its reference function, finds every occurrence, puts an operator there and says how many
it found.
"""
