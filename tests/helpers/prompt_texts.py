"""Prompts in the model's form, and an endpoint that rewrites, for tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BEFORE = (
    "A middle-aged woman with short grey hair and round glasses wears a dark green sweater over a"
    " white shirt. She sits upright in front of a plain beige wall, and soft daylight comes from "
    "the left. Her disposition is calm and a little amused. At first her lips are closed, her "
    "eyes rest on the lens, and her eyebrows are level. She breathes in, the corners of her mouth"
    " rise, and small folds appear beside her eyes. In a low, even voice, at a slow and steady "
    "pace, she says:"
)
AFTER = (
    "With each stressed syllable her brows lift slightly and her jaw opens a little further, "
    "while the muscles of her cheeks tighten and let go. Her head tilts a few degrees to the "
    "right at the end of the sentence and comes back. Afterwards her lips close softly, she "
    "blinks twice, and the smile stays on her face. Her shoulders and her hands do not move. The "
    "shot is a static medium close-up at the height of her eyes, in sharp focus."
)


def body(words: str) -> str:
    """Between 150 and 200 words that lack nothing, around what is said."""
    return f'{BEFORE} "{words}". {AFTER}'


def answer(text: str) -> bytes:
    """What an endpoint sends whose model has said this."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@dataclass
class Asked:
    """One question to the endpoint."""

    path: str
    headers: dict[str, str]
    body: dict


@dataclass
class Stub:
    """An endpoint on loopback. reply: status, headers and body by the number of the question."""

    reply: Callable[[int], tuple[int, dict[str, str], bytes]]
    asked: list[Asked] = field(default_factory=list)
    slow_s: float = 0.0
    url: str = ""
    stop: threading.Event = field(default_factory=threading.Event)


@contextmanager
def stub(*texts: str | tuple[int, dict[str, str], bytes], drip: bool = False) -> Iterator[Stub]:
    """An endpoint that answers one after another, and the last again and again.

    drip: whether a byte of the answer comes each 50 ms, and none is its last.
    """
    replies = [(200, {}, answer(text)) if isinstance(text, str) else text for text in texts]
    running = Stub(lambda number: replies[min(number, len(replies) - 1)])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            asked = Asked(self.path, dict(self.headers), json.loads(self.rfile.read(length)))
            running.asked.append(asked)
            status, headers, content = running.reply(len(running.asked) - 1)
            try:
                if drip:
                    while not running.stop.wait(0.05):
                        self.wfile.write(b"H")
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # whoever asked has gone
                pass

        def do_GET(self) -> None:
            running.asked.append(Asked(self.path, dict(self.headers), {}))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    running.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield running
    finally:
        running.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def within(seconds: float, start_s: float) -> bool:
    """Whether no more have passed since a time by `time.monotonic`."""
    return time.monotonic() - start_s <= seconds
