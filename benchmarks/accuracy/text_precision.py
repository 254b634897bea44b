"""What 8 bits in the text encoder's weights do to embeddings, and to the nano model's clips.

    python benchmarks/accuracy/text_precision.py [--layers N] [--clips N] [--folder RESULTS]
        [--tiny]

Random weights at the published width, normally distributed and with columns that are 30 times as
large, in as many layers as asked for, and the nano model's own. Embeddings of bf16, int8 and fp8
are compared with those of the same bf16 weights computed in fp32: relative error, over all tokens
and of the worst token. Then the nano model is scored in each. Runs on a CPU, too.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `harness` is

from harness import environment
from harness.measure import synchronize
from magihuman import runtime
from magihuman.runtime.evaluate.model_score import score_model
from magihuman.runtime.model import narrowed, put, uncapped, with_tables
from magihuman.runtime.weights import load_text_encoder, random_weights
from magihuman.runtime.weights.locate import TEXT_FOLDER
from magihuman.runtime.weights.shipped import NANO_FOLDER

PRECISIONS = ("bf16", "int8", "fp8")
VOCABULARY = 4096  # rows of the table: errors are those of rows, however many there are
TOKENS = 300
TINY_SECONDS = 1.0  # of a clip
OUTLIERS, FACTOR = 0.001, 30.0  # share of the columns, and how much larger they are
BF16 = torch.bfloat16
Build = Callable[[], Any]


def builder(layers: int, tiny: bool) -> Build:
    """Make an encoder of the published width, or of a narrow one."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    config = random_weights.text_config()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(config.encoder, name) for name in (*names, "head_dim")}
    if tiny:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    sizes |= {"num_hidden_layers": layers, "vocab_size": VOCABULARY}

    def build() -> Any:  # a configuration serves one model
        both = {"encoder": dict(sizes), "decoder": dict(sizes)}
        return uncapped(T5GemmaEncoderModel(T5GemmaConfig(**both, is_encoder_decoder=False)))

    return build


def in_precision(wide: Any, build: Build, precision: str, device: torch.device) -> Any:
    """The encoder with the weights of another, rounded."""
    if precision == "bf16":
        return wide
    with torch.device("meta"):
        model = narrowed(with_tables(build(), device), precision, BF16)
    for key, value in wide.named_parameters():
        put(model, key, value)
    return model.eval()


@torch.no_grad()
def widen_columns(model: Any, seed: int) -> None:
    """Make a few input channels of every linear large, in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            columns = module.weight.shape[1]
            chosen = torch.randperm(columns, generator=generator)
            module.weight[:, chosen[: max(1, int(OUTLIERS * columns))]] *= FACTOR


@torch.inference_mode()
def embedded(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """Embeddings [L, C] in fp32, and the seconds of a second run."""
    mask = torch.ones_like(ids)
    for _ in range(2):
        synchronize()
        start = time.perf_counter()
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        synchronize()
        seconds = time.perf_counter() - start
    return hidden.float(), seconds


def errors(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Relative errors: over all tokens, and of the worst."""
    rows = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    whole = (found - wanted).norm() / wanted.norm()
    return {"error": float(whole), "worst_token": float(rows.max())}


def held_bytes(model: Any) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def compared(wide: Any, build: Build, ids: Tensor, device: torch.device) -> dict[str, Any]:
    """Errors, seconds and bytes of each precision, of one model's weights in bf16."""
    wanted, _ = embedded(copy.deepcopy(wide).float(), ids)
    figures = {}
    for precision in PRECISIONS:
        model = in_precision(wide, build, precision, device)
        found, seconds = embedded(model, ids)
        figures[precision] = {
            **errors(found, wanted),
            "seconds": seconds,
            "bytes": held_bytes(model),
        }
        print(precision, figures[precision], flush=True)
    return figures


def of_random(build: Build, device: torch.device) -> dict[str, Any]:
    """Both kinds of random weights."""
    ids = torch.randint(5, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    figures = {}
    for kind in ("normal", "outliers"):
        wide = random_weights.drawn_text_model(build, 0, device, BF16)
        if kind == "outliers":
            widen_columns(wide, 0)
        figures[kind] = compared(wide, build, ids.to(device), device)
    return figures


def of_nano(
    device: torch.device, precisions: Sequence[str], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """The nano model: embeddings of its held-out prompts, and its score over clips as asked."""
    folder = NANO_FOLDER / TEXT_FOLDER
    prompts = (NANO_FOLDER / "score" / "prompts.txt").read_text().splitlines()
    exact = load_text_encoder(folder, device, torch.float32)
    figures: dict[str, Any] = {}
    for precision in precisions:
        encoder = load_text_encoder(folder, device, BF16, precision)
        pairs = [
            [each.encode(each.tokenize(prompt)[0]) for each in (encoder, exact)]
            for prompt in prompts
        ]
        found, wanted = (torch.cat(side) for side in zip(*pairs, strict=True))
        figures[precision] = errors(found, wanted)
        with runtime.load("nano", device=device, text_precision=precision) as engine:
            figures[precision]["score"] = asdict(score_model(engine, NANO_FOLDER, **asked))
        print(precision, figures[precision], flush=True)
    return figures


def main() -> None:
    """Measure all, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="the published model has 42")
    parser.add_argument("--clips", type=int, default=8, help="of the nano model, to score")
    arguments = environment.arguments(parser)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = 2 if arguments.tiny else arguments.layers
    figures = {
        "device": str(device),
        "layers": layers,
        "tokens": TOKENS,
        "clips": 1 if arguments.tiny else arguments.clips,
        "random": of_random(builder(layers, arguments.tiny), device),
    }
    asked: dict[str, Any] = {"clips": figures["clips"]}
    if arguments.tiny:
        asked["seconds"] = TINY_SECONDS
    scored = ("int8",) if arguments.tiny else PRECISIONS
    figures["nano"] = of_nano(device, scored, asked)
    print(f"wrote {environment.write('text_precision', figures, arguments.folder)}")


if __name__ == "__main__":
    main()
