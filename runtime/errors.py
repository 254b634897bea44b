"""Errors of the runtime. Messages give the rule, the value and the remedy."""


class MagiHumanError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidRequestError(MagiHumanError, ValueError):
    """A request cannot be served as asked; raised before any denoising."""


class CheckpointError(MagiHumanError):
    """Model files are missing, damaged or not what was expected."""


class DeviceError(MagiHumanError):
    """The device cannot hold or run what was asked."""


class OutputError(MagiHumanError, OSError):
    """The result could not be written; nothing half-written is left behind."""


class Cancelled(MagiHumanError):  # noqa: N818 - an outcome the caller asked for, not a fault
    """The request was cancelled between steps; the engine stays usable."""
