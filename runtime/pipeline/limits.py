"""What ends a request early: its caller's cancellation, or a deadline."""

from __future__ import annotations

import math
import threading
import time

from magihuman.runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequestError,
)

LOOK_S = 0.02  # how often a waiting request looks at its caller's events, which cannot wake it


class Limits:
    """What ends a request early: the caller's event, its own, and a deadline.

    Attributes:
        stop: set where whoever waits for the request has gone.
    """

    def __init__(
        self, cancel: threading.Event | None = None, deadline_s: float | None = None
    ) -> None:
        """Start the clock.

        cancel: the caller's event. deadline_s: seconds from now after which the request ends.
        Raises `InvalidRequestError` where that is no number above 0.
        """
        if deadline_s is not None and (
            not isinstance(deadline_s, (int, float))
            or isinstance(deadline_s, bool)
            or not 0 < deadline_s < math.inf
        ):
            raise InvalidRequestError(
                f"deadline_s must be a number of seconds above 0, got {deadline_s!r}"
            )
        self.stop = threading.Event()
        self._cancel, self._deadline_s = cancel, deadline_s
        self._end_s = math.inf if deadline_s is None else time.monotonic() + deadline_s

    def check(self) -> None:
        """Raise `Cancelled` or `DeadlineExceeded` once it is time to end."""
        if self.stop.is_set() or (self._cancel is not None and self._cancel.is_set()):
            raise Cancelled("the request was cancelled")
        if time.monotonic() >= self._end_s:
            raise DeadlineExceeded(
                f"the request must be done within {self._deadline_s:g} s and was not; give it more"
                " time, or ask for a smaller or shorter clip"
            )

    def look_s(self) -> float:
        """Seconds until `check` should be called again."""
        return min(LOOK_S, max(0.0, self._end_s - time.monotonic()))
