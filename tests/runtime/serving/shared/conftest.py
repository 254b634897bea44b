from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import pytest
from postgres import postgres

BUCKET = "videos"
COUNT = itertools.count()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture
def postgresql_url(postgres_url) -> str:
    """Of an empty database."""
    import psycopg

    name = f"test{next(COUNT)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres_url.replace("/postgres?", f"/{name}?")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path) -> str:
    """Of an empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/records.sqlite"
    return request.getfixturevalue("postgresql_url")


@pytest.fixture(scope="session")
def s3_server() -> str:
    """The address of a server that speaks as S3 does, in this process."""
    pytest.importorskip("s3fs", reason="the extra [cluster] is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    return f"http://{host}:{port}"  # its thread ends with the process: it waits for its clients


@pytest.fixture
def s3_url(s3_server, monkeypatch) -> str:
    """A folder of a bucket, with what whoever uses it has in the environment."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem(skip_instance_cache=True).makedirs(BUCKET, exist_ok=True)
    return f"s3://{BUCKET}/test{next(COUNT)}"


@pytest.fixture(params=["file", "memory", "s3"])
def storage_url(request, tmp_path) -> str:
    """Of an empty storage."""
    if request.param == "file":
        return str(tmp_path / "storage")
    if request.param == "memory":
        return f"memory://test{next(COUNT)}"
    return request.getfixturevalue("s3_url")
