"""The records of videos in SQL: SQLite in the server's folder, or PostgreSQL by URL.

`tables` has the schema and its versions, `database` speaks to either kind, `records` reads and
writes jobs.
"""
