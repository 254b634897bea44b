"""Weights that rest in host memory and are on the device only in the stages that read them.

Every layer of a model, and all that is in none, is one run of bytes in pinned host memory. In a
stage each has a buffer on the device, or layers take turns in a slot (`memory_plan.rings`), and the
model's tensors are views of it: where a tensor is does not change from the first forward of a stage
to its last. Copies have streams of their own, and layers wait for their own bytes alone.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from magihuman.runtime.errors import DeviceError
from magihuman.runtime.memory import plan as memory_plan

log = logging.getLogger(__name__)

ALIGNMENT = 256  # of a tensor within a run of bytes: what an allocation on a GPU has
PAGE = 4096  # of host memory; two registered runs must not share one
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


@dataclass(frozen=True)
class Placed:
    """A tensor's place in a run of bytes.

    Attributes:
        tensor: the model's own, which is pointed at one run or another.
        start: of its first element, in bytes.
        size: in bytes, the padding behind each of its rows included.
    """

    tensor: Tensor
    start: int
    size: int
    shape: torch.Size
    stride: tuple[int, ...]

    def at(self, run: Tensor) -> Tensor:
        """The tensor as a view of this run of bytes."""
        flat = run[self.start : self.start + self.size].view(self.tensor.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())


class Group:
    """Tensors that are moved together, and their bytes at rest."""

    def __init__(self, tensors: Iterable[Tensor], pin: bool) -> None:
        """Copies the tensors, from wherever they are, and points them at the copy."""
        self._placed: list[Placed] = []
        sources = []
        size = 0
        for tensor in tensors:
            source = _with_padding(tensor)
            self._placed.append(Placed(tensor, size, source.nbytes, tensor.shape, tensor.stride()))
            sources.append(source)
            size += -(-source.nbytes // ALIGNMENT) * ALIGNMENT
        self._memory = HostMemory(size, pin)
        self.host = self._memory.run
        for placed, source in zip(self._placed, sources, strict=True):
            run = self.host[placed.start : placed.start + placed.size]
            run.view(source.dtype).copy_(source)
            placed.tensor.data = placed.at(self.host)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors, with what aligns them."""
        return self.host.nbytes

    def point_at(self, run: Tensor) -> None:
        """Let the tensors be views of this run of bytes."""
        for placed in self._placed:
            placed.tensor.data = placed.at(run)

    def rest(self) -> None:
        """Let the tensors be those at rest."""
        self.point_at(self.host)


def _with_padding(tensor: Tensor) -> Tensor:
    """The elements of a tensor in the order of memory, with those behind its rows."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.ndim:
        held = int(tensor.untyped_storage().nbytes()) // tensor.itemsize
        span = max(span, min(held - int(tensor.storage_offset()), len(tensor) * tensor.stride(0)))
    return tensor.detach().as_strided((span if tensor.numel() else 0,), (1,))


class HostMemory:
    """A run of bytes of the host, uint8, pinned where that is asked for.

    PyTorch's own pinned memory is rounded up to a power of two; this is registered where it lies.
    """

    def __init__(self, size: int, pin: bool) -> None:
        if not pin or size == 0:
            self.run = torch.empty(size, dtype=torch.uint8)
            return
        pages = -(-size // PAGE) * PAGE
        mapped = anonymous(pages)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        whole.zero_()  # from all threads: registering would have one fetch page after page
        self.run = whole[:size]
        cudart = torch.cuda.cudart()
        status = int(cudart.cudaHostRegister(whole.data_ptr(), pages, PORTABLE))
        if status != 0:
            raise DeviceError(
                f"{pages / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {status});"
                " free host memory, or give a larger memory_limit_gb, with which less rests there"
            )
        # `whole` is held until it has been unregistered, whoever else still has a view of it.
        weakref.finalize(self, _unregister, cudart, whole).atexit = False


def anonymous(size: int) -> mmap.mmap:
    """So many bytes of memory in pages of their own, large ones where the system has them."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows has no other kind
        return mmap.mmap(-1, size)
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def _unregister(cudart: Any, whole: Tensor) -> None:
    cudart.cudaHostUnregister(whole.data_ptr())


class Copies:
    """Copies to the device on a stream beside the one that computes; on a CPU, at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy once what was launched before is done; the event says that the bytes are there."""
        if self._stream is None:
            to.copy_(source)
            return None
        self.follow()
        return self.add(to, source)

    def follow(self) -> None:
        """Let what is copied from now on wait for what has been launched."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def add(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy behind the copies before, waiting for nothing else; the event is as for `copy`."""
        if self._stream is None:
            to.copy_(source)
            return None
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let what is launched from now on wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def finish(self) -> None:
        """Wait until all copies are done."""
        if self._stream is not None:
            self._stream.synchronize()


