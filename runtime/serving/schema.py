"""What clients send and get, as pydantic models; the OpenAPI description is made from them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from magihuman.runtime.request import MAX_SECONDS, MAX_SEED, MAX_STEPS, MIN_SECONDS
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.store import Job, Status

SIDE = "(?:3[2-9]|[4-9][0-9]|[1-9][0-9]{2}|[1-3][0-9]{3}|40[0-8][0-9]|409[0-6])"  # 32 to 4096
NUMBER = "^[0-9]{1,3}([.][0-9]{1,6})?$"
IMAGE_FIELD, AUDIO_FIELD = "input_reference", "audio"
FILES = {
    IMAGE_FIELD: "Reference image, PNG, JPEG or WebP; becomes the first frame.",
    AUDIO_FIELD: "Driving voice, WAV, MP3, FLAC, Ogg, AAC or MP4; becomes the sound.",
}


def _seconds(value: object) -> object:
    """Turn text into a number, since OpenAI's clients send text; what is none is checked later."""
    return float(value) if isinstance(value, str) and re.fullmatch(NUMBER, value) else value


Seconds = Annotated[
    float,
    BeforeValidator(_seconds),
    Field(ge=MIN_SECONDS, le=MAX_SECONDS, allow_inf_nan=False),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": MIN_SECONDS, "maximum": MAX_SECONDS},
                {"type": "string", "pattern": NUMBER},
            ],
            "description": "Of the clip.",
        }
    ),
]


class VideoOptions(BaseModel):
    """A video to make, but for its files. What is not named here is refused."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(pattern=r"\S", description="What is seen and said.")
    model: str | None = Field(None, description="The served model's name, or nothing.")
    seconds: Seconds  # this and `size` are the server's where they are left out
    size: str = Field(
        pattern=f"^{SIDE}x{SIDE}$",
        description="Width and height in pixels, before super-resolution.",
    )
    seed: int = Field(42, ge=0, le=MAX_SEED, description="Same seed, same clip.")
    negative_prompt: str | None = Field(None, description="What guidance moves away from.")
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    enhance: bool = Field(
        False,
        description="Have the prompt rewritten first, by the endpoint of this server's operator.",
    )
    guidance_scale: float | None = Field(
        None, ge=1, le=100, allow_inf_nan=False, description="Of the base model; 1 turns it off."
    )

    def fields(self) -> dict[str, Any]:
        """Return the options as fields of `Request`, the prompt apart."""
        width, height = map(int, self.size.split("x"))
        values = {
            "seconds": self.seconds,
            "width": width,
            "height": height,
            "seed": self.seed,
            "negative_prompt": self.negative_prompt,
            "steps": self.num_inference_steps,
            "guidance": self.guidance_scale,
        }
        return {name: value for name, value in values.items() if value is not None}


class JobError(BaseModel):
    """Why a video has failed."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A video and how far it is. Times are seconds since 1970."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(ge=0, le=100, description="Percent.")
    stage: str | None = Field(description="What the engine is doing.")
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None = Field(description="When it will be removed.")
    prompt: str
    seconds: str
    size: str
    seed: int
    timings_s: dict[str, float] = Field(description="Seconds of each stage, once completed.")
    warnings: list[str] = Field(description="How the video differs from what was asked for.")
    error: JobError | None

    @classmethod
    def of(cls, job: Job, model: str) -> VideoObject:
        """Return what clients see of a job."""
        options = job.options
        return cls(
            id=job.id,
            model=model,
            status=job.status,
            progress=job.progress,
            stage=job.stage,
            created_at=int(job.created_at),
            started_at=None if job.started_at is None else int(job.started_at),
            completed_at=None if job.completed_at is None else int(job.completed_at),
            expires_at=None if job.expires_at is None else int(job.expires_at),
            prompt=job.prompt,
            seconds=f"{options['seconds']:g}",
            size=f"{options['width']}x{options['height']}",
            seed=options["seed"],
            timings_s=job.timings_s,
            warnings=job.warnings,
            error=None if job.error is None else JobError(**job.error),
        )


class Deleted(BaseModel):
    """A video is no more."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Health(BaseModel):
    """That the server answers, or takes jobs."""

    status: Literal["ok", "starting", "draining"]


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every answer of 400 and above."""

    error: ErrorDetail


def body_schema(settings: Settings) -> dict[str, Any]:
    """Describe the body of a new video for OpenAPI: a form with files, or JSON with data URLs."""
    limits = settings.limits

    def with_files(files: dict[str, Any]) -> dict[str, Any]:
        schema = VideoOptions.model_json_schema()
        for name, default in settings.defaults.items():
            schema["properties"][name]["default"] = default
            schema["required"].remove(name)
        for name in ("prompt", "negative_prompt"):
            _text(schema["properties"][name])["maxLength"] = limits.prompt_chars
        schema["properties"]["seconds"]["anyOf"][0]["maximum"] = limits.seconds
        for name, description in FILES.items():
            schema["properties"][name] = {**files, "description": description}
        return schema

    data_url = {"type": "string", "pattern": "^data:[^,]*;base64,"}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": with_files({"type": "string", "format": "binary"})},
            "application/json": {"schema": with_files(data_url)},
        },
    }


def _text(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the text among the kinds that a field can have."""
    kinds = schema.get("anyOf", [schema])
    return next(kind for kind in kinds if kind.get("type") == "string")
