"""What the host has set, in torch and around it, changes no clip, and nothing of it is changed."""

from __future__ import annotations

import contextlib
import locale
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from sounds import write_sine

from magihuman import runtime
from magihuman.runtime.weights import random_weights

# Guidance, both inputs and super-resolution: every component and every loop runs.
OPTIONS = {
    "seconds": 0.36, "width": 64, "height": 64, "steps": 2, "sr_width": 96, "sr_height": 96,
    "sr_steps": 2, "negative_prompt": "static",
}  # fmt: skip


def matmul_precision() -> str | None:
    """The older setting, which raises where the newer ones have been set by hand."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


SETTERS = {
    "float32_matmul_precision": (
        matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "fp32_precision": (
        lambda: torch.backends.fp32_precision,
        lambda value: setattr(torch.backends, "fp32_precision", value),
    ),
    "mkldnn_precision": (
        lambda: torch.backends.mkldnn.fp32_precision,
        lambda value: setattr(torch.backends.mkldnn, "fp32_precision", value),
    ),
    "deterministic_fill": (
        lambda: torch.utils.deterministic.fill_uninitialized_memory,
        lambda value: setattr(torch.utils.deterministic, "fill_uninitialized_memory", value),
    ),
    "cudnn_benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
    "cudnn_deterministic": (
        lambda: torch.backends.cudnn.deterministic,
        lambda value: setattr(torch.backends.cudnn, "deterministic", value),
    ),
}


@contextlib.contextmanager
def setting(name: str, value: object) -> Iterator[None]:
    """One of the process's settings, and back to what it was."""
    get, set_to = SETTERS[name]
    before = get()
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic(warn_only: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    yield


STATES = {
    "dtype bfloat16": lambda: setting("default_dtype", torch.bfloat16),
    "dtype float16": lambda: setting("default_dtype", torch.float16),
    "dtype float64": lambda: setting("default_dtype", torch.float64),
    "device meta": lambda: default_device("meta"),
    "device cpu": lambda: default_device("cpu"),
    "in a device context": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(True),
    "deterministic": lambda: deterministic(warn_only=False),
    "deterministic, warnings": lambda: deterministic(warn_only=True),
    "without the fill": lambda: setting("deterministic_fill", False),
    "matmul high": lambda: setting("float32_matmul_precision", "high"),
    "matmul medium": lambda: setting("float32_matmul_precision", "medium"),
    "tf32 for all": lambda: setting("fp32_precision", "tf32"),
    "bf16 on the CPU": lambda: setting("mkldnn_precision", "bf16"),
    "numpy raises": lambda: np.errstate(all="raise"),
    "cudnn benchmark": lambda: setting("cudnn_benchmark", True),
    "seeded": seeded,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A face and a voice."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
    voice = write_sine(tmp_path_factory.mktemp("voice") / "voice.wav", seconds=0.4)
    return {"image": Image.fromarray(pixels), "audio": voice}


@pytest.fixture(scope="module")
def loaded(tiny_dir):
    """An engine that runs every model, loaded in a plain host."""
    with runtime.load(tiny_dir, variant="base", sr="540p", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(loaded, inputs):
    """The clips of a plain host: with both inputs, and with neither."""
    return [loaded.generate("hi", **OPTIONS, **given) for given in (inputs, {})]


def check_same(clips: list[runtime.Video], plain: list[runtime.Video]) -> None:
    for clip, expected in zip(clips, plain, strict=True):
        assert np.array_equal(clip.frames, expected.frames)
        assert np.array_equal(clip.audio, expected.audio)


def test_a_stream_has_the_hosts_context_no_more_than_a_clip(loaded, plain):
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        chunks = list(loaded.generate_stream("hi", **OPTIONS))
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), plain[1].frames)


def test_a_callback_may_set_what_it_likes(loaded, plain):
    """From the thread of the request, while it runs."""
    cpu_state = torch.get_rng_state()

    def upset(progress: runtime.Progress) -> None:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(True)
        torch.set_float32_matmul_precision("highest")
        torch.manual_seed(progress.step)
        np.random.seed(progress.step)

    with setting("default_dtype", torch.float32), setting("float32_matmul_precision", "highest"):
        grad = torch.is_grad_enabled()
        try:
            clip = loaded.generate("hi", **OPTIONS, on_progress=upset)
        finally:
            torch.set_default_device(None)
            torch.set_grad_enabled(grad)
            torch.set_rng_state(cpu_state)
    check_same([clip], plain[1:])


def test_warming_up_does_not_mind(engine):
    with setting("default_dtype", torch.float64), default_device("meta"):
        engine.warmup([(64, 64, 0.2)], text_tokens=[4])


def test_settings_are_put_back_by_the_last_of_many_requests(loaded):
    """Requests that overlap each find the host's setting changed, and the host finds its own."""
    with setting("float32_matmul_precision", "high"):
        threads = [
            threading.Thread(target=lambda: loaded.generate("hi", **OPTIONS)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_float32_matmul_precision() == "high"


def state_of_host() -> dict[str, object]:
    """All that a library could change behind its host's back, as far as values compare."""
    facts: dict[str, object] = {name: get() for name, (get, _) in SETTERS.items()}
    facts |= {
        f"fp32 of {name}": place.fp32_precision
        for name, place in {
            "cuda.matmul": torch.backends.cuda.matmul,
            "mkldnn.matmul": torch.backends.mkldnn.matmul,
            "mkldnn.conv": torch.backends.mkldnn.conv,
            "cudnn.conv": torch.backends.cudnn.conv,
        }.items()
    }
    facts |= {
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "torch": tuple(torch.get_rng_state().tolist()),
        "numpy": str(np.random.get_state()),
        "random": random.getstate(),
        "numpy errors": np.geterr(),
        "warnings": list(warnings.filters),
        "locale": locale.setlocale(locale.LC_ALL),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "switch": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "excepthook": (sys.excepthook, threading.excepthook),
    }
    return facts


def differing(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [name for name, value in before.items() if after[name] != value]


@pytest.mark.parametrize("state", STATES)
def test_an_engine_is_that_of_a_plain_host_and_leaves_all_as_it_was(
    tiny_dir, loaded, inputs, plain, state
):
    """Loaded in the state, used in it and in a thread without what a thread has of its own, and
    used in it alone.
    """
    clips = []
    with STATES[state]():
        facts = [state_of_host()]
        engine = runtime.load(tiny_dir, variant="base", sr="540p", device="cpu")
        facts.append(state_of_host())
        clips.append(engine.generate("hi", **OPTIONS, **inputs))
        facts.append(state_of_host())
        thread = threading.Thread(target=lambda: clips.append(engine.generate("hi", **OPTIONS)))
        thread.start()
        thread.join()
        engine.close()
        facts.append(state_of_host())
        clips.append(loaded.generate("hi", **OPTIONS))
    for after in facts[1:]:
        assert differing(facts[0], after) == []
    check_same(clips, [*plain, plain[1]])


def test_what_is_refused_leaves_the_host_as_it_was(tiny_dir, tmp_path):
    with setting("default_dtype", torch.float64), setting("float32_matmul_precision", "high"):
        before = state_of_host()
        with pytest.raises(runtime.CheckpointError):
            runtime.load(tmp_path, device="cpu")
        cancel = threading.Event()
        cancelled = {"cancel": cancel, "on_progress": lambda progress: cancel.set()}
        with runtime.load(tiny_dir, device="cpu") as engine, pytest.raises(runtime.Cancelled):
            engine.generate("hi", seconds=0.2, width=64, height=64, **cancelled)
        assert differing(before, state_of_host()) == []


def test_random_weights_are_drawn_from_generators_of_their_own(monkeypatch):
    from transformers import T5GemmaConfig

    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260,
    }  # fmt: skip

    def small() -> T5GemmaConfig:
        return T5GemmaConfig(encoder=dict(sizes), decoder=dict(sizes), is_encoder_decoder=False)

    monkeypatch.setattr(random_weights, "text_config", small)
    cpu = torch.device("cpu")

    def states() -> list[dict[str, torch.Tensor]]:
        encoder, layers = random_weights.text_encoder(5, cpu, torch.bfloat16)
        assert len(list(layers)) == 2
        return [encoder.model.state_dict(), {"hidden": encoder.encode(torch.arange(9)[None])}]

    plain = states()
    with setting("default_dtype", torch.float64):
        before = state_of_host()
        again = states()
        assert differing(before, state_of_host()) == []
    for one, other in zip(plain, again, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
    assert plain[1]["hidden"].isfinite().all() and plain[1]["hidden"].std() > 0.1
    assert not any(value.is_meta for value in plain[0].values())


IMPORT = """
import random, signal, sys, warnings, locale, logging
import numpy as np
import scipy.signal  # which adds filters of warnings of its own
import torch
def facts():
    return {
        "signals": {n: signal.getsignal(n) for n in signal.valid_signals()},
        "warnings": list(warnings.filters), "locale": locale.setlocale(locale.LC_ALL),
        "random": random.getstate(), "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(), "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(), "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(), "matmul": torch.get_float32_matmul_precision(),
        "log": (logging.root.level, list(logging.root.handlers)),
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook),
    }
torch.set_default_dtype(torch.float64)
before = facts()
import magihuman.runtime as runtime
runtime.load, runtime.Request, runtime.Engine, runtime.synthetic
after = facts()
print([name for name in before if before[name] != after[name]])
"""


def test_an_import_leaves_the_host_as_it_was():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
