"""Weights that rest elsewhere, brought for a stage: the same bits, on CPU tensors.

Copies are made at once there, so that a layer which comes too early, too late or into the wrong
place gives other results than the model that stays.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import golden
from magihuman import runtime
from magihuman.graphs import quantization
from magihuman.graphs.transformer import replay
from magihuman.graphs.transformer.compile import pad_weights
from magihuman.graphs.transformer.layer_hooks import LayersMixedError, call_before_layers
from magihuman.graphs.transformer.options import ReplayOptions
from magihuman.graphs.transformer.replay import CompiledForward
from magihuman.kernels.jit import cache
from magihuman.runtime.memory import offload
from magihuman.runtime.memory import plan as memory_plan
from magihuman.runtime.memory.offload import PAGE, Group, HostMemory, Offloaded
from magihuman.runtime.memory.placement import Placer
from magihuman.runtime.memory.plan import AUDIO, BASE, IMAGE, SR, TEXT, MemoryPlan
from magihuman.runtime.model import tokens
from magihuman.runtime.weights import random_weights
from magihuman.runtime.weights.tiny import DIT

CPU = torch.device("cpu")
LAYOUT = tokens.Layout(3, 4, 6, 9, 33)
SMALL = {"seconds": 0.2, "width": 64, "height": 64, "steps": 2}
SPLITS = [(), (0, 1, 2, 3, 4), (0, 2, 4), (1, 2, 3), (0, 1, 4)]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not been brought is wrong in a way that shows."""
    monkeypatch.setattr(
        Offloaded, "_room", lambda self, size: torch.full((size,), 0x7F, dtype=torch.uint8)
    )


def moved(model, streamed=()) -> Offloaded:
    layers = list(model.block.layers)
    part = Offloaded(model, layers, CPU, streamed)
    offload.call_before_layers(model.block, layers, part.before_layer)
    return part


def dit(fp8: bool = False) -> torch.nn.Module:
    model = random_weights.dit(DIT, 0, CPU, torch.bfloat16, "distill")
    if fp8:
        quantization.quantize_model(model, quantization.quantized_linears(DIT))
    pad_weights(model, DIT)
    return model


# -- one model --------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", SPLITS)
@pytest.mark.parametrize("slots", [1, 2])
def test_a_model_that_moves_computes_the_same(streamed, slots, monkeypatch):
    monkeypatch.setattr(memory_plan, "SLOTS", slots)
    model = dit()
    inputs = golden.inputs_of(model, LAYOUT)
    expected = model(**inputs)
    part = moved(model, streamed)
    for _ in range(2):
        with part.present(), torch.inference_mode():
            for _ in range(3):
                for ours, theirs in zip(model(**inputs), expected, strict=True):
                    assert torch.equal(ours, theirs)
    # At rest the model is whole, in ordinary tensors, and computes as well.
    assert not any(parameter.is_inference() for parameter in model.parameters())
    for group in (part._outside, *part._layers):
        group.rest()


def test_layers_share_slots():
    """In a stage no more is on the device than the plan counts."""
    model, streamed = dit(), (1, 2, 3)
    part = moved(model, streamed)
    sizes = tuple(group.size_bytes for group in part._layers)
    planned = memory_plan.Part("x", part._outside.size_bytes, sizes)
    assert part.size_bytes == planned.total_bytes
    with part.present():
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
                    for p in [*model.parameters(), *model.buffers()]}  # fmt: skip
        assert sum(storages.values()) == planned.loaded_bytes(streamed) < part.size_bytes
        before = {name: p.data_ptr() for name, p in model.named_parameters()}
        model(**golden.inputs_of(model, LAYOUT))
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert sum(g.host.nbytes for g in (part._outside, *part._layers)) == part.size_bytes


