"""Loads models whose JSON says what it should not: see tests/runtime/weights/test_hostile.py.

Arguments: a folder with a model of every kind, how many bytes this process may grow by, and the
first of the files to change and the one after the last. It prints, as JSON, how many files were
read, how many of them were refused, by how many bytes the process has grown at its peak, and where
it is in its stdin. It ends with 1 where a file gives anything but a model or a `MagiHumanError`.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import random
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from magihuman.runtime.config import VARIANTS
from magihuman.runtime.errors import MagiHumanError
from magihuman.runtime.exported.manifest import read_manifest
from magihuman.runtime.memory import folder_parts
from magihuman.runtime.weights import TransformerOptions, checkpoint, plan, suited
from magihuman.runtime.weights.t5gemma import load_text_encoder

CPU = torch.device("cpu")
ONE_S = 120.0
MOST_PLACES = {list: 8, dict: 32}  # of each that are changed, of which the published have thousands
LARGE = 10**6
ODD = [
    None, True, "", "7", [], {}, [[7]], {"a": 7}, -1, 0, 0.5, float("nan"), float("inf"), 10**400,
    "../../../etc/passwd", "/etc/passwd", "a" * 5000, "\ud800", "\0",
]  # fmt: skip
TEXTS = [
    b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 200_000,
    b'{"num_layers": ' + b"9" * 5000 + b"}",
]  # fmt: skip


def transformer(folder: Path) -> None:
    options = TransformerOptions(CPU)
    for name in ("distill", "1080p_sr"):  # whose layers depend on their number
        plan(VARIANTS[name], folder, options).scan()
    spec = plan(VARIANTS["distill"], folder, options)
    spec.scan()
    assert spec.device_bytes > 0
    spec.read(CPU)


def artifact(folder: Path) -> None:
    spec = plan(VARIANTS["distill"], folder, TransformerOptions(CPU))
    spec.scan()
    spec.read(CPU)


def turbo_vae(folder: Path) -> None:
    vae = checkpoint.load_turbo_vae(folder, CPU, torch.float32)
    for _ in vae.windows(torch.zeros(1, 48, 1, 1, 1, dtype=torch.float32)):
        pass


def audio_vae(folder: Path) -> None:
    beside = folder.parent
    folder_parts(beside / "turbo_vae", beside / "text", folder, None, 2, is_engine=False)
    checkpoint.load_audio_vae(folder, CPU)


def text(folder: Path) -> None:
    encoder = load_text_encoder(folder, CPU, torch.bfloat16)
    ids, _ = encoder.tokenize("A woman smiles.")
    with torch.inference_mode():
        encoder.encode(ids)


FILES: list[tuple[str, str, Callable[[Path], object]]] = [
    ("distill", checkpoint.ARCHITECTURE_NAME, transformer),
    ("base", checkpoint.INDEX_NAME, transformer),
    ("distill", checkpoint.SINGLE_NAME, transformer),
    ("artifact", "manifest.json", artifact),
    ("turbo_vae", checkpoint.TURBO_VAE_CONFIG, turbo_vae),
    ("audio", "model_config.json", audio_vae),
    ("audio", checkpoint.SINGLE_NAME, audio_vae),
    ("exported", "manifest.json", read_manifest),
    ("clips", "request.json", suited),
    ("text", "config.json", text),
    ("text", "tokenizer.json", text),
    ("text", "tokenizer_config.json", text),
    ("text", "generation_config.json", text),
    ("text", "special_tokens_map.json", text),
]


def grown_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """The containers in a value with their keys, a few of each."""
    if isinstance(value, (list, dict)):
        keys = list(range(len(value)) if isinstance(value, list) else value)
        half = MOST_PLACES[type(value)] // 2
        for key in keys[:half] + keys[half:][-half:]:
            yield value, key
            yield from places(value[key])


def changed(value: Any, draw: random.Random) -> Iterator[Any]:
    """Copies of a value: each number times 10^6, and each thing replaced by something odd."""
    for number in range(len(list(places(value)))):
        made = copy.deepcopy(value)
        owner, key = list(places(made))[number]
        if type(owner[key]) in (int, float):
            owner[key] *= LARGE
            yield made
            made = copy.deepcopy(made)
            owner, key = list(places(made))[number]
        owner[key] = draw.choice(ODD)
        yield made


def parse(content: bytes, is_header: bool) -> Any:
    return json.loads(
        content[8 : 8 + struct.unpack("<Q", content[:8])[0]] if is_header else content
    )


def rewritten(content: bytes, value: Any, is_header: bool) -> bytes:
    said = json.dumps(value).encode()
    if not is_header:
        return said
    rest = content[8 + struct.unpack("<Q", content[:8])[0] :]
    return struct.pack("<Q", len(said)) + said + rest


def main(root: Path, growth_bytes: int, first: int, end: int) -> int:
    for folder, _, load in FILES:  # what is imported on the way does not count
        load(root / folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = grown_bytes("VmRSS")
    read = refused = longest = 0
    for folder, name, load in FILES[first:end]:
        path = root / folder / name
        content, is_header = path.read_bytes(), path.suffix == ".safetensors"
        values = changed(parse(content, is_header), random.Random(name))
        for said in chain(TEXTS, (rewritten(content, value, is_header) for value in values)):
            path.write_bytes(said)
            faulthandler.dump_traceback_later(ONE_S, exit=True)
            read += 1
            try:
                load(root / folder)
            except MagiHumanError as error:
                refused += 1
                longest = max(longest, len(str(error)))
            except BaseException:
                print(folder, name, said[:2000], file=sys.stderr)
                traceback.print_exc()
                return 1
            if grown_bytes("VmHWM") - before > growth_bytes:
                print(folder, name, said[:2000], "took too much memory", file=sys.stderr)
                return 1
        faulthandler.cancel_dump_traceback_later()
        path.write_bytes(content)
        load(root / folder)
    peak = grown_bytes("VmHWM") - before
    asked = os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR)
    facts = {"read": read, "refused": refused, "grown": peak, "longest": longest, "asked": asked}
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
