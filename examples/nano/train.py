"""Train the nano model: python examples/nano/train.py --out FOLDER, on one GPU.

Every stage goes on from the files that it finds in the folder. `--stage` and `--minutes` do one
stage for so long; without, all run in order. `--stage export` writes the model from them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import sound
import video
import world
from training import Run

MINUTES = {"vae": 9.0, "sound": 5.0}
BATCHES = {"vae": video.BATCH, "sound": sound.BATCH}
TRAIN = {"vae": video.train, "sound": sound.train}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=[*TRAIN, "export"], action="append")
    parser.add_argument("--minutes", type=float, help="of each stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, default=world.SIZE_PX, help="pixels, for trials")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile each step's loss")
    given = parser.parse_args()

    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = True  # products stay exact: the voice is a sum by them
    torch.backends.cudnn.benchmark = True
    for stage in given.stage or [*TRAIN, "export"]:
        if stage == "export":
            export(given.out)
            continue
        run = Run(stage, given.out, given.minutes or MINUTES[stage], torch.device(given.device))
        compiled = torch.compile if given.compile else lambda model: model
        TRAIN[stage](run, given.batch or BATCHES[stage], given.size, compiled)


def export(out: Path) -> None:
    """Write what has been trained to OUT/model, in the published layout."""
    from training import load

    for name, part, model in (
        ("vae", video, video.VideoAutoencoder()),
        ("sound", sound, sound.SoundAutoencoder()),
    ):
        if load(out / f"{name}.pt", model):
            part.write(model, out / "model")
            print(f"wrote {name}")


if __name__ == "__main__":
    main()
