"""Prompts in the form that the model was trained on.

`form` writes and reads them, with characters put apart by `spacing`. `check` says what a text lacks
and what of it will not fit, by the languages of `speech`. `enhance` has a text rewritten by a
language model elsewhere, through `chat`, where somebody asks for that; nothing else here sends
anything. Imports neither numpy nor torch.
"""

from magihuman.runtime.prompts.chat import Endpoint
from magihuman.runtime.prompts.check import PromptReport, TokenCount, check
from magihuman.runtime.prompts.enhance import TIMEOUT_S, Enhancement, Enhancer, enhance, picture
from magihuman.runtime.prompts.form import Line
from magihuman.runtime.prompts.prompt import Prompt
from magihuman.runtime.prompts.rules import PromptWarning
from magihuman.runtime.prompts.spacing import spaced

__all__ = [
    "TIMEOUT_S",
    "Endpoint",
    "Enhancement",
    "Enhancer",
    "Line",
    "Prompt",
    "PromptReport",
    "PromptWarning",
    "TokenCount",
    "check",
    "enhance",
    "picture",
    "spaced",
]
