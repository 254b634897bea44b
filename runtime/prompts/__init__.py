"""Prompts in the form that the model was trained on.

`form` has its marks and `prompt` writes and reads it, characters put apart by `spacing`. `check`
says what a text lacks, by `rules`, and what of it will not fit, by the languages of `speech`.
`script` reads prompts for the parts of a long clip. `enhance` has a text rewritten by a language
model elsewhere, through `chat`, where somebody asks for that; nothing else here sends anything.
Imports neither numpy nor torch.
"""

from magihuman.runtime.prompts.chat import Endpoint
from magihuman.runtime.prompts.check import PromptReport, TokenCount, check, guessed_lines
from magihuman.runtime.prompts.enhance import TIMEOUT_S, Enhancement, Enhancer, enhance, picture
from magihuman.runtime.prompts.form import HEADING, Line
from magihuman.runtime.prompts.prompt import Prompt
from magihuman.runtime.prompts.rules import PromptWarning
from magihuman.runtime.prompts.script import MAX_SCENE_S, Scene, read_script
from magihuman.runtime.prompts.spacing import CHARACTER, spaced
from magihuman.runtime.prompts.speech import guessed_language

__all__ = [
    "CHARACTER",
    "HEADING",
    "MAX_SCENE_S",
    "TIMEOUT_S",
    "Endpoint",
    "Enhancement",
    "Enhancer",
    "Line",
    "Prompt",
    "PromptReport",
    "PromptWarning",
    "Scene",
    "TokenCount",
    "check",
    "enhance",
    "guessed_language",
    "guessed_lines",
    "picture",
    "read_script",
    "spaced",
]