@pytest.mark.parametrize(("streamed", "steps"), [((), [2, 3, 5]), ((1, 2, 3), [5])])
def test_where_memory_is_in_pieces_more_layers_take_turns(streamed, steps, monkeypatch, caplog):
    """As many as it takes, and from then on."""
    monkeypatch.setattr(memory_plan, "SLOTS", 1)
    model = dit()
    inputs = golden.inputs_of(model, LAYOUT)
    expected = model(**inputs)
    part = moved(model, streamed)
    sizes = tuple(group.size_bytes for group in part._layers)
    planned = memory_plan.Part("x", part._outside.size_bytes, sizes)
    least = planned.loaded_bytes(range(len(sizes)))
    held: list[weakref.ref[np.ndarray]] = []  # each lives as long as the tensor's memory

    def room(self, size):
        now = sum(array.nbytes for reference in held if (array := reference()) is not None)
        if now + size > least:
            raise torch.OutOfMemoryError(f"{now} of {least} bytes are taken")
        array = np.full(size, 0x7F, np.uint8)
        held.append(weakref.ref(array))
        return torch.from_numpy(array)

    monkeypatch.setattr(Offloaded, "_room", room)
    caplog.set_level("INFO", "magihuman")
    for _ in range(2):
        with part.present(), torch.inference_mode():
            assert torch.equal(model(**inputs)[0], expected[0])
    said = zip(steps, [len(streamed), *steps], strict=False)
    wanted = [
        f"memory is in pieces: {now} layers take turns, {before} before" for now, before in said
    ]
    assert caplog.messages == wanted  # the second time there is room at once
    least -= 1
    with pytest.raises(torch.OutOfMemoryError), part.present():
        pass
    least += 1
    with part.present(), torch.inference_mode():
        assert torch.equal(model(**inputs)[0], expected[0])


def test_the_schedule_is_needed():
    """Without its calls the poisoned slots show: the other tests can fail."""
    model = dit()
    inputs = golden.inputs_of(model, LAYOUT)
    expected = model(**inputs)
    part = Offloaded(model, list(model.block.layers), CPU, (1, 2, 3))
    with part.present():
        ours = model(**inputs)
    assert not torch.equal(ours[0], expected[0])


@pytest.mark.parametrize(
    ("fp8", "streamed"),
    [
        (False, (0, 1, 2, 3, 4)),
        (True, (1, 2, 3)),
        pytest.param(True, (0, 1, 2, 3, 4), marks=pytest.mark.thorough),
        pytest.param(False, (1, 2, 3), marks=pytest.mark.thorough),
    ],
)
def test_a_compiled_model_that_moves_computes_the_same(fp8, streamed, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(replay.Captures, "__init__", lambda *arguments: None)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    stays = dit(fp8)
    inputs = golden.inputs_of(stays, LAYOUT)
    options = ReplayOptions(replays=False)
    expected = CompiledForward(stays, DIT, torch.bfloat16, CPU, options)(**inputs)
    if streamed == (1, 2, 3):  # capture it anew, over weights that share memory
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "other"))
    model = dit(fp8)
    part = moved(model, streamed)
    options = ReplayOptions(replays=False, before_layer=part.before_layer)
    forward = CompiledForward(model, DIT, torch.bfloat16, CPU, options)
    for _ in range(2):
        with part.present():
            for _ in range(2):
                for ours, theirs in zip(forward(**inputs), expected, strict=True):
                    assert torch.equal(ours, theirs)
    assert [size.modality_rows for size in forward.reports()] == [(18, 9, 64)]


def test_a_failure_leaves_the_weights_at_rest():
    model = dit()
    inputs = golden.inputs_of(model, LAYOUT)
    expected = model(**inputs)
    part = moved(model, (0, 2, 4))

    def fail(*_) -> None:
        raise RuntimeError("in the middle")

    handle = model.block.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), part.present():
        model(**inputs)
    handle.remove()
    with part.present():
        assert torch.equal(model(**inputs)[0], expected[0])


