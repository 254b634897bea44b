"""The portable kernels on whatever GPU is here, with the tiles of every architecture.

Errors are relative to the reference in fp32 over the same inputs, and may be at most a tenth larger
than those of the plain bf16 version; all outputs are written over NaN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attending import exact_attention, gated_blockwise
from torch import Tensor, nn

import golden
from magihuman.kernels import reference as ref
from magihuman.runtime.model import tokens
from magihuman.runtime.pipeline import denoise

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from magihuman import runtime
from magihuman.graphs import quantization, support
from magihuman.graphs.transformer.options import ReplayOptions
from magihuman.graphs.transformer.replay import CompiledForward
from magihuman.kernels.attention import backends, portable
from magihuman.kernels.target import E4M3_FROM, Capability, Target, name_of

DEVICE = torch.device("cuda")
HERE = torch.cuda.get_device_capability()
ROWS = [1, 63, 127, 4266, 14762]
HEADS = [(40, 8, 128), (4, 2, 64), (3, 1, 32)]
SHARED = Target("portable", HERE).shared_bytes
# Architectures whose tiles fit into the shared memory here, and of which each has its own.
TILED = [one for one in portable.ARCHITECTURES if Target("portable", one).shared_bytes <= SHARED]
BF16_TILES = {portable.tile_of(one, torch.bfloat16): one for one in TILED}
E4M3_TILES = {
    portable.tile_of(one, torch.float8_e4m3fn): one for one in TILED if one >= E4M3_FROM <= HERE
}
LOCAL_SHAPES = [
    # frames, tokens of each, reach, audio and text tokens: tiles and blocks divide none of them.
    (5, 137, 1, 9), (3, 50, 2, 1), (7, 64, 0, 200), (2, 510, 5, 33), (6, 300, 11, 130),
    (4, 21, 1, 3), (3, 130, 0, 130),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the allocator hands out next is full of NaN."""
    torch.full((1 << 28,), float("nan"), device=DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def scalar(value: int) -> Tensor:
    return torch.tensor(value, device=DEVICE, dtype=torch.int32)


def projection(rows: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, list[Tensor]]:
    """Rows [Q | K | V | gate], and the weights of both norms with the rotation."""
    angle = randn(rows, 3 * dim // 8, dtype=torch.float32)
    rope = torch.cat((angle.sin(), angle.cos()), dim=1)
    norms = [0.3 * randn(dim, dtype=torch.float32) for _ in "qk"]
    return randn(rows, (heads + 2 * kv_heads) * dim + heads), [*norms, rope]


# -- attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles_for", BF16_TILES.values(), ids=name_of)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_attention(tiles_for: Capability, rows: int, heads: int, kv_heads: int, dim: int) -> None:
    name = backends.portable_for(tiles_for)
    q = randn(rows, heads, dim)
    q[: rows // 2] *= 3  # some rows with sharp peaks
    k, v = randn(rows, kv_heads, dim), randn(rows, kv_heads, dim)
    gate = randn(rows, heads + 3)[:, 1 : 1 + heads]
    for length in sorted({1, max(1, rows // 2), max(1, rows - 1), rows}):
        k[length:], v[length:] = 50.0, float("nan")  # must not be seen
        ours = backends.run(name, q, k, v, gate, scalar(length))
        keys, values = k[:length], v[:length]
        exact = exact_attention(q, keys, values, gate)
        plain = golden.error(ref.gated_attention(q, keys, values, gate), exact)
        assert golden.error(ours, exact) <= 1.1 * plain + 1e-7, (length, plain)
        k[length:], v[length:] = 0.0, 0.0


@pytest.mark.parametrize("tiles_for", E4M3_TILES.values(), ids=name_of)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_e4m3_attention(
    tiles_for: Capability, rows: int, heads: int, kv_heads: int, dim: int
) -> None:
    name = backends.portable_for(tiles_for)
    for length in sorted({1, -(-rows // 2), rows}):
        qkv, (*norms, rope) = projection(rows, heads, kv_heads, dim)
        qkv[length:] = 1e4  # must not be seen
        gate, valid = qkv[:, -heads:], scalar(length)
        q, k, v, *scales = ref.qkv_fp8(qkv, *norms, rope, valid, None, heads, kv_heads)
        ours = backends.run_fp8(name, q, k, v, tuple(scales), gate, valid, None)[:length]
        careful = ref.attention_fp8(q, k, v, *scales, gate, valid)[:length]
        parts = ref.split_qkv(qkv[:length].float(), *norms, rope[:length], None, heads, kv_heads)
        exact = exact_attention(*parts)
        # The kernel rounds weights below the largest so far, the reference below that of all.
        bound = 1.05 * golden.error(careful, exact) + 1e-3
        assert golden.error(ours, exact) <= bound, (length, golden.error(ours, careful))


CASES = [("bf16", one) for one in BF16_TILES.values()]
CASES += [("e4m3", one) for one in E4M3_TILES.values()]


@pytest.mark.parametrize(("dtype", "tiles_for"), CASES)
@pytest.mark.parametrize("shape", LOCAL_SHAPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_frame_local_attention(
    dtype: str, tiles_for: Capability, shape: tuple[int, ...], heads: int, kv_heads: int, dim: int
) -> None:
    """Against the definition in fp32; valid lengths that cut the text."""
    name = backends.portable_for(tiles_for)
    *fields, rest = shape
    local = ref.LocalAttention(*fields)
    video = local.frames * local.frame_tokens
    rows = video + rest
    for length in sorted({video + 1, rows - rest // 2, rows}):
        qkv, (*norms, rope) = projection(rows, heads, kv_heads, dim)
        qkv[length:] = 1e4  # must not be seen
        valid = scalar(length)
        q, k, v, gate = ref.split_qkv(qkv, *norms, rope, None, heads, kv_heads)
        q, k, v = (x.contiguous() for x in (q, k, v))
        wide = (x.float() for x in (q, k, v, gate))
        exact = gated_blockwise(*wide, local, valid)[:length]
        if dtype == "bf16":
            ours = backends.run(name, q, k, v, gate, valid, local)[:length]
            plain = ref.gated_attention(q, k, v, gate, local, valid)[:length]
            bound = 1.1 * golden.error(plain, exact) + 1e-7
        else:
            q, k, v, *scales = ref.qkv_fp8(qkv, *norms, rope, valid, None, heads, kv_heads)
            ours = backends.run_fp8(name, q, k, v, tuple(scales), gate, valid, local)[:length]
            careful = ref.attention_fp8(q, k, v, *scales, gate, valid, local)[:length]
            bound = 1.05 * golden.error(careful, exact) + 1e-3
        assert golden.error(ours, exact) <= bound, (length, bound)


# -- the compiled forward ---------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [{}, {"tiles_for": (8, 6)}, {"tiles_for": (8, 9)}]


def portable_forward(model: nn.Module, **options: Any) -> CompiledForward:
    given = ReplayOptions(kernels="portable", **options)
    return CompiledForward(model, model.config, torch.bfloat16, DEVICE, given)


def streams_of(layout: tokens.Layout) -> tuple[Tensor, Tensor]:
    shape = (1, 48, layout.frames, layout.rows, layout.columns)
    return randn(*shape, dtype=torch.float32), randn(1, layout.audio, 64, dtype=torch.float32)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("name", "local"), [("dit_forward", False), ("sr_forward", True)])
def test_golden_forwards(name: str, local: bool, options: dict[str, Any]) -> None:
    data = {key: value.to(DEVICE) for key, value in golden.load(name).items()}
    model = golden.dit(local=local).to(DEVICE)
    text = data["text"][0, : golden.META[name]["text_len"]]
    layout = tokens.Layout(*data["x_t"].shape[2:], data["audio"].shape[1], len(text))
    forward = portable_forward(model, **options)
    velocity = denoise.velocity_of(model, layout, text, "v1" if local else "v2", forward)
    with torch.inference_mode():
        ours = velocity(data["x_t"], data["audio"])
    for stream, theirs in zip(ours, ("video", "audio_out"), strict=True):
        # Two bf16 runs that sum in different orders are 5e-3 to 7e-3 apart here.
        assert golden.error(stream, data[theirs]) <= 1e-2
    (report,) = forward.reports().values()
    assert report.kernels == "portable"
    assert report.attention == backends.portable_for(options.get("tiles_for", HERE))


PRECISIONS = {  # and what `support.why_not` has to know of each
    "int8": {},
    "fp8": {"fp8": True},
    "fp8-attn": {"fp8": True, "fp8_attention": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_linears_in_8_bits(precision: str, options: dict[str, Any]) -> None:
    """As near to bf16 as rounding operands to 8 bits leaves it; padding is not seen."""
    layout = tokens.Layout(3, 4, 6, 9, 33)
    reference, model = (golden.dit(local=False).to(DEVICE) for _ in range(2))
    reason = support.why_not(
        model.config, torch.bfloat16, DEVICE, **PRECISIONS[precision], kernels="portable"
    )
    if reason is not None:
        pytest.skip(reason)
    if precision != "int8" and options.get("tiles_for", HERE) < E4M3_FROM:
        pytest.skip("it has no tiles for e4m3")
    dtype = torch.int8 if precision == "int8" else torch.float8_e4m3fn
    quantization.quantize_model(model, quantization.quantized_linears(model.config), dtype)
    forward = portable_forward(model, fp8_attention=precision == "fp8-attn", **options)
    text = randn(layout.text, model.config.text_channels, dtype=torch.float32)
    with torch.inference_mode():
        streams = streams_of(layout)
        plain = denoise.velocity_of(reference, layout, text, "v2")(*streams)
        ours = denoise.velocity_of(model, layout, text, "v2", forward)(*streams)
    for a, b in zip(ours, plain, strict=True):
        assert 1e-3 < golden.error(a, b) < 0.1


def test_an_engine_of_portable_kernels(tmp_path: Path) -> None:
    """It says so, and makes the same clip twice; super-resolution to 1080p is compiled too."""
    runtime.write_tiny(tmp_path)
    with runtime.load(tmp_path, sr="1080p", kernels="portable") as engine:
        assert (engine.is_compiled, engine.kernels, engine.vae) == (True, "portable", "fast")
        assert engine._parts is not None and engine._parts.sr_forward is not None
        clip = {"seconds": 0.2, "width": 64, "height": 64, "sr_width": 96, "sr_height": 96}
        first, again = (engine.generate("a" * 30, seed=3, **clip) for _ in range(2))
    assert (again.frames == first.frames).all()
    assert (again.audio == first.audio).all()
