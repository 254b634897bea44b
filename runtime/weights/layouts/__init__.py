"""Files of a transformer in the layouts that people have, beside the published one.

`places` finds the files, `diffusers` reads the sizes that lie beside some, `scaled` takes fp8
weights with their scales, and `recognise` says what a file seems to be that is none of these.
"""

from magihuman.runtime.weights.layouts.diffusers import CONFIG_NAME, is_config, read_config
from magihuman.runtime.weights.layouts.places import (
    INDEX_NAME,
    SINGLE_NAME,
    Layout,
    beside,
    find,
    in_model,
    nested,
    parts_of,
    pipeline_patterns,
    scan,
    weight_files,
)
from magihuman.runtime.weights.layouts.recognise import refuse_foreign
from magihuman.runtime.weights.layouts.scaled import SCALE, Scaled, fp8_linears, split

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "SCALE",
    "SINGLE_NAME",
    "Layout",
    "Scaled",
    "beside",
    "find",
    "fp8_linears",
    "in_model",
    "is_config",
    "nested",
    "parts_of",
    "pipeline_patterns",
    "read_config",
    "refuse_foreign",
    "scan",
    "split",
    "weight_files",
]
