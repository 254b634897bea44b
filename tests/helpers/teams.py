"""What the processes of a team compute in tests: golden models in every form that can be shared."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import golden
from magihuman.graphs import quantization
from magihuman.graphs.transformer import compile as compiling
from magihuman.graphs.transformer.options import CompileOptions, ReplayOptions
from magihuman.graphs.transformer.passes.context import Context
from magihuman.graphs.transformer.replay import CompiledForward
from magihuman.kernels import reference as ref
from magihuman.kernels.parallel import exchange
from magihuman.runtime.config import DiTConfig
from magihuman.runtime.model.dit import DiT
from magihuman.runtime.parallel.context_parallel import ContextParallel, Transformer
from magihuman.runtime.parallel.team import CLOSE, Team
from magihuman.runtime.weights import random_weights, tiny

# By name: whether it has frame-local layers, dtype of its linears, and whether it is rewritten,
# with which attention.
FORMS = {
    "plain": (False, torch.bfloat16, None),
    "fp32": (False, torch.float32, None),
    "frame-local": (True, torch.bfloat16, None),
    "rewritten": (False, torch.bfloat16, "bf16"),
    "fp8": (False, torch.bfloat16, "fp8"),
    "fp8-attn frame-local": (True, torch.bfloat16, "fp8-attn"),
}
# Of the model with the published number of key/value heads, which four processes can share.
GROUPED_FORMS = {
    "grouped fp32": (False, torch.float32, None),
    "grouped fp8-attn frame-local": (True, torch.bfloat16, "fp8-attn"),
}
BROKEN = "cannot be prepared on rank 1"
DYING = "ends the process of rank 1"
GROUPED_DYING = "grouped, and ends the process of rank 1"
FAILING = "fails on rank 1 amid an exchange, where something keeps the process from ending"
LAUNCHED = "rewritten, and launched kernel by kernel"


class Rewritten:
    """The rewritten graph on the CPU, with the interface of `CompiledForward`."""

    def __init__(self, model: DiT, attention: str, rank: int, ranks: int, cache: Path) -> None:
        self._model, self._narrow = model, attention == "fp8-attn"
        self._rank, self._ranks, self._cache = rank, ranks, cache

    def sharding(self, video: int, audio: int, text: int) -> ref.Sharding:
        return ref.Sharding.of((video, audio, text + 3), self._ranks)  # padding of a bucket

    def prepare(self, video: int, audio: int, text: int, local: Any) -> None:
        pass

    def __call__(
        self, video: Tensor, audio: Tensor, text: Tensor, rope: Tensor, local: Any
    ) -> tuple[Tensor, ...]:
        sharding = self.sharding(len(video), len(audio), len(text))
        padded = text.new_full((sharding.counts[2], text.shape[1]), 5.0)
        padded[: len(text)] = text
        table = rope.new_zeros(sum(sharding.counts), rope.shape[1])
        table[: len(rope)] = rope
        own = [x[s] for x, s in zip((video, audio, padded), sharding.own(self._rank), strict=True)]
        context = Context(
            self._model.config, sharding.own_counts(self._rank), torch.bfloat16,
            torch.device("cpu"), local, sharding if self._ranks > 1 else None,
        )  # fmt: skip
        options = CompileOptions(fp8_attention=self._narrow, cache=self._cache)
        module, _ = compiling.compile_forward(self._model, context, options)
        return module(*own, table, torch.tensor(len(rope), dtype=torch.int32))


class Broken(Rewritten):
    def prepare(self, video: int, audio: int, text: int, local: Any) -> None:
        if self._rank == 1:
            raise torch.OutOfMemoryError("no room here")


class Dying(Rewritten):
    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        if self._rank == 1:
            os._exit(7)
        return super().__call__(*inputs)


class Failing(Rewritten):
    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        if self._rank == 1:
            threading.Thread(target=time.sleep, args=(600,)).start()
            raise RuntimeError("amid an exchange")
        return super().__call__(*inputs)


class Launched(CompiledForward):
    """Where memory is too short for graphs to be captured."""

    def __init__(self, model: DiT, attention: str, rank: int, ranks: int, cache: Path) -> None:
        cpu = torch.device("cpu")
        options = ReplayOptions(cache=cache, budget_bytes=0, replays=False, rank=rank, ranks=ranks)
        super().__init__(model, model.config, torch.bfloat16, cpu, options)


# As small as the golden architecture, with the published number of key/value heads.
GROUPED = dataclasses.replace(
    tiny.DIT, num_layers=3, hidden_size=512, kv_heads=8, modality_layers=(0, 2), frame_reach=1
)


def small(ranks: int, is_local: bool) -> DiT:
    """The golden model where its key/value heads can be shared by so many; else a random one."""
    model = golden.dit(local=is_local)
    if model.config.kv_heads % ranks == 0:
        return model
    layers = (1,) if is_local else ()
    arch = dataclasses.replace(GROUPED, local_attention_layers=layers)
    return random_weights.dit(arch, 0, torch.device("cpu"), torch.bfloat16, "grouped")


OTHERS = {
    BROKEN: Broken,
    DYING: Dying,
    GROUPED_DYING: Dying,
    FAILING: Failing,
    LAUNCHED: Launched,
}


def form_of(name: str) -> tuple[bool, torch.dtype, str | None]:
    return (FORMS | GROUPED_FORMS).get(name, FORMS["rewritten"])


def model_of(name: str) -> DiT:
    local, dtype, attention = form_of(name)
    ranks = 8 if name.startswith("grouped") else 1
    model = small(ranks, local)
    for layer in model.block.layers:
        layer.dtype = dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype if parameter.ndim == 2 else torch.float32)
    for name, parameter in small(ranks, local).named_parameters():  # outside the blocks
        if not name.startswith("block."):
            model.get_parameter(name).data = parameter.data
    if attention is not None and attention != "bf16":
        quantization.quantize_model(model, quantization.quantized_linears(model.config))
    compiling.pad_weights(model, model.config)
    return model


def transformer(name: str, rank: int, ranks: int, cache: Path) -> Transformer:
    model = model_of(name)
    kind, (_, _, attention) = OTHERS.get(name, Rewritten), form_of(name)
    if attention is None:
        return Transformer(model)
    return Transformer(model, kind(model, attention, rank, ranks, cache))


def shared(team: Team, names: Sequence[str], cache: Path) -> ContextParallel:
    torch.set_num_threads(1)
    return ContextParallel(
        team, {name: transformer(name, team.rank, team.ranks, cache) for name in names}
    )


def follow(team: Team, payload: tuple[Sequence[str], Path]) -> None:
    own = shared(team, *payload)
    own.follow()
    own.close()


def decoding(team: Team) -> ContextParallel:
    """Of frames alone."""
    torch.set_num_threads(1)
    vae = random_weights.turbo_vae(tiny.TURBO_VAE, 0, torch.device("cpu"), torch.float32)
    return ContextParallel(team, {}, vae)


def follow_decoding(team: Team, payload: None) -> None:
    own = decoding(team)
    own.follow()
    own.close()


# On GPUs, by precision and size. "wide": few layers of the published width, so that all kernels run
# as they do at full size; else the golden architecture. "launched": without capturing anything.
COMPILED = [
    "bf16",
    "bf16 launched",
    "bf16 frame-local",
    "fp8-attn frame-local",
    "bf16 wide",
    "fp8 wide",
    "fp8-attn wide",
]
WIDE = dataclasses.replace(DiTConfig(), num_layers=4, modality_layers=(0, 3), gelu7_layers=(0,))


def compiled(
    name: str, device: torch.device, rank: int = 0, ranks: int = 1, total: int = 0
) -> Transformer:
    """total: processes of the team whose model it is, where that is not `ranks`."""
    kind, _, size = name.partition(" ")
    if size == "wide":
        model = random_weights.dit(WIDE, 0, device, torch.bfloat16, "wide")
    else:
        model = small(total or ranks, size == "frame-local").to(device)
    if kind != "bf16":
        quantization.quantize_model(model, quantization.quantized_linears(model.config))
    narrow = kind == "fp8-attn"
    options = ReplayOptions(
        fp8_attention=narrow, replays=size != "launched", rank=rank, ranks=ranks
    )
    forward = CompiledForward(model, model.config, torch.bfloat16, device, options)
    return Transformer(model, forward)


def shared_on_gpus(team: Team, names: Sequence[str]) -> ContextParallel:
    made = {name: compiled(name, team.device, team.rank, team.ranks) for name in names}
    return ContextParallel(
        team, made, release=lambda: [t.compiled.release() for t in made.values()]
    )


def follow_on_gpus(team: Team, names: Sequence[str]) -> None:
    own = shared_on_gpus(team, names)
    own.follow()
    own.close()


# Heads, key/value heads, their width, dtype and rows of each process.
EXCHANGED = [
    (40, 8, 128, torch.bfloat16, 1072),
    (40, 8, 128, torch.bfloat16, 1),
    (24, 8, 32, torch.bfloat16, 37),
    (8, 8, 12, torch.float32, 61),
    (16, 8, 6, torch.bfloat16, 5),
]


def exchange_both_ways(team: Team, _: object = None) -> list[bool]:
    """On every process: whether exchanges by stores and through NCCL give the same, twice over."""
    same = []
    for heads, kv_heads, dim, dtype, rows in EXCHANGED:
        ranks = team.ranks
        columns = (heads + 2 * kv_heads) * dim + heads
        team.reserve(*exchange.room_bytes(rows, columns, heads * dim, ranks, dtype.itemsize))
        for seed in range(2):
            made = []
            for peers in (team._peers, None):
                exchange.connect(peers)
                torch.manual_seed(100 * seed + team.rank)
                # Rows further apart than they are long, as a padded projection's.
                qkv = torch.randn(rows, columns + 8, device=team.device).to(dtype)[:, :columns]
                there = exchange.rows_to_heads(qkv, heads, kv_heads, ranks)
                back = exchange.heads_to_rows(there[:, : heads // ranks * dim], ranks)
                made.append((there.clone(), back.clone()))
            exchange.connect(team._peers)
            same.append(all(torch.equal(a, b) for a, b in zip(*made, strict=True)))
            same.append(torch.equal(made[0][1], qkv[:, : heads * dim]))
    return same


def attend_both_ways(team: Team, _: object = None) -> list[bool]:
    """On every process: whether attention over e4m3 by stores has the bits of that through NCCL, of
    a few layers, one after another as a forward has them.
    """
    same = []
    for heads, kv_heads, dim, rows in ((40, 8, 128, 1072), (8, 8, 128, 37), (24, 8, 32, 1)):
        ranks, total = team.ranks, rows * team.ranks
        columns = (heads + 2 * kv_heads) * dim + heads
        team.reserve(*exchange.room_bytes(rows, columns, heads * dim, ranks, 2))
        length = torch.tensor(max(1, total - 3), dtype=torch.int32, device=team.device)
        counts = [total - total // 2 - total // 4, total // 4, total // 2]
        made: list[list[torch.Tensor]] = []
        for peers in (team._peers, None):
            exchange.connect(peers)
            torch.manual_seed(0)  # what all processes have alike
            angle = torch.randn(total, 3 * dim // 8, device=team.device)
            rope = torch.cat((angle.sin(), angle.cos()), dim=1)
            norms = [0.3 * torch.randn(3 * dim, device=team.device) for _ in "qk"]
            torch.manual_seed(1 + team.rank)
            outs = []
            for _ in range(3):
                qkv = torch.randn(rows, columns + 8, device=team.device).bfloat16()[:, :columns]
                parts = exchange.rows_to_heads_fp8(
                    qkv, *norms, rope, length, counts, heads, kv_heads, ranks
                )
                out = exchange.gated_attention_fp8_to_rows(*parts, length, [], ranks, "gluon")
                outs.append(out.clone())
            made.append(outs)
        exchange.connect(team._peers)
        valid = min(rows, max(0, int(length) - team.rank * rows))
        pairs = [(a[:valid], b[:valid]) for a, b in zip(*made, strict=True) if valid]
        same += [torch.equal(a, b) for a, b in pairs]
    return same


def follow_exchanges(team: Team, payload: object) -> None:
    assert all(exchange_both_ways(team, payload))
    assert all(attend_both_ways(team))
    while team.listen()[0] != CLOSE:
        pass
    team.close()
