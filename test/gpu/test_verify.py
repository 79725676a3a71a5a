"""Verifying drafts: a chain's logits are single steps', a tree's those of each path alone, and a path is accepted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from draft_trees import TREES, path_to
from test_executor_contract import prompt, step

from edgellm_ros import native
from edgellm_ros.executors.cuda import CudaExecutor

OpenCuda = Callable[..., CudaExecutor]
# Every head_dim, bias, norm, window; GELU and norms on outputs.
KINDS = ("gpu_llama", "gpu_llama_bias", "gpu_mistral", "gpu_qwen2", "gpu_qwen3", "gpu_gemma3")


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    centred = expected - expected.mean(-1, keepdims=True)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(centred))


def single_steps(executor: CudaExecutor, slot: int, ids: np.ndarray, position: int) -> np.ndarray:
    # Copies: a step's array is valid until the next one.
    return np.concatenate([executor.step([step(slot, ids[i : i + 1], position + i)]).copy() for i in range(len(ids))])


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_in_exact_mode_gets_the_bits_of_single_steps(kind: str, weights: str, open_cuda: OpenCuda) -> None:
    executor = open_cuda(kind, weights)
    ids = prompt(30)
    executor.step([step(slot, ids, 0) for slot in (0, 1)])
    for count in (2, 3, 4, 7, 8, 9, 15, 16):
        draft = prompt(count)
        verified = executor.step([step(0, draft, 30, count)]).copy()
        assert np.array_equal(verified, single_steps(executor, 1, draft, 30)), count
    assert np.array_equal(executor.save_prefix(0, 46), executor.save_prefix(1, 46))


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_in_fast_mode_agrees_with_single_steps(kind: str, weights: str, open_cuda: OpenCuda) -> None:
    executor = open_cuda(kind, weights, decode_batching="fast")
    ids = prompt(30)
    executor.step([step(slot, ids, 0) for slot in (0, 1)])
    for count in (2, 3, 5, 8, 11, 16):
        draft = prompt(count)
        verified = executor.step([step(0, draft, 30, count)]).copy()
        assert relative_error(verified, single_steps(executor, 1, draft, 30)) < 0.03, count


@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_a_graph_replays_what_plain_launches_compute(batching: str, open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_qwen3", "fp16", decode_batching=batching)
    executor.step([step(0, prompt(20), 0)])
    draft, parents = prompt(5), np.array([-1, 0, 0, 1, 2], np.int32)
    chain = executor.step([step(0, draft, 20, 5)]).copy()
    tree = executor.verify_tree(0, 20, draft, parents).copy()
    executor._decoder.use_graphs(False)
    assert np.array_equal(executor.step([step(0, draft, 20, 5)]), chain)
    assert np.array_equal(executor.verify_tree(0, 20, draft, parents), tree)


def test_verifying_shares_a_step_with_decoding_and_prefill(open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_llama", "fp16")
    draft, late, token = prompt(6), prompt(20), prompt(1)
    for slot in range(3):
        executor.step([step(slot, prompt(10 + slot), 0)])
    expected = [
        executor.step([step(0, draft, 10, 6)]).copy(), executor.step([step(1, token, 11)]).copy(),
        executor.step([step(2, late, 12, 2)]).copy(),
    ]  # fmt: skip
    rows = executor.step([step(1, token, 11), step(0, draft, 10, 6), step(2, late, 12, 2)])
    assert np.array_equal(rows, np.concatenate([expected[1], expected[0], expected[2]]))


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("batching", ["exact", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trees_logits_are_those_of_each_path_alone(kind: str, batching: str, name: str, open_cuda: OpenCuda) -> None:
    parents, prefix = TREES[name], 37
    executor = open_cuda(kind, "fp16", decode_batching=batching)
    ids, draft = prompt(prefix), prompt(len(parents))
    executor.step([step(slot, ids, 0) for slot in (0, 1)])
    verified = executor.verify_tree(0, prefix, draft, np.array(parents, np.int32)).copy()
    assert verified.shape == (len(parents), executor.info.vocab_size)
    for node in range(len(parents)):
        alone = single_steps(executor, 1, draft[path_to(parents, node)], prefix)
        assert relative_error(verified[node], alone[-1]) < 0.03, node


@pytest.mark.parametrize("batching", ["exact", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_goes_on_from_an_accepted_path_as_if_it_had_been_decoded(
    kind: str, batching: str, open_cuda: OpenCuda
) -> None:
    parents, prefix = TREES["deep"], 41
    executor = open_cuda(kind, "fp16", decode_batching=batching)
    ids, draft, rest = prompt(prefix), prompt(len(parents)), prompt(8)
    for leaf in (11, 8, 5, 0):
        path = path_to(parents, leaf)
        executor.step([step(slot, ids, 0) for slot in (0, 1)])
        executor.verify_tree(0, prefix, draft, np.array(parents, np.int32))
        executor.accept_path(0, prefix, path)
        single_steps(executor, 1, draft[path], prefix)
        kept = prefix + len(path)
        plain = executor.save_prefix(1, kept).view(np.uint16).astype(np.uint32) << 16
        moved = executor.save_prefix(0, kept).view(np.uint16).astype(np.uint32) << 16
        assert relative_error(moved.view(np.float32), plain.view(np.float32)) < 0.03, leaf
        goes_on = single_steps(executor, 0, rest, kept)
        assert relative_error(goes_on, single_steps(executor, 1, rest, kept)) < 0.03, leaf


def test_a_wrong_path_would_be_seen(open_cuda: OpenCuda) -> None:
    """The tolerances above tell an accepted path from its sibling."""
    executor = open_cuda("gpu_qwen3", "fp16")
    ids, draft = prompt(3), prompt(5)
    executor.step([step(slot, ids, 0) for slot in (0, 1)])
    executor.verify_tree(0, 3, draft, np.array([-1, 0, 0, 1, 2], np.int32))
    executor.accept_path(0, 3, [0, 1, 3])
    single_steps(executor, 1, draft[[0, 2, 4]], 3)
    rest = prompt(4)
    assert relative_error(single_steps(executor, 0, rest, 6), single_steps(executor, 1, rest, 6)) > 0.2


def test_the_last_place_of_a_slot_can_be_verified(open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_llama", "fp16", max_context=64)
    executor.step([step(0, prompt(59), 0)])
    assert np.isfinite(executor.verify_tree(0, 59, prompt(5), np.array([-1, 0, 0, 1, 1], np.int32))).all()
    with pytest.raises(ValueError, match="does not fit its slot"):
        executor.verify_tree(0, 60, prompt(5), np.array([-1, 0, 0, 1, 1], np.int32))


def test_drafts_that_make_no_tree_are_refused_by_name(open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_llama", "fp16")
    executor.step([step(0, prompt(5), 0)])
    with pytest.raises(ValueError, match="node 1 has parent 2; parents come before their children"):
        executor.verify_tree(0, 5, prompt(3), np.array([-1, 2, 0], np.int32))
    with pytest.raises(ValueError, match="17 nodes exceeds max_verify_tokens 16"):
        executor.verify_tree(0, 5, prompt(17), np.arange(-1, 16, dtype=np.int32))
    with pytest.raises(ValueError, match="ascend and lie in the slot"):
        executor.accept_path(0, 5, [0, 2, 1])


@pytest.mark.alone
def test_verifying_takes_no_memory(open_cuda: OpenCuda) -> None:
    module = native.load()
    executor = open_cuda("gpu_qwen3", "int4")
    executor.step([step(0, prompt(20), 0)])

    def verify() -> None:
        for count in range(2, 17):
            executor.step([step(0, prompt(count), 20, count)])
            executor.verify_tree(0, 20, prompt(count), np.array([-1] + [0] * (count - 1), np.int32))
            executor.accept_path(0, 20, [0, count - 1])

    verify()
    before, free = module.allocation_count(), module.device_info()["free_bytes"]
    verify()
    assert module.allocation_count() == before
    assert module.device_info()["free_bytes"] == free


@pytest.mark.parametrize("count", [17, 33, 64])
def test_a_tree_of_up_to_64_nodes_is_cut_into_products(
    count: int, open_cuda: OpenCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm_ros.executors import cuda

    make = cuda._settings

    def larger(*args: object) -> object:
        settings = make(*args)
        settings.max_verify_tokens = 64
        return settings

    monkeypatch.setattr(cuda, "_settings", larger)
    executor = open_cuda("gpu_qwen3", "fp16")
    parents = [-1, *((i - 1) // 3 for i in range(1, count))]
    ids, draft = prompt(50), prompt(count)
    executor.step([step(slot, ids, 0) for slot in (0, 1)])
    verified = executor.verify_tree(0, 50, draft, np.array(parents, np.int32)).copy()
    for node in (0, 1, 7, 15, 16, 17, 31, 32, 47, 48, 63):
        if node < count:
            alone = single_steps(executor, 1, draft[path_to(parents, node)], 50)
            assert relative_error(verified[node], alone[-1]) < 0.03, node
