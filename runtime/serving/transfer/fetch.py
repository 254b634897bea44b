"""Files fetched from addresses in requests: of named hosts alone, and never of private ones."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from magihuman.runtime.serving.errors import ApiError, invalid, shown

DEADLINE_S = 20.0  # for a file, from its name's look-up on
WAIT_S = 10.0  # for the next bytes
PORTS = {"http": 80, "https": 443}
PIECE_BYTES = 2**18


def is_address(text: str) -> bool:
    """Whether a text is an address of the web, and no data URL."""
    return text[:8].lower().startswith(("http://", "https://"))


def fetched(address: str, name: str, hosts: Sequence[str], limit_bytes: int) -> Iterator[bytes]:
    """Yield what an address has. Redirects are not followed.

    The host's address is looked up once, and the connection made to what was checked.

    name: of the field. hosts: those allowed, each with a port where it is not the usual one.
    Raises `ApiError`.
    """
    parts = _allowed(address, name, hosts)
    is_late = threading.Event()
    try:
        connection = _connection(parts, name)
        timer = threading.Timer(DEADLINE_S, _end, (connection.sock, is_late))
        timer.start()
        try:
            yield from _content(connection, parts, name, limit_bytes)
            if is_late.is_set():  # a file without a length ends like this, too
                raise _failed(name, "it was cut")
        finally:
            timer.cancel()
            connection.close()
    except (OSError, http.client.HTTPException, ApiError) as error:
        if is_late.is_set():
            raise _failed(name, f"it takes longer than {DEADLINE_S:g} s") from None
        if isinstance(error, ApiError):
            raise
        raise _failed(name, f"there was a {type(error).__name__}") from None


def _content(
    connection: http.client.HTTPConnection, parts: SplitResult, name: str, limit_bytes: int
) -> Iterator[bytes]:
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection.request("GET", target, headers={"Accept": "*/*"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise _failed(name, f"it answered {answer.status}, and redirects are not followed")
    taken = 0
    while piece := answer.read1(PIECE_BYTES):
        taken += len(piece)
        if taken > limit_bytes:
            raise _failed(name, f"it has more than {limit_bytes} bytes")
        yield piece
    if answer.length:  # it has told of more
        raise _failed(name, "it ended before its end")


def _end(connection: socket.socket, is_late: threading.Event) -> None:
    """End a connection that takes too long, whatever waits for it."""
    is_late.set()
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _allowed(address: str, name: str, hosts: Sequence[str]) -> SplitResult:
    """Return an address in parts, of a host that is allowed."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise _failed(name, "it is no address") from None
    host = (parts.hostname or "").lower()
    whole = host if port in (None, PORTS[parts.scheme.lower()]) else f"{host}:{port}"
    if parts.username is not None or not address.isascii() or not address.isprintable():
        raise _failed(name, "it is no plain address")
    if " " in address or whole not in {each.lower() for each in hosts}:
        raise invalid(
            f"{shown(name)} must be on a host that this server fetches from"
            f" ({', '.join(hosts)}), got {shown(whole)!r}; send the file itself, or a data URL",
            name,
        )
    return parts


def _connection(parts: SplitResult, name: str) -> http.client.HTTPConnection:
    """Return a connection to a public address of a host."""
    is_secure = parts.scheme.lower() == "https"
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme.lower()]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    places = [place for *_, place in found]
    if not all(is_public(str(place[0])) for place in places):
        raise _failed(name, "its host is on a private network")
    plain = socket.create_connection((str(places[0][0]), port), timeout=WAIT_S)
    connection = http.client.HTTPConnection(host, port, timeout=WAIT_S)
    try:
        connection.sock = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            if is_secure
            else plain
        )
    except BaseException:
        plain.close()
        raise
    return connection


def is_public(text: str) -> bool:
    """Whether an address belongs to the internet at large, and to no network of its own."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global and not address.is_multicast


def _failed(name: str, reason: str) -> ApiError:
    return invalid(
        f"{shown(name)} must be an address that can be fetched, and {reason}; send the file"
        " itself, or a data URL",
        name,
    )
