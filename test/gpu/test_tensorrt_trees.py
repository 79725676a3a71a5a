"""Trees of drafts through the tensorrt executor, over the double of libnvinfer: the cuda executor's logits and tokens.

The double computes with the same kernels, and compares every mask with what its token may see: a wrong one gives NaN.
Nothing here is TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import double_driver
import numpy as np
import pytest
from double_steps import KINDS, needed, one, prompt, relative_error
from draft_trees import TREES, path_to

from edgellm_ros.bundle import Bundle
from edgellm_ros.core import SamplingParams
from edgellm_ros.errors import UnsupportedError
from edgellm_ros.executors import Executor, RunSequence, SequenceStep
from edgellm_ros.executors import tensorrt as tensorrt_module
from edgellm_ros.executors.contract import decoder_contract

pytestmark = [
    pytest.mark.usefixtures("use_the_double"),
    pytest.mark.skipif(bool(double_driver.NO_DOUBLE), reason=double_driver.NO_DOUBLE),
]
BUILD = {"trees": True, "max_verify": 16}
Open = Callable[..., Executor]
WithEngine = Callable[..., Bundle]


def parents_of(name: str) -> np.ndarray:
    return np.array(TREES[name], np.int32)


def one_by_one(executor: Executor, slot: int, ids: np.ndarray, position: int) -> np.ndarray:
    return np.concatenate([one(executor, slot, ids[i : i + 1], position + i) for i in range(len(ids))])


def greedy(executor: Any, slot: int, token: int, position: int, count: int) -> list[int]:
    """`count` tokens behind `token`, drawn on the device."""
    sampling = SamplingParams(temperature=0.0)
    executor.run.start([RunSequence(slot, position, [token], prompt(1), sampling, seed=1)])
    tokens = []
    for i in range(count + 1):
        if i < count:
            executor.run.launch()
        if i:
            tokens.append(int(executor.run.read().token_ids[0]))
    return tokens


@pytest.mark.parametrize("dialect", ["standard", "plugin"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_nodes_logits_are_the_cuda_executors_and_those_of_its_path_alone(
    kind: str, dialect: str, with_engine: WithEngine, open_one: Open
) -> None:
    bundle = with_engine(kind, build={**BUILD, "dialect": needed(dialect)})
    tensorrt, cuda = open_one("tensorrt", bundle), open_one("cuda", bundle)
    assert tensorrt.max_tree_nodes == cuda.max_tree_nodes == 16
    ids = prompt(37)
    for executor in (tensorrt, cuda):
        one(executor, 0, ids, 0)
        one(executor, 1, ids, 0)
    for name in TREES:
        parents, draft = parents_of(name), prompt(len(TREES[name]))
        got = tensorrt.verify_tree(0, 37, draft, parents).copy()
        expected = cuda.verify_tree(0, 37, draft, parents).copy()
        assert np.isfinite(got).all(), "the double found a wrong mask"
        for node in range(len(parents)):
            alone = one_by_one(cuda, 1, draft[path_to(TREES[name], node)], 37)[-1]
            assert relative_error(got[node], expected[node]) < 0.03, (name, node)
            assert relative_error(got[node], alone) < 0.03, (name, node)


@pytest.mark.parametrize("dialect", ["standard", "plugin"])
@pytest.mark.parametrize("kind", ["gpu_mistral", "gpu_qwen3"])
def test_decoding_goes_on_from_an_accepted_path_with_the_cuda_executors_tokens(
    kind: str, dialect: str, with_engine: WithEngine, open_one: Open
) -> None:
    """The prefix is computed token by token, which has the cuda executor's bits; what a tree adds is within rounding."""
    bundle = with_engine(kind, build={**BUILD, "dialect": needed(dialect)})
    tensorrt, cuda = open_one("tensorrt", bundle), open_one("cuda", bundle)
    ids, draft = prompt(30), prompt(12)
    for leaf in (11, 8, 5, 0):
        path = path_to(TREES["deep"], leaf)
        for executor in (tensorrt, cuda):
            one_by_one(executor, 2, ids, 0)
        assert np.array_equal(one(tensorrt, 2, [9], 30), one(cuda, 2, [9], 30))
        for executor in (tensorrt, cuda):
            executor.verify_tree(2, 30, draft, parents_of("deep"))
            executor.accept_path(2, 30, path)
        one_by_one(cuda, 1, ids, 0)
        one_by_one(cuda, 1, draft[path], 30)
        kept, rest = 30 + len(path), prompt(6)
        rows = [one_by_one(executor, slot, rest, kept) for executor, slot in ((tensorrt, 2), (cuda, 2), (cuda, 1))]
        assert relative_error(rows[0], rows[1]) < 0.03 and relative_error(rows[0], rows[2]) < 0.03, leaf
        tokens = greedy(tensorrt, 2, int(rest[-1]), kept + 5, 10)
        chosen = one(cuda, 2, np.array([rest[-1], *tokens[:-1]], np.int32), kept + 5, 10)
        best, drawn = chosen.max(-1), chosen[np.arange(10), tokens]
        assert (best - drawn <= 0.15 * chosen.std(-1)).all(), "each token is as likely as the cuda executor's choice"


