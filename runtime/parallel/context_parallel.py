"""One request on several devices: the transformers' sequence is split, and so are the windows of
frames, and their pictures.

Every process has all weights. Rank 0 runs the loops of `pipeline/denoise.py`; for each forward it
calls the others, sends them what the model takes, and gets all velocities. Around attention the
processes exchange rows for heads (`kernels/parallel/exchange.py`). What a forward sends beside that
is small: at 896x512 and 5 s, 30 MB of inputs to each process and 11 MB of velocities in all, once a
step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from magihuman.kernels import reference as ref
from magihuman.kernels.decoder.bands import AXES, LARGE_PIXELS, Turn, schedule
from magihuman.kernels.parallel import exchange
from magihuman.runtime.config import VIDEO_STRIDE
from magihuman.runtime.device import PeerLost, is_cuda_error
from magihuman.runtime.model import DiT, TurboVAE
from magihuman.runtime.parallel.team import CLOSE, Team
from magihuman.runtime.pipeline import (
    Components,
    Decoder,
    EmbedsText,
    Forward,
    PlainDecoder,
    decode_group,
    frames_shape,
    whole_picture,
)

if TYPE_CHECKING:
    from magihuman.graphs.transformer import CompiledForward

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Transformer:
    """A model, and the compiled forward of its own rows that stands in for it, if there is one."""

    model: DiT
    compiled: CompiledForward | None = None


@dataclass(frozen=True)
class SharedForward:
    """A forward of every process on rank 0, whose own `compiled` embeds the text for all."""

    call: Callable[..., tuple[Tensor, Tensor]]
    compiled: EmbedsText

    def __call__(
        self,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        rope: Tensor,
        local: ref.LocalAttention | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results are those of `DiT.forward`."""
        return self.from_embedded(video, audio, self.embed_text(text), rope, local)

    def embed_text(self, text: Tensor) -> Tensor:
        """As of `CompiledForward`."""
        return self.compiled.embed_text(text)

    def from_embedded(
        self,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        rope: Tensor,
        local: ref.LocalAttention | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As of `CompiledForward`, with the velocities of all rows."""
        return self.call(video, audio, text, rope, local, is_embedded=True)


class ContextParallel:
    """What the processes of a team do together; each has one, over the same models.

    The sequence is split by rows, and around attention by heads: Ulysses (arXiv 2309.14509).
    """

    def __init__(
        self,
        team: Team,
        transformers: Mapping[str, Transformer],
        vae: TurboVAE | None = None,
        decoder: Decoder | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the models of this process.

        transformers: each by the name that calls give it. vae: where frames are to be decoded.
        decoder: stands in for that of `vae`. release: gives up this process's captured graphs.
        """
        self.team, self._transformers, self._vae = team, transformers, vae
        self._decoder = PlainDecoder(vae) if decoder is None and vae else decoder
        self._release = release

    def forward(self, name: str) -> Forward:
        """On rank 0: a stand-in for `DiT.forward` that has every process do its share."""
        call, compiled = partial(self._call_forward, name), self._transformers[name].compiled
        if isinstance(compiled, EmbedsText):
            return SharedForward(call, compiled)
        return cast(Forward, call)

    @torch.inference_mode()
    def frames(self, latent: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """On rank 0: a clip's windows in order, uint8 [frames, 16 H, 16 W, 3] each, decoded by the
        processes in turns, with the largest magnitude behind them. latent: [1, 48, T, H, W]
        normalised.
        """
        assert self._vae is not None
        x, size = self._vae.denormalize(latent), frames_shape(latent)[1:]
        rows, columns = latent.shape[3:]
        is_large = size[0] * size[1] > LARGE_PIXELS
        turns = schedule(
            self._vae.plan(latent.shape[2]),
            (rows, columns),
            self.team.ranks,
            self._vae.config,
            is_large,
        )
        for turn in turns:
            self.team.call("decode", turn, size, tuple(x.shape), x.dtype)
            decoded = self._decode(turn, size, tuple(x.shape), x.dtype, x)
            assert decoded is not None
            yield from _in_order(turn, size, *decoded)

    def release(self) -> None:
        """On rank 0: have every process give up its captured graphs."""
        with suppress(PeerLost):  # which the next request is told
            self.team.call("release")
        self._release()

    @torch.inference_mode()
    def follow(self) -> None:
        """On the others: do as rank 0 says, until it closes."""
        calls: dict[str, Callable[..., object]] = {
            "forward": self._forward,
            "decode": self._decode,
            "release": self._release,
        }
        while True:
            name, arguments = self.team.listen()
            if name == CLOSE:
                return
            try:
                calls[name](*arguments)
            except Exception as error:
                if is_cuda_error(error):  # leaving in order would wait for this GPU
                    self.team.lose(f"rank {self.team.rank} failed for good: {error}")
                # Else all have agreed that it cannot be done, and rank 0 tells its caller.
                if self.team.lost is not None:
                    raise

    def close(self) -> None:
        """Give up the graphs, which hold on to the connections, and leave the team."""
        with suppress(RuntimeError):  # of a GPU that has failed
            self._release()
        self.team.close()

    def _call_forward(
        self,
        name: str,
        video: Tensor,
        audio: Tensor,
        text: Tensor,
        rope: Tensor,
        local: ref.LocalAttention | None = None,
        is_embedded: bool = False,
    ) -> tuple[Tensor, Tensor]:
        inputs = (video, audio, text, rope)
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        self.team.call("forward", name, shapes, local, is_embedded)
        velocities = self._forward(name, shapes, local, is_embedded, inputs)
        assert velocities is not None
        return velocities

    def _forward(
        self,
        name: str,
        shapes: Shapes,
        local: ref.LocalAttention | None,
        is_embedded: bool,
        inputs: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """One forward pass of every process; rank 0 alone has inputs, and gets the velocities.

        shapes: of the inputs, by which the others make room for them. is_embedded: whether text is,
        for a compiled forward.
        """
        team, transformer = self.team, self._transformers[name]
        compiled = transformer.compiled
        sizes = [math.prod(shape) for shape in shapes]
        video, audio, text, _ = (shape[0] for shape in shapes)
        counts = (video, audio, text)
        if compiled is None:
            sharding = ref.Sharding.of(counts, team.ranks)
        else:
            sharding = compiled.sharding(*counts)

        def prepare() -> Tensor:
            if compiled is not None:
                compiled.prepare(*counts, local)
            if inputs is None:
                return torch.empty(sum(sizes), dtype=torch.float32, device=team.device)
            return torch.cat([tensor.flatten() for tensor in inputs])

        team.reserve(*_exchanged_bytes(transformer.model, sharding))
        flat = team.agree(prepare)
        with team.together():
            dist.broadcast(flat, 0)
            given = [part.view(s) for part, s in zip(flat.split(sizes), shapes, strict=True)]
            if compiled is not None:
                run = compiled.from_embedded if is_embedded else compiled
                velocities = run(given[0], given[1], given[2], given[3], local)
            else:
                velocities = _plain(transformer.model, sharding, team.rank, given, local)
            every = self._gather(_side_by_side(velocities, sharding.rows))
        if every is None:
            return None
        rows = every.flatten(0, 1)  # in the order of the sequence
        channels = velocities[1].shape[1]
        return rows[:video], rows[video : video + audio, :channels].contiguous()

    def _decode(
        self,
        turn: Turn,
        size: tuple[int, int, int],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        x: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Decode a window, or a band of one, on each process; rank 0 alone has the latents `x`, and
        gets the frames.

        size: (height, width, channels) of a frame. shape, dtype: of x, by which the others make
        room for it. Returns uint8 [ranks, bytes of the largest part], each part as it is in memory
        and then unset, and [ranks] fp32, the magnitude behind each.
        """
        team, decoder = self.team, self._decoder
        assert decoder is not None
        parts = _parts(turn, size)

        def prepare() -> tuple[Tensor, Tensor]:
            most = max(math.prod(part) for part in parts)
            frames = torch.empty(most, dtype=torch.uint8, device=team.device)
            return torch.empty(shape, dtype=dtype, device=team.device) if x is None else x, frames

        def decode() -> None:
            if team.rank >= len(parts):  # the last turn may have fewer windows
                return
            window = turn.windows[0 if turn.bands else team.rank]
            band = turn.bands[team.rank] if turn.bands else None
            pixels, largest = decode_group(decoder, latents, [window], band)
            frames[: pixels.numel()] = pixels.flatten()
            magnitude.copy_(largest)

        magnitude = torch.zeros((), dtype=torch.float32, device=team.device)
        latents, frames = team.agree(prepare)
        with team.together():
            dist.broadcast(latents, 0)
        team.agree(decode)
        with team.together():
            every, magnitudes = self._gather(frames), self._gather(magnitude)
        return None if every is None or magnitudes is None else (every, magnitudes)

    def _gather(self, tensor: Tensor) -> Tensor | None:
        """On rank 0 this tensor of all processes, [ranks, *shape]; None on the others."""
        if self.team.rank:
            dist.gather(tensor, dst=0)
            return None
        every = tensor.new_empty(self.team.ranks, *tensor.shape)
        dist.gather(tensor, list(every.unbind()), dst=0)
        return every


def _exchanged_bytes(model: DiT, sharding: ref.Sharding) -> tuple[int, int]:
    """The most that a process is sent in one exchange of rows for heads, and in one back."""
    config = model.config
    weights = model.block.named_parameters()
    size = next(w.element_size() for name, w in weights if name.endswith("linear_qkv.weight"))
    size = max(2, size)  # of activations, where weights have a byte
    width = config.heads * config.head_dim
    return exchange.room_bytes(sharding.rows, config.qkv_rows, width, sharding.ranks, size)


def _plain(
    model: DiT,
    sharding: ref.Sharding,
    rank: int,
    inputs: Sequence[Tensor],
    local: ref.LocalAttention | None,
) -> tuple[Tensor, Tensor]:
    """The plain model over the rows of one process: velocities of its video and audio rows.

    inputs: video [Nv, 192], audio [Na, 64], text [Nt, C] and the rotary table of all rows, whole.
    """
    video, audio, text, rope = inputs
    padding = sharding.counts[2] - text.shape[0]
    length = torch.tensor(rope.shape[0], device=rope.device) if padding else None
    text, rope = (F.pad(tensor, (0, 0, 0, padding)) for tensor in (text, rope))
    local_rows = (
        tensor[rows] for tensor, rows in zip((video, audio, text), sharding.own(rank), strict=True)
    )
    velocities: Any = model(*local_rows, rope, local, length, sharding)
    return velocities[0], velocities[1]


def _side_by_side(velocities: tuple[Tensor, Tensor], rows: int) -> Tensor:
    """Video and audio rows of a process in one tensor, for a single gather; text rows are unset.

    It is as wide as the wider of the two, [rows, 192] in the published model; the narrower rows
    fill the first channels.
    """
    video, audio = velocities
    out = video.new_empty(rows, max(video.shape[1], audio.shape[1]))
    out[: len(video), : video.shape[1]] = video
    out[len(video) : len(video) + len(audio), : audio.shape[1]] = audio
    return out


def _parts(turn: Turn, size: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """The shape of what each process of a turn makes: frames, height, width, channels."""
    if not turn.bands:
        return [(window.frames, *size) for window in turn.windows]
    (window,) = turn.windows
    shapes = []
    for band in turn.bands:
        shape = [window.frames, *size]
        side = AXES.index(band.axis)
        shape[1 + side] = (band.end - band.begin) * VIDEO_STRIDE[1 + side]
        shapes.append(tuple(shape))
    return shapes


def _in_order(
    turn: Turn, size: tuple[int, int, int], every: Tensor, magnitudes: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The windows of a turn, uint8 [frames, *size], each with its magnitude."""
    shapes = _parts(turn, size)
    parts = [
        flat[: math.prod(shape)].view(shape) for flat, shape in zip(every, shapes, strict=False)
    ]
    if not turn.bands:
        yield from zip(parts, magnitudes, strict=False)
    else:
        # The largest, and NaN where one is: what `finite.largest` says of all.
        yield whole_picture(parts, turn.bands), magnitudes.max()


def share(parts: Components, team: Team) -> tuple[Components, ContextParallel]:
    """The components of an engine with transformers and video decoder that run on every process of
    a team, and what this process does of that.
    """

    def release() -> None:
        for captured in parts.captured:
            captured.release()

    given = {"base": (parts.dit, parts.forward), "sr": (parts.sr_dit, parts.sr_forward)}
    models = {
        name: Transformer(model, cast("CompiledForward | None", forward))
        for name, (model, forward) in given.items()
        if model is not None
    }
    shared = ContextParallel(team, models, cast(TurboVAE, parts.turbo_vae), parts.decoder, release)
    together = dataclasses.replace(
        parts,
        forward=shared.forward("base"),
        sr_forward=None if parts.sr_dit is None else shared.forward("sr"),
        distributed=shared,
        captured=(shared,),
    )
    return together, shared
