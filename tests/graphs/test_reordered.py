"""No pass knows where in a schema an argument stands: all give the same with other schemas.

Those have the arguments in reverse, and one more with a default among them. Passes ask for
`torch.ops.magihuman` when they are imported, hence the process of its own, which runs this file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "reordered"


def test_passes_do_not_depend_on_the_order_of_arguments() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def reorder() -> None:
    """Let `torch.ops.magihuman` be operators of the same names with other schemas."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        if namespace == "magihuman":
            original = getattr(torch.ops.magihuman, name).default
            library.define(schema_of(original, name))
            kernel = by_name(original, f"added_to_{name}")
            library.impl(name, kernel, "CompositeExplicitAutograd")
    LIBRARIES.append(library)
    torch.ops.magihuman = getattr(torch.ops, NAMESPACE)


LIBRARIES: list[torch.library.Library] = []  # whose operators go with them


def schema_of(original: Any, name: str) -> str:
    """`(a, b, c=1) -> d` becomes `(b, a, added=7, c=1) -> d`: what has a default must be last."""
    text = str(original._schema).partition("(")[2]
    given, _, returned = text.partition(") -> ")
    parts = given.split(", ")
    needed = [part for part in parts if "=" not in part]
    chosen = [part for part in parts if "=" in part]
    return f"{name}({', '.join([*needed[::-1], f'int added_to_{name}=7', *chosen])}) -> {returned}"


def by_name(original: Any, added: str) -> Callable[..., Any]:
    names = [argument.name for argument in original._schema.arguments]
    needed = [a.name for a in original._schema.arguments if not a.has_default_value()]
    order = [*needed[::-1], added, *names[len(needed) :]]

    def kernel(*values: Any) -> Any:
        given = dict(zip(order, values, strict=False))
        assert given.pop(added, 7) == 7
        return original(**given)

    return kernel


def main() -> None:
    from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
    from magihuman.kernels.decoder import ops as decoder_ops  # noqa: F401 - registers others
    from magihuman.kernels.parallel import exchange  # noqa: F401 - registers others

    torch.manual_seed(0)
    plain = outputs()
    for name in [name for name in sys.modules if name.startswith("magihuman.graphs")]:
        del sys.modules[name]
    reorder()
    reordered = outputs()
    assert plain.keys() == reordered.keys()
    for key, ours in reordered.items():
        for one, other in zip(ours, plain[key], strict=True):
            assert torch.equal(one, other), key


def outputs() -> dict[str, tuple[Tensor, ...]]:
    """What rewritten graphs give, by what was asked for."""
    import golden
    from magihuman.graphs import quantization
    from magihuman.graphs.decoder.compile import compile_decoder
    from magihuman.graphs.decoder.passes.trim import trim
    from magihuman.graphs.transformer import CompileOptions, Context
    from magihuman.graphs.transformer import compile as compiling
    from magihuman.kernels import reference as ref
    from magihuman.runtime.config import TurboVAEConfig
    from magihuman.runtime.model.tokens import Layout
    from magihuman.runtime.model.turbo_vae import TurboVAE

    layout = Layout(frames=3, rows=4, columns=6, audio=9, text=7)
    length = torch.tensor(layout.tokens - 2, dtype=torch.int32)
    results = {}
    for keep in ("all", "none", "*.up_gate_proj"):
        model = golden.dit(local=True)
        torch.manual_seed(0)
        inputs = golden.inputs_of(model, layout)
        if keep != "all":
            keep_bf16 = keep if keep == "none" else [keep]
            names = quantization.quantized_linears(model.config, keep_bf16)
            quantization.quantize_model(model, names)
        compiling.pad_weights(model, model.config)
        with tempfile.TemporaryDirectory() as cache:
            context = Context(
                model.config,
                layout.counts,
                torch.bfloat16,
                torch.device("cpu"),
                local=ref.LocalAttention(layout.frames, layout.frame_tokens, 1),
            )
            options = CompileOptions(cache=Path(cache), fp8_attention=keep == "none")
            module, _ = compiling.compile_forward(model, context, options)
        assert {NAMESPACE, "magihuman"} & namespaces_of(module) == {torch.ops.magihuman.name}
        results[keep] = module(*inputs.values(), length)
    values = golden.META["turbo_vae"]["config"]
    values = {**values, "spatial_compression_ratio": 16, "temporal_compression_ratio": 4}
    torch.manual_seed(0)
    vae = TurboVAE(TurboVAEConfig.from_dict(values, "golden")).eval()
    decoder, _ = compile_decoder(vae.decoder, vae.config, False, torch.float32)
    assert {NAMESPACE, "magihuman"} & namespaces_of(decoder) == {torch.ops.magihuman.name}
    latents = torch.randn(1, 48, 7, 2, 3).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        results["decoder"] = (decoder(latents)[0], trim(decoder, 7, 4, 16)(latents)[0])
    return results


def namespaces_of(module: torch.fx.GraphModule) -> set[str]:
    return {str(node.target).partition(".")[0] for node in module.graph.nodes}


if __name__ == "__main__":
    main()
