"""The tensorrt executor over the double of libnvinfer keeps the executors' contract, and its runs draw what the host does.

Nothing here is TensorRT. What the double computes with its kernels does not depend on the batch, so bits are compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import double_driver
import numpy as np
import pytest
from double_plan import write_double_engine
from draws import agrees
from test_executor_contract import (
    CAPACITY,
    prompt,
    step,
    test_a_copied_and_a_restored_prefix_continue_like_the_original,
    test_a_sequence_in_a_batch_gets_the_bits_it_gets_alone,
    test_a_slot_can_be_filled_to_its_last_position,
    test_decoding_allocates_no_arrays,
    test_prefill_and_decode_share_a_step,
)

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.executors import RunSequence
from edgellm_ros.executors.tensorrt import TensorRTExecutor
from edgellm_ros.runtime.sampling import Sampler

__all__ = [
    "test_a_copied_and_a_restored_prefix_continue_like_the_original",
    "test_a_sequence_in_a_batch_gets_the_bits_it_gets_alone",
    "test_a_slot_can_be_filled_to_its_last_position",
    "test_decoding_allocates_no_arrays",
    "test_prefill_and_decode_share_a_step",
]
pytestmark = [
    pytest.mark.usefixtures("use_the_double"),
    pytest.mark.skipif(bool(double_driver.NO_DOUBLE), reason=double_driver.NO_DOUBLE),
]
Open = Callable[..., TensorRTExecutor]
VOCAB = 320


def make(source: Bundle, path: Path, build: dict[str, Any], **config: Any) -> TensorRTExecutor:
    bundle = Bundle.open(shutil.copytree(source.path, path))
    major, minor = native.load().device_info()["compute_capability"]
    options = BuildOptions(**{"max_batch": 4, "max_input": 32, "max_context": CAPACITY, "activations": "bf16", **build})
    write_double_engine(bundle, options, f"sm{major}{minor}")
    return TensorRTExecutor(bundle, EngineConfig(**{"max_slots": 4, **config}))


@pytest.fixture
def open_trt(gpu_bundle: Callable[..., Bundle], tmp_path: Path) -> Iterator[Open]:
    opened: list[TensorRTExecutor] = []

    def get(bundle: Bundle | None = None, build: dict[str, Any] | None = None, **config: Any) -> TensorRTExecutor:
        source = bundle or gpu_bundle("gpu_qwen3", "fp16")
        opened.append(make(source, tmp_path / f"trt{len(opened)}", build or {}, **config))
        return opened[-1]

    yield get
    for executor in opened:
        executor.close()


@pytest.fixture(params=["int4", "fp16"])
def executor(request: pytest.FixtureRequest, gpu_bundle: Callable[..., Bundle], open_trt: Open) -> TensorRTExecutor:
    """For the tests of the contract."""
    return open_trt(gpu_bundle("gpu_qwen3", request.param))


def run_tokens(executor: TensorRTExecutor, sequences: Sequence[RunSequence], count: int) -> list[list[int]]:
    """`count` tokens of each, the host one step behind."""
    assert executor.run is not None
    executor.run.start(sequences)
    steps = []
    for i in range(count + 1):
        if i < count:
            executor.run.launch()
        if i:
            steps.append(list(executor.run.read().token_ids))
    return [list(tokens) for tokens in zip(*steps, strict=True)]


def check_draws(executor: TensorRTExecutor, sequence: RunSequence, ids: np.ndarray, tokens: list[int]) -> None:
    """Every token lies where the host's draw falls, from logits of the same steps one by one."""
    sampler: Any = Sampler(sequence.sampling, VOCAB, ids.tolist())
    fed = [sequence.answer_ids[-1], *tokens]
    for i, token in enumerate(tokens):
        logits = executor.step([step(sequence.slot, [fed[i]], sequence.position + i)])[0].copy()
        assert agrees(sampler, 1 + i, logits, token), (sequence.slot, i)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("slots", [(0,), (3,), (0, 1, 2, 3), (2, 0), (3, 1, 0)])
@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_a_run_draws_what_the_host_draws_from_a_steps_logits(
    batching: str, slots: tuple[int, ...], params: dict[str, Any], open_trt: Open
) -> None:
    executor = open_trt(decode_batching=batching)
    prompts = {slot: prompt(5 + 9 * slot) for slot in slots}
    sequences = []
    for slot, ids in prompts.items():
        executor.step([step(slot, ids, 0)])
        sequences.append(RunSequence(slot, len(ids), [9 + slot], ids, SamplingParams(**params), seed=3))
    answers = run_tokens(executor, sequences, 12)
    for sequence, tokens in zip(sequences, answers, strict=True):
        check_draws(executor, sequence, prompts[sequence.slot], tokens)


