"""The tables, and how each version of them is made of the one before."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

METADATA = sa.MetaData()

# Prefixes, since a database can be shared with others.
VIDEOS = sa.Table(
    "magihuman_videos",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),  # times are seconds since 1970
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("expires_at", sa.Double),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("request", sa.Text, nullable=False),  # JSON in ASCII: what was asked for
    sa.Column("result", sa.Text, nullable=False),  # and what has come of it
    sa.Column("owner", sa.String(64)),  # the API process that has it, until `lease_until`
    sa.Column("lease_until", sa.Double),
    sa.Column("generation", sa.Integer, nullable=False),  # one more with each owner
    sa.Column("stage", sa.String(64)),  # as its owner has told when it last renewed the lease
    sa.Column("progress", sa.Integer, nullable=False, server_default="0"),
    sa.Column("revision", sa.Integer, nullable=False, server_default="0"),  # one more each change
    sa.Column("changed_at", sa.Double, nullable=False),
    sa.Index("magihuman_videos_line", "status", "created_at"),
    sa.Index("magihuman_videos_changed", "changed_at"),
)
VERSIONS = sa.Table("magihuman_schema", METADATA, sa.Column("version", sa.Integer, nullable=False))

Migration = Callable[[sa.Connection], None]


def _first(connection: sa.Connection) -> None:
    METADATA.create_all(connection)
    connection.execute(VERSIONS.insert().values(version=0))


MIGRATIONS: tuple[Migration, ...] = (_first,)
VERSION = len(MIGRATIONS)


def version(connection: sa.Connection) -> int:
    """Return the version of the tables, 0 where there are none."""
    if not sa.inspect(connection).has_table(VERSIONS.name):
        return 0
    return connection.scalar(sa.select(VERSIONS.c.version)) or 0


def migrate(connection: sa.Connection) -> None:
    """Bring the tables to `VERSION`. For one connection at a time, within a transaction."""
    for number in range(version(connection), VERSION):
        MIGRATIONS[number](connection)
        connection.execute(VERSIONS.update().values(version=number + 1))
