"""`magihuman generate`. Exit codes as for all commands."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from magihuman import runtime
from magihuman.runtime.cli.options import (
    DeviceOption,
    EncodingOptions,
    EngineOptions,
    JsonOptions,
    ModelOption,
    SrOption,
    takes_options,
)
from magihuman.runtime.cli.terminal.console import Bar, Made, print_result, user_errors
from magihuman.runtime.config import NANO
from magihuman.runtime.request import RequestOptions


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(EngineOptions, EncodingOptions, JsonOptions):
    """A clip and the engine that makes it."""

    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What is seen and said.")] = (
        None
    )
    path: Annotated[
        str,  # as it is given: a path of Python has no slash at its end
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Ends in .mp4, .webm, .gif or .wav; or in / for a new folder of PNG files.",
        ),
    ]
    thumbnail: Annotated[
        Path | None,
        typer.Option(help="Also write the frame in the middle, as .webp, .jpg or .png."),
    ] = None
    model: ModelOption = NANO
    image: Annotated[
        Path | None, typer.Option(help="Reference image; becomes the first frame.")
    ] = None
    audio: Annotated[Path | None, typer.Option(help="Driving voice; becomes the sound.")] = None
    continue_from: Annotated[
        Path | None, typer.Option(help="A clip whose last frame becomes the first frame of this.")
    ] = None
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="Make windows one after another, for a voice or --seconds of any length. The mp4"
            " grows with each, and can be played as far as it goes.",
        ),
    ] = False
    script: Annotated[
        Path | None,
        typer.Option(help="As --long, with seconds and a prompt on each line of this file."),
    ] = None
    window_seconds: Annotated[
        float | None, typer.Option(help="Of a window of a long clip; by default what suits.")
    ] = None
    variant: Annotated[str, typer.Option(help="distill (8 steps) or base (32, with guidance).")] = (
        "distill"
    )
    sr: SrOption = None
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Length of the clip, 0.2 to 60 without --long; by default 5, or as suits."
        ),
    ] = None
    width: Annotated[
        int | None, typer.Option(help="Pixels, made in steps of 32; by default 480, or as suits.")
    ] = None
    height: Annotated[
        int | None, typer.Option(help="Pixels, made in steps of 32; by default 256, or as suits.")
    ] = None
    sr_width: Annotated[int | None, typer.Option(help="Pixels after super-resolution.")] = None
    sr_height: Annotated[int | None, typer.Option(help="Pixels after super-resolution.")] = None
    seed: Annotated[int, typer.Option(help="Same seed, same clip.")] = 42
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance moves away from.")] = (
        None
    )
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None
    sr_steps: Annotated[int | None, typer.Option(help="Super-resolution steps.")] = None
    guidance: Annotated[float | None, typer.Option(help="Video guidance of the base model.")] = None
    sr_guidance: Annotated[float | None, typer.Option(help="Guidance of super-resolution.")] = None
    vae: Annotated[
        str | None,
        typer.Option(
            help="Decoder of frames: fast (on a GPU from sm_80 on), plain, or tensorrt, with"
            " --turbo-vae, a folder of engines."
        ),
    ] = None
    device: DeviceOption = None

    @property
    def output(self) -> runtime.Output:
        """The file to write, and how."""
        return runtime.Output(self.path, **self.encoding)

    @property
    def is_long(self) -> bool:
        """Whether the clip is made of windows."""
        return self.long or self.script is not None

    def scenes(self) -> str | list[runtime.Scene]:
        """Return the prompt, or those of the script. Raises `InvalidRequestError`."""
        if self.is_long and (self.crf, self.preset, self.thumbnail) != (None, None, None):
            raise runtime.InvalidRequestError(
                "a long clip has neither --crf, --preset nor --thumbnail; leave them out"
            )
        if (self.prompt is None) == (self.script is None):
            raise runtime.InvalidRequestError("give either --prompt or --script, and not both")
        if self.script is None:
            return self.prompt or ""
        if self.seconds is not None:
            raise runtime.InvalidRequestError(
                "with --script each line has its seconds; leave --seconds out"
            )
        return runtime.read_script(self.script)

    def _continued(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the size of the clip that this goes on from, where none is given."""
        from magihuman.runtime.media import read_last_frame

        assert self.continue_from is not None
        width, height = read_last_frame(self.continue_from).size
        if self.width is not None or self.height is not None or self.sr is not None:
            return {}
        return {"width": width, "height": height}

    def request(self) -> runtime.Request:
        """Return the clip asked for, by default at the length and size that suit the model."""
        from magihuman.runtime.weights import sized

        seconds = None if self.is_long else self.seconds
        size = {"seconds": seconds, "width": self.width, "height": self.height}
        values = sized(self.model, **size)
        if self.continue_from is not None:
            values |= self._continued(values)
        if self.negative_prompt is not None:
            values["negative_prompt"] = self.negative_prompt
        return runtime.Request(
            prompt="-" if self.prompt is None else self.prompt,
            image=self.image,
            audio=None if self.is_long else self.audio,
            continue_from=self.continue_from,
            sr_width=self.sr_width,
            sr_height=self.sr_height,
            seed=self.seed,
            steps=self.steps,
            sr_steps=self.sr_steps,
            guidance=self.guidance,
            sr_guidance=self.sr_guidance,
            **values,
        )


