"""The stages of a request that the engine has to itself."""

from __future__ import annotations

import torch

from magihuman.runtime import Request, config

CLIP = {"seconds": 0.36, "width": 32, "height": 64, "steps": 2, "seed": 7}


def test_noise_is_drawn_audio_first_and_again_by_encoding_again(engine):
    with engine.hold(Request("hi", **CLIP)) as pipeline:
        prepared = pipeline.prepare()
        encoded = pipeline.encode(prepared)
        pipeline.noise(encoded.video)
        again = pipeline.encode(prepared)
    generator = torch.Generator().manual_seed(7)
    audio = torch.randn(1, 10, config.AUDIO_CHANNELS, generator=generator)
    video = torch.randn(1, config.LATENT_CHANNELS, 3, 4, 2, generator=generator)
    for one in (encoded, again):
        assert torch.equal(one.audio, audio) and torch.equal(one.video, video)
        assert torch.equal(one.text, encoded.text)


def test_a_forward_stands_in_for_the_base_transformers(engine):
    steps, calls = [], []
    with engine.hold(Request("hi", **CLIP), steps.append) as pipeline:
        dit = pipeline.components.dit

        def forward(*inputs):
            calls.append([tensor.shape for tensor in inputs[:2]])
            return tuple(velocity / 2 for velocity in dit(*inputs))

        def latents(**options):
            return pipeline.run_base(pipeline.encode(pipeline.prepare()), **options)

        plain, ours, again = latents(), latents(forward=forward), latents(forward=dit)
        assert pipeline.components.forward is None
    assert calls == [[(3 * 2 * 1, 192), (10, 64)]] * 2
    assert all(map(torch.equal, plain, again)) and not torch.equal(plain[0], ours[0])
    assert [(p.stage, p.step, p.of) for p in steps] == 3 * [("denoise", i, 2) for i in range(3)]
