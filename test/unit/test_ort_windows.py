"""A sliding window is as wide as its attribute says in every version of ONNX Runtime, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from edgellm_ros.executors.ort_windows import for_this_version, narrowed, sees_one_more

HEADS, SIZE, LENGTH = 2, 16, 24


def attention(*windows: int | None) -> bytes:
    """A model of GroupQueryAttention nodes over the same inputs, one for each window."""
    names = ["q", "k", "v", "past_k", "past_v", "seqlens_k", "total"]
    width = HEADS * SIZE
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, width]) for name in names[:3]]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, HEADS, None, SIZE]) for name in names[3:5]]
    inputs += [helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1])]
    inputs += [helper.make_tensor_value_info("total", TensorProto.INT32, [])]
    nodes = [
        helper.make_node(
            "GroupQueryAttention", names, [f"out{i}", f"k{i}", f"v{i}"], domain="com.microsoft", num_heads=HEADS,
            kv_num_heads=HEADS, **({} if window is None else {"local_window_size": window}),
        )
        for i, window in enumerate(windows)
    ]  # fmt: skip
    outputs = [helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, None) for i in range(len(windows))]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
    """(tokens, heads * size) of causal attention in which a token sees `window` positions, itself among them."""
    heads = [x[0].reshape(LENGTH, HEADS, SIZE).transpose(1, 0, 2).astype(np.float64) for x in (q, k, v)]
    scores = heads[0] @ heads[1].transpose(0, 2, 1) / math.sqrt(SIZE)
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
    weights = np.exp(np.where((distance >= 0) & (distance < window), scores, -np.inf))
    mixed = weights / weights.sum(-1, keepdims=True) @ heads[2]
    return np.asarray(mixed.transpose(1, 0, 2).reshape(LENGTH, -1))


@pytest.mark.parametrize("window", [2, 7, LENGTH])
def test_a_token_sees_as_many_positions_as_the_attribute_says(window: int) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, LENGTH, HEADS * SIZE)).astype(np.float32) for _ in range(3))
    session = ort.InferenceSession(for_this_version(attention(window)), providers=["CPUExecutionProvider"])
    cache = np.zeros((1, HEADS, LENGTH, SIZE), np.float32)
    feed = {"q": q, "k": k, "v": v, "past_k": cache, "past_v": cache}
    feed |= {"seqlens_k": np.array([LENGTH - 1], np.int32), "total": np.array(LENGTH, np.int32)}
    (found,) = session.run(["out0"], feed)
    assert np.abs(found[0] - reference(q, k, v, window)).max() < 1e-5


def test_every_window_of_a_model_becomes_one_smaller_and_nothing_else_changes() -> None:
    windows = [7, None, -1, 128, 512, 129, 16384]
    graph = attention(*windows)
    changed = onnx.load_from_string(narrowed(graph))
    expected = onnx.load_from_string(attention(*(w - 1 if w is not None and w > 0 else w for w in windows)))
    assert changed == expected
    assert narrowed(attention(None)) == attention(None)


@pytest.mark.parametrize(("version", "wider"), [("1.22.0", True), ("1.23.2", True), ("1.24.1", False), ("1.32.0", False)])
def test_which_versions_see_one_more(version: str, wider: bool) -> None:
    assert sees_one_more(version) is wider
