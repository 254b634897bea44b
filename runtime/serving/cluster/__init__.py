"""The Ray cluster of one server: closed to others, and gone when the server ends.

`isolation` is for before Ray is imported, `loopback` for the processes of engines.
"""
