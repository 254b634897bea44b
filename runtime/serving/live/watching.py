"""An answer that lasts as long as a job, and ends when its client leaves."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from magihuman.runtime.serving.errors import ApiError
from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.store import Job, Status
from magihuman.runtime.serving.transfer.download import paced

log = logging.getLogger("magihuman")

MAX_WATCHERS = 256
RETRY_S = 10
# For proxies, which would keep pieces back until they have many.
UNBUFFERED = {"X-Accel-Buffering": "no"}


class Watchers:
    """Counts answers that last. For one event loop."""

    def __init__(self) -> None:
        self._count = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Be one of them. Raises `ApiError` where there are as many as may be."""
        if self._count >= MAX_WATCHERS:
            message = f"no more than {MAX_WATCHERS} clients may watch videos at once; try again"
            headers = {"Retry-After": str(RETRY_S)}
            raise ApiError(503, "too_many_watchers", message, headers=headers)
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1


class Watching(Response):
    """An answer in pieces, each sent once there is something to say.

    The status is sent with the first piece: until then, an answer can be an error. A client that
    takes pieces too slowly is dropped, as `transfer.download` has it.
    """

    def __init__(self, jobs: Jobs, job: Job, watchers: Watchers) -> None:
        super().__init__()
        self.jobs, self.job, self._watchers = jobs, job, watchers

    @abstractmethod
    def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield what is to be sent. Raises `ApiError` before the first."""

    def fields(self) -> Mapping[str, str]:
        """Return the headers, once there is a first piece."""
        return {}

    @property
    def is_gone(self) -> bool:
        """Whether the job has been removed."""
        return self.jobs.get(self.job.id) is not self.job

    @property
    def is_left(self) -> bool:
        """Whether this server makes no more of a job that has not ended: it is about to stop."""
        return self.jobs.is_draining and self.job.status is Status.QUEUED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI has it, until there is no more to say or nobody to say it to."""
        with self._watchers.place():
            answer = asyncio.create_task(self._answer(paced(send)))
            gone = asyncio.create_task(_until_gone(receive))
            try:
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    answer.result()
            except TimeoutError:  # the server closes a connection whose answer has no end
                log.warning("%s is watched too slowly, and the client is dropped", self.job.id)
            finally:
                for task in (answer, gone):
                    task.cancel()
                await asyncio.gather(answer, gone, return_exceptions=True)

    async def _answer(self, send: Send) -> None:
        async with aclosing(self.pieces()) as pieces:
            is_begun = False
            async for piece in pieces:
                if not is_begun:
                    await self._begin(send)
                    is_begun = True
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        if not is_begun:
            await self._begin(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, send: Send) -> None:
        fields = {**UNBUFFERED, **self.fields()}
        headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _until_gone(receive: Receive) -> None:
    """Return once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
