"""Decoders as ONNX graphs and TensorRT engines, with a manifest that `runtime` reads.

    from magihuman import export

    export.export_vae("/models/daVinci-MagiHuman", "engines", export.VaeExport(target="tensorrt"))

`load(..., turbo_vae="engines", vae="tensorrt")` runs them. Importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magihuman.export.exporting import VaeExport, export_audio, export_vae

__all__ = ["VaeExport", "export_audio", "export_vae"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.exporting"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
