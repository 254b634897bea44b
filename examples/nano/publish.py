"""Write the trained parts as a model folder, with what `magihuman score` needs, and its card."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch

from autoencoders import sound, video
from diffusion import dit
from diffusion.stock import latents_of
from magihuman.runtime.config import LATENT_AUDIO_RATE_HZ
from magihuman.runtime.evaluate.model_score import PROMPTS, SCORE_FOLDER, SECONDS, SIZE_PX
from magihuman.runtime.files import write_json
from magihuman.runtime.weights.shipped import PROMPTS as PROMPTS_KEY
from magihuman.runtime.weights.shipped import SUITED
from training import Average, save, trained
from world import scene
from world.captions import caption, draw
from world.scene import AUDIO, LONGEST

REFERENCES, CLIPS, EXAMPLES = 4, 64, 4
CARD = Path(__file__).parent / "MODEL_CARD.md"


def export(out: Path) -> None:
    """OUT/model, in the published layout."""
    folder = out / "model"
    for name, part, model in (
        ("vae", video, video.VideoAutoencoder()),
        ("sound", sound, sound.SoundAutoencoder()),
    ):
        trained(out, name, model)
        part.write(model, folder)
    dit.write(out, folder)
    parts = [
        file for file in folder.rglob("*") if file.is_file() and file.parent.name != SCORE_FOLDER
    ]
    size = sum(file.stat().st_size for file in parts)
    write_score(folder / SCORE_FOLDER)
    rng = random.Random(0)
    examples = [caption(draw(rng), rng, "en", full=True) for _ in range(EXAMPLES)]
    suits = {"seconds": SECONDS, "width": SIZE_PX, "height": SIZE_PX}
    write_json(folder / SUITED, {**suits, PROMPTS_KEY: examples})
    shutil.copyfile(CARD, folder / "README.md")
    print(f"wrote {folder}: {size / 1e6:.2f} MB of components")


def reopen(folder: Path, out: Path) -> None:
    """The files that stages go on from, of a model that `export` wrote.

    Ends the run where any would be lost. Weights are those of the model, rounded as it has them.
    """
    kept = [path.name for path in sorted(out.glob("*.pt"))]
    if kept:
        raise SystemExit(f"--start wants an --out without *.pt, got {out} with {', '.join(kept)}")
    pictures, sounds, model = video.VideoAutoencoder(), sound.SoundAutoencoder(), dit.Model()
    video.read(pictures, folder)
    sound.read(sounds, folder)
    tokenizer = dit.read(model, folder).to_str()
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("vae", pictures), ("sound", sounds)):
        save(out / f"{name}.pt", Average(part), averaged=True, steps=0)
    facts = {"steps": 0, "tokenizer": tokenizer, "latents": latents_of(0, 0)}
    save(out / "dit.pt", Average(model), averaged=True, **facts)


def write_score(folder: Path) -> None:
    """Held-out prompts, and for the first of them the first frame and the sound."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    rng, generator = random.Random(64), torch.Generator().manual_seed(64)
    clips = [draw(rng, LONGEST, held_out=True) for _ in range(CLIPS)]
    lines = [caption(clip, rng, "en", full=True) for clip in clips]
    (folder / PROMPTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = scene.make(REFERENCES, AUDIO, rng, generator, clips=clips[:REFERENCES], shown=(0, 1))
    for i in range(REFERENCES):
        pixels = (data.frames[i, :, 0] * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png", optimize=True)
        wave = data.sound.wave[i, : int(SECONDS * LATENT_AUDIO_RATE_HZ)]
        samples = (wave.clamp(-1, 1) * 32767).short()
        _write_flac(folder / f"{i}.flac", samples[None])


def _write_flac(path: Path, samples: torch.Tensor) -> None:
    """samples: int16 [1, n] at 51.2 kHz."""
    import av

    with av.open(str(path), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=LATENT_AUDIO_RATE_HZ, layout="mono")
        for start in range(0, samples.shape[1], 4096):
            block = samples[:, start : start + 4096].contiguous().numpy()
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate, frame.pts = LATENT_AUDIO_RATE_HZ, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
