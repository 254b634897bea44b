"""The explanation counts what the graphs hold."""

from __future__ import annotations

import torch

from magihuman.graphs.explain import OUTSIDE, explain, layer_kinds, to_html
from magihuman.runtime.config import DiTConfig
from magihuman.runtime.model.dit import DiT

COUNTS = (3840, 126, 320)


def test_kinds_of_the_published_layers() -> None:
    kinds = [(kind.modality, kind.gelu, kind.layers) for kind in layer_kinds(DiTConfig())]
    assert kinds == [(True, True, 1), (True, True, 3), (False, False, 32), (True, False, 4)]


def test_the_published_model() -> None:
    found = explain(lambda config: DiT(config), DiTConfig(), COUNTS, torch.bfloat16)
    calls: dict[str, int] = {}
    for row in found.after:
        calls[row.operation] = calls.get(row.operation, 0) + row.calls
    assert calls["magihuman.norm"] == calls["magihuman.linear_add_"] == 80
    assert calls["magihuman.qk_norm_rope"] == calls["magihuman.gated_attention"] == 40
    assert calls["magihuman.linear"] == calls["magihuman.linear_activation"] == 40
    inside = [row for row in found.after if row.layers != OUTSIDE]
    fused = [row for row in inside if row.operation.startswith("magihuman.")]
    assert sum(row.launches for row in fused) == 8 * 40
    # The rows of text, which the kernel passes over, count as read.
    tokens, channels, normed = sum(COUNTS), DiTConfig().hidden_size, sum(COUNTS[:2])
    (norm,) = (row for row in found.after if row.operation == "magihuman.head_norm")
    assert (norm.layers, norm.calls, norm.launches) == (OUTSIDE, 1, 1)
    assert abs(norm.gigabytes - 4 * channels * (tokens + 2 + normed) / 1e9) < 1e-6
    totals = found.totals()
    assert totals["after"]["launches"] < totals["before"]["launches"] / 5
    assert totals["after"]["gigabytes"] < totals["before"]["gigabytes"]

    # Bytes of one operation, by hand: the up projection of 32 shared layers with its swiglu7.
    rows = [row for row in found.after if row.operation == "magihuman.linear_activation"]
    expected = 32 * 2 * (tokens * 5120 + 27304 * 5120 + tokens * 13696)
    shared = next(row for row in rows if row.layers.startswith("32 x shared"))
    assert abs(shared.gigabytes - expected / 1e9) < 1e-6
    assert {row.layers for row in found.after} >= {OUTSIDE}


def test_the_page_holds_every_row() -> None:
    small = DiTConfig(
        num_layers=2, hidden_size=128, head_dim=32, kv_heads=2, text_channels=64,
        modality_layers=(0,), gelu7_layers=(0,),
    )  # fmt: skip
    found = explain(lambda config: DiT(config), small, (12, 5, 4), torch.bfloat16)
    page = to_html(found)
    assert page.count("<tr><td>") == len(found.before) + len(found.after)
    assert "12 video, 5 audio and 4 text tokens" in page
