"""Verifying drafts: a chain's logits are single steps', a tree's those of each path alone, and a path is accepted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from draft_trees import TREES, path_to
from kernel_case import K
from test_executor_contract import prompt, step

from edgellm_ros import native
from edgellm_ros.benchmark import random_bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors import cuda
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.manifest import QuantSpec

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
    largest = 2**31 - 1
    with pytest.raises(ValueError, match="a path does not fit its slot"):
        executor.accept_path(0, largest, [1])
    with pytest.raises(ValueError, match="does not fit its slot"):
        executor.verify_tree(0, largest, prompt(3), np.array([-1, 0, 0], np.int32))


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


@pytest.fixture
def open_wide(open_cuda: OpenCuda, monkeypatch: pytest.MonkeyPatch) -> OpenCuda:
    """open_cuda with room for drafts of 64 nodes."""
    monkeypatch.setattr(cuda, "_MAX_VERIFY_TOKENS", 64)
    return open_cuda


def tree_of(count: int) -> np.ndarray:
    return np.array([-1, *((i - 1) // 3 for i in range(1, count))], np.int32)


def tree_errors(executor: CudaExecutor, counts: tuple[int, ...]) -> dict[tuple[int, int], float]:
    """Of a tree's nodes against their paths, token by token."""
    errors = {}
    ids = prompt(50)
    executor.step([step(slot, ids, 0) for slot in (0, 1)])
    for count in counts:
        parents, draft = tree_of(count), prompt(count)
        verified = executor.verify_tree(0, 50, draft, parents).copy()
        for node in (0, 1, 7, 8, 15, 16, 17, 31, 32, 47, 48, 63):
            if node < count:
                alone = single_steps(executor, 1, draft[path_to(list(parents), node)], 50)
                errors[count, node] = relative_error(verified[node], alone[-1])
    return errors


@pytest.mark.parametrize("batching", ["exact", "fast"])
@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", [*KINDS, "gpu_gemma3_64"])
def test_a_tree_of_up_to_64_nodes_has_products_or_is_cut_into_them(
    kind: str, weights: str, batching: str, open_wide: OpenCuda
) -> None:
    executor: Any = open_wide(kind, weights, decode_batching=batching)
    most = executor._decoder.most_multiplied_nodes
    # A GPU with a large L2 cache copies int4 weights for a prompt, in exact mode.
    assert most in {"fp16": (64,), "int8": (0,), "int4": (64,) if batching == "fast" else (0, 64)}[weights]
    assert executor._decoder.multiplies_head(64) == (weights == "fp16")  # the others' are int8
    errors = tree_errors(executor, (9, 16, 17, 33, 64))
    assert max(errors.values()) < 0.03, errors


@pytest.mark.parametrize("batching", ["exact", "fast"])
@pytest.mark.parametrize("weights", ["int4", "int4-fp8", "int4-head", "bf16"])  # with a head in int8, fp8, int4, bf16
def test_trees_of_a_wide_model(weights: str, batching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers as wide as an 8B model's: products of its sizes, of which cuBLASLt's may be several kernels."""
    shape = dataclasses.replace(random_bundle.SHAPES["llama-8b"], num_layers=2, vocab_size=4099, max_context=256)
    monkeypatch.setitem(random_bundle.SHAPES, "wide", shape)
    monkeypatch.setitem(random_bundle.SCHEMES, "int4-head", QuantSpec("int4", 64, "int4", "int8"))
    monkeypatch.setattr(cuda, "_MAX_VERIFY_TOKENS", 64)
    config = EngineConfig(max_slots=2, max_context=256, decode_batching=batching)
    executor: Any = CudaExecutor(random_bundle.RandomBundle("wide", weights), config)
    counts = (9, 16, 17, 32, 33, 64)
    errors = tree_errors(executor, counts)
    most, heads = executor._decoder.most_multiplied_nodes, executor._decoder.multiplies_head(64)
    executor.close()
    if batching == "fast" or weights == "bf16":
        assert most == 64
    in_int4 = weights == "int4-head" and batching == "fast" and K.has_gemm_int4_split(64, 64)
    assert heads == (weights == "bf16" or in_int4)
    # In one node of a few hundred two scores are nearly alike, and rounding decides: single steps differ there, too.
    for count in counts:
        own = [error for (nodes, _), error in errors.items() if nodes == count]
        assert np.median(own) < 0.03 and np.mean(np.array(own) < 0.05) > 0.6, errors


def test_a_larger_tree_than_a_prompts_chunk_has_the_decode_kernels(open_wide: OpenCuda) -> None:
    executor: Any = open_wide("gpu_qwen3", "fp16", prefill_chunk=32, prefill_chunk_busy=32)
    assert executor._decoder.most_multiplied_nodes == 32
    errors = tree_errors(executor, (32, 64))
    assert max(errors.values()) < 0.03, errors


@pytest.mark.parametrize("kind", ["gpu_qwen3", "gpu_gemma3"])
def test_a_drafts_products_are_what_the_decode_kernels_compute(kind: str, open_wide: OpenCuda) -> None:
    """But for the order of sums, and what is rounded to bf16 between products."""
    multiplied: Any = open_wide(kind, "fp16", decode_batching="fast")
    chunks = {"prefill_chunk": 16, "prefill_chunk_busy": 16}  # of too few tokens for products
    cut: Any = open_wide(kind, "fp16", decode_batching="fast", **chunks)
    assert (multiplied._decoder.most_multiplied_nodes, cut._decoder.most_multiplied_nodes) == (64, 0)
    ids, draft, parents = prompt(50), prompt(48), tree_of(48)
    rows = []
    for executor in (multiplied, cut):
        executor.step([step(0, ids, 0)])
        rows.append(executor.verify_tree(0, 50, draft, parents).copy())
    assert relative_error(rows[0], rows[1]) < 0.03
    assert not np.array_equal(rows[0], rows[1]), "both were computed alike"


def test_graphs_of_products_replay_what_plain_launches_compute(open_wide: OpenCuda) -> None:
    executor: Any = open_wide("gpu_qwen2", "fp16", decode_batching="fast")
    executor.step([step(0, prompt(20), 0)])
    draft, parents = prompt(30), tree_of(30)
    tree = executor.verify_tree(0, 20, draft, parents).copy()
    assert np.array_equal(executor.verify_tree(0, 20, draft, parents), tree)
    executor._decoder.use_graphs(False)
    assert np.array_equal(executor.verify_tree(0, 20, draft, parents), tree)
