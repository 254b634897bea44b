"""The one video that the fields of a request make, and a warning for each that it leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.request import MIN_SECONDS, MIN_SIDE_PX, Plan, Request
from magihuman.runtime.serving.asked.names import Asked
from magihuman.runtime.serving.asked.rules import FIELDS, refusal
from magihuman.runtime.serving.errors import MAX_NAME, ApiError, invalid, shown
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.store import Job, request_of

STEP_PX = MIN_SIDE_PX  # the smallest size is one step
SMALLER = tuple(step / 20 for step in range(19, 0, -1))


def job_of(asked: Asked, settings: Settings) -> Job:
    """Return the job that a request asks for. Raises `ApiError` for what this server cannot make.

    Its warnings say which of the fields were ignored.
    """
    values = {name: FIELDS[name].check(name, value) for name, value in asked.values.items()}
    if "prompt" not in values:
        raise invalid("prompt must be given; say what is seen and said", "prompt")
    notes: list[str] = []
    model = _model(values, settings, notes)
    _check_texts(values, settings)
    _check_count(values)
    options = {
        **_length(values, settings, notes),
        **_size(values, settings, notes),
        "seed": values.get("seed", 42),
    }
    for name, field in (
        ("negative_prompt", "negative_prompt"),
        ("num_inference_steps", "steps"),
        ("guidance_scale", "guidance"),
    ):
        if name in values:
            options[field] = values[name]
    if options.get("guidance") == 0:
        options["guidance"] = 1.0  # which is off, too
    if asked.ignored:
        notes.append(f"not known to this server, and ignored: {', '.join(asked.ignored)}")
    job = Job(values["prompt"], options, model=model, warnings=notes)
    _check_plan(job, settings)
    return job


def is_enhanced(asked: Asked, settings: Settings) -> bool:
    """Whether the prompt is rewritten first. Raises `ApiError` where no endpoint does that."""
    name = "enhance"
    if name not in asked.values or not FIELDS[name].check(name, asked.values[name]):
        return False
    if settings.enhancer is None:
        message = "enhance needs a server that was started with --enhance; leave it out on this one"
        raise invalid(message, name)
    return True


def _model(values: dict[str, Any], settings: Settings, notes: list[str]) -> str | None:
    """Return the name that a video is answered under: as asked, where it is one of the server's."""
    name = values.get("model")
    if name is None or name in settings.names:
        return name
    if settings.is_model_strict or len(name) > MAX_NAME:
        raise ApiError(
            404,
            "model_not_found",
            f"model must be {settings.model!r}, the one served, got {shown(name)!r}; GET /v1/models"
            " has all its names",
            "model",
        )
    notes.append(f"model {shown(name)!r} is not served here, and {settings.model!r} was taken")
    return None


def _check_texts(values: dict[str, Any], settings: Settings) -> None:
    most = settings.limits.prompt_chars
    for name in ("prompt", "negative_prompt"):
        if len(values.get(name, "")) > most:
            raise invalid(
                f"{name} must have no more than {most} characters, got {len(values[name])}; say it"
                " in fewer words",
                name,
            )


def _check_count(values: dict[str, Any]) -> None:
    if values.get("n", 1) != 1:
        raise refusal(
            "n", "1, since a request makes one video", values["n"], "send a request for each"
        )


def _length(values: dict[str, Any], settings: Settings, notes: list[str]) -> dict[str, Any]:
    """Return the seconds of the clip, which frames stand for, too."""
    fps = values.get("fps", config.FPS)
    if fps != config.FPS:
        notes.append(f"fps {fps:g} was ignored: clips have {config.FPS} frames a second")
    name, seconds = "seconds", values.get("seconds", settings.suited["seconds"])
    if "num_frames" in values:
        name, frames = "num_frames", values["num_frames"]
        if "seconds" in values and seconds != frames / config.FPS:
            notes.append(f"seconds {seconds:g} was ignored, since num_frames was given: {frames}")
        seconds = frames / config.FPS
    most = settings.limits.seconds
    if seconds > most:
        raise refusal(
            name,
            f"from {MIN_SECONDS:g} to {most:g} s on this server",
            values.get(name, seconds),
            f"ask for {most:g} s, which are {int(most * config.FPS)} frames, or fewer",
        )
    return {"seconds": seconds}


