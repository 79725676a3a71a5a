"""A prompt's logits do not depend on how it is cut, and FP8 prefill costs the accuracy that three bits cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_ros import native
from edgellm_ros.benchmark import random_bundle
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors import SequenceStep, cuda
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.lora import LoraTensors, make_adapter

KINDS = ("gpu_llama", "gpu_llama_bias", "gpu_mistral", "gpu_qwen2", "gpu_qwen3", "gpu_gemma3")
RNG = np.random.default_rng(5)


def step(slot: int, ids: np.ndarray, position: int, num_logits: int = 1, adapter: int = 0) -> SequenceStep:
    return SequenceStep(slot, np.asarray(ids, np.int32), position, num_logits, adapter)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    centred = expected - expected.mean(-1, keepdims=True)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(centred))


class AsFp8(Bundle):
    """A bundle of float weights that asks the executor to round them to FP8 at load."""

    def __init__(self, bundle: Bundle) -> None:
        quantization = dataclasses.replace(bundle.manifest.quantization, weights="fp8")
        super().__init__(bundle.path, dataclasses.replace(bundle.manifest, quantization=quantization))


@pytest.fixture
def open_fp8(gpu_bundle: Callable[..., Bundle]) -> Iterator[Callable[..., CudaExecutor]]:
    opened: list[CudaExecutor] = []

    def get(kind: str, **settings: Any) -> CudaExecutor:
        opened.append(CudaExecutor(AsFp8(gpu_bundle(kind)), EngineConfig(**{"max_slots": 4, **settings})))
        return opened[-1]

    yield get
    for executor in opened:
        executor.close()


def needs_fp8(executor: CudaExecutor) -> None:
    major, minor = native.load().device_info()["compute_capability"]
    if (major, minor) < (8, 9):
        pytest.skip("this GPU has no FP8 products")
    assert executor._decoder.has_fp8_products


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_prefill_is_as_close_to_hugging_face_as_its_activations_allow(
    kind: str, open_fp8: Callable[..., CudaExecutor], gpu_model: Callable[[str], tuple[Any, Path]]
) -> None:
    import torch

    ids = RNG.integers(5, 300, 90).astype(np.int32)
    with torch.no_grad():
        expected = gpu_model(kind)[0](torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    executor = open_fp8(kind)
    needs_fp8(executor)
    fp8 = executor.step([step(1, ids, 0, 90)]).copy()
    plain = open_fp8(kind, fp8_prefill=False)
    assert not plain._decoder.has_fp8_products
    wide = plain.step([step(1, ids, 0, 90)]).copy()
    # transformers with the weights rounded so is 0.10 to 0.13 away, with the inputs of its linear layers rounded as
    # well 0.14 to 0.17, and these two are 0.09 to 0.12 apart: random weights amplify what real ones average out.
    assert relative_error(wide, expected) < 0.16
    assert relative_error(fp8, expected) < 0.21
    assert relative_error(fp8, wide) < 0.15
    assert not np.array_equal(fp8, wide)  # the switch switches
    # The cache that FP8 prefill wrote is decoded from as well.
    decoded = []
    for each in (executor, plain):
        each.step([step(1, ids[:60], 0)])
        decoded.append(each.step([step(1, ids[60:61], 60)])[0].copy())
    assert relative_error(decoded[0], decoded[1]) < 0.2


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4", "int4 as stored", "fp8"])
@pytest.mark.parametrize("kind", ["gpu_qwen3", "gpu_gemma3"])
def test_a_prompts_bits_do_not_depend_on_how_it_is_cut(
    kind: str,
    weights: str,
    open_fp8: Callable[..., CudaExecutor],
    open_cuda: Callable[..., CudaExecutor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if weights.startswith("int4"):
        monkeypatch.setattr(cuda, "_MAX_PACKED_TOKENS", int(weights == "int4 as stored"))
        weights = "int4"
    ids = RNG.integers(5, 300, 200).astype(np.int32)

    def open_one(chunk: int) -> CudaExecutor:
        if weights == "fp8":
            return open_fp8(kind, prefill_chunk=chunk)
        return open_cuda(kind, weights, prefill_chunk=chunk)

    executor = open_one(256)
    whole = executor.step([step(0, ids, 0, 200)]).copy()
    for cuts in ([100], [2, 17, 64], [150, 198], [16, 32, 48, 64, 80, 96, 112]):
        for a, b in itertools.pairwise([0, *cuts, 200]):
            # One row: a short step that asks for all of them verifies a draft and has the decode kernels' bits.
            assert np.array_equal(executor.step([step(1, ids[a:b], a)])[0], whole[b - 1]), (cuts, b)


@pytest.mark.parametrize("weights", ["fp16", "fp8"])
@pytest.mark.parametrize("kind", ["gpu_qwen3", "gpu_gemma3"])
def test_the_last_layer_leaves_out_what_no_logits_need(
    kind: str, weights: str, open_fp8: Callable[..., CudaExecutor], open_cuda: Callable[..., CudaExecutor]
) -> None:
    """Chunks of 64 tokens, the last two of 63 and 2, of which 0, 1 or 70 tokens' logits are asked for."""
    executor = open_fp8(kind, prefill_chunk=64) if weights == "fp8" else open_cuda(kind, weights, prefill_chunk=64)
    ids = RNG.integers(5, 300, 193).astype(np.int32)
    every = executor.step([step(0, ids, 0, 193)]).copy()
    assert np.array_equal(executor.step([step(1, ids, 0, 1)])[0], every[-1])
    assert np.array_equal(executor.step([step(2, ids, 0, 70)]), every[-70:])
    for cut in (64, 100, 150):
        assert len(executor.step([step(3, ids[:cut], 0, 0)])) == 0
        assert np.array_equal(executor.step([step(3, ids[cut:], cut, 20)]), every[-20:]), cut


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_weight_that_is_dequantised_in_parts_on_two_streams_gives_what_decoding_gives(
    weights: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers as wide as an 8B model's: gate_up goes in 7 or 14 parts, down in 4 or 8."""
    wide = dataclasses.replace(random_bundle.SHAPES["llama-8b"], num_layers=2, vocab_size=4096, max_context=256)
    monkeypatch.setitem(random_bundle.SHAPES, "wide", wide)
    monkeypatch.setattr(cuda, "_MAX_PACKED_TOKENS", 0)
    monkeypatch.setattr(cuda, "_COPIED_BYTES", size << 20)
    executor = CudaExecutor(random_bundle.RandomBundle("wide", weights), EngineConfig(max_slots=2, max_context=128))
    ids = RNG.integers(5, 4000, 40).astype(np.int32)
    together = executor.step([step(0, ids, 0, 40)]).copy()
    for _ in range(5):
        assert np.array_equal(executor.step([step(0, ids, 0, 40)]), together)
    alone = np.concatenate([executor.step([step(1, ids[i : i + 1], i)]).copy() for i in range(40)])
    executor.close()
    assert relative_error(together, alone) < 0.05


def test_fp8_weights_that_a_prompt_with_an_adapter_copies_in_parts_give_what_decoding_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without an adapter they are multiplied as they are. gate_up, of 235 MB in bf16, goes in parts of 32."""
    wide = dataclasses.replace(random_bundle.SHAPES["llama-8b"], num_layers=2, vocab_size=4096, max_context=256)
    monkeypatch.setitem(random_bundle.SHAPES, "wide", wide)
    monkeypatch.setattr(cuda, "_COPIED_BYTES", 64 << 20)
    config = EngineConfig(max_slots=2, max_context=128, max_loras=1, max_lora_rank=8)
    executor = CudaExecutor(random_bundle.RandomBundle("wide", "fp8"), config)
    size = wide.hidden_size, wide.intermediate_size
    tensors = tuple(
        LoraTensors(
            layer, target, RNG.normal(size=(8, size[0])).astype(np.float32),
            (RNG.normal(size=(size[1], 8)) * 5e-3).astype(np.float32), 1.0,
        )
        for layer in range(2)
        for target in ("gate_proj", "up_proj")
    )  # fmt: skip
    adapter = executor.load_adapter("a", make_adapter(tensors)).index
    ids = RNG.integers(5, 4000, 40).astype(np.int32)
    together = executor.step([step(0, ids, 0, 40, adapter)]).copy()
    for _ in range(5):
        assert np.array_equal(executor.step([step(0, ids, 0, 40, adapter)]), together)
    alone = np.concatenate([executor.step([step(1, ids[i : i + 1], i, 1, adapter)]).copy() for i in range(40)])
    plain = executor.step([step(0, ids, 0, 40)]).copy()
    executor.close()
    assert relative_error(plain, alone) > 0.2, "an adapter that changes nothing tests nothing"
    assert relative_error(together, alone) < 0.05


@pytest.mark.parametrize("batching", ["exact", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_int4_weights_as_they_are_stored_give_what_their_copies_in_bf16_give(
    kind: str, batching: str, open_cuda: Callable[..., CudaExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = RNG.integers(5, 300, 150).astype(np.int32)
    logits, plans = [], []
    for most in (0, 80):  # with "fast", chunks of 100 and 50 tokens: the first by way of a copy
        monkeypatch.setattr(cuda, "_MAX_PACKED_TOKENS", most)
        executor = open_cuda(kind, "int4", decode_batching=batching, prefill_chunk=100)
        logits.append(executor.step([step(1, ids, 0, 150)]).copy())
        plans.append(executor._decoder.plan)  # of what it took
        assert plans[-1] == executor.memory_plan
        assert executor._decoder.products_reason == ""
    assert relative_error(logits[1], logits[0]) < 0.05
    assert not np.array_equal(logits[1], logits[0])  # a copy's numbers are rounded, its products summed differently
    assert np.array_equal(logits[1][:80], logits[0][:80]) == (batching == "fast")
    # Nothing is copied with "exact": there is no memory for cuBLASLt.
    saved = (32 << 20) + 256 if batching == "exact" else 0
    assert {name: plans[0][name] - size for name, size in plans[1].items() if size != plans[0][name]} == (
        {"workspace": saved, "total": saved} if saved else {}
    )