def test_layers_must_stand_in_their_order():
    graph = torch.fx.Graph()
    root = dit()
    weights = [graph.get_attr(f"block.layers.{i}.attention.q_norm.weight") for i in (0, 1)]
    first = graph.call_function(torch.add, (weights[1], 1))
    second = graph.call_function(torch.add, (weights[0], first))
    graph.output((second,))
    with pytest.raises(LayersMixedError, match=r"of 2 layers must stand in their order, got \[1"):
        call_before_layers(torch.fx.GraphModule(root, graph), 2, print)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4),
        torch.arange(60.0).view(3, 20)[:, :7],  # zeros or not, what lies behind a row is kept
        torch.arange(48.0).view(2, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        torch.tensor(3, dtype=torch.int64),
        torch.arange(10, dtype=torch.bfloat16)[3:7],
        torch.empty(0, 5),
    ],
)
def test_a_tensor_keeps_its_layout(tensor):
    other = torch.ones(5, dtype=torch.uint8)
    expected = tensor.clone(memory_format=torch.preserve_format)
    stride, last = tensor.stride(), len(tensor.shape) == 2 and len(tensor)
    behind = tensor.as_strided((3, 20), (20, 1)).clone() if stride == (20, 1) and last else None
    group = Group([other, tensor], pin=False)
    run = group.host.clone()
    group.point_at(run)
    assert tensor.untyped_storage().data_ptr() == run.untyped_storage().data_ptr()
    assert torch.equal(tensor, expected) and tensor.stride() == stride
    assert tensor.numel() == 0 or tensor.data_ptr() % 4 == 0
    if behind is not None:
        assert torch.equal(tensor.as_strided((3, 20), (20, 1)), behind)
    group.rest()
    assert torch.equal(tensor, expected) and torch.equal(other, torch.ones(5, dtype=torch.uint8))


def test_layers_come_to_rest_before_the_next_is_made():
    """So that a device needs room for one, whatever the model takes."""
    expected = random_weights.dit(DIT, 0, CPU, torch.bfloat16, "distill")
    model, layers = random_weights.dit_by_layer(DIT, 0, CPU, torch.bfloat16, "distill")
    every = list(model.block.layers)
    made = []

    def watched() -> Iterator[torch.nn.Module]:
        for layer in layers:
            made.append(layer)
            resting = [p for other in made[:-1] for p in other.parameters()]
            assert not any(p.is_meta for p in layer.parameters())
            assert all(p.untyped_storage().nbytes() > p.nbytes for p in resting)  # a group's
            coming = [p for other in every[len(made) :] for p in other.parameters()]
            assert all(p.is_meta for p in coming)
            yield layer

    part = Offloaded(model, watched(), CPU, (1, 2, 3))
    assert made == every and len(part._layers) == len(every)
    with part.present():
        assert model.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


