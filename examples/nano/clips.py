"""Draw the README's animations: python examples/nano/clips.py OUT.webp [--long] [--model DIR]."""

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
WOMAN = (
    "A woman with curly brown hair in a white shirt on a blue background looks into the camera and"
    " says: {}"
)
SAID = ("ba no hi me su ko la de", "ti wo gu na pe lo ki ma", "go hu di ba so we nu te", "li ma ho")
SCENE_S = 3.0
EVERY = 2  # of 25 frames a second


def main() -> None:
    """Make clips and lay them side by side, or one that goes on from scene to scene."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=NANO)
    parser.add_argument("--long", action="store_true", help="one of 12 s")
    given = parser.parse_args()
    size = sized(given.model, seconds=None, width=None, height=None)
    with runtime.load(given.model) as engine:
        if given.long:
            scenes = [runtime.Scene(WOMAN.format(words), SCENE_S) for words in SAID]
            clips = [np.concatenate([chunk.frames for chunk in engine.generate_long(scenes)])]
        else:
            clips = [
                engine.generate(prompt, seed=seed, **size).frames
                for seed, prompt in enumerate(PROMPTS)
            ]
    pictures = [Image.fromarray(np.hstack(row)) for row in zip(*clips, strict=True)][::EVERY]
    pictures[0].save(
        given.out, save_all=True, append_images=pictures[1:], duration=40 * EVERY, loop=0,
        quality=60, method=6,
    )  # fmt: skip


if __name__ == "__main__":
    main()
