"""Turns a decoder in fp16 into one in bf16, for models whose activations exceed 65,504: same range as fp32, 8 bits."""

from __future__ import annotations

from typing import Any

from edgellm_ros.trt_plugins import DOMAIN

_DTYPE_ATTRIBUTES = ("to", "output_dtype")  # of Cast, and of DequantizeLinear


def to_bfloat16(model: Any) -> None:
    """Change `model` (an onnx ModelProto) in place: inputs, outputs, constants and casts; stored fp16 gets a Cast.

    Scales of quantised layers are rounded to bf16, by 0.2 % at most.
    """
    import ml_dtypes
    from onnx import TensorProto, helper, numpy_helper

    half, wide = TensorProto.FLOAT16, TensorProto.BFLOAT16
    graph = model.graph
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = wide
    stored = {}
    for tensor in graph.initializer:
        if tensor.data_type != half:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            stored[tensor.name] = f"{tensor.name}.bf16"
        else:
            values = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _DTYPE_ATTRIBUTES and attribute.i == half:
                attribute.i = wide
        if node.domain == DOMAIN:
            continue  # a plugin's scales stay fp16
        for place, name in enumerate(node.input):
            node.input[place] = stored.get(name, name)
    used = {name for node in graph.node for name in node.input}
    casts = [
        helper.make_node("Cast", [old], [new], name=f"{new}/Cast", to=wide) for old, new in stored.items() if new in used
    ]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
