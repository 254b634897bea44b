"""The embedder of text outside of the graph, and once a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

import golden
from magihuman.graphs.rewrite import CompileError, CompileReport
from magihuman.graphs.trace import capture
from magihuman.graphs.transformer import compile as compiling
from magihuman.graphs.transformer.options import ReplayOptions
from magihuman.graphs.transformer.passes import embedded_text
from magihuman.graphs.transformer.passes.context import Context
from magihuman.graphs.transformer.replay import CompiledForward
from magihuman.runtime.model import tokens
from magihuman.runtime.model.dit import Adapter, DiT
from magihuman.runtime.pipeline import denoise

CPU = torch.device("cpu")
LAYOUT = tokens.Layout(frames=3, rows=4, columns=6, audio=9, text=7)


def rewritten(model: DiT) -> fx.GraphModule:
    context = Context(model.config, LAYOUT.counts, torch.bfloat16, CPU)
    return compiling.rewrite(model, context, CompileReport())


def test_the_graph_takes_text_embedded_and_gives_the_same_bits() -> None:
    model = golden.dit(local=False)
    module, inputs = rewritten(model), golden.inputs_of(model, LAYOUT)
    length = torch.tensor(LAYOUT.tokens - 2, dtype=torch.int32)
    expected = module(*inputs.values(), length)
    assert embedded_text.run(module) == 1
    left = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    assert not any(name.startswith(embedded_text.EMBEDDER) for name in left)
    assert "adapter.video_embedder.weight" in left
    inputs["text"] = embedded_text.embed(model, inputs["text"])
    assert inputs["text"].shape == (7, model.config.hidden_size)
    for ours, theirs in zip(module(*inputs.values(), length), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_text_that_goes_elsewhere_stays_in_the_graph(tmp_path: Path, monkeypatch) -> None:
    def twice(self: Adapter, video: Tensor, audio: Tensor, text: Tensor) -> Tensor:
        parts = self.video_embedder(video), self.audio_embedder(audio), self.text_embedder(text)
        return torch.cat(parts) + text.mean()

    monkeypatch.setattr(Adapter, "forward", twice)
    model = golden.dit(local=False)
    module = capture(model, golden.inputs_of(model, LAYOUT))
    before = str(module.graph)
    assert embedded_text.run(module) == 0 and str(module.graph) == before
    options = ReplayOptions(replays=False, budget_bytes=0, cache=tmp_path)
    forward = CompiledForward(model, model.config, torch.bfloat16, CPU, options)
    with pytest.raises(CompileError, match=r"text must go into adapter\.text_embedder"):
        forward.prepare(*LAYOUT.counts)


def test_each_prompt_of_a_request_is_embedded_once(tmp_path: Path) -> None:
    """With guidance: two prompts, whose steps take turns."""
    model = golden.dit(local=False)
    options = ReplayOptions(replays=False, budget_bytes=0, cache=tmp_path)
    forward = CompiledForward(model, model.config, torch.bfloat16, CPU, options)
    forward.prepare(*LAYOUT.counts)
    embedded: list[int] = []
    model.adapter.text_embedder.register_forward_hook(
        lambda module, inputs, output: embedded.append(len(output))
    )
    layouts = [tokens.Layout(3, 4, 6, 9, text) for text in (7, 3)]
    texts = [torch.randn(layout.text, model.config.text_channels) for layout in layouts]
    streams = torch.randn(1, 48, 3, 4, 6), torch.randn(1, 9, 64)

    def latents(stand_in: denoise.Forward) -> tuple[Tensor, Tensor]:
        pair = (
            denoise.velocity_of(model, layout, text, "v2", stand_in)
            for layout, text in zip(layouts, texts, strict=True)
        )
        with torch.inference_mode():
            return denoise.guided(*pair, *streams, steps=3)

    ours = latents(forward)
    assert embedded == [7, 3]
    every_step = latents(lambda *inputs: forward(*inputs))
    assert embedded == [7, 3] + 3 * [7, 3]
    assert all(map(torch.equal, ours, every_step))
