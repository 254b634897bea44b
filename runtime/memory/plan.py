"""What is on the device in each stage of a request, and what rests in host memory: arithmetic
alone, over bytes that the caller gives.

A part (a transformer, the text encoder, an autoencoder) stays on the device, or moves: it rests in
host memory and is brought over for each of its stages. Of a part that moves and is made of layers,
those that do not fit are streamed: they share a few slots, and are brought over again for every
forward pass, the next one while this one is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from magihuman.runtime.errors import DeviceError

GIB = 2**30
# Names of the parts, also for people.
TEXT, AUDIO, IMAGE, VIDEO = "text encoder", "audio autoencoder", "image encoder", "video decoder"
BASE, SR = "transformer", "super-resolution transformer"
LOAD = "load"  # the stage before all
SLOTS = 2  # of streamed layers of like size: one is computed while the next is brought over
COPY_BYTES_PER_S = 50e9  # from pinned memory over PCIe 5.0 x16, where none was measured
# What the driver, the libraries and the code of kernels hold beside what PyTorch allocates, on an
# H100; 0.91 GiB once cuDNN has run, rounded up.
CONTEXT_BYTES = 2**30
STARTED_BYTES = 5 * 2**27  # of it, as soon as a process uses the device; 0.60 GiB there
# What PyTorch allocates beside weights and activations: cuBLAS's workspaces, latents, embeddings,
# and what rounding blocks up leaves. With 0.25 GiB a second request was 0.07 short of memory on an
# H100 (480x256 in int8 within 24 GiB), since the pools of captured graphs leave gaps.
SLACK_BYTES = 2**29
HIDDEN_COST = 0.1  # of a copy's time, where computing hides it
REPLAY_GAIN = 0.01  # of a forward's time, by replaying a captured graph
LIKE = 1.1  # layers up to so many times the size of a class's smallest share its slots


class NoPlanError(DeviceError):
    """There is no plan within a limit; the message tells the smallest for which there is one.

    Attributes:
        found: the message without its remedy.
        stage: the name of the one that takes most, if the limit is below that.
    """

    def __init__(self, found: str, remedy: str, stage: str = "") -> None:
        super().__init__(f"{found}; {remedy}")
        self.found, self.stage = found, stage


@dataclass(frozen=True)
class Part:
    """How many bytes the weights of a component have.

    Attributes:
        outside_bytes: bytes of all that is in no layer.
        layer_bytes: bytes of each layer, in the order in which they run; empty where the part is
            moved as a whole.
        can_move: whether it may rest in host memory.
        widened_bytes: of its largest weight in bf16, where each is widened for its product.
    """

    name: str
    outside_bytes: int
    layer_bytes: tuple[int, ...] = ()
    can_move: bool = True
    widened_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all its weights."""
        return self.outside_bytes + sum(self.layer_bytes)

    def loaded_bytes(self, streamed: Collection[int]) -> int:
        """Bytes that it takes on the device in a stage, with these layers streamed."""
        resident = sum(b for i, b in enumerate(self.layer_bytes) if i not in streamed)
        slots = sum(slot for slot, _ in rings(self.layer_bytes, streamed))
        return self.outside_bytes + resident + slots


@dataclass(frozen=True)
class Stage:
    """What a stage needs.

    Attributes:
        parts: names of those it runs.
        working_bytes: activations.
        forwards: how often it runs its layers.
        forward_s: an estimate of how long it takes to do so once.
        graph_bytes: of the activations, what captured graphs keep; 0 where it cannot run as such.
        spares_graphs: whether it may run without graphs where other stages have theirs.
    """

    name: str
    parts: tuple[str, ...]
    working_bytes: int
    forwards: int = 1
    forward_s: float = 0.0
    graph_bytes: int = 0
    spares_graphs: bool = False


@dataclass(frozen=True)
class StageMemory:
    """A stage in a plan.

    Attributes:
        weights: bytes on the device by part, slots included.
        streamed: of each part, how many layers are streamed.
        working_bytes: activations, and those that captured graphs keep.
        copied_bytes: weights brought over in the stage.
        extra_s: what that is expected to add to the stage, beside what computing hides.
    """

    name: str
    weights: dict[str, int]
    streamed: dict[str, int]
    working_bytes: int
    copied_bytes: int
    extra_s: float

    @property
    def total_bytes(self) -> int:
        """Bytes of all that is on the device, with what the driver holds."""
        held = sum(self.weights.values()) + self.working_bytes
        return held + SLACK_BYTES + CONTEXT_BYTES


