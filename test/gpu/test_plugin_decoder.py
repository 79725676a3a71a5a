"""A whole decoder.plugin.onnx with the real plugins on the GPU, against decoder.onnx, which ONNX Runtime runs.

onnx's reference evaluator does everything else, so that only the plugins stand between the two. No TensorRT is involved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_case import needs_gpu, stream, torch
from plugin_case import library, plugin_of_node

from edgellm_ros.bundle import DECODER_PLUGIN

pytest.importorskip("onnx")
pytest.importorskip("transformers")
pytestmark = needs_gpu
ALLOWED = 4e-2  # of the largest logit: bf16 inside the kernels, fp16 between them


def run(name: str, attributes: dict[str, Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Run a node's plugin on device tensors; those of `outputs` are filled."""
    plugin, ins, outs = plugin_of_node(name, attributes, inputs, outputs)
    workspace = torch.full((max(1, plugin.workspace(ins, outs)),), 0xFF, dtype=torch.uint8, device="cuda")
    plugin.enqueue(ins, outs, [t.data_ptr() for t in (*inputs, *outputs)], workspace.data_ptr(), stream())
    torch.cuda.synchronize()


def to_device(values: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(values)).cuda()


def gpu_ops() -> list[Any]:
    """The three operators as the reference evaluator takes them."""
    from plugin_ops import OPS, handed_over

    def on_device(self: Any, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        name = type(self).__name__
        arrays, out = handed_over(name, attributes, inputs)
        tensors, first = [to_device(values) for values in arrays], to_device(out)
        outputs = [first, tensors[1]] if name == "EdgeLLMAttention" else [first]  # the cache is written in place
        run(name, attributes, tensors, outputs)
        return tuple(t.cpu().numpy() for t in outputs)

    return [type(op.__name__, (op,), {"_run": on_device}) for op in OPS]


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("qwen3", "int4"), ("llama_bias", "int8"), ("smollm3", "int4"), ("gemma3_scaled", "int4"), ("mistral", "fp16")],
)
def test_a_decoder_with_plugins_computes_what_the_portable_one_does(kind: str, weights: str, tmp_path: Path) -> None:
    from plugin_bundles import export_64
    from test_plugin_graph import compare

    library()  # skips where there is none
    bundle = export_64(tmp_path, kind, weights)
    compare(bundle, bundle.file(DECODER_PLUGIN), allowed=ALLOWED, ops=gpu_ops())


@pytest.mark.parametrize(("kind", "weights"), [("qwen3", "int4"), ("llama_bias", "int8")])
def test_a_prompt_whose_products_are_cublaslts_too(kind: str, weights: str, tmp_path: Path) -> None:
    from plugin_bundles import export_64
    from test_plugin_graph import compare

    library()
    bundle = export_64(tmp_path, kind, weights)
    steps = ([[0, 0], 40], [[40, 40], 1], [[41, 41], 33])  # of two sequences: 80 and 66 tokens are prompts
    compare(bundle, bundle.file(DECODER_PLUGIN), allowed=ALLOWED, ops=gpu_ops(), steps=steps, capacity=80)


@pytest.mark.parametrize(("kind", "weights"), [("qwen3", "int4"), ("mistral", "fp16")])
def test_trees_through_the_plugins_have_the_logits_of_each_path_alone(kind: str, weights: str, tmp_path: Path) -> None:
    from plugin_bundles import export_64
    from test_build_trees import paths_alone, plugin_tree_error

    library()
    bundle, *rest = paths_alone(export_64(tmp_path, kind, weights))
    assert plugin_tree_error(bundle, bundle.file(DECODER_PLUGIN), *rest, ops=gpu_ops()) < ALLOWED
