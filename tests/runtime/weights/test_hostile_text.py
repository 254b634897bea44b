"""Text encoders that lie: their numbers are read, and none of their code."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch

from magihuman.runtime import CheckpointError
from magihuman.runtime.weights.locate import TEXT_FOLDER
from magihuman.runtime.weights.t5gemma import load_text_encoder

CPU = torch.device("cpu")


@pytest.mark.skipif(not hostile.CAN_MEASURE, reason="needs Linux's /proc")
def test_whatever_its_json_says_a_text_encoder_is_read_or_refused(
    folders: Path, tmp_path: Path
) -> None:
    """Every number times 10^6, every value of another kind, one at a time, and what is no JSON."""
    found = hostile.walk(shutil.copytree(folders, tmp_path / "models"), 9, 14)
    assert found["read"] > 200 and found["refused"] > found["read"] // 4
    assert found["grown"] <= hostile.GROWTH_BYTES and found["asked"] == 0
    assert found["longest"] < 5000  # letters of a message


# -- code -----------------------------------------------------------------------------------------

EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class EvilConfig(PretrainedConfig):
    model_type = "evil"
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
CONFIG_CODE = {"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoTokenizer": "evil.EvilTokenizer"}}
TOKENIZER_CODE = {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
LOAD = """
import sys, torch
from pathlib import Path
from magihuman.runtime.errors import CheckpointError
from magihuman.runtime.weights.t5gemma import load_text_encoder
for folder in sys.argv[1:]:
    try:
        load_text_encoder(Path(folder), torch.device("cpu"), torch.bfloat16)
        print("loaded")
    except CheckpointError as error:
        print(error)
import os
print(os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR))
"""
# What config.json and tokenizer_config.json say beside what they said, and whether that is loaded.
CARRIERS: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "another model": ({"model_type": "evil", **CONFIG_CODE}, {}, "the model_type 't5gemma', got"),
    "no model": ({"model_type": None, **CONFIG_CODE}, {}, "the model_type 't5gemma', got None"),
    "code beside the model": (CONFIG_CODE, {}, "loaded"),
    "code of a tokenizer": (CONFIG_CODE, TOKENIZER_CODE, "loaded"),
    "code in another place": ({}, {"auto_map": ["evil.EvilTokenizer", None]}, "loaded"),
    "another tokenizer": (
        CONFIG_CODE,
        {"tokenizer_class": "EvilTokenizer", **TOKENIZER_CODE},
        "tokenizer_class of GemmaTokenizer",
    ),
    "a kernel of the hub": (
        {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"},
        {},
        "loaded",
    ),
    "quantisation": ({"quantization_config": {"quant_method": "evil"}}, {}, "loaded"),
    "other files": ({}, {"tokenizer_file": "../../elsewhere.json"}, "must name no other files"),
    "other weights": ({"transformers_weights": "evil.bin"}, {}, "loaded"),
}


def test_no_code_of_a_folder_runs_and_nothing_is_asked(tiny_dir: Path, tmp_path: Path) -> None:
    """In a process whose stdin says yes to everything, and which is not offline."""
    mark, places = tmp_path / "mark", []
    for name, (config, tokenizer, _) in CARRIERS.items():
        place = shutil.copytree(tiny_dir / TEXT_FOLDER, tmp_path / name)
        hostile.rewrite(place / "config.json", **config)
        hostile.rewrite(place / "tokenizer_config.json", **tokenizer)
        (place / "evil.py").write_text(EVIL.format(mark=str(mark)))
        places.append(str(place))
    (tmp_path / "yes").write_text("yes\n" * 100)
    with (tmp_path / "yes").open() as stdin:
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *places],
            stdin=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        )
    assert done.returncode == 0, done.stderr
    *said, asked = done.stdout.splitlines()
    assert not mark.exists() and asked == "0"
    for (name, (*_, wanted)), line in zip(CARRIERS.items(), said, strict=True):
        assert wanted in line, name


def tokenizer_json(folder: Path, **changes: object) -> None:
    hostile.rewrite(folder / "tokenizer.json", **changes)


CHARSMAP = base64.b64encode(b"\x08\0\0\0" + b"\xff" * 8 + b"abc").decode()


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "xxxx"}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": []}},
        {"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]]}},
        {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 4 * 10**9}}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(?s)."}, "content": ""}},
    ],
)
def test_a_tokenizer_that_gives_up_is_refused(
    changes: dict[str, Any], tiny_dir: Path, tmp_path: Path
) -> None:
    """Its library is in Rust, whose panics are no `Exception`; some come with the first text."""
    folder = shutil.copytree(tiny_dir / TEXT_FOLDER, tmp_path / "text")
    tokenizer_json(folder, **changes)
    with pytest.raises(CheckpointError, match=f"the text encoder at {folder} cannot be loaded: "):
        load_text_encoder(folder, CPU, torch.bfloat16)


def test_a_tokenizer_that_gives_up_on_a_prompt_costs_that_prompt(
    tiny_dir: Path, tmp_path: Path
) -> None:
    """One that no text at loading finds."""
    folder = shutil.copytree(tiny_dir / TEXT_FOLDER, tmp_path / "text")
    pattern = {"type": "Replace", "pattern": {"String": "\u2603"}, "content": "\u2603"}
    tokenizer_json(folder, normalizer=pattern)
    encoder = load_text_encoder(folder, CPU, torch.bfloat16)
    from tokenizers import pre_tokenizers

    backend = encoder.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.FixedLength(0)
    with pytest.raises(CheckpointError, match="the tokenizer must take every prompt"):
        encoder.tokenize("hello")


def test_a_token_that_the_encoder_has_not_costs_its_prompt(tiny_dir: Path, tmp_path: Path) -> None:
    """Gemma's class adds one for masks, behind a vocabulary that has none."""
    folder = shutil.copytree(tiny_dir / TEXT_FOLDER, tmp_path / "text")
    hostile.rewrite(folder / "tokenizer_config.json", tokenizer_class="GemmaTokenizer")
    encoder = load_text_encoder(folder, CPU, torch.bfloat16)
    assert encoder.tokenize("hello")[0].numel()
    with pytest.raises(CheckpointError, match=r"tokens below 260, the rows .*, got 260;"):
        encoder.tokenize("hello <mask>")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_is_no_file(name: str, tiny_dir: Path, tmp_path: Path) -> None:
    """To read it would wait for ever."""
    folder = shutil.copytree(tiny_dir / TEXT_FOLDER, tmp_path / "text")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError):
        load_text_encoder(folder, CPU, torch.bfloat16)
