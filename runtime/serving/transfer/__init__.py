"""Bytes between clients and the disk: bodies that are sent, and videos that are fetched.

Neither is ever held whole. A body is taken apart as it comes: its texts stay in memory, which are
few and short, and its files go to the disk (`form`, `document`, `spool`), within one bound for all
clients. A video is read from the disk as fast as it is fetched (`download`).
"""
