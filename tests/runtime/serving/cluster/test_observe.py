"""What whoever runs a server sees: lines of the log from all processes, and a collector's spans."""

from __future__ import annotations

import gzip
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from typer.testing import CliRunner
from video_client import until

from magihuman.runtime.cli.main import app
from magihuman.runtime.serving.observe import lines, relay
from magihuman.runtime.serving.record import Job, Status

PRIVATE = "a prompt that nobody else reads"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def job(**changes: object) -> Job:
    options = {"seconds": 5.0, "width": 480, "height": 256, "seed": 3}
    values = {
        "status": Status.COMPLETED, "created_at": 100.0, "started_at": 102.5, "completed_at": 110.0,
        "attempts": 1, "timings_s": {"denoise": 6.25, "write": 0.5}, "warnings": ["cut"],
    }  # fmt: skip
    return Job(PRIVATE, options, "video_1", **{**values, **changes})


FAILED = {
    "status": Status.FAILED, "timings_s": {}, "warnings": [],
    "error": {"code": "device", "message": "no\nmemory"},
}  # fmt: skip


def logged(caplog, formatter: logging.Formatter, ended: Job) -> str:
    with caplog.at_level(logging.INFO, "magihuman.videos"):
        lines.log_end(ended)
    (record,) = caplog.records
    return formatter.format(record)


def test_a_video_is_a_line_of_text(caplog):
    line = logged(caplog, lines.TextFormatter(), job())
    time, text = line.split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert text == (
        "INFO video_1 completed: 5.0 s of 480x256; waited 2.5 s; took 7.5 s (denoise 6.25, write"
        " 0.50); cut"
    )


def test_a_video_that_has_failed_says_why_in_its_line(caplog):
    line = logged(caplog, lines.TextFormatter(), job(**FAILED))
    assert line.endswith(
        "WARNING video_1 failed: 5.0 s of 480x256; waited 2.5 s; took 7.5 s; device: no memory"
    )


def test_a_video_is_a_json_object_in_a_line(caplog):
    line = logged(caplog, lines.JsonFormatter(), job(**FAILED))
    assert "\n" not in line
    said = json.loads(line)
    assert (said["level"], said["video"], said["status"]) == ("warning", "video_1", "failed")
    assert (said["waited_s"], said["took_s"], said["attempts"]) == (2.5, 7.5, 1)
    assert (said["error_code"], said["error_message"]) == ("device", "no memory")
    assert (said["seconds"], said["size"], said["seed"]) == (5.0, "480x256", 3)


def test_what_a_client_has_named_adds_no_line_and_no_colour(caplog):
    named = job(warnings=["ignored: a\n2026-01-01T00:00:00.000Z INFO video_2 \x1b[31m"])
    line = logged(caplog, lines.TextFormatter(), named)
    assert line.endswith(r"; ignored: a 2026-01-01T00:00:00.000Z INFO video_2 \x1b[31m")
    assert "\n" not in line


def test_prompts_are_not_logged(caplog):
    for formatter in (lines.TextFormatter(), lines.JsonFormatter()):
        assert PRIVATE not in logged(caplog, formatter, job())
        caplog.clear()


def test_an_error_with_its_traceback_is_one_json_object(caplog):
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("magihuman").exception("it has failed")
    line = lines.JsonFormatter().format(caplog.records[0])
    assert "\n" not in line and "two\nlines" in json.loads(line)["error"]


CHILD = """
import logging, sys
from magihuman.runtime.serving.observe import relay
from magihuman.runtime.serving.observe.lines import videos
relay.set_up()
videos.info("from %s", sys.argv[1])
logging.getLogger("magihuman").info("not for people")
logging.getLogger("another.library").warning("\\u00e9\\ud800 " + "x" * 100_000)
"""


