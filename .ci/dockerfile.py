"""Run the steps of deploy/Dockerfile in clean Debian roots, where there is no Docker.

    python .ci/dockerfile.py [PATH...]

Needs root, debootstrap and the network, and takes minutes. It stands in for `docker build` as far
as it can: images are roots of Debian in place of NVIDIA's, so that nothing is said of CUDA. Then
the command is asked for its version as the image's user, makes a clip by the model in the package,
and serves until the image's own health check passes. Folders that are named, such as a mirror of
packages, are there in the roots under the same path, read only; pip's configuration is copied.

Nothing of this machine can be changed from a root: what is lent is mounted read only, in a mount
namespace of this process's own, and `/dev` is the root's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
SUITE = "bookworm"
PATIENCE_S = 300
# For pip: where it finds packages, and whom it trusts. Roots make their own of the last.
COPIED = ("/etc/pip.conf", "/etc/xdg/pip", "/usr/local/share/ca-certificates")
ALONE = "MAGIHUMAN_DOCKERFILE_ALONE"  # set where this process has its own mount namespace


@dataclass
class Stage:
    """An image that is being made: its root, and what later steps inherit."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0"
    health: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        """Run a command in it, as its user, and raise where that fails."""
        return subprocess.run(self.entered(command), check=True, **options)

    def entered(self, command: list[str]) -> list[str]:
        """The command line that runs another in the root."""
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        enter = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root)]
        return [*enter, "/usr/bin/env", "-C", self.folder, *variables, *command]


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction of a Dockerfile with what follows it, lines joined and comments left out."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.strip().partition(" ")
        yield word.upper(), rest.strip()


def build(place: Path) -> Stage:
    """Run all steps, and return the last image."""
    stages: dict[str, Stage] = {}
    stage = Stage(place)
    for number, (word, rest) in enumerate(instructions(DOCKERFILE.read_text())):
        print(f"== {word} {rest}", flush=True)
        match word:
            case "ARG":
                pass
            case "FROM":
                name = rest.partition(" AS ")[2] or f"stage{number}"
                stage = stages[name] = Stage(new_root(place, name))
                stage.variables["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/bin"
                stage.variables |= {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
            case "RUN":
                stage.run(["/bin/sh", "-ec", rest])
            case "COPY":
                copy(stage, stages, rest)
            case "ENV":
                for part in shlex.split(rest):
                    name, _, value = part.partition("=")
                    old = stage.variables.get(name, "")
                    stage.variables[name] = value.replace(f"${name}", old)
            case "WORKDIR":
                stage.folder = rest
                (stage.root / rest[1:]).mkdir(parents=True, exist_ok=True)
            case "USER":
                stage.user = rest
            case "HEALTHCHECK":
                stage.health = json.loads(rest[rest.index("[") :])
            case "ENTRYPOINT" | "CMD":
                stage.command += json.loads(rest)
            case "VOLUME" | "EXPOSE":
                json.loads(rest)
            case _:
                raise SystemExit(f"{word} is no instruction that can be run here")
    return stage


def new_root(place: Path, name: str) -> Path:
    """A root of Debian, copied from one that is made once."""
    base = place / "base"
    if not base.exists():
        subprocess.run(["debootstrap", "--variant=minbase", SUITE, str(base)], check=True)
        for source in filter(os.path.exists, COPIED):
            target = base / source[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-aT", source, str(target)], check=True)
    root = place / name
    subprocess.run(["cp", "-a", "--reflink=auto", str(base), str(root)], check=True)
    mount("-t", "proc", "proc", root / "proc")
    (root / "dev" / "shm").mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", "size=1g,mode=1777", "shm", root / "dev" / "shm")
    for lent in sys.argv[1:]:
        target = root / os.path.abspath(lent)[1:]
        target.mkdir(parents=True, exist_ok=True)
        mount("--bind", lent, target)
        mount("-o", "remount,bind,ro", target)
    return root


def mount(*arguments: object) -> None:
    """Mount something, in this process's namespace alone."""
    subprocess.run(["mount", *map(str, arguments)], check=True)


def copy(stage: Stage, stages: dict[str, Stage], rest: str) -> None:
    """COPY, from the repository or from another stage."""
    origin = ROOT
    words = rest.split()
    if words[0].startswith("--from="):
        origin = stages[words.pop(0).partition("=")[2]].root
    *sources, target = words
    for source in sources:
        found = origin / source.lstrip("/")
        goal = stage.root / os.path.join(stage.folder, target).lstrip("/")
        if found.is_dir():
            shutil.copytree(found, goal, symlinks=True, dirs_exist_ok=True)
        else:
            goal.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, goal)


def check(image: Stage) -> None:
    """Use the image as it is meant to be used."""
    image.run([image.command[0], "--version"])
    clip = [
        "generate",
        "--seconds",
        "0.4",
        "--out",
        "/var/lib/magihuman/clip.mp4",
        "--prompt",
        "hi",
    ]
    image.run([image.command[0], *clip])
    options = ["--model", "nano", "--device", "cpu"]
    server = subprocess.Popen(image.entered([*image.command, *options]), start_new_session=True)
    try:
        end = time.monotonic() + PATIENCE_S
        while subprocess.run(image.entered(image.health), stderr=subprocess.DEVNULL).returncode:
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit("the server does not become healthy")
            time.sleep(1)
    finally:
        server.terminate()
        server.wait(PATIENCE_S)
    print("the image's steps run, and its server is healthy")


def main() -> None:
    """Build and check in a folder, which is removed."""
    if ALONE not in os.environ:
        own = ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
        os.execvpe(own[0], own, {**os.environ, ALONE: "1"})
    place = Path(tempfile.mkdtemp(prefix="dockerfile-"))
    place.chmod(0o755)
    try:
        check(build(place))
    finally:
        release(place)


def release(place: Path) -> None:
    """Remove the roots, once nothing is mounted in them."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mounted in reversed([mount for mount in mounts if mount.startswith(f"{place}/")]):
        subprocess.run(["umount", mounted], check=True)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
