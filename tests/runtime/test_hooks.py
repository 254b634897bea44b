"""Hooks with the real packages."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from magihuman import runtime
from magihuman.runtime import (
    Cancelled,
    InvalidRequestError,
    NvtxHooks,
    OpenTelemetryHooks,
    PrometheusHooks,
)

SMALL = {"seconds": 0.2, "width": 32, "height": 32, "steps": 1}
STAGES = [
    "prepare", "queue", "text", "audio", "image", "queue", "denoise", "decode_audio",
    "decode_video",
]  # fmt: skip


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def tracers(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


@pytest.fixture
def watched(tiny_dir, tracers, registry):
    hooks = [OpenTelemetryHooks(tracers), PrometheusHooks(registry)]
    with runtime.load(tiny_dir, device="cpu", hooks=hooks) as engine:
        assert engine.hooks == tuple(hooks)
        yield engine


def fail(*args):
    raise ValueError("no sound")


def test_spans_of_a_request_and_its_stages(watched, tracers, exporter, tmp_path):
    with tracers.get_tracer("service").start_as_current_span("call"):
        video = watched.generate("hi", **SMALL, save=tmp_path / "clip.mp4")
    *stages, request, call = exporter.get_finished_spans()
    assert [span.name for span in stages] == [f"magihuman.{s}" for s in [*STAGES, "write"]]
    assert (request.name, call.name) == ("magihuman.request", "call")
    assert {span.parent.span_id for span in stages} == {request.context.span_id}
    assert request.parent.span_id == call.context.span_id
    assert all(span.attributes["magihuman.request"] == 1 for span in [*stages, request])
    assert request.attributes["magihuman.outcome"] == "done"
    # A span and the clip's own figure of a stage are taken one right after the other.
    seconds = {span.name: (span.end_time - span.start_time) / 1e9 for span in stages}
    assert seconds["magihuman.decode_video"] == pytest.approx(
        video.timings_s["decode_video"], abs=0.1
    )


def test_a_stream_keeps_the_callers_span(watched, tracers, exporter):
    with tracers.get_tracer("service").start_as_current_span("call") as call:
        assert len(list(watched.generate_stream("hi", **SMALL))) == 1
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert spans["magihuman.request"].parent.span_id == call.get_span_context().span_id


def test_outcomes_are_told_and_counted(watched, exporter, registry, monkeypatch, tmp_path):
    def count(outcome: str) -> float:
        found = registry.get_sample_value("magihuman_requests_total", {"outcome": outcome})
        return found or 0.0

    watched.generate("hi", **SMALL)
    with pytest.raises(InvalidRequestError):
        watched.generate("hi", **SMALL, guidance=3.0)
    with pytest.raises(InvalidRequestError):
        watched.generate("hi", **SMALL, image=tmp_path / "no.png")
    with pytest.raises(runtime.DeadlineExceeded):
        watched.generate("hi", **{**SMALL, "steps": 1000}, deadline_s=0.1)
    stream = watched.generate_stream("hi", **{**SMALL, "steps": 1000})
    stream.close()
    monkeypatch.setattr(watched._parts.audio_vae, "decode", fail)
    with pytest.raises(ValueError, match="no sound"):
        watched.generate("hi", **SMALL)
    counts = {name: count(name) for name in ("done", "rejected", "cancelled", "failed")}
    assert counts == {"done": 1, "rejected": 2, "cancelled": 2, "failed": 1}
    requests = [s for s in exporter.get_finished_spans() if s.name == "magihuman.request"]
    assert [span.attributes["magihuman.outcome"] for span in requests] == [
        "done", "rejected", "rejected", "cancelled", "cancelled", "failed",
    ]  # fmt: skip
    assert [span.attributes["magihuman.request"] for span in requests] == list(range(1, 7))
    assert not requests[0].events and requests[5].events[0].name == "exception"

    def seconds(stage: str, of: str) -> float:
        value = registry.get_sample_value(f"magihuman_stage_seconds_{of}", {"stage": stage})
        assert value is not None
        return value

    assert seconds("request", "count") == 6
    assert seconds("decode_video", "count") == 1 and seconds("decode_audio", "count") == 2
    assert 0 < seconds("denoise", "sum") < seconds("request", "sum")
    assert registry.get_sample_value("magihuman_requests_in_progress") == 0


@pytest.mark.parametrize("at", ["request", "denoise"])
def test_what_a_hook_raises_ends_the_request_alone(tiny_dir, at):
    class Broken:
        def span(self, name, request):
            if name == at and request == 1:
                raise Cancelled("the hook's own")
            return nullcontext()

    with runtime.load(tiny_dir, device="cpu", hooks=[Broken()]) as engine:
        with pytest.raises(Cancelled, match="the hook's own"):
            engine.generate("hi", **SMALL)
        assert engine.is_usable and engine.queue_length == 0
        assert len(engine.generate("hi", **SMALL).frames) == 5


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has NVTX")
def test_nvtx_without_cuda_is_refused():
    with pytest.raises(InvalidRequestError, match="need a PyTorch built for CUDA"):
        NvtxHooks()


def test_importing_the_runtime_imports_none_of_them():
    code = (
        "import sys; from magihuman import runtime; runtime.PrometheusHooks;"
        "print([m for m in ('torch', 'opentelemetry', 'prometheus_client') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
