"""The server's own OpenAPI description, turned into requests by schemathesis."""

from __future__ import annotations

import subprocess
import sys

from video_client import BEARER, SMALL

# A schema cannot say that bytes are an image, that the variant knows no guidance, or that a size
# is small enough; so what fits it may be refused.
LEFT_OUT = "positive_data_acceptance"


def test_no_request_that_fits_or_breaks_the_description_meets_a_fault(server, tmp_path):
    """No 5xx, and every answer as described: status, headers, body; broken requests refused."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--header", f"Authorization:{BEARER['Authorization']}"]
    command += ["--checks", "all", "--exclude-checks", LEFT_OUT, "--continue-on-failure"]
    command += ["--max-examples", "15", "--seed", "1", "--request-timeout", "60"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    finally:
        server.clear()
    assert done.returncode == 0, done.stdout + done.stderr
    server.when(server.create(SMALL), "completed")