def test_lines_of_other_processes_arrive_whole(tmp_path, capfd):
    with relay.listening(tmp_path):
        children = [subprocess.Popen([sys.executable, "-c", CHILD, f"{n}"]) for n in range(2)]
        assert [child.wait(300) for child in children] == [0, 0]
    said = capfd.readouterr().err.splitlines()
    assert sorted(line.split(" INFO ")[1] for line in said if " INFO " in line) == [
        "from 0",
        "from 1",
    ]
    long = [line for line in said if " WARNING " in line]
    assert len(said) == 4 and len(long) == 2
    assert all(line.count("x") > 60_000 for line in long)


def test_without_a_command_lines_go_to_standard_error():
    done = subprocess.run([sys.executable, "-c", CHILD, "here"], capture_output=True, timeout=300)
    assert done.returncode == 0
    assert re.match(rb"\S+Z INFO from here\n\S+Z WARNING ", done.stderr)


def test_a_reader_that_has_gone_ends_nothing(tmp_path):
    with relay.listening(tmp_path):
        place = str(tmp_path / relay.SOCKET)
        handler = relay.SocketHandler(place)
    record = logging.LogRecord("magihuman", logging.INFO, "", 0, "hi", None, None)
    handler.emit(record)
    handler.close()
    with pytest.raises(OSError):  # noqa: PT011 - whichever the system has
        relay.SocketHandler(place)


# -- a server ---------------------------------------------------------------------------------


@dataclass
class Collector:
    """Takes spans over HTTP, as OpenTelemetry's own collector does."""

    url: str = ""
    spans: list = field(default_factory=list)

    def named(self, name: str) -> list:
        return [span for span in list(self.spans) if span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip(
        "opentelemetry.exporter.otlp.proto.http", reason="the extra [otel] is not installed"
    )
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found.spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


@pytest.mark.thorough
def test_a_server_logs_and_traces_as_its_environment_says(
    server_at, collector, tmp_path, monkeypatch
):
    """Spans lead from the client's own over the request to the stages; Ray says nothing."""
    pytest.importorskip("ray", reason="the extra [serve] is not installed")
    for name, value in {
        "LOG_FORMAT": "json", "OTLP_ENDPOINT": collector.url, "MAX_PROMPT_CHARS": "40",
        "TAGS": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"MAGIHUMAN_{name}", value)
    server = server_at(tmp_path / "videos")
    server.start()
    small = {"prompt": PRIVATE, "seconds": "0.2", "size": "64x64", "num_inference_steps": 2}
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    answer = server.http.post("/v1/videos", json=small, headers=headers)
    assert answer.status_code == 200, answer.text
    name = answer.json()["id"]
    server.when(name, "completed")
    content = server.content(name).content
    assert PRIVATE.encode() not in content and b"trainedAlgorithmicMedia" in content
    assert server.http.post("/v1/videos", json={**small, "prompt": "x" * 41}).status_code == 422
    until(lambda: collector.named("magihuman.request"))
    server.end()

    said = [json.loads(line) for line in server.log.read_text().splitlines()]
    (video,) = (line for line in said if line.get("video") == name)
    assert video["status"] == "completed" and "denoise" in video["stages_s"]
    others = [line["message"] for line in said if line is not video]
    assert [text.split()[0] for text in others] == ["loading", "serving", "stopping:"]
    assert PRIVATE not in server.log.read_text()

    (request,) = (
        span for span in collector.named("POST /v1/videos") if span.trace_id.hex() == TRACE
    )
    assert request.parent_span_id.hex() == SPAN
    (made,) = collector.named("magihuman.video")
    (engine,) = collector.named("magihuman.request")
    (stage,) = collector.named("magihuman.denoise")
    assert {span.trace_id.hex() for span in (made, engine, stage)} == {TRACE}
    assert made.parent_span_id == request.span_id
    assert engine.parent_span_id == made.span_id and stage.parent_span_id == engine.span_id


def test_a_log_format_that_is_unknown_is_refused(tmp_path):
    pytest.importorskip("ray", reason="the extra [serve] is not installed")
    options = ("--model", "nano", "--folder", str(tmp_path / "videos"), "--log-format", "xml")
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 2
    assert result.stderr == "error: --log-format must be one of 'text', 'json', got 'xml'\n"
