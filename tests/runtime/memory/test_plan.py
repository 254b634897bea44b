"""Plans of what is on the device: sums, limits, order, and errors with numbers."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from magihuman import runtime
from magihuman.runtime import config
from magihuman.runtime.engine import assemble
from magihuman.runtime.errors import DeviceError, InvalidRequestError
from magihuman.runtime.memory import Clips, estimate, placement
from magihuman.runtime.memory import parts as weighed
from magihuman.runtime.memory import plan as memory_plan
from magihuman.runtime.memory.plan import (
    AUDIO,
    BASE,
    CONTEXT_BYTES,
    GIB,
    IMAGE,
    LOAD,
    SLACK_BYTES,
    SLOTS,
    SR,
    STARTED_BYTES,
    TEXT,
    VIDEO,
    Part,
    Stage,
    make_plan,
    rings,
    streamings,
)
from magihuman.runtime.memory.speeds import Speeds, speeds_of
from magihuman.runtime.weights import checkpoint, load_text_encoder, random_weights
from magihuman.runtime.weights.locate import AUDIO_FOLDER, IMAGE_FOLDER, TEXT_FOLDER, TURBO_FOLDER
from magihuman.runtime.weights.precision import PrecisionPolicy
from magihuman.runtime.weights.tiny import DIT
from magihuman.runtime.weights.transformer import (
    TransformerOptions,
    TransformerSpec,
    linears_in_8_bits,
    plan,
)

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
OUTSIDE = CONTEXT_BYTES + SLACK_BYTES
BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn


def spec(name: str, precision: str) -> TransformerSpec:
    variant = config.VARIANTS[name]
    arch = variant.architecture(config.DiTConfig())
    names = () if precision == "bf16" else linears_in_8_bits(arch, "none")
    return TransformerSpec(variant, arch, None, None, PrecisionPolicy(precision), names)


@pytest.fixture(scope="module")
def others() -> list[Part]:
    """Of the published sizes."""
    return weighed.synthetic_parts(BF16)


def planned(others, precision, sr, limit_gib) -> memory_plan.MemoryPlan:
    upscaler = None if sr is None else spec(f"{sr}_sr", precision)
    base, limit = spec("distill", precision), int(limit_gib * GIB)
    return placement.plan_memory(others, base, upscaler, limit, Clips(is_compiled=True))


def test_the_parts_of_the_published_model(others):
    size = {part.name: part.total_bytes / GIB for part in others}
    assert size[TEXT] == pytest.approx(17.2, abs=0.1)  # as docs/models.md says
    assert size[AUDIO] + size[IMAGE] + size[VIDEO] == pytest.approx(1.26, abs=0.05)
    base = weighed.dit_part(BASE, spec("distill", "bf16"))
    assert base.total_bytes / GIB == pytest.approx(28.5, abs=0.1)
    assert len(base.layer_bytes) == 40 and base.outside_bytes < 0.1 * GIB
    fp8 = weighed.dit_part(BASE, spec("distill", "fp8"))
    assert fp8.total_bytes / GIB == pytest.approx(14.3, abs=0.1)
    assert weighed.dit_part(BASE, spec("distill", "int8")) == fp8


@pytest.mark.parametrize(
    ("precision", "sr", "limit_gib", "moving"),
    [
        ("bf16", None, 78, set()),
        ("fp8", "540p", 78, set()),  # both transformers and all else
        ("bf16", "540p", 78, {SR}),  # 0.6 s, behind a forward of 0.7 s
        ("fp8", "1080p", 78, set()),  # without graphs of the decoder, for which there is no room
        ("bf16", "1080p", 40, {TEXT, BASE, SR}),
        ("fp8", "540p", 24, {TEXT, SR}),
    ],
)
def test_line_ups_of_the_published_model(others, precision, sr, limit_gib, moving):
    made = planned(others, precision, sr, limit_gib)
    assert set(made.streamed) >= moving and (moving or not made.streamed)
    assert made.peak_bytes <= limit_gib * GIB
    if not moving:
        assert made.host_bytes == 0 and made.replays and made.extra_s == 0
        assert made.spared == ({"decode"} if sr == "1080p" else set())


def test_what_the_driver_holds_is_no_more_than_is_counted():
    """Beside what PyTorch has reserved, in the runs that were measured."""
    cases = json.loads((RESULTS / "memory_limit.json").read_text())["cases"].values()
    held = [case["driver_gib"] * GIB for case in cases if "driver_gib" in case]
    started = [case["context_at_start_gib"] * GIB for case in cases]
    assert held and max(started) <= STARTED_BYTES < max(held) <= CONTEXT_BYTES


def test_a_process_that_follows_needs_no_encoders(others):
    """And fits where they have no room."""
    own = [part for part in others if part.name == VIDEO]
    made = planned(own, "bf16", "540p", 78)
    assert [stage.name for stage in made.stages] == ["load", "denoise", "super_resolve", "decode"]
    assert not made.streamed and set(made.stages[-1].weights) == {VIDEO, BASE, SR}


# What is free of 80 GB, and what each GPU holds beside both transformers and the video decoder.
CARD_GIB = 76.6
SHARED = {VIDEO, BASE, SR}


def placed(others, precision, sr, ranks, limit_gib=CARD_GIB, **options) -> memory_plan.MemoryPlan:
    upscaler = None if sr is None else spec(f"{sr}_sr", precision)
    asked = TransformerOptions(torch.device("cuda:0"), ranks=ranks)
    return placement.plan_placement(
        lambda: list(others),
        spec("distill", precision),
        upscaler,
        int(limit_gib * GIB),
        False,
        asked,
        **options,
    )


@pytest.fixture
def compiles(monkeypatch):
    monkeypatch.setattr(placement, "why_not", lambda *arguments: None)
    monkeypatch.setattr(placement, "check_host", lambda plan: None)


@pytest.mark.parametrize(
    ("precision", "sr", "ranks"),
    [("fp8", "1080p", 4), ("bf16", "1080p", 4), ("bf16", "540p", 2), ("fp8", "1080p", 2)],
)
def test_gpus_that_work_together_hold_the_transformers(compiles, others, precision, sr, ranks):
    """Where these fit, whatever would be a little faster with one of them elsewhere. Only what the
    first has alone may rest in host memory.
    """
    leads = placed(others, precision, sr, ranks)
    follows = placed([part for part in others if part.name == VIDEO], precision, sr, ranks)
    assert not follows.streamed and set(leads.streamed) <= {TEXT, AUDIO, IMAGE}
    assert set(follows.stages[0].weights) == SHARED
    for made in (leads, follows):
        assert made.replays and made.peak_bytes <= CARD_GIB * GIB
        sizes = made.stages[0].weights
        assert all(f"{name} {sizes[name] / GIB:.1f}" in made.held for name in SHARED)
        assert f"{made.peak_bytes / GIB:.1f} of 76.6 GiB" in made.held


def test_gpus_that_work_together_share_activations(others):
    """Each has its own tokens, room for their exchanges, and inputs and velocities of all."""
    base = [spec("distill", "fp8")]
    alone, *shared = (
        {
            stage.name: stage
            for stage in placement.stages_of(base, others, Clips(is_compiled=True, ranks=ranks))
        }
        for ranks in (1, 2, 4)
    )
    for ranks, stages in zip((2, 4), shared, strict=True):
        whole, part = alone["denoise"], stages["denoise"]
        share = whole.working_bytes / ranks
        assert 1.2 * share < part.working_bytes < 1.4 * share
        assert part.forward_s == whole.forward_s / ranks


@pytest.mark.parametrize(("ranks", "most"), [(2, 0.62), (4, 0.37), (8, 0.24)])
def test_gpus_that_work_together_share_large_frames(others, ranks, most):
    """In bands of the picture; small ones are whole windows, of which the first has all bytes."""
    whole, part = (
        estimate.decoding_bytes(1920, 1088, is_compiled=True, ranks=n) for n in (1, ranks)
    )
    assert 1 / ranks < part / whole < most
    small, aside = (
        estimate.decoding_bytes(480, 256, is_compiled=True, ranks=n) for n in (1, ranks)
    )
    assert aside - small == (ranks + 1) * 480 * 256 * 3 * 28


@pytest.mark.parametrize(("sr", "name", "together"), [(None, "256p", 3), ("540p", "540p", 1)])
def test_graphs_of_small_windows_are_of_several(others, sr, name, together):
    """And take the memory that was measured for all of them."""
    specs = [spec("distill", "fp8"), *([] if sr is None else [spec(f"{sr}_sr", "fp8")])]
    stage = placement.stages_of(specs, others, Clips(is_compiled=True))[-1]
    window = estimate.decoding_bytes(*((480, 256) if sr is None else config.SR_SIZES[sr]), True)
    assert stage.graph_bytes == together * window
    shared = placement.stages_of(specs, others, Clips(is_compiled=True, ranks=2))[-1]
    assert shared.graph_bytes < 2 * window
    found = json.loads((RESULTS / "vae_decode.json").read_text())[name]
    assert 0.8 * stage.graph_bytes < found["default"]["device_gib"] * GIB < 1.03 * stage.graph_bytes


def test_without_captures_no_stage_keeps_a_graph(compiles, others):
    made = placed(others, "fp8", "540p", 4, captures=False)
    assert not made.replays and not made.spared and "without captured graphs" in made.held
    assert made.peak_bytes < placed(others, "fp8", "540p", 4).peak_bytes


def test_gpus_that_cannot_hold_the_transformers_are_refused(compiles, others):
    own = [part for part in others if part.name == VIDEO]
    with pytest.raises(memory_plan.NoPlanError) as caught:
        placed(own, "bf16", "1080p", 4, limit_gib=50)
    message = str(caught.value)
    assert message.startswith("GPUs that work together must each hold the transformers, and no way")
    assert "context_parallel=1" in message and "memory_limit_gb" not in message
    # One alone streams layers.
    assert placed(own, "bf16", "1080p", 1, limit_gib=50).streamed


@pytest.mark.parametrize(
    ("precision", "sr"), [("bf16", None), ("bf16", "1080p"), ("fp8", "540p"), ("fp8", "1080p")]
)
def test_plans_over_many_limits(others, precision, sr):
    """Every stage adds up and stays below; a larger limit never costs more."""
    upscaler = [] if sr is None else [spec(f"{sr}_sr", precision)]
    every = [*others, weighed.dit_part(BASE, spec("distill", precision))]
    every += [weighed.dit_part(SR, one) for one in upscaler]
    parts = {part.name: part for part in every}
    before = float("inf")
    found = 0
    for limit_gib in range(4, 164, 12):
        try:
            made = planned(others, precision, sr, limit_gib)
        except DeviceError:
            assert found == 0  # larger ones have plans too
            continue
        found += 1
        assert made.cost_s <= before
        before = made.cost_s
        assert made.host_bytes == sum(parts[name].total_bytes for name in made.streamed)
        assert made.stages[0].name == LOAD
        for stage in made.stages:
            assert stage.total_bytes == (
                sum(stage.weights.values()) + stage.working_bytes + OUTSIDE
            )
            assert stage.total_bytes <= made.limit_bytes
            for name, size in stage.weights.items():
                assert size == parts[name].loaded_bytes(made.streamed.get(name, ()))
            assert set(parts) - set(made.streamed) <= set(stage.weights)
        named = {"text": TEXT, "denoise": BASE, "super_resolve": SR, "decode": VIDEO}
        for stage in made.stages:
            if stage.name in named:
                assert named[stage.name] in stage.weights
    assert found > 10 and before == 0


def test_the_smallest_limit_that_is_named_works(others):
    for precision, sr in (("bf16", "1080p"), ("fp8", "540p"), ("fp8", None)):
        with pytest.raises(DeviceError) as caught:
            planned(others, precision, sr, 4)
        said = str(caught.value)
        assert said.startswith("no way to run in 4.0 GiB was found: with all that can rest in host")
        (least,) = re.findall(r"memory_limit_gb=([\d.]+) or more", said)
        assert planned(others, precision, sr, float(least)).peak_bytes <= float(least) * GIB
        with pytest.raises(DeviceError):
            planned(others, precision, sr, float(least) - 0.2)
        figures = r"takes ([\d.]+) GiB, .* which ([\d.]+) are .* ([\d.]+) act.* ([\d.]+) the"
        total, weights, working, driver = map(float, re.findall(figures, said)[0])
        assert total == pytest.approx(weights + working + driver, abs=0.2)


def test_captured_graphs_keep_their_activations():
    """All stages bear them, or none is captured. A stage runs beside its own when it captures
    another size, and what no graph keeps counts once.
    """
    part = Part("a", GIB)
    stages = [Stage(name, ("a",), 2 * GIB, 1, 1.0, graph_bytes=GIB) for name in ("x", "y")]
    wide = make_plan([part], stages, 5 * GIB + OUTSIDE)
    assert wide.replays and [stage.working_bytes for stage in wide.stages] == [0, 4 * GIB, 4 * GIB]
    assert wide.extra_s == 0 and not wide.streamed
    narrow = make_plan([part], stages, 5 * GIB + OUTSIDE - 1)
    assert not narrow.replays and not narrow.streamed and narrow.peak_bytes == 3 * GIB + OUTSIDE
    assert narrow.extra_s == pytest.approx(0.02)  # a hundredth of two seconds


def test_a_stage_may_spare_its_graphs():
    """Before the others give theirs up, or anything moves."""
    parts = [Part("a", GIB), Part("b", GIB)]
    stages = [
        Stage("x", ("a",), GIB, graph_bytes=GIB, spares_graphs=True),
        Stage("y", ("b",), 2 * GIB, 1, 1.0, graph_bytes=2 * GIB),
    ]
    wide = make_plan(parts, stages, 7 * GIB + OUTSIDE)
    assert wide.replays and not wide.spared
    assert [stage.working_bytes / GIB for stage in wide.stages] == [0, 4, 5]
    narrow = make_plan(parts, stages, 7 * GIB + OUTSIDE - 1)
    assert narrow.replays and narrow.spared == {"x"} and not narrow.streamed
    assert [stage.working_bytes / GIB for stage in narrow.stages] == [0, 3, 4]
    assert narrow.extra_s == 0 and narrow.as_dict()["spared"] == ["x"]
    none = make_plan(parts[1:], [Stage("y", ("b",), GIB)], 2 * GIB + OUTSIDE)
    assert not none.replays and not none.spared
    less = make_plan(parts, stages, 4 * GIB + OUTSIDE)
    assert not less.replays and not less.spared
    # Of several that may, those whose graphs take least.
    stages[1:1] = [Stage("z", ("b",), GIB, graph_bytes=GIB // 2, spares_graphs=True)]
    more = make_plan(parts, stages, int(7.5 * GIB) + OUTSIDE - 1)
    assert more.replays and more.spared == {"z"}
    both = make_plan(parts, stages, int(6.5 * GIB) + OUTSIDE - 1)
    assert both.replays and both.spared == {"x", "z"}


def test_graphs_of_the_text_encoder_are_counted(others):
    """By what its layers compute; some 100 to 200 MiB at full size, of ten lengths."""
    arch = random_weights.text_config().encoder
    longest, buckets = config.MAX_TEXT_TOKENS, range(64, config.MAX_TEXT_TOKENS + 1, 64)
    assert len(buckets) == 10 and buckets[-1] == longest
    widest = 2 * longest * (3 * arch.intermediate_size + 4 * arch.hidden_size)
    kept = 2 * widest + sum(2 * tokens * arch.hidden_size for tokens in buckets)
    assert 100 * 2**20 < kept < 200 * 2**20
    for is_compiled in (True, False):
        stage = placement.stages_of([spec("distill", "bf16")], others, Clips(is_compiled))[0]
        assert (stage.name, stage.graph_bytes) == ("text", kept if is_compiled else 0)
    made = planned(others, "fp8", "540p", 78)
    least = made.peak_bytes / GIB  # at which all of them just fit
    assert not planned(others, "fp8", "540p", least).spared
    beside = planned(others, "fp8", "540p", least - 2**20 / GIB)
    assert beside.spared == {"text"} and beside.replays and not beside.streamed
    assert made.peak_bytes - beside.peak_bytes == kept


@pytest.mark.parametrize(
    ("replays", "spared", "moves", "is_replayed"),
    [
        (True, set(), False, True),
        (True, {"text"}, False, False),
        (True, set(), True, False),
        (False, set(), False, False),
    ],
)
def test_prompts_are_encoded_by_graphs_where_the_plan_has_them(
    replays, spared, moves, is_replayed, tiny_dir, monkeypatch
):
    from magihuman.graphs.text import replay as replay_text

    monkeypatch.setattr(replay_text.Captures, "__init__", lambda *arguments: None)
    encoder = load_text_encoder(tiny_dir / TEXT_FOLDER, CPU, torch.float32)
    encoder.model.config.encoder.sliding_window = 4096
    streamed = {TEXT: ()} if moves else {}
    made = memory_plan.MemoryPlan(GIB, streamed, replays, (), 0, frozenset(spared))
    for plan_, expected in ((made, is_replayed), (None, True)):
        got = assemble.replayed(encoder, placement.Placer(plan_, CPU))
        assert (got.replayed is not None) == expected


def test_a_part_of_layers_that_moves_is_in_no_graph():
    part = Part("a", 0, (GIB, GIB))
    other = Part("b", GIB)
    stages = [
        Stage("x", ("a",), GIB, 1, 1.0, graph_bytes=GIB),
        Stage("y", ("b",), GIB, 1, 1.0, graph_bytes=GIB),
    ]
    made = make_plan([part, other], stages, 4 * GIB + OUTSIDE)
    assert made.streamed == {"a": (), "b": ()} and made.replays
    # b has no layers, and so is in no graph; the stage of a runs as it is, and keeps nothing.
    assert [stage.working_bytes for stage in made.stages] == [0, 2 * GIB, 2 * GIB]


def test_seconds_of_moving():
    """The first forward hides what comes meanwhile; each streams its layers again."""
    size = int(memory_plan.COPY_BYTES_PER_S / 10)  # a tenth of a second each
    part = Part("a", 0, (size,) * 10)
    stages = [Stage("x", ("a",), 0, forwards=3, forward_s=0.2), Stage("y", (), 9 * size)]
    whole = make_plan([part], stages, 10 * size + OUTSIDE)
    assert whole.streamed == {"a": ()} and whole.extra_s == pytest.approx(1.0 - 0.2)
    made = make_plan([part], [stages[0]], 6 * size + OUTSIDE)
    assert len(made.streamed["a"]) == 6  # 4 stay, 2 slots
    assert made.extra_s == pytest.approx(1.0 - 0.2 + 2 * (0.6 - 0.2))
    assert made.stages[1].copied_bytes == (10 + 2 * 6) * size


def test_layers_of_like_size_share_slots():
    sizes = (30, 31, 10, 11, 10, 10, 32, 90)
    assert memory_plan.classes(sizes) == [[2, 3, 4, 5], [0, 1, 6], [7]]
    assert rings(sizes, (2, 3, 4, 0)) == [(11, (2, 4)), (11, (3,)), (30, (0,))]
    every = list(streamings(sizes))
    assert every[0] == () and every[-1] == (0, 1, 2, 3, 4, 5, 6)
    part = Part("a", 5, sizes)
    loaded = [part.loaded_bytes(streamed) for streamed in every]
    assert loaded == sorted(loaded, reverse=True) and len(set(loaded)) == len(loaded)
    assert all(len(streamed) > SLOTS for streamed in every[1:])
    # One in two lies between those that stay.
    spread = next(s for s in streamings((10,) * 32) if len(s) == 16)
    assert {b - a for a, b in pairwise(spread)} == {2}


# -- of a model directory ---------------------------------------------------------------------


def test_parts_of_a_folder_are_those_that_are_loaded(tiny_dir):
    found = weighed.folder_parts(
        *(tiny_dir / name for name in (TURBO_FOLDER, TEXT_FOLDER, AUDIO_FOLDER, IMAGE_FOLDER)),
        width=4,
        is_engine=False,
    )
    size = {part.name: part for part in found}
    with runtime.load(tiny_dir, device="cpu") as engine:
        parts = engine._parts
        models = {
            AUDIO: parts.audio_vae.model,
            IMAGE: parts.image_vae.model,
            TEXT: parts.text_encoder.model,
        }
        for name, model in models.items():
            assert size[name].total_bytes == sum(p.nbytes for p in model.parameters())
        decoder = sum(p.nbytes for p in parts.turbo_vae.parameters())
        assert size[VIDEO].total_bytes == 2 * decoder and not size[VIDEO].can_move
        layers = models[TEXT].encoder.layers
        assert size[TEXT].layer_bytes == tuple(
            sum(p.nbytes for p in layer.parameters()) for layer in layers
        )


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_bytes_of_a_transformer_by_layer(tiny_dir, precision):
    names = () if precision == "bf16" else linears_in_8_bits(DIT, "none")
    one = TransformerSpec(
        config.VARIANTS["distill"],
        DIT,
        tiny_dir / "distill",
        None,
        PrecisionPolicy(precision),
        names,
    )
    part = weighed.dit_part(BASE, one)
    model = one.read(CPU)
    layers = [
        sum(t.untyped_storage().nbytes() for t in layer.state_dict().values())
        for layer in model.block.layers
    ]
    assert part.layer_bytes == tuple(layers)
    whole = sum(t.untyped_storage().nbytes() for t in model.state_dict().values())
    assert part.total_bytes == whole == one.device_bytes


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_weights_that_rest_are_those_that_stay(tiny_dir, precision, monkeypatch):
    """Read or made at random; of the device only what quantises is needed, a tensor at a time."""
    policy = PrecisionPolicy(precision)
    names = tuple(linears_in_8_bits(DIT, "none")) if policy.narrow else ()
    one = TransformerSpec(
        config.VARIANTS["distill"], DIT, tiny_dir / "distill", None, policy, names
    )
    device = CPU if policy.narrow else torch.device("meta")  # holds no values
    read = one.read(device, rest=CPU)
    quantized = one.quantized_dtypes
    made, layers = random_weights.dit_by_layer(DIT, 0, CPU, BF16, "distill", quantized)
    assert list(layers) == list(made.block.layers)
    for other in (read, made):
        expected = one.read(CPU).state_dict()
        assert other.state_dict().keys() == expected.keys()
        for key, value in other.state_dict().items():
            assert value.device == CPU and value.dtype == expected[key].dtype
            assert value.stride() == expected[key].stride(), key
            assert torch.equal(value.float(), expected[key].float()), key


def test_quantising_holds_one_tensor_on_the_device(tiny_dir, monkeypatch):
    seen, real = [], checkpoint.quantize_linear

    def watched(linear, weight, rest, dtype):
        real(linear, weight, rest, dtype)
        seen.append(rest)
        assert linear.weight.device == CPU

    monkeypatch.setattr(checkpoint, "quantize_linear", watched)
    names = tuple(linears_in_8_bits(DIT, "none"))
    quantized = dict.fromkeys(names, FP8)
    checkpoint.load_dit(
        tiny_dir / "distill", config.VARIANTS["distill"], CPU, BF16, quantized=quantized, rest=CPU
    )
    assert seen == [CPU] * len(names)


# -- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), "40", True])
def test_a_wrong_limit_is_refused(tiny_dir, limit):
    with pytest.raises(InvalidRequestError, match="must be a number of GiB above 0, got"):
        runtime.load(tiny_dir, device="cpu", memory_limit_gb=limit)


def test_a_limit_needs_a_gpu(tiny_dir):
    with pytest.raises(InvalidRequestError, match="must go with a GPU, got 40 with cpu"):
        runtime.load(tiny_dir, device="cpu", memory_limit_gb=40)
    with runtime.load(tiny_dir, device="cpu") as engine:
        assert engine.memory_plan is None


def test_the_limit_is_at_most_what_is_free(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 70 * GIB)
    assert placement.limit_of(40, gpu) == 40 * GIB
    assert placement.limit_of(80, gpu) == 70 * GIB + CONTEXT_BYTES
    assert placement.limit_of(None, gpu) < 70 * GIB + CONTEXT_BYTES
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * GIB)
    assert placement.limit_of(80, gpu) == 73 * GIB + CONTEXT_BYTES  # 3 of it are held already


def test_a_limit_counts_what_the_process_holds_already(monkeypatch, others):
    monkeypatch.setattr(placement, "check_host", lambda plan: None)
    monkeypatch.setattr(placement, "why_not", lambda *arguments: None)
    options = TransformerOptions(torch.device("cuda:0"))

    def asked(limit_gib: float, held_gib: float) -> memory_plan.MemoryPlan:
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(held_gib * GIB))
        given = list(others), spec("distill", "bf16"), None, int(limit_gib * GIB), True
        return placement.plan_placement(lambda: given[0], *given[1:], options)

    free, beside = asked(60, 0), asked(60, 5)
    assert free.streamed == beside.streamed
    for alone, stage in zip(free.stages, beside.stages, strict=True):
        assert stage.weights["other tensors of this process"] == 5 * GIB
        assert stage.total_bytes == alone.total_bytes + 5 * GIB
    assert beside.peak_bytes <= 60 * GIB
    messages = []
    for held_gib in (0, 3):
        with pytest.raises(memory_plan.NoPlanError, match=r"no way to run in 1\.0 GiB") as caught:
            asked(1, held_gib)
        messages.append(float(re.search(r"memory_limit_gb=([\d.]+)", str(caught.value))[1]))
    assert messages[1] - messages[0] == pytest.approx(3, abs=0.11)  # rounded up to tenths


def test_a_cap_holds_for_as_long_as_it_lives(monkeypatch):
    """PyTorch gets what the limit leaves beside what the driver holds."""
    share = {"now": 1.0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share["now"])
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda fraction, device: share.update(now=fraction),
    )
    cap = placement.Cap(torch.device("cuda:0"), 40 * GIB)
    assert share["now"] * 80 * GIB == 40 * GIB - CONTEXT_BYTES
    del cap
    assert share["now"] == 1.0


def test_without_a_limit_what_has_no_room_is_only_a_warning(monkeypatch, others, caplog):
    """The card may be too small for the default size, and large enough for others."""
    monkeypatch.setattr(placement, "check_host", lambda plan: None)
    monkeypatch.setattr(placement, "why_not", lambda *arguments: "none here")
    options = TransformerOptions(torch.device("cuda:0"), compile=False)

    def asked(is_asked: bool) -> memory_plan.MemoryPlan:
        pair = spec("distill", "bf16"), spec("1080p_sr", "bf16")
        return placement.plan_placement(lambda: others, *pair, 24 * GIB, is_asked, options)

    with pytest.raises(memory_plan.NoPlanError, match=r"the stage decode takes 38"):
        asked(True)
    made = asked(False)
    assert set(made.streamed) >= {TEXT, BASE, SR} and made.peak_bytes <= 24 * GIB
    decode = next(stage for stage in made.stages if stage.name == "decode")
    assert 15 * GIB < decode.working_bytes < 24 * GIB
    assert "clips of the default size have no room" in caplog.text


def test_host_memory_must_have_room(monkeypatch, others):
    made = planned(others, "bf16", "1080p", 40)
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 50 * GIB)
    with pytest.raises(DeviceError, match=r"74\.\d GiB of weights .* and 50\.0 GiB are free"):
        placement.check_host(made)
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 90 * GIB)
    placement.check_host(made)


def test_an_fp8_transformer_fits_where_a_bf16_one_moves(tiny_dir, monkeypatch, others):
    assert not planned(others, "fp8", None, 40).streamed
    assert planned(others, "bf16", None, 40).streamed
    one = plan(config.VARIANTS["distill"], tiny_dir / "distill", TransformerOptions(CPU))
    assert weighed.reading_bytes(one) > 0


# -- the bus ----------------------------------------------------------------------------------


def test_a_slower_bus_makes_moving_dearer(others):
    """A clip that computes ten times as fast as its weights come waits for them."""
    made = {
        rate: placement.plan_memory(
            others,
            spec("distill", "bf16"),
            None,
            20 * GIB,
            Clips(is_compiled=True, speeds=Speeds(copy_bytes_per_s=rate)),
        )
        for rate in (memory_plan.COPY_BYTES_PER_S, 5e9)
    }
    fast, slow = made.values()
    assert slow.extra_s > 5 * fast.extra_s > 0
    assert slow.as_dict()["copy_bytes_per_s"] == slow.copy_bytes_per_s == 5e9
    assert planned(others, "bf16", None, 20).extra_s == fast.extra_s


def test_load_plans_by_the_bus_that_is_there(others, monkeypatch):
    monkeypatch.setattr(placement, "speeds_of", lambda device: Speeds(copy_bytes_per_s=7e9))
    monkeypatch.setattr(placement, "check_host", lambda plan: None)
    options = TransformerOptions(CPU)
    made = placement.plan_placement(
        lambda: others, spec("distill", "bf16"), None, 20 * GIB, True, options
    )
    assert made is not None and made.copy_bytes_per_s == 7e9


def test_without_a_gpu_nothing_is_measured():
    assert speeds_of(CPU) == Speeds()
