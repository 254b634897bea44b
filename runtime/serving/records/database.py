"""A database by its URL: transactions, its own clock, and errors that say what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from magihuman.runtime.errors import InvalidRequestError, MissingExtraError, OutputError
from magihuman.runtime.serving.records import tables

FILE = "records.sqlite"  # in the server's folder
BUSY_S = 30.0  # for another writer of the same SQLite file
CONNECT_S = 5
POOL = 4  # connections of a process to PostgreSQL
STATEMENT_MS = 30_000
MIGRATING = 0x6D616769  # of the lock that one process holds while it changes tables
WRITING = "is_writing"
CLOCKS = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
}


class RecordsError(OSError):
    """The database does not take or give a record. `strerror` says why.

    Attributes:
        place: where it is: on the disk, or elsewhere.
    """

    place = "disk"


class DatabaseAway(RecordsError):  # noqa: N818 - a state
    """A database on another machine cannot be reached, or refuses."""

    place = "database"


class Database:
    """A database whose tables are made or brought up to date when it is first written to.

    For any thread.
    """

    def __init__(self, url: str) -> None:
        """Connect to nothing yet. Raises `InvalidRequestError` for a URL that cannot be used."""
        self._url = _url(url)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = _sqlite(self._url) if self._is_sqlite else _postgresql(self._url)
        self._is_ready = False
        self.now: sa.ColumnElement[float] = sa.literal_column(
            CLOCKS[self._url.get_backend_name()], sa.Double
        )

    def __str__(self) -> str:
        return self._url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Give a connection that changes nothing. Raises `RecordsError`."""
        with self._errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Give a connection whose changes hold once the context ends well. Raises `RecordsError`.

        Raises `OutputError` where the tables are of a later version of this package.
        """
        self._prepare()
        with self._begun() as connection:
            yield connection

    def has_tables(self) -> bool:
        """Whether there is something to read. Raises `RecordsError`, and as `writing` does."""
        if self._is_ready:
            return True
        if self._is_sqlite and not os.path.exists(self._url.database or ""):
            return False  # to connect would make it, as open as anybody's files
        with self.reading() as connection:
            version = tables.version(connection)
        if version > tables.VERSION:
            raise OutputError(
                f"the records must be of version {tables.VERSION} at most, and {self} has version"
                f" {version}; start a release that knows it, or name another database"
            )
        self._is_ready = version == tables.VERSION
        return version > 0

    def check(self) -> None:
        """Raise `OutputError` where it cannot be read, or is of a later release."""
        try:
            self.has_tables()
        except RecordsError as error:
            raise OutputError(
                f"the records must be a database that can be read, and {self} is not:"
                f" {error.strerror}; mend it or bring it back, or name another"
            ) from error

    def close(self) -> None:
        """Close what is connected."""
        self._engine.dispose()

    def _prepare(self) -> None:
        if self._is_ready:
            return
        self.has_tables()
        if self._is_ready:
            return
        if self._is_sqlite:
            self._make_file()
        with self._begun() as connection:
            if not self._is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATING)))
            tables.migrate(connection)
        self._is_ready = True

    @contextmanager
    def _begun(self) -> Iterator[sa.Connection]:
        """Give a connection that may write."""
        options = {WRITING: True}
        with (
            self._errors(),
            self._engine.connect() as connection,
            connection.execution_options(**options).begin(),
        ):
            yield connection

    def _make_file(self) -> None:
        """Make the file, which is then for nobody else; SQLite makes others as open as it is."""
        place = self._url.database
        assert place is not None
        try:
            Path(place).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        except OSError as error:
            raise RecordsError(error.errno, f"{place}: {error.strerror}") from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            kind = RecordsError if self._is_sqlite else DatabaseAway
            raise kind(_number(error), _reason(error)) from error


def in_folder(folder: Path) -> str:
    """Return the URL of a folder's own records."""
    return sa.URL.create("sqlite", database=os.fspath(folder / FILE)).render_as_string()


def _url(text: str) -> sa.URL:
    rule = "the database must be postgresql://USER:PASSWORD@HOST/NAME, or sqlite:///FILE"
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise InvalidRequestError(f"{rule}, got what is no URL") from None
    kind = url.get_backend_name()
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise InvalidRequestError(f"{rule}, got {kind}://")
    if url.database in (None, "", ":memory:"):
        raise InvalidRequestError(f"{rule}, got sqlite without a file; it keeps what a server has")
    return url.set(drivername="sqlite")


def _sqlite(url: sa.URL) -> sa.Engine:
    """Open the file for each transaction anew: a disk may refuse, and be well again later."""
    engine = sa.create_engine(url, poolclass=NullPool, connect_args={"timeout": BUSY_S})

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None  # or Python begins transactions of its own

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        is_writing = connection.get_execution_options().get(WRITING)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")

    return engine


def _postgresql(url: sa.URL) -> sa.Engine:
    try:
        return sa.create_engine(
            url,
            pool_size=POOL,
            pool_pre_ping=True,
            pool_timeout=CONNECT_S,
            connect_args={
                "client_encoding": "utf8",  # where the database has none of its own
                "connect_timeout": CONNECT_S,
                "options": f"-c statement_timeout={STATEMENT_MS}",
            },
        )
    except ModuleNotFoundError as error:
        raise MissingExtraError("PostgreSQL", "cluster", error.name or "psycopg") from error


def _number(error: sa.exc.SQLAlchemyError) -> int:
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0) & 0xFF
    return {8: errno.EROFS, 13: errno.ENOSPC}.get(code, errno.EIO)


def _reason(error: sa.exc.SQLAlchemyError) -> str:
    """Return what the database says, in a line, without what it was asked."""
    cause = getattr(error, "orig", None) or error
    return " ".join(str(cause).split()) or type(cause).__name__
