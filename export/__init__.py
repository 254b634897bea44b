"""Decoders as ONNX graphs and TensorRT engines, with a manifest that `runtime` reads.

    from magihuman import export

    export.export_vae("/models/daVinci-MagiHuman", "engines", target="tensorrt")

`load(..., turbo_vae="engines", vae="tensorrt")` runs them. Importing this package imports no torch.
"""
