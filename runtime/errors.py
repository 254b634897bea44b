"""Errors of the runtime. Messages give the rule, the value and the remedy."""

import reprlib
from collections.abc import Sequence
from typing import Literal, Self

LONGEST_SHOWN = 200  # letters of a text
MOST_SHOWN = 12  # items of a list, and of the lists in it

Outcome = Literal["done", "cancelled", "rejected", "failed"]


class MagiHumanError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidRequestError(MagiHumanError, ValueError):
    """A request cannot be served as asked; raised before any denoising."""


class CheckpointError(MagiHumanError):
    """Model files are missing, damaged or not what was expected."""


class DeviceError(MagiHumanError):
    """The device cannot hold or run what was asked."""


class NonFiniteError(MagiHumanError):
    """A clip would have been wrong: NaN or infinity came out of a model. Nothing is written.

    Attributes:
        component: the model that made it, such as "transformer" or "video decoder".
        stage: as in `Video.timings_s`.
        step: of the stage, from 1: a step of denoising, a window of the decoder; None elsewhere.
    """

    def __init__(self, component: str, stage: str, step: int | None = None) -> None:
        at = "" if step is None else f", step {step}"
        super().__init__(
            f"what each stage makes must be finite, got NaN or infinity from the {component} (stage"
            f" {stage}{at}); look for damaged weights with `magihuman inspect FOLDER --check`"
        )
        self.component, self.stage, self.step = component, stage, step

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, int | None]]:
        return type(self), (self.component, self.stage, self.step)


class EngineUnusable(DeviceError):  # noqa: N818 - a state, not a fault of this request
    """The GPU has failed for good in this process; only a new process can load again."""


class MissingExtraError(MagiHumanError):
    """What was asked needs libraries that are not installed; the message has pip's command.

    Attributes:
        extra: of this package, such as "serve".
    """

    def __init__(self, what: str, extra: str, missing: str) -> None:
        super().__init__(
            f"{what} needs {missing}, which is not installed: pip install 'magihuman[{extra}]'"
        )
        self.what, self.extra, self.missing = what, extra, missing

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str]]:
        return type(self), (self.what, self.extra, self.missing)


class OutputError(MagiHumanError, OSError):
    """The result could not be written; nothing half-written is left behind."""


class QueueFull(MagiHumanError):  # noqa: N818 - an outcome, not a fault
    """This request was refused at once: as many requests wait as may."""


class Cancelled(MagiHumanError):  # noqa: N818 - an outcome the caller asked for, not a fault
    """The request was cancelled between steps; the engine stays usable."""


class DeadlineExceeded(MagiHumanError, TimeoutError):  # noqa: N818 - as Cancelled
    """The request was not done in the time given; the engine stays usable."""


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise `InvalidRequestError` where the argument `name` is none of what is allowed."""
    if value not in allowed:
        options = ", ".join(map(repr, allowed))
        raise InvalidRequestError(f"{name} must be one of {options}, got {value!r}")


def shown(value: object) -> str:
    """A value out of a file or a request, for a message: as `repr`, but short, however long or deep
    the value is.
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = LONGEST_SHOWN
    short.maxlist = short.maxtuple = short.maxdict = MOST_SHOWN
    short.maxlevel = 3
    try:
        return short.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"a long {type(value).__name__}"


def outcome_of(error: BaseException | None) -> Outcome:
    """How a request ended that raised this, or nothing."""
    match error:
        case None:
            return "done"
        case Cancelled() | DeadlineExceeded():
            return "cancelled"
        case InvalidRequestError() | QueueFull() | EngineUnusable():
            return "rejected"
    return "failed"
