"""What every kind of clip has in common, whatever its format: `provenance` is what a file says of
where it comes from.
"""
