"""How good clips are.

`clip_score` measures a clip of the nano world, `model_score` a model by many of them. `verify_runs`
compares fp8 or int8, which `simulated` computes on any device, with bf16 from the same noise.
`verify_report` has the figures and the verdict, `verify_page` shows them.
"""

from magihuman.runtime.evaluate.clip_score import ClipScore, Synchrony, score_file
from magihuman.runtime.evaluate.model_score import ModelScore, score_model
from magihuman.runtime.evaluate.verify_page import write_page
from magihuman.runtime.evaluate.verify_report import Report, Thresholds
from magihuman.runtime.evaluate.verify_runs import VerifyOptions, verify

__all__ = [
    "ClipScore",
    "ModelScore",
    "Report",
    "Synchrony",
    "Thresholds",
    "VerifyOptions",
    "score_file",
    "score_model",
    "verify",
    "write_page",
]
