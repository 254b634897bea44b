"""Lines of the log: one for each video, and warnings; as text, or a JSON object each."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magihuman.runtime.serving.record import Job

FORMATS = ("text", "json")
FORMAT_VARIABLE = "MAGIHUMAN_LOG_FORMAT"  # that of the option, which other processes inherit
FIELDS = "fields"  # of a record: what JSON has of it beside the text

videos = logging.getLogger("magihuman.videos")


class TextFormatter(logging.Formatter):
    """A line with the time in UTC; errors are followed by their traceback."""

    converter = staticmethod(time.gmtime)
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")


class JsonFormatter(TextFormatter):
    """A JSON object a line: time, level and message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Form a record, as `logging` has it."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def formatter() -> logging.Formatter:
    """The formatter that this process was told to use."""
    is_json = os.environ.get(FORMAT_VARIABLE) == "json"
    return JsonFormatter() if is_json else TextFormatter()


def say(text: str) -> None:
    """Print a line of the server itself to standard error."""
    if os.environ.get(FORMAT_VARIABLE) == "json":
        record = logging.LogRecord("magihuman", logging.INFO, "", 0, text, None, None)
        text = JsonFormatter().format(record)
    print(text, file=sys.stderr, flush=True)


def log_end(job: Job) -> None:
    """Log how a video ended, once: nothing of it is said before. Prompts are not logged."""
    fields = _fields(job)
    facts = [
        f"{fields['seconds']} s of {fields['size']}",
        f"waited {fields['waited_s']:.1f} s",
        f"took {fields['took_s']:.1f} s",
    ]
    if job.timings_s:
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in job.timings_s.items())
        facts[-1] += f" ({stages})"
    facts.extend(fields["warnings"])
    if job.error is not None:
        facts.append(f"{job.error['code']}: {fields['error_message']}")
    level = logging.INFO if job.error is None else logging.WARNING
    text = f"{job.id} {fields['status']}: {'; '.join(facts)}"
    videos.log(level, "%s", text, extra={FIELDS: fields})


def _fields(job: Job) -> dict[str, Any]:
    ended, started = job.completed_at or time.time(), job.started_at
    return {
        "video": job.id,
        "status": job.status.value,
        "seconds": job.options.get("seconds"),
        "size": f"{job.options.get('width')}x{job.options.get('height')}",
        "seed": job.options.get("seed"),
        "waited_s": round((started or ended) - job.created_at, 3),
        "took_s": round(ended - (started or ended), 3),
        "attempts": job.attempts,
        "stages_s": {name: round(seconds, 4) for name, seconds in job.timings_s.items()},
        "warnings": [_line(text) for text in job.warnings],
        "error_code": None if job.error is None else job.error["code"],
        "error_message": None if job.error is None else _line(job.error["message"]),
    }


def _line(text: str) -> str:
    """The text in one line, with escapes for what a terminal obeys: clients choose parts of it."""
    line = " ".join(text.split())
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)