class Cudart:
    """Stands in for the calls that pin memory, which need a driver."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.pinned = status, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if self.status == 0:
            self.pinned[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


@pytest.mark.parametrize("size", [1, 4096, 3 * 2**20 + 5])
def test_pinned_memory_is_whole_pages_of_its_own(size, monkeypatch):
    """Not rounded up to a power of two, and let go of with the group that has it."""
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    one, other = (HostMemory(size, pin=True) for _ in range(2))
    assert one.run.shape == (size,) and one.run.dtype == torch.uint8
    assert set(cudart.pinned) == {one.run.data_ptr(), other.run.data_ptr()}
    assert all(at % PAGE == 0 for at in cudart.pinned)
    assert set(cudart.pinned.values()) == {-(-size // PAGE) * PAGE}
    view = one.run.fill_(7)
    del one
    assert set(cudart.pinned) == {other.run.data_ptr()}
    assert (view == 7).all()  # whoever still has a view of it
    assert HostMemory(0, pin=True).run.numel() == 0 and len(cudart.pinned) == 1


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(status=2))
    with pytest.raises(runtime.DeviceError, match=r"cannot be pinned \(CUDA error 2\)"):
        HostMemory(2**20, pin=True)


# -- an engine --------------------------------------------------------------------------------


@contextmanager
def engine_that_moves(folder, streamed: dict[str, tuple[int, ...]], **options) -> Iterator:
    """What `load` makes of a plan, with the CPU for a device."""
    with runtime.load(folder, device="cpu", **options) as engine:
        parts = engine._parts
        placer = Placer(MemoryPlan(0, streamed, False, (), 0), CPU)
        encoder = parts.text_encoder.model
        placer.place(AUDIO, parts.audio_vae.model)
        placer.place(IMAGE, parts.image_vae.model)
        placer.place(TEXT, encoder, encoder.encoder.layers, encoder.encoder)
        for name, model in ((BASE, parts.dit), (SR, parts.sr_dit)):
            if model is not None:
                placer.place(name, model, list(model.block.layers), model.block)
        engine._parts = dataclasses.replace(parts, residency=placer.residency)
        yield engine


@pytest.fixture(scope="module")
def clips(tiny_dir, tmp_path_factory):
    """Requests with all that is encoded, and what comes of them where nothing moves."""
    from PIL import Image
    from sounds import write_sine

    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    voice = write_sine(tmp_path_factory.mktemp("sound") / "voice.wav", seconds=0.3)
    jobs = [
        {**SMALL, "seed": 1, "image": Image.fromarray(pixels), "sr_width": 96, "sr_height": 96},
        {**SMALL, "seed": 2, "audio": voice, "sr_width": 96, "sr_height": 96, "sr_guidance": 2.0},
    ]
    for job in jobs:
        job |= {"sr_steps": 2, "negative_prompt": "x"}
    with runtime.load(tiny_dir, sr="1080p", device="cpu") as engine:
        return jobs, [engine.generate("hi", **job) for job in jobs]


def same(a: runtime.Video, b: runtime.Video) -> bool:
    return np.array_equal(a.frames, b.frames) and np.array_equal(a.audio, b.audio)


EVERY = (AUDIO, IMAGE, TEXT, BASE, SR)


@pytest.mark.parametrize(
    "streamed",
    [
        dict.fromkeys(EVERY, ()),
        {**dict.fromkeys(EVERY, ()), BASE: (1, 2, 3), SR: (0, 1, 2, 3, 4)},
        {TEXT: (0, 1), SR: (0, 2, 4)},
        {BASE: (0, 1, 4)},
    ],
)
def test_clips_are_those_of_an_engine_where_nothing_moves(tiny_dir, clips, streamed):
    jobs, expected = clips
    with engine_that_moves(tiny_dir, streamed, sr="1080p") as engine:
        for job, clip in zip(jobs, expected, strict=True):
            assert same(engine.generate("hi", **job), clip)


def test_warming_up_brings_what_it_runs(tiny_dir):
    streamed = {**dict.fromkeys((AUDIO, IMAGE, TEXT), ()), BASE: (1, 2, 3)}
    with engine_that_moves(tiny_dir, streamed) as engine:
        assert list(engine.warmup([(64, 64, 0.2)], text_tokens=[5])) == [(64, 64, 0.2)]


@pytest.mark.parametrize("stage", ["denoise", "super_resolve", "decode_video"])
def test_a_request_that_ends_early_leaves_the_next_its_weights(tiny_dir, clips, stage):
    jobs, expected = clips
    streamed = {**dict.fromkeys(EVERY, ()), BASE: (1, 2, 3), SR: (0, 2, 4)}
    with engine_that_moves(tiny_dir, streamed, sr="1080p") as engine:

        def stop(progress: runtime.Progress) -> None:
            if progress.stage == stage and progress.step >= 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.generate("hi", on_progress=stop, **jobs[0])
        assert same(engine.generate("hi", **jobs[0]), expected[0])


def test_nothing_is_encoded_beside_a_request_whose_weights_move(tiny_dir, clips, monkeypatch):
    """Four callers at once: each stage has the device, and so its memory, to itself."""
    from concurrent.futures import ThreadPoolExecutor

    jobs, expected = clips
    open_parts: list[str] = []
    present = Offloaded.present

    @contextmanager
    def watched(self) -> Iterator[None]:
        with present(self):
            open_parts.append("open")
            assert len(open_parts) == 1
            yield
            open_parts.pop()

    monkeypatch.setattr(Offloaded, "present", watched)
    with (
        engine_that_moves(tiny_dir, dict.fromkeys(EVERY, ()), sr="1080p") as engine,
        ThreadPoolExecutor(4) as pool,
    ):
        made = pool.map(lambda i: engine.generate("hi", **jobs[i % 2]), range(4))
        assert all(same(clip, expected[i % 2]) for i, clip in enumerate(made))
