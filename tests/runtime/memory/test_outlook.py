"""Cards that are not here: what would run, where its weights would be, and in what time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from magihuman.runtime import InvalidRequestError
from magihuman.runtime.cli import main
from magihuman.runtime.memory import outlook as outlooks
from magihuman.runtime.memory.cards import CARDS, card_of
from magihuman.runtime.memory.outlook import BASE_S, DECODE_S, SIZES, SR_S, Outlook, outlook
from magihuman.runtime.memory.plan import BASE, GIB, SR, TEXT

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, str], Outlook]:
    return {(name, size): outlook(card, size) for name, card in CARDS.items() for size in SIZES}


# -- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("4090", "4090"),
        ("RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 5090", "5090"),
        ("a100-40", "a100-40"),
        ("A100_80GB", "a100-80"),
        ("a100", "a100-80"),
        ("L40S", "l40s"),
        ("RTX PRO 6000", "pro6000"),
        ("4060ti", "4060ti-16"),
        ("dgx-spark", "gb10"),
    ],
)
def test_a_card_is_found_by_the_names_that_people_write(given, name):
    assert card_of(given).name == name


@pytest.mark.parametrize("given", ["", "4", "409", "v100", "a100-60", "4090x"])
def test_an_unknown_card_lists_those_that_are_known(given):
    with pytest.raises(InvalidRequestError) as caught:
        card_of(given)
    assert f"card must be one of {', '.join(CARDS)}, got {given!r}; take the" in str(caught.value)
    for wanted in ("3090", "4090", "a100-40", "a100-80", "l40s", "5090", "pro6000", "gb10", "h100"):
        assert wanted in CARDS and wanted in str(caught.value)


# -- precisions -------------------------------------------------------------------------------


def test_fp8_begins_with_ada_and_int8_with_ampere():
    for card in CARDS.values():
        assert ("fp8" in card.precisions) == (card.sm >= (8, 9)) == (card.fp8 > 0), card.name
        assert "int8" in card.precisions and "bf16" in card.precisions
        assert ("fp8-attn" in card.precisions) == ("fp8" in card.precisions)
    assert card_of("3090").precisions[0] == card_of("a100").precisions[0] == "int8"
    with pytest.raises(InvalidRequestError, match="precision must be one of None, 'int8', 'bf16'"):
        outlook(card_of("3090"), "256p", "fp8")


# -- places -----------------------------------------------------------------------------------


def test_no_plan_is_larger_than_its_card(made):
    for (name, _), each in made.items():
        if each.plan is not None:
            assert each.plan.peak_bytes <= each.plan.limit_bytes < CARDS[name].memory_bytes
            where = each.places
            placed = [part for parts in where.values() for part in parts]
            assert len(placed) == (5 if each.size == "256p" else 6)


def test_what_each_size_of_memory_holds(made):
    """8-bit weights are 14.4 GiB a transformer, the text encoder 17.2 or, in 8 bits, 8.6."""
    for size in SIZES:  # from 141 GB up nothing moves
        assert made["h200", size].places["moved"] == made["h200", size].places["streamed"] == []
    small = made["4080", "256p"]  # 16 GB: layers are streamed
    assert small.places["streamed"] and small.places["streamed"][0].startswith(BASE)
    assert small.text_precision == "int8" and small.plan.host_bytes > 14 * GIB
    middle = made["5090", "256p"]  # 32 GB: all stays, with the text encoder in 8 bits
    assert middle.text_precision == "int8" and not middle.plan.streamed
    assert made["a6000", "256p"].text_precision == "bf16"  # 48 GB: as it is
    assert not made["a6000", "256p"].plan.streamed
    for name in ("3090", "4090"):  # 24 GB
        assert made[name, "540p"].plan is not None and made[name, "540p"].plan.streamed
    assert {BASE, SR} <= set(made["4080", "540p"].plan.streamed)


def test_where_there_is_no_way_it_says_why(made):
    each = outlook(card_of("4080"), "1080p", limit_gb=8)
    assert each.plan is None and each.seconds is None
    assert "no way to run in 8.0 GiB was found" in each.reason and "super_res" in each.reason
    assert each.as_dict()["memory_plan"] == {"error": each.reason}


def test_frames_are_decoded_in_bands_where_memory_is_small(made):
    """What is beside a band is decoded more than once."""
    assert all(each.plan is not None for each in made.values())
    in_bands = {key for key, each in made.items() if each.plan.bands > 1}
    assert ("4080", "1080p") in in_bands and {size for _, size in in_bands} == {"1080p"}
    assert all(CARDS[name].memory_gib < 24 for name, _ in in_bands)
    work = [outlooks._work_in_bands("1080p", bands) for bands in (1, 2, 4)]
    assert work == sorted(work) and work[0] == pytest.approx(1) and 1.05 < work[2] < 1.5
    cut = outlook(card_of("h100"), "1080p", limit_gb=16)
    assert (
        cut.plan.bands > 1 and not cut.is_measured and cut.seconds > made["h100", "1080p"].seconds
    )


def test_a_limit_below_the_card_is_kept():
    card = card_of("h100")
    each = outlook(card, "256p", limit_gb=20)
    assert each.plan is not None and each.plan.limit_bytes == 20 * GIB and each.plan.streamed
    assert not each.is_measured
    assert outlook(card, "256p", limit_gb=500).plan.limit_bytes < card.memory_bytes


def test_the_text_encoder_is_as_asked_for():
    card = card_of("5090")
    asked = outlook(card, "256p", text_precision="bf16")
    assert asked.text_precision == "bf16" and asked.plan.streamed
    assert TEXT in asked.places["resident"] or TEXT in asked.places["moved"]


# -- seconds ----------------------------------------------------------------------------------


def test_measured_seconds_are_those_of_the_results():
    sizes = json.loads((RESULTS / "super_resolution.json").read_text())
    request = json.loads((RESULTS / "prompt_to_mp4.json").read_text())
    assert pytest.approx(BASE_S, abs=6e-4) == {
        name: value["loop_s"] for name, value in sizes["256p"].items()
    }
    found = {
        (size, name): value["loop_s"]
        for size in ("540p", "1080p")
        for name, value in sizes[size].items()
        if isinstance(value, dict) and "loop_s" in value
    }
    assert pytest.approx(SR_S, abs=6e-4) == found
    assert DECODE_S["256p"] == pytest.approx(request["fp8"]["stages_s"]["decode_video"], abs=6e-4)
    for size in ("540p", "1080p"):
        assert DECODE_S[size] == pytest.approx(sizes[size]["decode"]["s"], abs=6e-4)


def test_only_what_was_measured_is_said_to_be(made):
    measured = {key for key, each in made.items() if each.is_measured}
    assert measured == {("h100", "256p"), ("h100", "1080p")}  # 540p not in fp8
    assert made["h100", "256p"].seconds == pytest.approx(0.926 + 0.134)
    assert not outlook(card_of("h100"), "256p", variant="base").is_measured
    moving = outlook(card_of("h100"), "1080p", "bf16")
    assert moving.plan.streamed and not moving.is_measured  # timed with everything resident
    assert moving.seconds == pytest.approx(1.426 + 29.697 + 2.042 + moving.plan.extra_s)


def test_an_estimate_is_the_sum_that_the_docs_have():
    """94 TFLOP of products and 15 of attention in each of 8 steps, at shares of the dense rate."""
    card = card_of("l40s")
    each = outlook(card, "256p")
    tokens = 3840 + 126 + 640
    layers = 32 * (7208 + 5120 + 27304 + 13652) + 4 * (7208 + 5120 + 2 * 20480)
    layers += 4 * (7208 + 5120 + 27304 + 13652)
    linears = 2 * tokens * 5120 * layers
    attention = 4 * tokens**2 * 5120 * 40
    forward_s = linears / (0.5 * 0.8 * 733e12) + attention / (0.5 * 0.8 * 362e12)
    decode_s = 0.134 * (0.6 * 989e12) / (0.5 * 362e12)
    assert not each.plan.streamed
    assert each.seconds == pytest.approx(8 * forward_s + decode_s, rel=1e-6)


def test_estimates_come_near_to_what_was_measured(monkeypatch):
    """On the one card that was measured, and in others' own runs on a 5090 in bf16."""
    monkeypatch.setattr(outlooks, "MEASURED_CARD", "none")
    for precision in BASE_S:
        for size in ("256p", "540p"):
            measured = outlooks.measured_s(size, precision)
            if measured is None:
                continue
            estimated = outlook(card_of("h100"), size, precision, limit_gb=200).seconds
            assert 0.7 < estimated / measured < 1.5, (precision, size)
    assert 0.7 < outlook(card_of("5090"), "256p", "bf16").seconds / 4.5 < 1.5


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8-attn"])
def test_portable_kernels_on_hopper_are_estimated_and_slower(made, precision):
    """Only Hopper's own were measured in whole requests; memory is the same."""
    card = card_of("h100")
    own, portable = (
        outlook(card, "256p", precision, kernels=kernels) for kernels in ("auto", "portable")
    )
    assert own.is_measured and not portable.is_measured
    assert portable.seconds > own.seconds and portable.plan.peak_bytes == own.plan.peak_bytes
    ada = card_of("4090")
    assert ada.kernels == "portable" == card.asked_for("portable").kernels
    assert outlook(ada, "256p", kernels="portable").seconds == made["4090", "256p"].seconds
    assert not outlook(card, "256p", "int8").is_measured


