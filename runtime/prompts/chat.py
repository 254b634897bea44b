"""One question to an OpenAI-compatible chat endpoint, within a bound of time and of bytes."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from magihuman.runtime.errors import InvalidRequestError, shown

ANSWER_BYTES = 256 * 1024
ANSWER_CHARS = 20_000
ROUTE = "/chat/completions"
Message = Mapping[str, object]


class ChatError(Exception):
    """The endpoint gave no answer that can be used. Its message never has the key in it."""

    def __init__(self, message: str, is_final: bool = True) -> None:
        """is_final: whether asking again would be in vain."""
        super().__init__(message)
        self.is_final = is_final


@dataclass(frozen=True)
class Endpoint:
    """Where questions are sent, and what goes with each.

    Attributes:
        url: of the endpoint, with or without `/chat/completions` at its end, as in
            `http://127.0.0.1:8080/v1`. Only this address is asked: redirects are not followed, and
            no proxy is used.
        model: the name by which the endpoint knows the language model.
        key: sent as a bearer token; never printed.

    Raises `InvalidRequestError` for a URL that is none, or has a password in it, or for a key that
    no header can have.
    """

    url: str
    model: str = "default"
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _split(self.url)
        if not isinstance(self.model, str) or not self.model.strip():
            raise InvalidRequestError(f"the model's name must be text, got {shown(self.model)}")
        if self.key is not None and not (self.key and all("!" <= c <= "~" for c in self.key)):
            raise InvalidRequestError(
                "the key must be printable ASCII without spaces, and not empty"
            )

    def ask(self, messages: Sequence[Message], end_s: float) -> str:
        """The text that the model answers with.

        end_s: by `time.monotonic`, when the wait is over, however slow the other side is. Raises
        `ChatError`.
        """
        body = json.dumps({"model": self.model, "messages": list(messages)}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"User-Agent": "magihuman", "Connection": "close"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        text = _text(_Exchange(_split(self.url), body, headers).result(end_s))
        if self.key is not None and self.key in text:  # which may be printed
            raise ChatError("its answer repeats the key")
        return text


class _Exchange:
    """A request in a thread of its own, so that nothing of it can take longer than is waited."""

    def __init__(self, url: SplitResult, body: bytes, headers: Mapping[str, str]) -> None:
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(url.hostname or "", url.port)
        path = url.path.rstrip("/")
        path = path if path.endswith(ROUTE) else path + ROUTE
        self._path = f"{path}?{url.query}" if url.query else path
        self._body, self._headers = body, headers
        self._socket: socket.socket | None = None
        self._done: queue.SimpleQueue[bytes | ChatError] = queue.SimpleQueue()

    def result(self, end_s: float) -> bytes:
        """The body of a good answer. Raises `ChatError`."""
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise ChatError("there was no time left")
        self._connection.timeout = left_s
        threading.Thread(target=self._run, name="magihuman chat", daemon=True).start()
        try:
            result = self._done.get(timeout=left_s)
        except queue.Empty:
            self._break()
            raise ChatError("it did not answer in time") from None
        if isinstance(result, ChatError):
            raise result
        return result

    def _run(self) -> None:
        try:
            self._done.put(self._exchange())
        except ChatError as error:
            self._done.put(error)
        except TimeoutError:
            self._done.put(ChatError("it did not answer in time"))
        except ssl.SSLCertVerificationError:
            self._done.put(ChatError("its certificate is not trusted"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Of what is raised the kind alone is told: a text might repeat what was sent.
            said = error.strerror if isinstance(error, OSError) else None
            self._done.put(ChatError(said or f"it cannot be talked to ({type(error).__name__})"))
        finally:
            self._connection.close()

    def _exchange(self) -> bytes:
        self._connection.connect()
        self._socket = self._connection.sock  # which the answer takes over
        self._connection.request("POST", self._path, self._body, dict(self._headers))
        with self._connection.getresponse() as answer:
            return _good(answer)

    def _break(self) -> None:
        """End what the thread waits for."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _good(answer: http.client.HTTPResponse) -> bytes:
    """The body of an answer, within its bound. Raises `ChatError` where it is not a good one."""
    if 300 <= answer.status < 400:
        raise ChatError(f"it answered {answer.status}, and redirects are not followed")
    if answer.status != 200:
        is_final = answer.status < 500 and answer.status != 429
        raise ChatError(f"it answered {answer.status}", is_final)
    content = answer.read(ANSWER_BYTES + 1)
    if len(content) > ANSWER_BYTES:
        raise ChatError(f"its answer has more than {ANSWER_BYTES} bytes")
    return content


def _text(content: bytes) -> str:
    """The text of an answer. Raises `ChatError`."""
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        message = "its answer is not JSON with choices[0].message.content"
        raise ChatError(message, is_final=False) from None
    if not isinstance(text, str) or not text.strip():
        raise ChatError("its answer has no text", is_final=False)
    if len(text) > ANSWER_CHARS:
        raise ChatError(f"its text has more than {ANSWER_CHARS} characters", is_final=False)
    return text.encode("utf-8", "replace").decode()  # without halves of surrogate pairs


def _split(url: object) -> SplitResult:
    """The parts of an address. Raises `InvalidRequestError`, without a password in its message."""
    rule = "the endpoint must be an address such as http://127.0.0.1:8080/v1"
    if not isinstance(url, str):
        raise InvalidRequestError(f"{rule}, got {shown(url)}")
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise InvalidRequestError(f"{rule}, got one that cannot be read") from None
    if parts.username is not None or parts.password is not None:
        raise InvalidRequestError(f"{rule}, without a user or a password; give the key by itself")
    if not is_good or any(not "!" <= letter <= "~" for letter in url):
        raise InvalidRequestError(f"{rule}, got {shown(url)}")
    return parts
