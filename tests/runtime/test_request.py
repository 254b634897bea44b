from __future__ import annotations

import math
import subprocess
import sys

import pytest

from magihuman.runtime import InvalidRequestError, Request, config
from magihuman.runtime.errors import shown

BASE, DISTILL = config.VARIANTS["base"], config.VARIANTS["distill"]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("prompt", "", "prompt must be text that is not blank, got ''"),
        ("prompt", " \n\t", r"prompt must be text that is not blank, got ' \n\t'"),
        ("prompt", None, "prompt must be text that is not blank, got None"),
        ("prompt", b"hi", "prompt must be text that is not blank, got b'hi'"),
        ("prompt", "hi \udcff", r"prompt must be valid Unicode, got 'hi \udcff'"),
        ("negative_prompt", None, "negative_prompt must be text, got None"),
        ("negative_prompt", "\ud800", r"negative_prompt must be valid Unicode, got '\ud800'"),
        ("seconds", 0.1, "seconds must be a number from 0.2 to 60, got 0.1"),
        ("seconds", 60.5, "seconds must be a number from 0.2 to 60, got 60.5"),
        ("seconds", -1, "seconds must be a number from 0.2 to 60, got -1"),
        ("seconds", math.nan, "seconds must be a number from 0.2 to 60, got nan"),
        ("seconds", math.inf, "seconds must be a number from 0.2 to 60, got inf"),
        ("seconds", 10**400, f"seconds must be a number from 0.2 to 60, got {shown(10**400)}"),
        ("seconds", True, "seconds must be a number from 0.2 to 60, got True"),
        ("seconds", "5", "seconds must be a number from 0.2 to 60, got '5'"),
        ("width", 31, "width must be a whole number from 32 to 4096, got 31"),
        ("width", 4097, "width must be a whole number from 32 to 4096, got 4097"),
        ("width", 480.0, "width must be a whole number from 32 to 4096, got 480.0"),
        ("height", 0, "height must be a whole number from 32 to 4096, got 0"),
        ("height", True, "height must be a whole number from 32 to 4096, got True"),
        ("seed", -1, f"seed must be a whole number from 0 to {2**63 - 1}, got -1"),
        ("seed", 2**63, f"seed must be a whole number from 0 to {2**63 - 1}, got {2**63}"),
        ("seed", 1.5, f"seed must be a whole number from 0 to {2**63 - 1}, got 1.5"),
        ("steps", 0, "steps must be a whole number from 1 to 1000, got 0"),
        ("steps", 1001, "steps must be a whole number from 1 to 1000, got 1001"),
        ("sr_steps", 0, "sr_steps must be a whole number from 1 to 1000, got 0"),
        ("guidance", 0.5, "guidance must be a number from 1 to 100, got 0.5"),
        ("guidance", math.nan, "guidance must be a number from 1 to 100, got nan"),
        ("sr_guidance", 101, "sr_guidance must be a number from 1 to 100, got 101"),
    ],
)
def test_a_bad_value_is_refused_with_rule_and_value(field, value, rule):
    with pytest.raises(InvalidRequestError) as caught:
        Request(**{"prompt": "hi", field: value})
    assert str(caught.value) == rule
    assert len(rule) < 300


@pytest.mark.parametrize("alone", ["sr_width", "sr_height"])
def test_super_resolution_sides_go_together(alone):
    with pytest.raises(InvalidRequestError, match="sr_width and sr_height go together"):
        Request("hi", **{alone: 896})


@pytest.mark.parametrize("side", ["sr_width", "sr_height"])
def test_super_resolution_sides_have_limits(side):
    sizes = {"sr_width": 896, "sr_height": 512, side: 16}
    with pytest.raises(InvalidRequestError, match=f"^{side} must be a whole number from 32"):
        Request("hi", **sizes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", 0.2),
        ("seconds", 60),
        ("width", 32),
        ("height", 4096),
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("steps", 1),
        ("steps", 1000),
        ("guidance", 1),
        ("sr_guidance", 100.0),
        ("negative_prompt", ""),
    ],
)
def test_limits_are_inclusive(field, value):
    assert getattr(Request("hi", **{field: value}), field) == value


@pytest.mark.parametrize(
    ("seconds", "frames"),
    # 25 frames a second, in whole latent frames of 4, plus the first: 4 (25 s // 4) + 1.
    # 4.64 is there because 25 * 4.64 is 115.99999999999999 in floating point.
    [(0.2, 5), (1, 25), (2.0, 49), (5, 125), (10, 249), (60, 1501), (4.6, 113), (4.64, 117)],
)
def test_plan_makes_whole_latent_frames(seconds, frames):
    plan = Request("hi", seconds=seconds).plan(DISTILL, None)
    assert config.video_frames(plan.frames) == frames
    assert plan.duration_s == frames / 25