@dataclass(frozen=True)
class MemoryPlan:
    """Where weights are, stage by stage.

    Attributes:
        limit_bytes: that every stage stays below, what the driver holds included.
        streamed: of each part that moves, the layers that are streamed. Other parts stay.
        replays: whether stages run as captured graphs, as far as their parts stay.
        host_bytes: of pinned memory, for parts that move.
        spared: names of the stages that run without graphs even so, which have no room for them.
        copy_bytes_per_s: from host memory to the device, by which times were reckoned.
        bands: in which a window of frames is decoded, one after another.
    """

    limit_bytes: int
    streamed: Mapping[str, tuple[int, ...]]
    replays: bool
    stages: tuple[StageMemory, ...]
    host_bytes: int
    spared: frozenset[str] = frozenset()
    copy_bytes_per_s: float = COPY_BYTES_PER_S
    bands: int = 1

    @property
    def peak_bytes(self) -> int:
        """Bytes on the device in the stage that needs most."""
        return max(stage.total_bytes for stage in self.stages)

    @property
    def held(self) -> str:
        """What the process holds, for people: parts that stay, and bytes in the fullest stage."""
        stay = ", ".join(
            f"{name} {size / GIB:.1f}" for name, size in self.stages[0].weights.items()
        )
        return (
            f"{stay} GiB, and at most {self.peak_bytes / GIB:.1f} of {self.limit_bytes / GIB:.1f}"
            f" GiB{'' if self.replays else ', without captured graphs'}"
        )

    @property
    def room_bytes(self) -> dict[str, int]:
        """Bytes that each stage has to work in, beside the weights that are there with it."""
        return {
            stage.name: self.limit_bytes - (stage.total_bytes - stage.working_bytes)
            for stage in self.stages
        }

    @property
    def extra_s(self) -> float:
        """Seconds that moving is expected to add to a request."""
        return sum(stage.extra_s for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it, sizes in bytes."""
        return {
            "limit_bytes": self.limit_bytes,
            "peak_bytes": self.peak_bytes,
            "host_bytes": self.host_bytes,
            "extra_s": self.extra_s,
            "copy_bytes_per_s": self.copy_bytes_per_s,
            "replays": self.replays,
            "spared": sorted(self.spared),
            "bands": self.bands,
            "moves": {name: list(layers) for name, layers in self.streamed.items()},
            "stages": [{**vars(stage), "total_bytes": stage.total_bytes} for stage in self.stages],
        }

    @property
    def cost_s(self) -> float:
        """Seconds by which plans are chosen: copies that are hidden are not free either."""
        copied = sum(stage.copied_bytes for stage in self.stages)
        return self.extra_s + HIDDEN_COST * copied / self.copy_bytes_per_s


@dataclass(frozen=True)
class _Problem:
    parts: Mapping[str, Part]
    stages: Sequence[Stage]
    loading_bytes: int
    limit_bytes: int = field(default=0)
    captures: bool = True
    copy_bytes_per_s: float = COPY_BYTES_PER_S

    def solve(self, moving: Collection[str], captured: frozenset[str]) -> MemoryPlan | None:
        """The plan in which these parts move and these stages are captured, as far as their parts
        stay, with as few layers streamed as fit.
        """
        staying = {n: p.total_bytes for n, p in self.parts.items() if n not in moving}
        streamed: dict[str, tuple[int, ...]] = dict.fromkeys(moving, ())
        for name in moving:
            part = self.parts[name]
            room = min(
                (
                    self.limit_bytes - self._needed(stage, staying, streamed, captured, name)
                    for stage in self.stages
                    if name in stage.parts
                ),
                default=self.limit_bytes,
            )
            layers = next((chosen for chosen, size in loadings(part) if size <= room), None)
            if layers is None:
                return None
            streamed[name] = layers
        laid_out = self.lay_out(staying, streamed, captured)
        if any(stage.total_bytes > self.limit_bytes for stage in laid_out):
            return None
        host_bytes = sum(self.parts[name].total_bytes for name in moving)
        spared = frozenset[str]()
        if captured:
            spared = frozenset(stage.name for stage in self.stages if stage.graph_bytes) - captured
        return MemoryPlan(
            self.limit_bytes,
            streamed,
            bool(captured),
            laid_out,
            host_bytes,
            spared,
            self.copy_bytes_per_s,
        )

    def capturings(self) -> list[frozenset[str]]:
        """Names of the stages to capture: all, all but some that spare their graphs, and none."""
        if not self.captures:
            return [frozenset()]
        every = {stage.name for stage in self.stages if stage.graph_bytes}
        spare = [stage.name for stage in self.stages if stage.name in every and stage.spares_graphs]
        choices = [frozenset(every.difference(spared)) for spared in _subsets(spare)]
        return list(dict.fromkeys([*choices, frozenset()]))

    def lay_out(
        self,
        staying: Mapping[str, int],
        streamed: Mapping[str, tuple[int, ...]],
        captured: Collection[str],
    ) -> tuple[StageMemory, ...]:
        """The memory of all stages; first comes loading, when what stays may be there already."""
        load = Stage(LOAD, (), self.loading_bytes)
        stages = (load, *self.stages)
        return tuple(self._stage(stage, staying, streamed, captured) for stage in stages)

    def _needed(
        self,
        stage: Stage,
        staying: Mapping[str, int],
        streamed: Mapping[str, tuple[int, ...]],
        captured: Collection[str],
        but: str,
    ) -> int:
        """Bytes that a stage takes beside one of its parts."""
        memory = self._stage(stage, staying, streamed, captured)
        return memory.total_bytes - memory.weights[but]

    def _stage(
        self,
        stage: Stage,
        staying: Mapping[str, int],
        streamed: Mapping[str, tuple[int, ...]],
        captured: Collection[str],
    ) -> StageMemory:
        present = {name: streamed[name] for name in stage.parts if name in streamed}
        loaded = {name: self.parts[name].loaded_bytes(layers) for name, layers in present.items()}
        working = stage.working_bytes
        if stage.name != LOAD:  # nothing is captured before the first request
            # The stage's own too: before another size of it is captured, it runs without a graph,
            # beside those it has.
            kept = (other for other in self.stages if self._is_kept(other, streamed, captured))
            working += sum(other.graph_bytes for other in kept)
        costs = [self._moved(stage, name, layers) for name, layers in present.items()]
        extra_s = sum(seconds for _, seconds in costs)
        if stage.graph_bytes and not self._is_kept(stage, streamed, captured):
            extra_s += REPLAY_GAIN * stage.forwards * stage.forward_s
        counts = {name: len(layers) for name, layers in present.items() if layers}
        copied = sum(size for size, _ in costs)
        return StageMemory(stage.name, {**staying, **loaded}, counts, working, copied, extra_s)

    def _is_kept(self, stage: Stage, streamed: Collection[str], captured: Collection[str]) -> bool:
        """Whether it keeps graphs: one reads weights where they were when it was made. What moves
        and has no layers is in no graph.
        """
        return stage.name in captured and not any(
            name in streamed and self.parts[name].layer_bytes for name in stage.parts
        )

    def _moved(self, stage: Stage, name: str, layers: tuple[int, ...]) -> tuple[int, float]:
        """Bytes brought over, and seconds beyond computing: the first forward runs while its layers
        come, later ones while the streamed ones do.
        """
        part, later = self.parts[name], stage.forwards - 1
        every = sum(part.layer_bytes[i] for i in layers)
        extra_s = max(0.0, part.total_bytes / self.copy_bytes_per_s - stage.forward_s)
        extra_s += later * max(0.0, every / self.copy_bytes_per_s - stage.forward_s)
        return part.total_bytes + later * every, extra_s


def make_plan(
    parts: Sequence[Part],
    stages: Sequence[Stage],
    limit_bytes: int,
    loading_bytes: int = 0,
    captures: bool = True,
    copy_bytes_per_s: float = COPY_BYTES_PER_S,
) -> MemoryPlan:
    """The plan that is expected to cost least time within the limit.

    Args:
        parts: those that exist.
        stages: in their order.
        limit_bytes: of everything that the process holds on the device.
        loading_bytes: working memory while parts are read.
        captures: whether any stage may run as captured graphs.
        copy_bytes_per_s: from host memory to the device.

    Raises:
        NoPlanError: there is none.
    """
    named = {part.name: part for part in parts}
    problem = _Problem(named, stages, loading_bytes, limit_bytes, captures, copy_bytes_per_s)
    plans = [
        plan
        for moving in _subsets([part.name for part in parts if part.can_move])
        for captured in problem.capturings()
        if (plan := problem.solve(moving, captured)) is not None
    ]
    if plans:
        kept = {stage.name: stage.graph_bytes for stage in stages}

        def order(plan: MemoryPlan) -> tuple[float, ...]:
            given_up = sum(kept[name] for name in plan.spared)
            return plan.cost_s, len(plan.streamed), given_up, plan.peak_bytes

        return min(plans, key=order)
    least = _least(parts, stages, loading_bytes)
    worst = max(least, key=lambda stage: stage.total_bytes)
    raise NoPlanError(
        f"no way to run in {limit_bytes / GIB:.1f} GiB was found: with all that can rest in host"
        f" memory resting there, the stage {worst.name} takes {worst.total_bytes / GIB:.1f} GiB,"
        f" of which {sum(worst.weights.values()) / GIB:.1f} are weights,"
        f" {(worst.working_bytes + SLACK_BYTES) / GIB:.1f} activations and"
        f" {CONTEXT_BYTES / GIB:.1f} the driver's",
        f"give memory_limit_gb={_ceil_gb(worst.total_bytes):g} or more, load without sr or with a"
        " smaller one, or use precision='fp8' or 'int8'",
        worst.name,
    )


def rings(
    layer_bytes: Sequence[int], streamed: Collection[int]
) -> list[tuple[int, tuple[int, ...]]]:
    """The slots of streamed layers: bytes of each, and the layers that take turns in it."""
    return [
        (max(layer_bytes[i] for i in layers), tuple(layers[slot::SLOTS]))
        for same in classes(layer_bytes)
        if (layers := [i for i in same if i in streamed])
        for slot in range(min(SLOTS, len(layers)))
    ]


def classes(layer_bytes: Sequence[int]) -> list[list[int]]:
    """Layers of like size, in order, the smaller ones first."""
    alike: list[list[int]] = []
    for layer in sorted(range(len(layer_bytes)), key=lambda i: layer_bytes[i]):
        if alike and layer_bytes[layer] <= LIKE * layer_bytes[alike[-1][0]]:
            alike[-1].append(layer)
        else:
            alike.append([layer])
    return [sorted(layers) for layers in alike]


def streamings(layer_bytes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Ways to choose the layers to stream, from none to all, each smaller on the device.

    Small layers go first, whose slots take less. They lie evenly among the others, which are
    computed while they come. Streaming no more layers than there are slots would save nothing.
    """
    yield ()
    chosen: list[int] = []
    for same in classes(layer_bytes):
        for count in range(SLOTS + 1, len(same) + 1):
            spread = [same[(2 * k + 1) * len(same) // (2 * count)] for k in range(count)]
            yield tuple(sorted(chosen + spread))
        if len(same) > SLOTS:
            chosen += same


@functools.lru_cache(maxsize=64)
def loadings(part: Part) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Every way of `streamings`, with the bytes that the part then takes on the device."""
    return tuple((layers, part.loaded_bytes(layers)) for layers in streamings(part.layer_bytes))


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for count in range(len(names) + 1):
        yield from combinations(names, count)


def _least(
    parts: Sequence[Part], stages: Sequence[Stage], loading_bytes: int
) -> tuple[StageMemory, ...]:
    """Stages with everything that can move resting, and every layer streamed."""
    problem = _Problem({part.name: part for part in parts}, stages, loading_bytes)
    staying = {part.name: part.total_bytes for part in parts if not part.can_move}
    streamed = {
        part.name: list(streamings(part.layer_bytes))[-1] for part in parts if part.can_move
    }
    return problem.lay_out(staying, streamed, ())


def _ceil_gb(count: int) -> float:
    """Bytes in GiB, rounded up to a tenth."""
    return -(-10 * count // GIB) / 10
