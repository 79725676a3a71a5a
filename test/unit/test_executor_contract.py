"""What every executor promises: the same logits whatever the chunking, the batch and the slot; no more than planned."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgellm_ros.bundle import WEIGHTS, Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import ChatMessage  # noqa: F401  (imports of the lower layers must not pull in an executor)
from edgellm_ros.errors import BundleError, ConfigError, DeviceError, UnsupportedError
from edgellm_ros.executors import Executor, SequenceStep, create_executor
from edgellm_ros.executors import onnxruntime as ort_executor
from edgellm_ros.executors.selftest import compare_self_test, measure_self_test, run_self_test

CAPACITY = 128
RNG = np.random.default_rng(3)


def prompt(length: int) -> np.ndarray:
    return RNG.integers(5, 300, length).astype(np.int32)


def step(slot: int, ids: np.ndarray, position: int, num_logits: int = 1) -> SequenceStep:
    return SequenceStep(slot, np.asarray(ids, np.int32), position, num_logits)


CASES = ("qwen3-fp32", "qwen3-fp16", "qwen3-int8", "qwen3-int4", "gemma3_scaled-int4", "phi3_partial-int8", "smollm3_window-fp32")


@pytest.fixture(scope="module", params=CASES)
def executor(request: pytest.FixtureRequest, tiny_bundle: Callable[..., Bundle]) -> Iterator[Executor]:
    bundle = tiny_bundle(*request.param.rsplit("-", 1))
    made = create_executor(bundle, EngineConfig(max_slots=4, max_context=CAPACITY))
    yield made
    made.close()


def test_any_chunking_of_a_prompt_gives_the_same_bits(executor: Executor) -> None:
    ids = prompt(60)
    whole = executor.step([step(0, ids, 0)]).copy()
    for cuts in ((30,), (2, 4, 50), (58,)):
        position = 0
        for part in np.split(ids, cuts):
            last = executor.step([step(1, part, position)]).copy()
            position += len(part)
        assert np.array_equal(last, whole), cuts


def test_a_sequence_in_a_batch_gets_the_bits_it_gets_alone(executor: Executor) -> None:
    prompts = [prompt(n) for n in (7, 19, 40)]
    tokens = [prompt(1) for _ in prompts]
    for slot, ids in enumerate(prompts):
        executor.step([step(slot, ids, 0)])
    alone = [executor.step([step(s, tokens[s], len(prompts[s]))])[0].copy() for s in range(3)]
    for order in ((0, 1, 2), (2, 0, 1), (0, 2)):
        together = executor.step([step(s, tokens[s], len(prompts[s])) for s in order])
        for row, slot in enumerate(order):
            assert np.array_equal(together[row], alone[slot]), (order, slot)


def test_where_rows_round_apart_sequences_decode_one_by_one(
    tiny_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ort_executor.OnnxRuntimeExecutor
    logits_of, run, sizes = kind._logits_of, kind._run, []
    monkeypatch.setattr(kind, "_logits_of", lambda self, members: logits_of(self, members) + 1e-3 * len(members))
    monkeypatch.setattr(kind, "_run", lambda self, members, out: sizes.append(len(members)) or run(self, members, out))
    for batching, expected in (("exact", [1, 1]), ("fast", [2])):
        config = EngineConfig(max_slots=2, max_context=CAPACITY, decode_batching=batching)
        executor = kind(tiny_bundle("qwen3", "fp32"), config)
        sizes.clear()
        executor.step([step(slot, prompt(1), 0) for slot in range(2)])
        executor.close()
        assert sizes == expected, batching


def test_prefill_and_decode_share_a_step(executor: Executor) -> None:
    first, second, token = prompt(9), prompt(30), prompt(1)
    executor.step([step(0, first, 0)])
    expected_decode = executor.step([step(0, token, 9)])[0].copy()
    expected_prefill = executor.step([step(1, second, 0, 3)]).copy()
    rows = executor.step([step(2, second, 0, 3), step(0, token, 9)])
    assert np.array_equal(rows[:3], expected_prefill)
    assert np.array_equal(rows[3], expected_decode)


def test_logits_of_several_positions_are_those_of_each_prefix(executor: Executor) -> None:
    ids = prompt(24)
    rows = executor.step([step(0, ids, 0, 5)]).copy()
    for i in range(5):
        prefix = ids[: 24 - 4 + i]
        assert np.allclose(rows[i], executor.step([step(1, prefix, 0)])[0], atol=1e-3), i


def test_a_step_without_logits_still_writes_the_cache(executor: Executor) -> None:
    ids = prompt(20)
    expected = executor.step([step(0, ids, 0)]).copy()
    assert executor.step([step(1, ids[:12], 0, 0)]).shape == (0, executor.info.vocab_size)
    assert np.array_equal(executor.step([step(1, ids[12:], 12)]), expected)


def test_writing_at_an_earlier_position_forgets_what_came_after(executor: Executor) -> None:
    kept, rejected, taken = prompt(15), prompt(6), prompt(4)
    expected = executor.step([step(0, np.concatenate([kept, taken]), 0)]).copy()
    executor.step([step(1, np.concatenate([kept, rejected]), 0)])
    assert np.array_equal(executor.step([step(1, taken, 15)]), expected)


def test_a_copied_and_a_restored_prefix_continue_like_the_original(executor: Executor) -> None:
    ids, rest = prompt(33), prompt(5)
    executor.step([step(0, ids, 0)])
    saved = executor.save_prefix(0, 33)
    assert saved.nbytes == 33 * executor.info.kv_bytes_per_token
    expected = executor.step([step(0, rest, 33)]).copy()
    executor.copy_prefix(0, 3, 33)
    assert np.array_equal(executor.step([step(3, rest, 33)]), expected)
    executor.step([step(2, prompt(40), 0)])
    executor.load_prefix(2, saved, 33)
    assert np.array_equal(executor.step([step(2, rest, 33)]), expected)


def test_a_slot_can_be_filled_to_its_last_position(executor: Executor) -> None:
    ids = prompt(CAPACITY)
    executor.step([step(3, ids[:-1], 0)])
    assert np.isfinite(executor.step([step(3, ids[-1:], CAPACITY - 1)])).all()
    with pytest.raises(AssertionError):
        executor.step([step(3, ids[:1], CAPACITY)])


def test_decoding_allocates_no_arrays(executor: Executor) -> None:
    """Logits live in one buffer: the address is the same after every step."""
    executor.step([step(0, prompt(8), 0)])
    addresses = {executor.step([step(0, prompt(1), 8 + i)]).__array_interface__["data"][0] for i in range(8)}
    assert len(addresses) == 1


def test_fast_batching_keeps_the_values_if_not_the_bits(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle("qwen3", "int4")
    exact = create_executor(bundle, EngineConfig(max_slots=2, max_context=CAPACITY))
    fast = create_executor(bundle, EngineConfig(max_slots=2, max_context=CAPACITY, decode_batching="fast"))
    ids, token = prompt(10), prompt(1)
    rows = []
    for one in (exact, fast):
        one.step([step(0, ids, 0), step(1, ids[:7], 0)])
        rows.append(one.step([step(0, token, 10), step(1, token, 7)]).copy())
        one.close()
    assert np.linalg.norm(rows[0] - rows[1]) < 0.05 * np.linalg.norm(rows[0])


def test_more_context_than_the_bundle_has_is_refused(tiny_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(ConfigError, match="max_context 4096 exceeds the bundle's 256; export again with --max-context"):
        create_executor(tiny_bundle("llama"), EngineConfig(max_context=4096))


@pytest.mark.parametrize("max_slots", [1, 4])
def test_memory_is_refused_to_the_byte_and_before_it_is_taken(
    max_slots: int, tiny_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights, keys and values in fp32 of every slot, and 64 MiB of scratch memory."""

    class Taken(Exception):
        pass

    def take(*arguments: object) -> None:
        raise Taken

    bundle, config = tiny_bundle("llama"), EngineConfig(executor="onnxruntime", max_slots=max_slots)
    model = bundle.manifest.model
    cache = max_slots * model.max_context * 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
    plan = (bundle.path / WEIGHTS).stat().st_size + cache + (64 << 20)
    monkeypatch.setattr(ort_executor.OnnxRuntimeExecutor, "_load", take)
    monkeypatch.setattr(ort_executor, "available_memory", lambda: plan - 1)
    with pytest.raises(ConfigError, match=rf"max_slots {max_slots} x max_context 256 .* {plan / 1e6:.0f} MB are free; lower"):
        create_executor(bundle, config)
    monkeypatch.setattr(ort_executor, "available_memory", lambda: plan)
    with pytest.raises(Taken):
        create_executor(bundle, config)


