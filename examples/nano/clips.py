"""Draw the README's animation: python examples/nano/clips.py OUT.webp [--model DIR]."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from magihuman import runtime
from magihuman.runtime.config import NANO
from magihuman.runtime.weights import sized

PROMPTS = (
    "A woman with long black hair in a yellow shirt on a pink background looks into the camera and"
    " says: ho ba hu bu ge de pi bi pi ke gu",
    "A man with curly red hair in a green shirt on a pink background looks into the camera, smiles"
    " and says: mi hi ti pu to",
    "A child in a blue shirt with curly blue hair on a purple background looks into the camera and"
    " says: mu ga go gu",
)
EVERY = 2  # of 25 frames a second


def main() -> None:
    """Make the clips and lay them side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=NANO)
    given = parser.parse_args()
    size = sized(given.model, seconds=None, width=None, height=None)
    with runtime.load(given.model) as engine:
        clips = [
            engine.generate(prompt, seed=seed, **size).frames for seed, prompt in enumerate(PROMPTS)
        ]
    pictures = [Image.fromarray(np.hstack(row)) for row in zip(*clips, strict=True)][::EVERY]
    pictures[0].save(
        given.out, save_all=True, append_images=pictures[1:], duration=40 * EVERY, loop=0,
        quality=60, method=6,
    )  # fmt: skip


if __name__ == "__main__":
    main()
