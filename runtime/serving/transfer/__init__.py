"""Bodies that clients send, on their way to the disk.

None is ever held whole. A body is taken apart as it comes: its texts stay in memory, which are
few and short, and its files go to the disk (`form`, `document`, `spool`), within one bound for
all clients.
"""