@pytest.mark.parametrize("kv_cache", ["bf16", "fp16", "fp8"])
def test_a_kv_cache_that_the_executor_does_not_have_is_refused(
    kv_cache: str, tiny_bundle: Callable[..., Bundle]
) -> None:
    with pytest.raises(ConfigError, match=f"kv_cache is '{kv_cache}'.* is fp32; use auto or fp32"):
        create_executor(tiny_bundle("llama"), EngineConfig(executor="onnxruntime", kv_cache=kv_cache))


def test_an_fp32_kv_cache_may_be_asked_for_by_name(tiny_bundle: Callable[..., Bundle]) -> None:
    made = create_executor(tiny_bundle("llama"), EngineConfig(executor="onnxruntime", kv_cache="fp32"))
    assert made.info.precision.endswith("fp32 KV cache")
    made.close()


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_an_executor_that_is_not_there_is_refused_by_name(name: str, tiny_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(UnsupportedError, match=f"executor is '{name}'.*use (onnxruntime|auto)"):
        create_executor(tiny_bundle("llama"), EngineConfig(executor=name))


def test_a_failure_while_computing_is_a_device_error(tiny_bundle: Callable[..., Bundle]) -> None:
    executor = create_executor(tiny_bundle("llama"), EngineConfig(max_slots=1))
    with pytest.raises(DeviceError, match="ONNX Runtime failed in a step of 3 tokens"):
        executor._seqlens = np.zeros(1, np.int64)  # type: ignore[attr-defined]  # a wrong dtype: the runtime must object
        executor.step([step(0, prompt(3), 0)])
    executor.close()
    executor.close()


def test_the_self_test_passes_for_the_right_weights_and_refuses_others_with_the_numbers(
    tiny_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = tiny_bundle("llama", "fp32")
    executor = create_executor(bundle, EngineConfig(max_slots=1))
    result = run_self_test(executor, bundle.manifest)
    assert result.error < 1e-4 and result.num_agreeing == result.num_tokens == 24
    executor.close()
    shutil.copytree(bundle.path, tmp_path / "other")
    weights = tmp_path / "other" / "weights.safetensors"
    offset, _ = bundle.weights().location("layers.1.mlp.down.weight")
    data = bytearray(weights.read_bytes())
    data[offset : offset + 4096] = bytes(4096)
    weights.write_bytes(data)
    changed = Bundle.open(tmp_path / "other", verify=False)
    wrong = create_executor(changed, EngineConfig(max_slots=1))
    assert not measure_self_test(wrong, changed.manifest).passed
    with pytest.raises(BundleError, match=r"self-test failed: onnxruntime's logits differ from .* allowed is 0.001"):
        run_self_test(wrong, changed.manifest)
    wrong.close()


def test_logits_that_are_not_finite_do_not_pass_the_self_test(tiny_bundle: Callable[..., Bundle]) -> None:
    manifest = tiny_bundle("llama", "fp32").manifest
    vocab_size = manifest.model.vocab_size
    logits = [np.full((len(case.next_ids), vocab_size), np.nan, np.float32) for case in manifest.self_test.cases]
    result = compare_self_test(manifest, logits, None)
    assert np.isnan(result.error) and not result.passed
