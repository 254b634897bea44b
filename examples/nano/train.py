"""Train the nano model: python examples/nano/train.py --out FOLDER, on one GPU.

Every stage goes on from the files that it finds in the folder. `--stage` and `--minutes` do one
stage for so long; without, all run in order. `--stage export` writes the model from them. README.md
beside this file has the figures to expect.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from autoencoders import sound, video
from diffusion import distill, dit
from publish import export, reopen
from training import Run
from world import scene

MINUTES = {"vae": 9.3, "sound": 9.3, "dit": 12.0, "distill": 9.0}
BATCHES = {"vae": video.BATCH, "sound": sound.BATCH, "dit": dit.BATCH, "distill": dit.BATCH}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=[*MINUTES, "export"], action="append")
    parser.add_argument("--minutes", type=float, help="of each stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="model whose weights stages go on from")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, default=scene.SIZE_PX, help="pixels, for trials")
    parser.add_argument("--stock", type=int, default=dit.STOCK, help="clips that dit draws from")
    parser.add_argument("--matching", type=float, default=0.0, help="weight of it in distill")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="layers; of vae its halves")
    given = parser.parse_args()

    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = True  # products stay exact: the voice is a sum by them
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # masks are what the other kernels are good at
    if given.start is not None:
        reopen(given.start, given.out)
    for stage in given.stage or [*MINUTES, "export"]:
        if stage == "export":
            export(given.out)
            continue
        run = Run(stage, given.out, given.minutes or MINUTES[stage], torch.device(given.device))
        batch = given.batch or BATCHES[stage]
        if stage == "vae":
            video.train(run, batch, given.size, given.compile)
        elif stage == "sound":
            sound.train(run, batch, given.compile)
        elif stage == "dit":
            dit.train(run, batch, given.size, given.compile, given.stock)
        else:
            distill.train(run, batch, given.size, given.compile, given.stock, given.matching)


if __name__ == "__main__":
    main()
