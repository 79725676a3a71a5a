"""The parts of a decoder that its self-test runs are models that older versions of ONNX Runtime take too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from edgellm_ros.bundle import Bundle
from edgellm_ros.toolchain.layerwise import first_logits


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_every_input_of_a_part_has_its_width(
    family: str, tiny_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a layer's input had no shape, ONNX Runtime 1.30 inferred a wrong one for heads wider than the model."""
    bundle = tiny_bundle(family, "fp32")
    parts: list[onnx.ModelProto] = []
    real = onnxruntime.InferenceSession

    def session(model: bytes, *args: Any, **kwargs: Any) -> Any:
        parts.append(onnx.load_from_string(model))
        return real(model, *args, **kwargs)

    monkeypatch.setattr("edgellm_ros.toolchain.layerwise.ort.InferenceSession", session)
    first_logits(bundle, [np.arange(8, dtype=np.int32)], [1])
    assert len(parts) > bundle.manifest.model.num_layers
    hidden = bundle.manifest.model.hidden_size
    between = [value for part in parts for value in part.graph.input if "layers." in value.name]
    assert len(between) >= bundle.manifest.model.num_layers - 1
    for value in [value for part in parts for value in part.graph.input]:
        assert value.type.tensor_type.HasField("shape"), value.name
    for value in between:
        if "past" not in value.name and len(value.type.tensor_type.shape.dim) == 3:
            assert value.type.tensor_type.shape.dim[-1].dim_value == hidden, value.name