class Offloaded:
    """A model whose weights rest in host memory.

    Layers must run in their order, all of them, and say so: `before_layer` is called before each,
    and once more after the last.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        device: torch.device,
        streamed: Collection[int] = (),
    ) -> None:
        """Moves the weights to rest, layer by layer.

        Args:
            model: whose parameters and buffers are moved, wherever they are.
            layers: of the model, in the order in which they run; may be none. One may get its
                weights when it is asked for.
            device: that computes.
            streamed: the layers that take turns in slots, by index.
        """
        self._device = device
        pin = device.type == "cuda"
        inside: list[nn.Module] = []
        self._layers: list[Group] = []
        with _outside_inference():
            for layer in layers:
                self._layers.append(Group(_tensors(layer), pin))
                inside.append(layer)
            known = {id(tensor) for layer in inside for tensor in _tensors(layer)}
            self._outside = Group((t for t in _tensors(model) if id(t) not in known), pin)
        self._sizes = [group.size_bytes for group in self._layers]
        self._take_turns(streamed)
        self._buffers: dict[int, Tensor] = {}
        self._ready: dict[int, torch.cuda.Event | None] = {}
        self._running: int | None = None
        self._loads, self._turns = Copies(device), Copies(device)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights at rest."""
        return self._outside.size_bytes + sum(group.size_bytes for group in self._layers)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Have the weights on the device in this context; layers come while others compute."""
        try:
            with _outside_inference():
                self._bring()
            yield
        finally:
            self._loads.finish()
            self._turns.finish()
            with _outside_inference():
                for group in (self._outside, *self._layers):
                    group.rest()
            self._buffers, self._ready, self._running = {}, {}, None

    def before_layer(self, layer: int) -> None:
        """Be told that this layer is next and all before it have been launched.

        After the last, `layer` is the number of layers.
        """
        done, self._running = self._running, layer
        if done is not None and done in self._next:
            after = self._next[done]
            group = self._layers[after]
            self._ready[after] = self._turns.copy(self._buffers[after], group.host)
        if layer < len(self._layers):
            self._loads.wait(self._ready[layer])
        else:
            self._running = None

    def _take_turns(self, streamed: Collection[int]) -> None:
        self._streamed = frozenset(streamed)
        self._rings = memory_plan.rings(self._sizes, streamed)
        self._next = {
            layer: turns[(at + 1) % len(turns)]
            for _, turns in self._rings
            for at, layer in enumerate(turns)
            if len(turns) > 1
        }

    def _bring(self) -> None:
        """Make room, and start copies in the order in which they are needed."""
        slots, outside = self._make_room()
        first = {turns[0] for _, turns in self._rings}
        for layer, group in enumerate(self._layers):
            run = slots[layer][: group.size_bytes]
            self._buffers[layer] = run
            group.point_at(run)
        self._outside.point_at(outside)
        self._loads.follow()
        self._turns.follow()
        here = self._loads.add(outside, self._outside.host)
        for layer, group in enumerate(self._layers):
            if layer not in self._streamed:
                self._ready[layer] = self._loads.add(self._buffers[layer], group.host)
            elif layer in first:
                self._ready[layer] = self._turns.add(self._buffers[layer], group.host)
        self._loads.wait(here)

    def _make_room(self) -> tuple[dict[int, Tensor], Tensor]:
        """Memory for every layer, which may be a slot, and for all else.

        What is free may be in pieces, of which none is large enough: then more layers take turns,
        from now on.
        """
        while True:
            try:
                return self._rooms()
            except torch.OutOfMemoryError:
                before = len(self._streamed)
                ways = memory_plan.streamings(self._sizes)
                more = next((way for way in ways if len(way) > before), None)
                if more is None:
                    raise
            self._take_turns(more)
            log.info("memory is in pieces: %d layers take turns, %d before", len(more), before)

    def _rooms(self) -> tuple[dict[int, Tensor], Tensor]:
        rooms: dict[int, Tensor] = {}
        for size, turns in self._rings:
            rooms |= dict.fromkeys(turns, self._room(size))
        outside = self._room(self._outside.size_bytes)
        for layer, size in enumerate(self._sizes):
            if layer not in self._streamed:
                rooms[layer] = self._room(size)
        return rooms, outside

    def _room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer, each once."""
    yield from model.parameters()
    yield from model.buffers()


@contextmanager
def _outside_inference() -> Iterator[None]:
    """Tensors made here can be those of a model: one made in inference mode stays of its kind."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def call_before_layers(
    model: nn.Module, layers: Sequence[nn.Module], before_layer: Callable[[int], None]
) -> None:
    """Let a model that runs as it is say which layer is next. model: runs the layers, and all."""
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: before_layer(index))
    model.register_forward_hook(lambda *_: before_layer(len(layers)))


class Residency:
    """Which parts of an engine move, and their presence on the device."""

    def __init__(self, cap: object = None) -> None:
        """cap: what holds for as long as the engine has its parts, as a `Cap`."""
        self._moving: dict[str, Offloaded] = {}
        self._cap = cap

    @property
    def moves(self) -> bool:
        """Whether any part does: then stages of different requests must not overlap."""
        return bool(self._moving)

    @property
    def host_bytes(self) -> int:
        """Bytes of all weights at rest."""
        return sum(part.size_bytes for part in self._moving.values())

    def __getitem__(self, name: str) -> Offloaded:
        return self._moving[name]

    def add(self, name: str, part: Offloaded) -> None:
        """Take in a part that moves."""
        self._moving[name] = part

    @contextmanager
    def present(self, *names: str) -> Iterator[None]:
        """These parts are on the device, whether they stay there or not.

        At the end what the stage used goes back to the device, so that the next finds it in one
        piece.
        """
        if not self._moving:
            yield
            return
        try:
            with ExitStack() as stack:
                for name in names:
                    if name in self._moving:
                        stack.enter_context(self._moving[name].present())
                yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
