"""Videos that several API processes share, by a database and a storage.

`following` knows what others do, `jobs` is the line in front of the engines, `staging` brings files
to an engine's machine and back.
"""
