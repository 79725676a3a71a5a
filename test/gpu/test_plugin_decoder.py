"""A whole decoder.plugin.onnx with the real plugins on the GPU, against decoder.onnx, which ONNX Runtime runs.

onnx's reference evaluator does everything else, so that only the plugins stand between the two. No TensorRT is involved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_case import needs_gpu, stream, torch
from plugin_case import FLOAT, HALF, INT8, INT64, Plugin, Tensor, library

from edgellm_ros.bundle import DECODER_PLUGIN

pytest.importorskip("onnx")
pytest.importorskip("transformers")
pytestmark = needs_gpu
_KINDS = {"float32": FLOAT, "float16": HALF, "int8": INT8, "int64": INT64}


def call(name: str, attributes: dict[str, Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Run a plugin on device tensors; those of `outputs` are filled."""
    settings = {key: value for key, value in attributes.items() if not key.startswith("plugin_")}
    plugin = Plugin(name, settings)

    def describe(tensor: Any) -> Tensor:
        return Tensor(tuple(tensor.shape), _KINDS[str(tensor.dtype).removeprefix("torch.")])

    ins, outs = [describe(t) for t in inputs], [describe(t) for t in outputs]
    assert [t[:2] for t in plugin.outputs(ins)] == [t[:2] for t in outs]
    plugin.shape_change(ins, outs)
    workspace = torch.full((max(1, plugin.workspace(ins, outs)),), 0xFF, dtype=torch.uint8, device="cuda")
    plugin.enqueue(ins, outs, [t.data_ptr() for t in (*inputs, *outputs)], workspace.data_ptr(), stream())
    torch.cuda.synchronize()


def to_device(values: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(values)).cuda()


def gpu_ops() -> list[Any]:
    """The three operators as the reference evaluator takes them."""
    from onnx.reference.op_run import OpRun

    from edgellm_ros.toolchain.build.packing import pack_int4, pack_scales

    class EdgeLLMAttention(OpRun):
        op_domain = "edgellm"

        def _run(self, *inputs: Any, **attributes: Any) -> tuple[Any, Any]:
            tensors = [to_device(value) for value in inputs]
            batch, tokens, _ = tensors[0].shape
            width = attributes["num_heads"] * attributes["head_dim"]
            out = torch.full((batch, tokens, width), float("nan"), dtype=tensors[0].dtype, device="cuda")
            call("EdgeLLMAttention", attributes, tensors, [out, tensors[1]])
            return out.cpu().numpy(), tensors[1].cpu().numpy()

    class EdgeLLMInt8Gemm(OpRun):
        op_domain = "edgellm"

        def _run(self, *inputs: Any, **attributes: Any) -> tuple[Any]:
            x, weight, scales, *bias = inputs
            name = type(self).__name__
            if name == "EdgeLLMInt4Gemm":
                weight, scales = pack_int4(weight.view(np.uint8)).view(np.int8), pack_scales(scales, attributes["group"])
            tensors = [to_device(value) for value in (x, weight, scales, *bias)]
            dtype = torch.float32 if attributes["float_output"] else tensors[0].dtype
            out = torch.full((*x.shape[:-1], attributes["rows"]), float("nan"), dtype=dtype, device="cuda")
            call(name, attributes, tensors, [out])
            return (out.cpu().numpy(),)

    class EdgeLLMInt4Gemm(EdgeLLMInt8Gemm):
        pass

    return [EdgeLLMAttention, EdgeLLMInt8Gemm, EdgeLLMInt4Gemm]


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("qwen3", "int4"), ("llama_bias", "int8"), ("smollm3", "int4"), ("gemma3_scaled", "int4"), ("mistral", "fp16")],
)
def test_a_decoder_with_plugins_computes_what_the_portable_one_does(kind: str, weights: str, tmp_path: Path) -> None:
    from plugin_bundles import export_64
    from test_plugin_graph import compare

    library()  # skips where there is none
    bundle = export_64(tmp_path, kind, weights)
    # Of the largest logit: bf16 inside the kernels, fp16 between them.
    compare(bundle, bundle.file(DECODER_PLUGIN), allowed=4e-2, ops=gpu_ops())
