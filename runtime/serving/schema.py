"""What clients send and get, as pydantic models; the OpenAPI description is made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema, create_model

from magihuman.runtime.serving.asked.names import AUDIO_FIELD, EXTRAS, IMAGE_FIELD, REFERENCES
from magihuman.runtime.serving.asked.rules import FIELDS, PROMPT
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.store import Job, Status

FILES = {
    IMAGE_FIELD: "Reference image, PNG, JPEG or WebP; of a video, the last frame is taken.",
    AUDIO_FIELD: "Driving voice, WAV, MP3, FLAC, Ogg, AAC or MP4; becomes the sound.",
}


_DEFINITIONS: dict[str, Any] = {
    name: (Annotated[Any, WithJsonSchema(rule.schema())], None) for name, rule in FIELDS.items()
}
VideoOptions = create_model(
    "VideoOptions",
    __doc__="A video to make, but for its files. What is not named here is ignored.",
    **_DEFINITIONS,
)


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
    stage_durations: dict[str, float] = Field(description="The same, as vLLM-Omni calls it.")
    inference_time_s: float | None = Field(description="Seconds from `started_at` to the end.")
    peak_memory_mb: float | None = Field(
        description="MB that the engine's GPU, or its process on a CPU, has held at most."
    )
    warnings: list[str] = Field(description="How the video differs from what was asked for.")
    error: JobError | None

    @classmethod
    def of(cls, job: Job, model: str) -> VideoObject:
        """Return what clients see of a job."""
        options = job.options
        return cls(
            id=job.id,
            model=job.model or model,
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
            stage_durations=job.timings_s,
            inference_time_s=job.inference_time_s,
            peak_memory_mb=job.peak_memory_mb,
            warnings=job.warnings,
            error=None if job.error is None else JobError(**job.error),
        )


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool = Field(description="Whether there are more after the last.")


class Model(BaseModel):
    """A name of the model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server was started.")
    owned_by: str = "magihuman"
    root: str = Field(description="The model's first name.")


class ModelList(BaseModel):
    """All names of the model, and what SGLang's clients ask about it."""

    object: Literal["list"] = "list"
    data: list[Model]
    model_path: str
    task_type: Literal["TI2V"] = "TI2V"
    pipeline_name: str = "magihuman"
    variant: str
    sr: str | None
    size: str
    seconds: float
    fps: int


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


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe answers of these statuses, as OpenAPI has it."""
    return {status: {"model": ErrorBody} for status in statuses}


def body_schema(settings: Settings) -> dict[str, Any]:
    """Describe the body of a new video for OpenAPI: a form with files, or JSON with data URLs."""
    data_url = {"type": "string", "pattern": "^data:[^,]*;base64,"}
    kinds = [data_url, {"type": "object"}, {"type": "null"}]
    as_form = _fields_schema(settings, {"type": "string", "format": "binary"})
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": as_form},
            "application/json": {"schema": _fields_schema(settings, {"anyOf": kinds})},
        },
    }


def _fields_schema(settings: Settings, file: dict[str, Any]) -> dict[str, Any]:
    """Describe all fields. file: what stands for one."""
    limits = settings.limits
    fields = VideoOptions.model_json_schema()["properties"]
    fields["prompt"] = {
        **PROMPT.kinds[0],
        "maxLength": limits.prompt_chars,
        "description": PROMPT.description,
    }
    fields["negative_prompt"]["anyOf"][0] = {"type": "string", "maxLength": limits.prompt_chars}
    fields["seconds"]["anyOf"][0]["maximum"] = limits.seconds
    for name, default in settings.defaults.items():
        fields[name]["default"] = default
    for name, use in REFERENCES.items():
        fields[name] = {**file, "description": FILES[use]}
    for name in EXTRAS:
        kinds = [{"type": "object"}, {"type": "string"}, {"type": "null"}]
        fields[name] = {"anyOf": kinds, "description": "More of these fields, as an object."}
    return {"type": "object", "properties": fields, "required": ["prompt"]}