@takes_options
def generate(options: GenerateOptions) -> None:
    """Make one clip and write it, as an mp4 with sound or in another format by its suffix."""
    with user_errors():
        scenes, request = options.scenes(), options.request()
        _check_before_loading(request, options)
        bar = Bar(options.as_json)
        start = time.perf_counter()
        with bar:
            engine = runtime.load(**options.load_arguments(), on_load=bar.on_load)
            load_s = time.perf_counter() - start
            with engine:
                if options.is_long:
                    made = _long(engine, scenes, request, options, bar)
                else:
                    video = engine.generate(
                        request, save=options.output, on_progress=bar.on_progress
                    )
                    made = Made.of(video)
                    if options.thumbnail is not None:
                        video.save_thumbnail(options.thumbnail)
        timings_s = {"load": load_s, **made.last.timings_s}
        print_result(options.output.file, made, timings_s, options.as_json)


def _long(
    engine: runtime.Engine,
    scenes: str | list[runtime.Scene],
    request: runtime.Request,
    options: GenerateOptions,
    bar: Bar,
) -> Made:
    """Make a clip of windows, and return what is to be said of it."""
    fields = {name: getattr(request, name) for name in RequestOptions.__annotations__}
    del fields["seconds"]
    fields["audio"] = options.audio
    if options.seconds is not None:
        fields["seconds"] = options.seconds
    made = None
    for chunk in engine.generate_long(
        scenes,
        window_seconds=options.window_seconds,
        save=options.output.file,
        on_progress=bar.on_progress,
        **fields,
    ):
        frames = chunk.first_frame + len(chunk.frames)
        height, width = chunk.frames.shape[1:3]
        made = Made(frames, height, width, chunk)
    assert made is not None
    return made


def _check_before_loading(request: runtime.Request, options: GenerateOptions) -> None:
    """Refuse before weights are read what can be: plan, input files, the output's place."""
    from magihuman.runtime import config
    from magihuman.runtime.errors import one_of
    from magihuman.runtime.media import check_output, check_thumbnail

    variant, sr = options.variant, options.sr
    one_of("variant", variant, config.BASE_VARIANTS)
    if sr is not None:
        one_of("sr", sr, tuple(config.SR_SIZES))
    plan = request.plan(config.VARIANTS[variant], sr)
    if request.image is not None:
        from magihuman.runtime.media import open_image

        open_image(request.image)
    if request.audio is not None:
        from magihuman.runtime.media import open_driving_audio

        open_driving_audio(request.audio, request.seconds)
    check_output(options.output, config.video_frames(plan.frames), *plan.size_px)
    if options.thumbnail is not None:
        check_thumbnail(options.thumbnail)
