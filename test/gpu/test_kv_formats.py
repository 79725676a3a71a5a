"""The KV cache in bf16, fp16 and FP8: logits, prefixes that move, windows, batches, and what may not be mixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import ChatMessage, Request, SamplingParams
from edgellm_ros.errors import ConfigError
from edgellm_ros.executors import SequenceStep
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor

# Every head_dim, bias, norm, window; GELU and norms on outputs.
KINDS = ("gpu_llama", "gpu_llama_bias", "gpu_mistral", "gpu_qwen2", "gpu_qwen3", "gpu_gemma3")
# Relative error of logits. Beside what bf16 activations cost (3e-2), E4M3 rounds each key and value by up to 1/16.
TOLERANCE = {"bf16": 0.03, "fp16": 0.03, "fp8": 0.12}
BYTES = {"bf16": 2, "fp16": 2, "fp8": 1}
FORMATS = tuple(TOLERANCE)
RNG = np.random.default_rng(17)
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


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_hugging_faces(
    kind: str, form: str, open_cuda: OpenCuda, gpu_model: Callable[[str], tuple[Any, Path]]
) -> None:
    import torch

    executor = open_cuda(kind, "fp16", kv_cache=form)
    for length, num_prefilled in ((20, 1), (70, 7), (130, 64), (130, 65)):  # beyond gpu_mistral's window of 16
        ids = prompt(length)
        with torch.no_grad():
            expected = gpu_model(kind)[0](torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
        got = prefilled_and_decoded(executor, ids, num_prefilled)
        assert relative_error(got[:num_prefilled], expected[:num_prefilled]) < TOLERANCE[form]
        assert relative_error(got[num_prefilled:], expected[num_prefilled:]) < TOLERANCE[form]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_logits_are_onnx_runtimes(
    weights: str, form: str, open_cuda: OpenCuda, gpu_bundle: Callable[..., Bundle]
) -> None:
    reference = OnnxRuntimeExecutor(gpu_bundle("gpu_qwen3", weights), EngineConfig(max_slots=2))
    ids = prompt(90)
    expected = prefilled_and_decoded(reference, ids, 60)
    reference.close()
    got = prefilled_and_decoded(open_cuda("gpu_qwen3", weights, kv_cache=form), ids, 60)
    assert relative_error(got, expected) < 0.05 + TOLERANCE[form]  # ONNX Runtime rounds activations to int8 here


def test_fp16_is_closer_than_fp8_and_each_format_takes_what_it_says(
    open_cuda: OpenCuda, gpu_model: Callable[[str], tuple[Any, Path]]
) -> None:
    import torch

    ids = prompt(120)
    with torch.no_grad():
        expected = gpu_model("gpu_qwen3")[0](torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    errors = {}
    for form in FORMATS:
        executor = open_cuda("gpu_qwen3", "fp16", kv_cache=form)
        assert executor.info.precision == f"fp16 weights, {form} KV cache"
        assert executor.info.kv_bytes_per_token == 2 * 3 * 2 * 128 * BYTES[form]
        assert executor.memory_plan["kv_cache"] == 4 * executor.info.capacity * executor.info.kv_bytes_per_token
        errors[form] = relative_error(prefilled_and_decoded(executor, ids, 40), expected)
    assert errors["fp16"] < errors["fp8"] and errors["bf16"] < errors["fp8"], errors


@pytest.mark.parametrize(("kind", "form"), [("gpu_llama", "fp16"), ("gpu_gemma3", "bf16")])
def test_auto_is_fp16_where_the_models_numbers_allow_it(kind: str, form: str, open_cuda: OpenCuda) -> None:
    auto, named = open_cuda(kind), open_cuda(kind, kv_cache=form)
    assert auto.info.precision == named.info.precision == f"fp16 weights, {form} KV cache"
    ids = prompt(50)
    assert np.array_equal(prefilled_and_decoded(auto, ids, 20), prefilled_and_decoded(named, ids, 20))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 199])
def test_a_prefix_that_was_copied_or_saved_and_loaded_continues_with_the_same_bits(
    form: str, length: int, open_cuda: OpenCuda
) -> None:
    executor = open_cuda("gpu_qwen3", "fp16", kv_cache=form)
    ids, others = prompt(length), prompt(220)
    executor.step([step(0, ids, 0)])
    for slot in (1, 2, 3):
        executor.step([step(slot, others, 0)])  # what was there before must not matter
    saved = executor.save_prefix(0, length)
    assert saved.nbytes == length * executor.info.kv_bytes_per_token
    executor.copy_prefix(0, 1, length)
    executor.load_prefix(2, saved, length)
    assert np.array_equal(executor.save_prefix(1, length), saved)
    assert np.array_equal(executor.save_prefix(2, length), saved)
    token = np.array([9], np.int32)
    wanted = executor.step([step(0, token, length)]).copy()
    for slot in (1, 2):
        assert np.array_equal(executor.step([step(slot, token, length)]), wanted)
    fresh = open_cuda("gpu_qwen3", "fp16", kv_cache=form)
    fresh.load_prefix(3, saved, length)
    assert np.array_equal(fresh.step([step(3, token, length)]), wanted)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["gpu_mistral", "gpu_qwen3"])
def test_decoded_tokens_are_the_same_alone_and_in_a_batch(kind: str, form: str, open_cuda: OpenCuda) -> None:
    executor = open_cuda(kind, "int4", kv_cache=form, max_slots=8)
    lengths = [3, 63, 64, 65, 1, 100, 7, 150]
    for slot, length in enumerate(lengths):
        executor.step([step(slot, prompt(length), 0)])
    first = [5 + slot for slot in range(8)]
    together = executor.decode_tokens(list(range(8)), lengths, first, 30)
    for slot in range(8):
        alone = executor.decode_tokens([slot], [lengths[slot]], [first[slot]], 30)
        assert np.array_equal(alone[:, 0], together[:, slot])
    assert len(np.unique(together)) > 8  # not all one token


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("length", [1000, 8170])
def test_a_run_crosses_from_one_class_of_context_to_the_next_without_a_change(
    length: int, form: str, open_long: Callable[..., Any]
) -> None:
    """Attention is launched otherwise beyond 1,024 and 8,192 tokens; alone, in a batch, and step by step."""
    executor = open_long(form)
    long, short = prompt(length), prompt(40)
    for first in range(0, length, 1000):
        executor.step([step(0, long[first : first + 1000], first)])
    executor.step([step(1, short, 0)])
    executor.copy_prefix(0, 2, length)
    together = executor.decode_tokens([0, 1], [length, 40], [5, 6], 60)
    assert np.array_equal(executor.decode_tokens([0], [length], [5], 60)[:, 0], together[:, 0])
    assert np.array_equal(executor.decode_tokens([1], [40], [6], 60)[:, 0], together[:, 1])
    token, tokens = 5, []
    for i in range(60):
        token = int(executor.step([step(2, np.array([token]), length + i)])[0].argmax())
        tokens.append(token)
    assert tokens == together[:, 0].tolist()


@pytest.mark.parametrize("form", FORMATS)
def test_logits_at_a_long_context_are_hugging_faces(
    form: str, open_long: Callable[..., Any], gpu_model: Callable[[str], tuple[Any, Path]]
) -> None:
    import torch

    executor = open_long(form)
    ids = prompt(2050)
    with torch.no_grad():
        expected = gpu_model("gpu_qwen3")[0](torch.tensor(ids[None].astype(np.int64))).logits[0, -10:].numpy()
    assert relative_error(executor.step([step(0, ids, 0, 10)]), expected) < TOLERANCE[form]
    got = np.concatenate([executor.step([step(0, ids[i : i + 1], i)]).copy() for i in range(2040, 2050)])
    assert relative_error(got, expected) < TOLERANCE[form]


@pytest.fixture
def open_long(gpu_model: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> Any:
    """`open_long(form)` is an executor of gpu_qwen3's weights for 8,320 tokens; closed after the test."""
    import json

    from edgellm_ros.toolchain.export import export_bundle

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for source in gpu_model("gpu_qwen3")[1].iterdir():
        (checkpoint / source.name).write_bytes(source.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    config["max_position_embeddings"] = 8320
    (checkpoint / "config.json").write_text(json.dumps(config))
    bundle = export_bundle(checkpoint, tmp_path / "bundle", weights="fp16", max_context=8320)
    opened: list[CudaExecutor] = []

    def get(form: str) -> CudaExecutor:
        opened.append(CudaExecutor(bundle, EngineConfig(max_slots=3, max_context=8320, kv_cache=form)))
        return opened[-1]

    yield get
    for executor in opened:
        executor.close()


def test_a_pinned_prompt_saved_in_one_format_is_not_used_in_another(
    gpu_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    from edgellm_ros.llm import LLM

    request = Request(
        messages=(ChatMessage("system", "You are a robot with a rather long system prompt."), ChatMessage("user", "Hi")),
        sampling=SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), pin_system_prompt=True,
    )  # fmt: skip
    cached = []
    for form in ("fp16", "bf16", "fp16"):
        config = EngineConfig(executor="cuda", kv_cache=form)
        with LLM.open(gpu_bundle("gpu_qwen3"), config, pinned_dir=tmp_path) as llm:
            cached.append(llm.complete(request).usage.cached_tokens)
    assert cached[0] == cached[1] == 0 and cached[2] > 0


def test_a_format_that_the_kernels_do_not_have_is_refused(gpu_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(ConfigError, match="kv_cache is 'fp32'.*use auto, bf16, fp16, fp8, or the executor onnxruntime"):
        CudaExecutor(gpu_bundle("gpu_llama"), EngineConfig(kv_cache="fp32"))


def test_a_prefix_that_lies_in_no_slot_is_refused_and_nothing_is_lost(open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_qwen3", "fp16", max_slots=2, max_context=64)
    ids = prompt(20)
    expected = executor.step([step(0, ids, 0)]).copy()
    saved = executor.save_prefix(0, 19)
    words = r"does not fit: there are 2 slots of 64 tokens"
    for source, target, length in ((0, 2, 4), (2, 0, 4), (0, -1, 4), (0, 1, 65), (0, 1, -1)):
        with pytest.raises(ValueError, match=words):
            executor.copy_prefix(source, target, length)
    for slot, length in ((2, 19), (0, 65), (0, -1)):
        with pytest.raises(ValueError, match=words):
            executor.save_prefix(slot, length)
    with pytest.raises(ValueError, match=words):
        executor.load_prefix(2, saved, 19)
    executor.load_prefix(1, saved, 19)
    for slot in (0, 1):
        assert relative_error(executor.step([step(slot, ids[19:], 19)]), expected) < TOLERANCE["fp16"]