@pytest.mark.parametrize("size", SIZES)
def test_int8_takes_the_memory_of_fp8(size):
    card = card_of("5090")
    int8, fp8 = (outlook(card, size, precision) for precision in ("int8", "fp8"))
    assert (int8.precision, fp8.precision) == ("int8", "fp8")
    assert int8.plan.peak_bytes == fp8.plan.peak_bytes and int8.seconds < fp8.seconds


def test_more_of_anything_is_no_slower(made):
    """A later card of the same memory, and a larger one of the same chip."""
    for slow, fast in (("3090", "4090"), ("4090", "5090"), ("a100-40", "a100-80"), ("l4", "l40s")):
        for size in ("256p", "540p"):
            assert made[fast, size].seconds <= made[slow, size].seconds


# -- the command ------------------------------------------------------------------------------


def run(*arguments: str):
    return CliRunner().invoke(main.app, ["doctor", *arguments], env={"COLUMNS": "200"})


def test_doctor_tells_of_bands():
    said = run("--card", "4080", "--sr", "1080p").stdout
    assert "windows of frames are decoded in 3 bands, one after another" in said
    assert "bands" not in run("--card", "4080", "--sr", "540p").stdout


def test_doctor_tells_of_a_card():
    said = run("--card", "3090")
    assert said.exit_code == 0, said.output
    for text in ("GeForce RTX 3090, sm_86", "portable", "int8", "estimated", "streamed", "1080p"):
        assert text in said.stdout
    assert "fp8" not in said.stdout.replace("fp8-attn", "")
    found = json.loads(run("--card", "h100", "--sr", "1080p", "--json").stdout)
    assert found["card"]["kernels"] == "hopper"
    (clip,) = found["clips"]
    portable = json.loads(run("--card", "h100", "--kernels", "portable", "--json").stdout)
    assert portable["card"]["kernels"] == "portable" and len(portable["clips"]) == len(SIZES)
    assert not any(each["is_measured"] for each in portable["clips"])
    assert clip["is_measured"] and clip["size"] == "1080p"
    assert clip["memory_plan"]["peak_bytes"] > 0 and clip["resident"]


def test_doctor_refuses_what_there_is_not():
    for arguments, message in (
        (("--card", "voodoo2"), "card must be one of 3090,"),
        (("--card", "3090", "--precision", "fp8"), "precision must be one of"),
        (("--card", "3090", "--sr", "720p"), "sr must be one of"),
        (("--card", "3090", "--text-precision", "int4"), "text_precision must be one of"),
        (("--card", "3090", "--kernels", "hopper"), "kernels must be one of 'auto', 'portable'"),
        (("--card", "h100", "--context-parallel", "2"), "context_parallel must be 1 with --card"),
    ):
        said = run(*arguments)
        assert said.exit_code == 2 and message in said.output.replace("\n", " ")
