"""The CUDA executor computes what Hugging Face and ONNX Runtime compute, and takes no memory while it does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Request, SamplingParams
from edgellm_ros.errors import ConfigError, DeviceError
from edgellm_ros.executors import SequenceStep, create_executor
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor

# Every head_dim, bias, norm, window; layers without rope; stacked projections and rope of half a head; GELU, norms on
# outputs, and two ropes.
KINDS = (
    "gpu_llama", "gpu_llama_bias", "gpu_mistral", "gpu_qwen2", "gpu_qwen3", "gpu_smollm3", "gpu_phi3", "gpu_gemma3",
    "gpu_gemma3_64",
)  # fmt: skip
RNG = np.random.default_rng(11)
OpenCuda = Callable[..., CudaExecutor]


def prompt(length: int) -> np.ndarray:
    return RNG.integers(5, 300, length).astype(np.int32)


def step(slot: int, ids: np.ndarray, position: int, num_logits: int = 1) -> SequenceStep:
    return SequenceStep(slot, np.asarray(ids, np.int32), position, num_logits)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    centred = expected - expected.mean(-1, keepdims=True)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(centred))


def prefilled_and_decoded(executor: Any, ids: np.ndarray, num_prefilled: int) -> np.ndarray:
    """Logits after every token of `ids`, the first `num_prefilled` in one step, the others one by one."""
    rows = [executor.step([step(1, ids[:num_prefilled], 0, num_prefilled)]).copy()]
    for i in range(num_prefilled, len(ids)):
        rows.append(executor.step([step(1, ids[i : i + 1], i)]).copy())
    return np.concatenate(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_hugging_faces_in_prefill_and_decode(
    kind: str, open_cuda: OpenCuda, gpu_model: Callable[[str], tuple[Any, Path]]
) -> None:
    import torch

    executor = open_cuda(kind, "fp16")
    ids = prompt(90)
    with torch.no_grad():
        expected = gpu_model(kind)[0](torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    got = prefilled_and_decoded(executor, ids, 60)
    assert relative_error(got[:60], expected[:60]) < 0.03
    assert relative_error(got[60:], expected[60:]) < 0.03


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_logits_are_onnx_runtimes(
    kind: str, weights: str, open_cuda: OpenCuda, gpu_bundle: Callable[..., Bundle]
) -> None:
    reference = OnnxRuntimeExecutor(gpu_bundle(kind, weights), EngineConfig(max_slots=2))
    ids = prompt(90)
    expected = prefilled_and_decoded(reference, ids, 60)
    reference.close()
    got = prefilled_and_decoded(open_cuda(kind, weights), ids, 60)
    # ONNX Runtime rounds activations to int8 in these products, which moves its logits as far as bf16 moves ours.
    assert relative_error(got[:60], expected[:60]) < 0.08
    assert relative_error(got[60:], expected[60:]) < 0.08


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gpu_qwen3", "gpu_gemma3"])
def test_short_steps_through_the_decode_kernels_agree_with_products(
    kind: str, weights: str, open_cuda: OpenCuda
) -> None:
    ids = prompt(40)
    exact = open_cuda(kind, weights).step([step(0, ids[:30], 0), step(1, ids[:8], 0, 5)]).copy()
    fast = open_cuda(kind, weights, decode_batching="fast")
    assert relative_error(fast.step([step(0, ids[:30], 0), step(1, ids[:8], 0, 5)]), exact) < 0.03


def greedy_by_steps(executor: CudaExecutor, slot: int, position: int, token: int, count: int) -> list[int]:
    tokens = []
    for i in range(count):
        logits = executor.step([step(slot, np.array([token]), position + i)])
        token = int(logits[0].argmax())
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("batching", ["exact", "fast"])
@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gpu_qwen3", "gpu_gemma3"])
def test_tokens_fed_back_on_the_device_are_those_of_single_steps(
    kind: str, weights: str, batching: str, open_cuda: OpenCuda
) -> None:
    executor = open_cuda(kind, weights, max_slots=8, decode_batching=batching)
    lengths = [3, 40, 17, 64, 9, 30, 2, 50]
    for slot, length in enumerate(lengths):
        executor.step([step(slot, prompt(length), 0)])
    first = [7 + slot for slot in range(8)]
    single = greedy_by_steps(executor, 2, lengths[2], first[2], 24)
    assert executor.decode_tokens([2], [lengths[2]], [first[2]], 24)[:, 0].tolist() == single
    if batching == "exact":
        alone = [greedy_by_steps(executor, s, lengths[s], first[s], 24) for s in range(8)]
        for slots in ([0, 1, 2], list(range(8)), [5, 3]):
            got = executor.decode_tokens(slots, [lengths[s] for s in slots], [first[s] for s in slots], 24)
            assert got.T.tolist() == [alone[s] for s in slots], slots


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gpu_qwen3", "gpu_gemma3"])
def test_fast_batches_are_what_each_sequence_computes_alone_but_for_rounding(
    kind: str, weights: str, open_cuda: OpenCuda
) -> None:
    executor = open_cuda(kind, weights, max_slots=8, decode_batching="fast")
    lengths = [3, 40, 17, 64, 9, 30, 2, 50]
    for slot, length in enumerate(lengths):
        executor.step([step(slot, prompt(length), 0)])
    first = [7 + slot for slot in range(8)]
    for slots in ([5, 3], [0, 1, 2], [6, 0, 4, 1, 7], list(range(8))):
        rows = executor.step([step(s, np.array([first[s]]), lengths[s]) for s in slots]).copy()
        tokens = executor.decode_tokens(slots, [lengths[s] for s in slots], [first[s] for s in slots], 24)
        for column, slot in enumerate(slots):
            fed, drawn = [first[slot], *tokens[:-1, column]], tokens[:, column]
            ids = np.array(fed, np.int32)
            alone = [executor.step([step(slot, ids[i : i + 1], lengths[slot] + i)])[0].copy() for i in range(24)]
            assert relative_error(rows[column], alone[0]) < 0.03, (slots, slot)
            # Rounding decides between tokens that are nearly alike. An error of 0.03 moves the difference of two logits
            # by 0.04 of their deviation, where 1 to 2.2e-2 was measured: allowed is 3.5 times that.
            for logits, token in zip(alone, drawn, strict=True):
                assert logits.max() - logits[token] <= 0.15 * logits.std(), (slots, slot)


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_more_sequences_than_one_batch_takes_get_the_bits_that_each_gets_alone(
    weights: str, open_cuda: OpenCuda
) -> None:
    """Eight at a time; what is asked for no logits still has its key and value written, and rows keep their order."""
    executor = open_cuda("gpu_qwen3", weights, max_slots=19)
    assert native.load().MAX_BATCH == 8
    lengths = [2 + 9 * (slot % 7) + slot for slot in range(19)]
    for slot, length in enumerate(lengths):
        executor.step([step(slot, prompt(length), 0, 0)])
    for num_singles, has_prompt in ((9, True), (16, True), (19, False)):
        slots = RNG.permutation(19)[: num_singles + has_prompt]
        batch = [step(int(s), prompt(1), lengths[s], int(i % 3 != 1)) for i, s in enumerate(slots[:num_singles])]
        if has_prompt:
            slot = int(slots[-1])
            batch.insert(num_singles // 2, step(slot, prompt(12), lengths[slot], 3))
        ends = [item.position + len(item.token_ids) for item in batch]
        alone, kept = [], []
        for item, end in zip(batch, ends, strict=True):
            alone.append(executor.step([item]).copy())
            kept.append(executor.save_prefix(item.slot, end))
            executor.step([step(item.slot, item.token_ids + 1, item.position, 0)])  # other keys and values
        assert np.array_equal(executor.step(batch), np.concatenate(alone)), num_singles
        for item, end, expected in zip(batch, ends, kept, strict=True):
            assert np.array_equal(executor.save_prefix(item.slot, end), expected), (num_singles, item.slot)


def test_a_graph_replays_what_plain_launches_compute(open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_llama", "int4")
    executor.step([step(0, prompt(20), 0)])
    replayed = executor.step([step(0, np.array([9]), 20)]).copy()
    executor._decoder.use_graphs(False)
    assert np.array_equal(executor.step([step(0, np.array([9]), 20)]), replayed)


def test_greedy_sampling_rows_draw_the_most_likely_token(open_cuda: OpenCuda) -> None:
    module = native.load()
    executor = open_cuda("gpu_qwen3", "fp16")
    executor.step([step(0, prompt(20), 0), step(1, prompt(11), 0)])
    greedy = executor.decode_tokens([0, 1], [20, 11], [5, 6], 30)
    cold = [module.SamplingRow(seed=1), module.SamplingRow(seed=2, temperature=0.9, top_k=1)]
    assert np.array_equal(executor.decode_tokens([0, 1], [20, 11], [5, 6], 30, cold), greedy)


def test_a_seed_draws_the_same_tokens_alone_and_in_a_batch(open_cuda: OpenCuda) -> None:
    module = native.load()
    executor = open_cuda("gpu_qwen3", "fp16")
    executor.step([step(0, prompt(20), 0), step(1, prompt(11), 0)])

    def rows(*seeds: int) -> list[Any]:
        return [module.SamplingRow(seed=s, temperature=1.0, top_k=50, top_p=0.95) for s in seeds]

    together = executor.decode_tokens([0, 1], [20, 11], [5, 6], 30, rows(3, 4))
    assert np.array_equal(executor.decode_tokens([1], [11], [6], 30, rows(4))[:, 0], together[:, 1])
    assert not np.array_equal(executor.decode_tokens([1], [11], [6], 30, rows(5))[:, 0], together[:, 1])


def test_draws_follow_the_models_distribution(open_cuda: OpenCuda) -> None:
    """First tokens over many seeds against the softmax of the logits: total variation far below that of a wrong one."""
    module = native.load()
    executor = open_cuda("gpu_qwen3", "fp16")
    executor.step([step(0, prompt(20), 0)])
    logits = executor.step([step(0, np.array([5]), 20)])[0].astype(np.float64) / 2.0
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    draws = [
        int(executor.decode_tokens([0], [20], [5], 1, [module.SamplingRow(seed=s, temperature=2.0)])[0, 0])
        for s in range(3000)
    ]
    counts = np.bincount(draws, minlength=len(expected)) / len(draws)
    noise = np.random.default_rng(0).multinomial(len(draws), expected) / len(draws)
    assert np.abs(counts - expected).sum() < 1.5 * np.abs(noise - expected).sum()


@pytest.mark.alone
@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_generating_takes_no_memory(batching: str, open_cuda: OpenCuda) -> None:
    module = native.load()
    executor = open_cuda("gpu_qwen3", "int4", max_slots=8, decode_batching=batching)
    loaded = module.allocation_count()
    executor.step([step(slot, prompt(20 + slot), 0) for slot in range(8)])

    def generate() -> None:
        for i in range(20):
            executor.step([step(slot, prompt(1), 20 + slot + i) for slot in range(8)])
        executor.step([step(0, prompt(60), 0)])
        executor.decode_tokens(list(range(8)), [60] * 8, [5] * 8, 50)
        executor.decode_tokens([3], [60], [5], 50, [module.SamplingRow(seed=1, temperature=1.0)])

    generate()  # CUDA and cuBLASLt load a kernel's code when it first runs
    free = module.device_info()["free_bytes"]
    generate()
    assert module.allocation_count() == loaded
    assert module.device_info()["free_bytes"] == free


def test_the_engine_takes_no_memory_after_load(gpu_bundle: Callable[..., Bundle]) -> None:
    from edgellm_ros.llm import LLM

    module = native.load()
    with LLM.open(gpu_bundle("gpu_qwen3", "int4"), EngineConfig(executor="cuda", max_slots=4)) as llm:
        loaded = module.allocation_count()
        for temperature in (0.0, 1.0):
            sampling = SamplingParams(temperature=temperature, seed=3, max_tokens=20, ignore_eos=True)
            running = [llm.submit(Request(prompt="The robot " * (i + 1), sampling=sampling)) for i in range(7)]
            assert [len(generation.result().token_ids) for generation in running] == [20] * 7
        assert module.allocation_count() == loaded


def test_rows_of_logits_outlive_the_buffer_that_a_larger_step_replaces(open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_llama", "fp16", max_slots=1)
    ids = prompt(200)
    rows = executor.step([step(0, ids[:3], 0, 3)])
    kept = rows.copy()
    every = executor.step([step(0, ids, 0, 200)])
    assert every.ctypes.data != rows.ctypes.data, "200 rows were no more than there was room for"
    assert np.array_equal(rows, kept)


@pytest.mark.alone
def test_the_plan_names_every_purpose_and_bounds_what_is_taken(open_cuda: OpenCuda) -> None:
    module = native.load()
    free = module.device_info()["free_bytes"]
    executor = open_cuda("gpu_qwen3", "fp16", max_slots=4)
    plan = executor.memory_plan
    assert set(plan) == {"weights", "kv_cache", "workspace", "logits", "graphs", "total"}
    assert plan["total"] == sum(size for name, size in plan.items() if name != "total") == executor.info.memory_bytes
    assert free - module.device_info()["free_bytes"] <= plan["total"] + (128 << 20)  # the libraries' own code


def test_memory_is_refused_before_it_is_taken(
    gpu_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = native.load()
    info = dict(module.device_info(), free_bytes=50_000_000)
    monkeypatch.setattr(module, "device_info", lambda: info)
    before = module.allocation_count()
    with pytest.raises(ConfigError, match=r"max_slots 4 x max_context 256 .* 50 MB are free; lower max_slots"):
        CudaExecutor(gpu_bundle("gpu_llama"), EngineConfig())
    assert module.allocation_count() == before


def test_the_plan_is_told_before_memory_is_taken(
    gpu_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(settings: Any) -> None:
        raise DeviceError("taken")

    monkeypatch.setattr(native.load(), "Decoder", refuse)
    with caplog.at_level(logging.INFO), pytest.raises(DeviceError, match="taken"):
        CudaExecutor(gpu_bundle("gpu_llama"), EngineConfig())
    assert "GPU memory planned: " in caplog.text and "kv_cache" in caplog.text and "MB are free" in caplog.text


def test_auto_takes_the_gpu_and_says_so(gpu_bundle: Callable[..., Bundle], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        executor = create_executor(gpu_bundle("gpu_llama"), EngineConfig())
    assert executor.info.name == "cuda"
    assert any(record.getMessage().startswith("executor: cuda on NVIDIA") for record in caplog.records)
    executor.close()
    executor.close()
    with pytest.raises(DeviceError, match="closed"):
        executor.copy_prefix(0, 1, 1)


def test_a_model_that_the_kernels_cannot_run_falls_back_by_name(
    tiny_bundle: Callable[..., Bundle], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        executor = create_executor(tiny_bundle("qwen3"), EngineConfig())
    assert executor.info.name == "onnxruntime"
    assert "head_dim is 32; the kernels take 64, 80, 96, 128 and 256" in caplog.text
    executor.close()


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
def test_the_engine_passes_the_self_test_and_answers(weights: str, gpu_bundle: Callable[..., Bundle]) -> None:
    from edgellm_ros.llm import LLM

    with LLM.open(gpu_bundle("gpu_qwen3", weights), EngineConfig(executor="cuda")) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        request = Request(prompt="The robot", sampling=sampling)
        first = llm.complete(request)
        assert len(first.token_ids) == 12
        assert llm.complete(request).token_ids == first.token_ids