def test_slots_that_idle_between_others_keep_what_they_hold(open_trt: Open) -> None:
    executor = open_trt(decode_batching="fast")
    capacity = executor.info.capacity
    assert capacity == CAPACITY - 1
    full = prompt(capacity)
    executor.step([step(1, full, 0)])
    expected = executor.step([step(1, full[-1:], capacity - 1)])[0].copy()
    sequences = []
    for slot in (0, 2):
        ids = prompt(10)
        executor.step([step(slot, ids, 0)])
        sequences.append(RunSequence(slot, 10, [7], ids, SamplingParams(temperature=0.0), seed=1))
    run_tokens(executor, sequences, 20)
    assert np.array_equal(executor.step([step(1, full[-1:], capacity - 1)])[0], expected)


@pytest.mark.parametrize("build", [{"profile": "single"}, {"max_batch": 1}, {"max_verify": 2, "max_input": 5}])
def test_other_profiles_change_no_logits_but_by_rounding(build: dict[str, Any], open_trt: Open) -> None:
    ids = prompt(50)
    rows = []
    for options in ({}, build):
        executor = open_trt(build=options)
        rows.append(np.concatenate([executor.step([step(2, ids, 0, 20)]), executor.step([step(2, prompt(1) * 0 + 7, 50)])]))
    assert np.linalg.norm(rows[0] - rows[1]) < 0.03 * np.linalg.norm(rows[0])


def test_adapters_come_and_go_without_touching_others(
    gpu_model: Any, open_trt: Open, tmp_path: Path
) -> None:
    from adapters import ALL, write_adapter

    from edgellm_ros.toolchain.export import export_bundle

    model, checkpoint = gpu_model("gpu_llama")
    bundle = export_bundle(checkpoint, tmp_path / "exported", weights="fp16", max_lora_rank=8)
    executor = open_trt(bundle, {"lora": True}, max_loras=2, max_lora_rank=8)
    ids = prompt(12)

    def logits(adapter: int, slot: int = 0) -> np.ndarray:
        executor.step([replace(step(slot, ids, 0), adapter=adapter)])
        return executor.step([replace(step(slot, [5], 12), adapter=adapter)])[0].copy()

    plain = logits(0)
    first = executor.load_adapter("first", write_adapter(tmp_path / "a", model, dict.fromkeys(ALL, 8), seed=3)).index
    with_first = logits(first)
    assert np.array_equal(logits(0), plain) and not np.allclose(with_first, plain, atol=1e-3)
    second = executor.load_adapter("second", write_adapter(tmp_path / "b", model, {"q_proj": 4}, seed=4)).index
    with_second = logits(second, 1)
    assert np.array_equal(logits(first), with_first)
    executor.unload_adapter("first")
    again = executor.load_adapter("third", write_adapter(tmp_path / "c", model, {"down_proj": 2}, seed=5)).index
    assert again == first and not np.allclose(logits(again), with_first, atol=1e-3)
    assert np.array_equal(logits(second, 1), with_second) and np.array_equal(logits(0), plain)


@pytest.mark.alone
def test_decoding_slots_that_were_seen_before_takes_no_memory(open_trt: Open) -> None:
    module = native.load()
    executor = open_trt()

    def generate() -> None:
        for slots in ((0,), (1,), (0, 1, 2)):
            sequences = []
            for slot in slots:
                ids = prompt(20)
                executor.step([step(slot, ids, 0)])
                sequences.append(RunSequence(slot, 20, [7], ids, SamplingParams(temperature=0.5), seed=1))
            run_tokens(executor, sequences, 10)

    generate()
    made = executor.decoder.num_contexts_and_graphs
    before, free = module.allocation_count(), module.device_info()["free_bytes"]
    generate()
    assert executor.decoder.num_contexts_and_graphs == made
    assert module.allocation_count() == before and module.device_info()["free_bytes"] == free


def test_many_combinations_of_slots_are_forgotten_and_made_again(open_trt: Open) -> None:
    executor = open_trt(max_slots=12, build={"max_batch": 8}, decode_batching="fast")
    rng = np.random.default_rng(2)
    ids = prompt(6)
    for slot in range(12):
        executor.step([step(slot, ids, 0)])
    expected = executor.step([step(0, [8], 6)])[0].copy()
    for _ in range(150):
        slots = rng.permutation(12)[: rng.integers(1, 9)]
        rows = executor.step([step(int(slot), [8], 6) for slot in slots])
        assert np.array_equal(rows, np.broadcast_to(expected, rows.shape))
    contexts, graphs = executor.decoder.num_contexts_and_graphs
    assert contexts <= 64 and graphs <= 129
