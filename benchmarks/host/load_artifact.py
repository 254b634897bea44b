"""A transformer converted to fp8, at full size: seconds to load it, and host memory.

    python benchmarks/host/load_artifact.py SCRATCH [--folder RESULTS] [--tiny]

Random weights are written below SCRATCH (14.3 GiB, removed afterwards), and read twice, each time
in a fresh process and by the way that `load(transformer=...)` takes; the second time they come from
the page cache. What was loaded is then compared, bit for bit, with the weights made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `harness` is

from harness import environment, sizes
from magihuman.graphs import quantization
from magihuman.runtime import config
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.weights import converting, random_weights
from magihuman.runtime.weights.precision import PrecisionPolicy
from magihuman.runtime.weights.transformer import TransformerOptions, plan

VARIANT = config.VARIANTS["distill"]
SAMPLE_S = 0.01
GIB = 2**30


class FromModel:
    """A source of weights for an artifact: a bf16 model on any device."""

    def __init__(self, model: DiT) -> None:
        self.config, self._state = model.config, model.state_dict()

    @property
    def tensors(self) -> Collection[str]:
        return self._state

    def read(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        return ((key, self._state[key]) for key in keys)


def made(size: sizes.Size) -> DiT:
    """The model whose weights are written."""
    return random_weights.dit(size.arch, 0, size.device, torch.bfloat16, VARIANT.name)


def write(size: sizes.Size, folder: Path) -> dict[str, Any]:
    """The artifact."""
    start = time.perf_counter()
    converting.write_artifact(
        folder, FromModel(made(size)), VARIANT.name, PrecisionPolicy.FP8, "none", {}
    )
    files = sorted(folder.glob("*.safetensors"))
    return {
        "seconds": time.perf_counter() - start,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }


class HostMemory:
    """Largest growth of a process's memory while it is open, of anonymous and of mapped pages.

    Sampled: pages of a mapped file count as long as it is mapped, and can be dropped at any time.
    """

    FIELDS = ("RssAnon", "RssFile", "RssShmem")

    def __enter__(self) -> HostMemory:
        self.peak = self._before = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth_bytes(self) -> dict[str, int]:
        """By kind of page."""
        return {name: self.peak[name] - self._before[name] for name in self.FIELDS}

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            now = self._now()
            self.peak = {name: max(now[name], self.peak[name]) for name in self.FIELDS}

    def _now(self) -> dict[str, int]:
        status = Path("/proc/self/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return {name: 1024 * int(lines[name].split()[0]) for name in self.FIELDS}


def read(size: sizes.Size, folder: Path) -> dict[str, Any]:
    """Load it, measure, and check every bit."""
    torch.zeros(1, device=size.device)  # what a device's first use costs is not counted
    with HostMemory() as memory:
        start = time.perf_counter()
        spec = plan(VARIANT, folder, TransformerOptions(size.device))
        spec.scan()  # as `load` does to find damage early
        planned_s = time.perf_counter() - start
        model = spec.read(size.device)
        if size.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "seconds": seconds,
        "plan_s": planned_s,  # most of it a process's first model, of no data: imports in torch
        "gib_per_s": total / GIB / (seconds - planned_s),
        "host_growth_bytes": memory.growth_bytes,
        "tensors": check(model, made(size), spec.why_bf16 is not None),
    }


def check(loaded: DiT, source: DiT, rounded: bool) -> int:
    """Raise unless the weights are the source's, quantised; returns how many tensors were equal.

    rounded: they were made bf16 again, as where fp8 cannot run.
    """
    quantization.quantize_model(source, quantization.linears(source.config))
    if rounded:
        quantization.dequantize_model(source)
    wanted = source.state_dict()
    found = loaded.state_dict()
    if found.keys() != wanted.keys():
        raise ValueError(f"names must agree, got {sorted(found.keys() ^ wanted.keys())}")
    for key, value in found.items():
        same = value.dtype == wanted[key].dtype and torch.equal(bits(value), bits(wanted[key]))
        if not same:
            raise ValueError(f"{key} must be what was written, got another value")
    return len(found)


def bits(value: Tensor) -> Tensor:
    """Bytes of a tensor's rows, since e4m3 cannot be compared."""
    return value.contiguous().view(torch.uint8)


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--read", action="store_true", help="SCRATCH, an artifact; used by itself")
    arguments = environment.arguments(parser)
    size = sizes.TINY if arguments.tiny else sizes.FULL
    if arguments.read:
        print(json.dumps(read(size, arguments.scratch)))
        return
    figures: dict[str, Any] = {"size": size.name}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        figures["written"] = write(size, Path(folder))
        if size.device.type == "cuda":
            torch.cuda.empty_cache()
        print("written", json.dumps(figures["written"]), flush=True)
        command = [sys.executable, __file__, folder, "--read"]
        command += ["--folder", str(arguments.folder), *["--tiny"] * arguments.tiny]
        for name in ("first read", "from the page cache"):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, json.dumps(figures[name]), flush=True)
    print(environment.write("load_artifact", figures, arguments.folder))


if __name__ == "__main__":
    main()
