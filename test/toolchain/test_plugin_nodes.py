"""Every node of decoder.plugin.onnx as a plugin object, made and told of its arrays as on a GPU, while NumPy computes.

What test/gpu/test_plugin_decoder.py does up to the launch, where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plugin_bundles import export_64
from plugin_case import library, plugin_of_node
from plugin_ops import OPS, handed_over
from test_plugin_graph import STEPS, compare

from edgellm_ros.bundle import DECODER_PLUGIN


@pytest.mark.parametrize(
    ("kind", "weights", "products"),
    [("qwen3", "int4", 4), ("llama_bias", "int8", 4), ("smollm3", "int4", 4), ("gemma3_scaled", "int4", 4), ("mistral", "fp16", 0)],
)
def test_every_node_becomes_a_plugin_that_takes_its_arrays(kind: str, weights: str, products: int, tmp_path: Path) -> None:
    library()  # skips where there is none
    taken: list[str] = []

    def made(op: Any) -> Any:
        def checked(self: Any, *inputs: Any, **attributes: Any) -> Any:
            arrays, out = handed_over(op.__name__, attributes, inputs)
            outputs = [out, arrays[1]] if op.__name__ == "EdgeLLMAttention" else [out]
            plugin, ins, outs = plugin_of_node(op.__name__, attributes, arrays, outputs)
            assert plugin.takes([*ins, *outs], len(outs)) == [True] * len([*ins, *outs])
            taken.append(op.__name__)
            return op._run(self, *inputs, **attributes)

        return type(op.__name__, (op,), {"_run": checked})

    bundle = export_64(tmp_path, kind, weights)
    compare(bundle, bundle.file(DECODER_PLUGIN), ops=[made(op) for op in OPS])
    layers = bundle.manifest.model.num_layers
    assert taken.count("EdgeLLMAttention") == layers * len(STEPS)
    assert len(taken) >= (1 + products) * layers * len(STEPS)