@pytest.mark.parametrize("build", [BUILD, {"dialect": "plugin", **BUILD}, {"max_verify": 16}])
def test_drafts_are_graphs_of_a_power_of_two_that_replay_what_plain_launches_compute(
    build: dict[str, Any], with_engine: WithEngine, open_one: Open
) -> None:
    if "dialect" in build:
        needed("plugin")
    executor: Any = open_one("tensorrt", with_engine("gpu_mistral", build=build))
    ids = prompt(30)
    drafts = [(position, prompt(count)) for position in (30, 25) for count in (5, 8, 7)]

    def verify() -> list[np.ndarray]:
        one(executor, 0, ids, 0)  # again: drafts from 25 on write over its last five
        rows = [one(executor, 0, draft, position, len(draft)) for position, draft in drafts]
        if executor.max_tree_nodes:
            for position, draft in drafts:
                parents = np.array([-1, *((i - 1) // 2 for i in range(1, len(draft)))], np.int32)
                rows.append(executor.verify_tree(0, position, draft, parents).copy())
        return rows

    contexts, graphs = executor.decoder.num_contexts_and_graphs
    captured = verify()
    assert executor.decoder.num_contexts_and_graphs == (contexts + 1, graphs + 1)
    executor.decoder.use_graphs(False)
    assert all(np.array_equal(*pair) for pair in zip(captured, verify(), strict=True))


@pytest.mark.parametrize("dialect", ["standard", "plugin"])
def test_a_path_that_is_longer_than_the_window(dialect: str, with_engine: WithEngine, open_one: Open) -> None:
    bundle = with_engine("gpu_mistral", build={**BUILD, "max_verify": 32, "dialect": needed(dialect)})
    tensorrt, cuda = open_one("tensorrt", bundle), open_one("cuda", bundle)
    assert bundle.manifest.model.sliding_windows[0] == 16
    ids, draft = prompt(20), prompt(26)
    for executor in (tensorrt, cuda):
        one(executor, 0, ids, 0)
        one(executor, 1, ids, 0)
    deep = np.array([-1, *range(21), 3, 22, 23, 24], np.int32)  # a path of 22 nodes, and one that leaves it early
    got = tensorrt.verify_tree(0, 20, draft, deep).copy()
    for node in (5, 16, 17, 21, 25):
        alone = one_by_one(cuda, 1, draft[path_to(deep.tolist(), node)], 20)[-1]
        assert relative_error(got[node], alone) < 0.03, node


def test_drafts_at_the_end_of_a_slot_need_no_place_behind_it(with_engine: WithEngine, open_one: Open) -> None:
    executor = open_one("tensorrt", with_engine("gpu_qwen3", build={**BUILD, "max_context": 64}), max_context=64)
    ids, draft = prompt(59), prompt(5)
    one(executor, 0, ids, 0)
    one(executor, 1, ids, 0)
    expected = one_by_one(executor, 1, draft, 59)
    assert relative_error(one(executor, 0, draft, 59, 5), expected) < 0.03
    assert np.isfinite(executor.verify_tree(0, 59, draft, np.array([-1, 0, 0, 1, 1], np.int32))).all()
    with pytest.raises(ValueError, match="does not fit its slot"):
        executor.verify_tree(0, 60, draft, np.array([-1, 0, 0, 1, 1], np.int32))


def test_a_path_that_was_not_kept_would_be_seen(with_engine: WithEngine, open_one: Open) -> None:
    """The tolerances above tell an accepted path from its sibling."""
    bundle = with_engine("gpu_qwen3", build=BUILD)
    tensorrt, cuda = open_one("tensorrt", bundle), open_one("cuda", bundle)
    ids, draft, rest = prompt(3), prompt(5), prompt(4)
    for executor, path in ((tensorrt, [0, 1, 3]), (cuda, [0, 2, 4])):
        one(executor, 0, ids, 0)
        executor.verify_tree(0, 3, draft, np.array([-1, 0, 0, 1, 2], np.int32))
        executor.accept_path(0, 3, path)
    assert relative_error(one_by_one(tensorrt, 0, rest, 6), one_by_one(cuda, 0, rest, 6)) > 0.2


@pytest.mark.parametrize("build", [{}, {"profile": "single"}, {"dialect": "plugin"}])
@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_prompts_chains_and_steps_of_several_slots_are_as_without_trees(
    batching: str, build: dict[str, Any], with_engine: WithEngine, open_one: Open
) -> None:
    if "dialect" in build:
        needed("plugin")
    rows = []
    prompts = [prompt(20 + 9 * slot) for slot in range(3)]
    chain, tokens = prompt(6), prompt(3)
    for trees in (False, True):
        bundle = with_engine("gpu_mistral", build={**build, "max_verify": 8, "trees": trees})
        executor = open_one("tensorrt", bundle, decode_batching=batching)
        got = [one(executor, slot, ids, 0, 3) for slot, ids in enumerate(prompts)]
        got.append(one(executor, 1, chain, 29, 6))
        steps = [(0, 20), (1, 35), (2, 38)]
        items = [SequenceStep(slot, tokens[slot : slot + 1], position) for slot, position in steps]
        got.append(executor.step(items).copy())
        rows.append(np.concatenate(got))
    assert relative_error(rows[1], rows[0]) < 0.03


def test_a_tree_with_an_adapter_is_the_cuda_executors(
    gpu_model: Any, with_engine: WithEngine, open_one: Open, tmp_path: Any
) -> None:
    from adapters import ALL, write_adapter

    from edgellm_ros.toolchain.export import export_bundle

    model, checkpoint = gpu_model("gpu_llama")
    exported = export_bundle(checkpoint, tmp_path / "exported", weights="fp16", max_lora_rank=8)
    bundle = with_engine(bundle=exported, build={**BUILD, "lora": True})
    path = write_adapter(tmp_path / "adapter", model, dict.fromkeys(ALL, 8), seed=3)
    ids, draft = prompt(20), prompt(7)
    rows = []
    for name in ("tensorrt", "cuda"):
        executor = open_one(name, bundle, max_loras=1, max_lora_rank=8)
        place = executor.load_adapter(path.name, path).index
        for adapter in (0, place):
            one(executor, adapter, ids, 0, 1, adapter)
            rows.append(executor.verify_tree(adapter, 20, draft, parents_of("binary"), adapter).copy())
    assert relative_error(rows[0], rows[2]) < 0.03 and relative_error(rows[1], rows[3]) < 0.05
    assert relative_error(rows[1], rows[0]) > 0.2, "an adapter that changes nothing tests nothing"


def test_the_double_notices_a_mask_of_another_window(
    with_engine: WithEngine, open_one: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_of = tensorrt_module.engine_settings

    def narrower(module: Any, engine: Any, bundle: Bundle, config: Any) -> Any:
        settings, manifest = settings_of(module, engine, bundle, config), bundle.manifest
        contract = decoder_contract(
            manifest.model, manifest.graph, capacity=engine.options.max_context, activations="bfloat16", trees=True
        )
        settings.set_tensors(
            [(t.name, t.role, t.layer, list(t.sizes), 0, t.window // 2) for t in contract]
        )
        return settings

    bundle = with_engine("gpu_mistral", build=BUILD)
    right = open_one("tensorrt", bundle)
    monkeypatch.setattr(tensorrt_module, "engine_settings", narrower)
    wrong = open_one("tensorrt", bundle)
    for executor, finite in ((right, True), (wrong, False)):
        one(executor, 0, prompt(20), 0)
        assert np.isfinite(executor.verify_tree(0, 20, prompt(7), parents_of("binary"))).all() == finite


def test_an_engine_without_trees_says_how_to_build_one_and_verifies_chains(
    with_engine: WithEngine, open_one: Open
) -> None:
    executor = open_one("tensorrt", with_engine("gpu_qwen3"))
    assert executor.max_tree_nodes == 0
    with pytest.raises(UnsupportedError, match=r"no trees; build one that does with `edgellm build .* --trees`"):
        executor.verify_tree(0, 0, prompt(3), np.array([-1, 0, 0], np.int32))
    assert one(executor, 0, prompt(5), 0, 5).shape[0] == 5


def test_what_makes_no_tree_or_exceeds_the_engine_is_refused_by_name(with_engine: WithEngine, open_one: Open) -> None:
    executor = open_one("tensorrt", with_engine("gpu_qwen3", build={**BUILD, "max_verify": 6}))
    one(executor, 0, prompt(5), 0)
    with pytest.raises(ValueError, match="7 nodes exceeds max_verify_tokens 6"):
        executor.verify_tree(0, 5, prompt(7), np.arange(-1, 6, dtype=np.int32))
    with pytest.raises(ValueError, match="node 1 has parent 2; parents come before their children"):
        executor.verify_tree(0, 5, prompt(3), np.array([-1, 2, 0], np.int32))
    with pytest.raises(ValueError, match="ascend and lie in the slot"):
        executor.accept_path(0, 5, [0, 2, 1])


@pytest.mark.alone
def test_verifying_takes_no_memory(with_engine: WithEngine, open_one: Open) -> None:
    from edgellm_ros import native

    module = native.load()
    executor = open_one("tensorrt", with_engine("gpu_qwen3", build=BUILD))
    one(executor, 0, prompt(20), 0)

    def verify() -> None:
        for count in range(1, 17):
            executor.verify_tree(0, 20, prompt(count), np.array([-1] + [0] * (count - 1), np.int32))
            executor.accept_path(0, 20, [0, count - 1] if count > 1 else [0])

    verify()
    before, free = module.allocation_count(), module.device_info()["free_bytes"]
    verify()
    assert module.allocation_count() == before and module.device_info()["free_bytes"] == free