@pytest.mark.parametrize(
    ("asked", "made"),
    [((480, 272), (480, 256)), ((33, 95), (32, 64)), ((272, 480), (256, 480))],
)
def test_plan_rounds_sizes_down_and_says_so(asked, made):
    plan = Request("hi", width=asked[0], height=asked[1]).plan(DISTILL, None)
    assert plan.size_px == made
    assert plan.warnings == (
        f"sizes are made in steps of 32 pixels: asked for {asked[0]}x{asked[1]},"
        f" making {made[0]}x{made[1]}",
    )


def test_plan_has_nothing_to_say_about_a_size_that_is_made():
    assert Request("hi", width=480, height=256).plan(DISTILL, None).warnings == ()


@pytest.mark.parametrize(
    ("sr", "size", "made"),
    [
        ("540p", (480, 256), (896, 512)),
        ("540p", (256, 480), (512, 896)),
        ("540p", (256, 256), (896, 512)),
        ("1080p", (480, 256), (1920, 1088)),
        ("1080p", (256, 480), (1088, 1920)),
    ],
)
def test_super_resolution_turns_with_a_portrait(sr, size, made):
    plan = Request("hi", width=size[0], height=size[1]).plan(DISTILL, sr)
    assert plan.size_px == made
    assert plan.warnings == ()


def test_super_resolution_takes_a_size_of_its_own_and_rounds_it():
    request = Request("hi", width=64, height=64, sr_width=100, sr_height=130)
    plan = request.plan(DISTILL, "540p")
    assert plan.size_px == (96, 128)
    assert plan.warnings == (
        "sizes are made in steps of 32 pixels: super-resolution to 100x130 makes 96x128",
    )


@pytest.mark.parametrize(("width", "height"), [(1024, 256), (480, 544)])
def test_super_resolution_must_not_shrink(width, height):
    request = Request("hi", width=width, height=height, sr_width=896, sr_height=512)
    with pytest.raises(InvalidRequestError) as caught:
        request.plan(DISTILL, "540p")
    assert str(caught.value) == (
        f"super-resolution must not shrink the clip: {width}x{height} does not fit 896x512;"
        " ask for a smaller width and height"
    )


@pytest.mark.parametrize(
    "options", [{"sr_width": 896, "sr_height": 512}, {"sr_steps": 5}, {"sr_guidance": 3.5}]
)
def test_super_resolution_options_need_super_resolution(options):
    request = Request("hi", **options)
    with pytest.raises(InvalidRequestError) as caught:
        request.plan(DISTILL, None)
    assert str(caught.value) == (
        f"{next(iter(options))} needs an engine loaded with super-resolution:"
        " load(..., sr='540p' or '1080p')"
    )
    assert request.plan(DISTILL, "540p").sr_steps == 5


def test_guidance_is_refused_by_a_distilled_model():
    with pytest.raises(InvalidRequestError) as caught:
        Request("hi", guidance=5.0).plan(DISTILL, None)
    assert str(caught.value) == (
        "guidance must stay unset for the distill variant, which was distilled to run without,"
        " got 5; load variant='base' to use guidance"
    )


@pytest.mark.parametrize(
    ("variant", "guidance", "used"),
    [(BASE, None, 5.0), (BASE, 1.0, None), (BASE, 7, 7), (DISTILL, None, None), (DISTILL, 1, None)],
)
def test_plan_resolves_guidance(variant, guidance, used):
    assert Request("hi", guidance=guidance).plan(variant, None).guidance == used


@pytest.mark.parametrize(("guidance", "used"), [(None, None), (1.0, None), (3.5, 3.5)])
def test_plan_resolves_super_resolution_guidance(guidance, used):
    assert Request("hi", sr_guidance=guidance).plan(DISTILL, "540p").sr_guidance == used


@pytest.mark.parametrize(
    ("variant", "steps", "used"), [(BASE, None, 32), (DISTILL, None, 8), (DISTILL, 3, 3)]
)
def test_plan_resolves_steps(variant, steps, used):
    plan = Request("hi", steps=steps).plan(variant, None)
    assert (plan.steps, plan.sr_steps) == (used, 0)


def test_importing_the_runtime_imports_no_model_library():
    code = (
        "import sys; from magihuman import runtime; runtime.Request('hi');"
        "heavy = {'torch', 'transformers', 'diffusers', 'scipy', 'av', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy; runtime.load; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_looking_at_models_and_converting_them_imports_no_model_library(tiny_dir, tmp_path):
    """Nor PyTorch's compiler; each takes seconds."""
    code = """
import sys
from typer.testing import CliRunner
from magihuman.export.cli import cli
for arguments in (["inspect", sys.argv[1]], ["convert", sys.argv[2], "-m", sys.argv[1]]):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
heavy = {"diffusers", "transformers", "sympy", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code, tiny_dir, tmp_path / "converted"], check=True)


def test_the_package_lists_what_it_has():
    from magihuman import runtime

    assert all(getattr(runtime, name) is not None for name in runtime.__all__)
    assert dir(runtime) == sorted(runtime.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        runtime.nothing  # noqa: B018
