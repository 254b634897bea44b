"""Graph rewrites, one file each, in the order in which `compile.py` runs them."""
