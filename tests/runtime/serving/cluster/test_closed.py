"""What others can reach of the server and its Ray, started in an environment that opens Ray."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from listeners import is_loopback, listening

pytest.importorskip("ray", reason="the extra [serve] is not installed")
grpc = pytest.importorskip("grpc")

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc")

# What a stranger does who has found the port of the cluster's head.
INTRUDER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
ray.get(ray.remote(num_cpus=0)(open).remote(sys.argv[2], "w"))
"""


def test_nothing_listens_to_other_machines(server):
    """Neither Ray's own services, nor its exporters of metrics, nor the processes of engines."""
    ports = listening(server.processes())
    assert len(ports) > 5  # of Ray's head alone
    assert {port: where for port, where in ports.items() if not is_loopback(where)} == {}


class Payload:
    """Makes a folder wherever it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_is_not_opened_for_a_stranger(server, tmp_path):
    """Processes of engines take pickles, from those alone who have the cluster's token."""
    from ray.serve.generated.serve_pb2 import ASGIRequest
    from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

    request = ASGIRequest(pickled_request_metadata=pickle.dumps(Payload(tmp_path / "opened")))
    answers = []
    for port in listening(server.processes("ray::ServeReplica")):
        for metadata in ((), (("authorization", "Bearer " + "0" * 64),)):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                with pytest.raises(grpc.RpcError) as refused:
                    ASGIServiceStub(channel).HandleRequest(request, timeout=300, metadata=metadata)
                answers.append(refused.value.code())
    assert grpc.StatusCode.UNAUTHENTICATED in answers
    assert not (tmp_path / "opened").exists()


def test_the_cluster_runs_nothing_for_a_stranger(server, tmp_path):
    ports = listening(server.processes("gcs/gcs_server "))
    assert ports
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    for port in ports:
        command = [sys.executable, "-c", INTRUDER, f"127.0.0.1:{port}", str(tmp_path / "ran")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode != 0 and "uthenticat" in done.stderr, done.stderr
    assert not (tmp_path / "ran").exists()
