"""Exported decoders: a folder of ONNX graphs or TensorRT engines with a manifest.

The export writes such folders and the runtime reads them, both by `manifest`. `tensorrt` decodes on
engines, with the interface of the plain decoder.
"""

from magihuman.runtime.exported import manifest
from magihuman.runtime.exported.manifest import (
    AUDIO_VAE,
    DTYPES,
    INPUT,
    MANIFEST_NAME,
    OUTPUT,
    TURBO_VAE,
    Builder,
    Dims,
    Exported,
    Graph,
    check_sources,
    is_exported,
    read_manifest,
)
from magihuman.runtime.exported.tensorrt import (
    FULL,
    TensorRTVAE,
    device_sm,
    flavour_for,
    library,
    load_engines,
    logger,
)

__all__ = [
    "AUDIO_VAE",
    "DTYPES",
    "FULL",
    "INPUT",
    "MANIFEST_NAME",
    "OUTPUT",
    "TURBO_VAE",
    "Builder",
    "Dims",
    "Exported",
    "Graph",
    "TensorRTVAE",
    "check_sources",
    "device_sm",
    "flavour_for",
    "is_exported",
    "library",
    "load_engines",
    "logger",
    "manifest",
    "read_manifest",
]
