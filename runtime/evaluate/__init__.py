"""How good clips are.

`evaluation` makes clips of `cases` in several `precisions` and takes `measures` of them side by
side: of what is heard, by `hearing`, and of faces, by `landmarks`; others may be `plugged` in.
`clip_score` measures a clip of the nano world, `model_score` a model by many of them. `verify_runs`
compares fp8 or int8, which `simulated` computes on any device, with bf16 from the same noise.
`verify_report` has the figures and the verdict, `verify_page` shows them.
"""

from magihuman.runtime.evaluate.cases import Case, read_cases
from magihuman.runtime.evaluate.clip_score import ClipScore, Synchrony, score_file
from magihuman.runtime.evaluate.evaluation import Evaluation, Figures, evaluate
from magihuman.runtime.evaluate.hearing import Recogniser
from magihuman.runtime.evaluate.landmarks import Landmarks
from magihuman.runtime.evaluate.measures import EvaluatedClip, Measure, standard_measures
from magihuman.runtime.evaluate.model_score import ModelScore, score_model
from magihuman.runtime.evaluate.verify_page import write_page
from magihuman.runtime.evaluate.verify_report import Report, Thresholds
from magihuman.runtime.evaluate.verify_runs import VerifyOptions, verify

__all__ = [
    "Case",
    "ClipScore",
    "EvaluatedClip",
    "Evaluation",
    "Figures",
    "Landmarks",
    "Measure",
    "ModelScore",
    "Recogniser",
    "Report",
    "Synchrony",
    "Thresholds",
    "VerifyOptions",
    "evaluate",
    "read_cases",
    "score_file",
    "score_model",
    "standard_measures",
    "verify",
    "write_page",
]
