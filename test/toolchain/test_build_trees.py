"""Decoders of `edgellm build --trees`: each node's logits are those of its path alone, which decoder.onnx gives in ONNX
Runtime; engines of them are built by the real TensorRT-RTX, and never executed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from plugin_ops import OPS
from portable_session import portable_session
from test_plugin_graph import plugin_graph

from edgellm_ros.bundle import DECODER, WEIGHTS, Bundle
from edgellm_ros.config import BuildOptions
from edgellm_ros.errors import ToolchainError
from edgellm_ros.executors.contract import MASK, TREE_MASKS, mask_windows
from edgellm_ros.toolchain.build.targets import load_graph
from edgellm_ros.toolchain.build.trees import take_trees

CAPACITY, PREFIX = 48, 29  # past the windows of 16
PARENTS = [-1, 0, 0, 1, 1, -1, 3, 5]
DEPTHS = [0, 1, 1, 2, 2, 0, 3, 1]
PATHS = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [5], [0, 1, 3, 6], [5, 7]]
OPTIONS = BuildOptions(max_input=32, max_context=CAPACITY, trees=True)
TinyBundle = Callable[..., Bundle]


def run(session: Any, bundle: Bundle, embeds: np.ndarray, positions: Any, write: int, caches: dict[str, Any],
        extra: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:  # fmt: skip
    """Logits of every token, and the caches as the next step reads them."""
    names = bundle.manifest.graph
    feed = {
        names.embeds: embeds[None], names.positions: np.asarray(positions)[None], names.write_indices: np.array([write]),
        names.logit_indices: np.arange(len(embeds)), **caches, **extra,
    }  # fmt: skip
    ours = isinstance(session, ReferenceEvaluator)
    outputs = list(session.output_names) if ours else [o.name for o in session.get_outputs()]
    got = dict(zip(outputs, session.run(outputs, feed), strict=True))
    return got[names.logits], {name.replace("present", "past"): value for name, value in got.items() if name != names.logits}


def masks(bundle: Bundle, positions: np.ndarray, write: int, sees: np.ndarray) -> dict[str, Any]:
    """As the contract has them: of `sees` (new, new), which new token sees which, and all before `write`."""
    found = {}
    place = np.arange(CAPACITY)
    at = np.where(place < write, place, CAPACITY)  # position of what is in each place
    at[write : write + len(positions)] = positions
    for window in mask_windows(bundle.manifest.model):
        seen = np.zeros((len(positions), CAPACITY), bool)
        seen[:, :write] = True
        seen[:, write : write + len(positions)] = sees
        if window:
            seen &= at[None] > positions[:, None] - window
        found[MASK.format(window=window)] = np.where(seen, 0, -65504).astype(bundle.manifest.graph.activation_dtype)[None, None]
    return found


def sees_itself_and_ancestors() -> np.ndarray:
    sees = np.zeros((len(PATHS), len(PATHS)), bool)
    for node, path in enumerate(PATHS):
        sees[node, path] = True
    return sees


def empty(bundle: Bundle, together: bool = False) -> dict[str, Any]:
    model, names = bundle.manifest.model, bundle.manifest.graph
    shape = (model.num_kv_heads, CAPACITY, model.head_dim)
    kinds = {names.past_kv: (1, 2, *shape)} if together else {name: (1, *shape) for name in (names.past_key, names.past_value)}
    return {
        name.format(layer=layer): np.zeros(size, names.activation_dtype)
        for layer in range(model.num_layers) for name, size in kinds.items()
    }  # fmt: skip


@pytest.fixture
def of_paths(tiny_bundle: TinyBundle) -> Callable[[str], tuple[Bundle, np.ndarray, np.ndarray, np.ndarray]]:
    """A bundle, a prefix, draft embeddings, and each node's logits on its path alone, from decoder.onnx as it is."""

    return lambda kind: paths_alone(tiny_bundle(kind, "fp32"))


def paths_alone(bundle: Bundle) -> tuple[Bundle, np.ndarray, np.ndarray, np.ndarray]:
    """As of_paths gives it."""
    rng, dtype = np.random.default_rng(5), bundle.manifest.graph.activation_dtype
    prefix, draft = (rng.normal(0, 1, (n, bundle.manifest.model.hidden_size)).astype(dtype) for n in (PREFIX, 8))
    session = portable_session(bundle.file(DECODER))
    expected = []
    for path in PATHS:
        tokens = np.concatenate([prefix, draft[path]])
        expected.append(run(session, bundle, tokens, np.arange(len(tokens)), 0, empty(bundle), {})[0][-1])
    return bundle, prefix, draft, np.stack(expected)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", ["llama", "mistral", "smollm3_window", "gemma3"])