def _size(values: dict[str, Any], settings: Settings, notes: list[str]) -> dict[str, Any]:
    """Return width and height of the clip, as size or one by one."""
    suited = settings.suited
    width, height = values.get("size", (suited["width"], suited["height"]))
    name = "size"
    for side, other in (("width", "height"), ("height", "width")):
        if side in values and other not in values:
            raise invalid(
                f"{side} must be given together with {other}, got {values[side]} alone; give both,"
                " or size",
                side,
            )
    if "width" in values:
        name, sides = "width", (values["width"], values["height"])
        if "size" in values and sides != (width, height):
            notes.append(f"size {width}x{height} was ignored, since width and height were given")
        width, height = sides
    most = settings.limits.pixels
    if width * height > most:
        fitting = next(
            ((w, h) for w, h in _scaled(width, height) if w * h <= most), (STEP_PX, STEP_PX)
        )
        raise refusal(
            name,
            f"of no more than {most} pixels on this server",
            f"{width}x{height}",
            f"ask for {fitting[0]}x{fitting[1]}, or for less",
        )
    return {"width": width, "height": height}


def _scaled(width: int, height: int) -> list[tuple[int, int]]:
    """Return smaller sizes of about the same shape, the largest first, of whole steps."""
    return [
        (whole_steps(width * share), whole_steps(height * share))
        for share in SMALLER
        if min(width, height) * share >= STEP_PX
    ]


def whole_steps(pixels: float) -> int:
    """Return a side in the steps that sizes are made in, rounded down."""
    return int(pixels // STEP_PX) * STEP_PX


def _check_plan(job: Job, settings: Settings) -> None:
    """Refuse what the engines refuse, and what none of them has the memory for."""
    variant = config.VARIANTS[settings.variant]
    try:
        request = request_of(job, Path())
        plan = request.plan(variant, settings.sr)
    except InvalidRequestError as error:
        name = "guidance_scale" if str(error).startswith("guidance ") else "size"
        raise invalid(str(error), name) from None
    lack = None if settings.capacity is None else settings.capacity.lacks(plan)
    if lack is not None:
        needed, room = lack
        raise invalid(
            f"a video must fit the memory that this server's engines have for it,"
            f" {room / 2**30:.1f} GiB each, and {request.seconds:g} s of"
            f" {request.width}x{request.height} take about {needed / 2**30:.1f} GiB;"
            f" {_advice(request, settings)}",
            "size",
        )


def _advice(request: Request, settings: Settings) -> str:
    """Say what fits: fewer seconds of this size, and a smaller size for as long."""

    def fits(options: dict[str, Any]) -> bool:
        try:
            plan = plan_of(options)
        except InvalidRequestError:
            return False
        return settings.capacity is None or settings.capacity.lacks(plan) is None

    def plan_of(options: dict[str, Any]) -> Plan:
        return Request("-", **options).plan(config.VARIANTS[settings.variant], settings.sr)

    size = {"width": request.width, "height": request.height}
    lengths = (max(MIN_SECONDS, round(request.seconds * share, 1)) for share in SMALLER)
    shorter = ({**size, "seconds": seconds} for seconds in lengths)
    smaller = (
        {"width": width, "height": height, "seconds": request.seconds}
        for width, height in _scaled(request.width, request.height)
    )
    found = [next(filter(fits, others), None) for others in (shorter, smaller)]
    texts = [f"{o['seconds']:g} s of {o['width']}x{o['height']}" for o in found if o is not None]
    return f"{' or '.join(texts)} would fit" if texts else "ask for a smaller size or fewer seconds"