def test_a_nodes_logits_are_those_of_its_path_alone(kind: str, of_paths: Any, tmp_path: Path) -> None:
    bundle, prefix, draft, expected = of_paths(kind)
    graph = load_graph(bundle, DECODER, CAPACITY)
    take_trees(graph, bundle.manifest, OPTIONS)
    shutil.copy(bundle.file(WEIGHTS), tmp_path / WEIGHTS)
    onnx.save(graph, tmp_path / DECODER)
    onnx.checker.check_model(str(tmp_path / DECODER), full_check=True)
    session = portable_session(tmp_path / DECODER)
    at = np.arange(PREFIX)
    _, caches = run(session, bundle, prefix, at, 0, empty(bundle), masks(bundle, at, 0, np.tri(PREFIX, dtype=bool)))
    at = PREFIX + np.array(DEPTHS)
    got, _ = run(session, bundle, draft, at, PREFIX, caches, masks(bundle, at, PREFIX, sees_itself_and_ancestors()))
    assert error(got, expected) < 2e-5
    chain, _ = run(session, bundle, draft, at, PREFIX, caches, masks(bundle, at, PREFIX, np.tri(8, dtype=bool)))
    assert error(chain, expected) > 0.01, "a mask that changes nothing tests nothing"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_the_plugins_graph_takes_trees_as_bits(kind: str, of_paths: Any, tmp_path: Path) -> None:
    bundle, *rest = of_paths(kind)
    assert plugin_tree_error(bundle, plugin_graph(bundle, tmp_path), *rest) < 2e-5


def plugin_tree_error(
    bundle: Bundle, path: Path, prefix: np.ndarray, draft: np.ndarray, expected: np.ndarray, ops: Any = OPS
) -> float:
    """Of the nodes' logits by the plugin graph at `path`, which is changed to take trees."""
    graph = onnx.load(path, load_external_data=False)
    take_trees(graph, bundle.manifest, replace(OPTIONS, dialect="plugin"))
    onnx.save(graph, path)
    session = ReferenceEvaluator(str(path), new_ops=ops)
    assert session.input_names[-1] == TREE_MASKS

    def bits(sees: np.ndarray) -> dict[str, Any]:
        return {TREE_MASKS: (sees * (1 << np.arange(sees.shape[1]))).sum(1)[None]}

    _, caches = run(session, bundle, prefix, np.arange(PREFIX), 0, empty(bundle, True), bits(np.tri(PREFIX, dtype=bool)))
    got, _ = run(session, bundle, draft, PREFIX + np.array(DEPTHS), PREFIX, caches, bits(sees_itself_and_ancestors()))
    return error(got, expected)


def test_a_decoder_without_the_masks_is_refused_by_name(tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle("mistral", "fp32")
    graph = load_graph(bundle, DECODER, CAPACITY)
    for node in graph.graph.node:
        node.output[:] = [name.replace("mask.16", "other") for name in node.output]
    with pytest.raises(ToolchainError, match=r"makes no mask\.16; export the model again"):
        take_trees(graph, bundle.manifest, OPTIONS)
    with pytest.raises(ToolchainError, match="no EdgeLLMAttention; export the model again with --dialect plugin"):
        take_trees(graph, bundle.manifest, replace(OPTIONS, dialect="plugin"))


@pytest.mark.parametrize(("kind", "target"), [("gemma3_scaled", "sm89"), ("llama", "sm120")])
def test_engines_have_fused_attention_under_the_masks(
    kind: str, target: str, tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (it exists for x86-64 only)")
    from edgellm_ros.toolchain.build.builder import build_engine
    from edgellm_ros.toolchain.build.kernels import fused_attentions

    bundle = Bundle.open(shutil.copytree(tiny_bundle(kind, "int4").path, tmp_path / "bundle"))
    split = kind == "llama"
    engine, _ = build_engine(bundle, target, replace(OPTIONS, max_context=64, profile="split" if split else "single"))
    layers, kinds = bundle.manifest.model.num_layers, engine.report["network"]["kinds"]
    assert (kinds["KV_CACHE_UPDATE"], kinds["ATTENTION_OUTPUT"]) == (2 * layers, layers)
    assert fused_attentions(engine.report["kernels"]) == layers * (2 if split else 1)
    assert "-trees" in engine.key
    for window in mask_windows(bundle.manifest.model):
        longest = [profile[MASK.format(window=window)][2] for profile in engine.profiles]
        assert longest == ([(1, 1, 8, 64), (1, 1, 32, 64)] if split else [(1, 1, 32, 64)])
