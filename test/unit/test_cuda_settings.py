"""What the CUDA executor makes of a bundle and the settings: the native DecoderConfig, which needs no GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from edgellm_ros import native
from edgellm_ros.benchmark.random_bundle import RandomBundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ConfigError
from edgellm_ros.executors import cuda

pytestmark = pytest.mark.skipif(bool(native.import_module()[1]), reason=native.import_module()[1])


def settings(wide_activations: bool = False, **config: Any) -> Any:
    bundle = RandomBundle("llama-1b", "int4")
    model = dataclasses.replace(bundle.manifest.model, wide_activations=wide_activations)
    bundle.manifest = dataclasses.replace(bundle.manifest, model=model)
    return cuda._settings(bundle, EngineConfig(**config))


@pytest.mark.parametrize(
    ("batching", "max_slots", "batch_invariant", "row_invariant", "min_gemm_tokens"),
    [
        ("exact", 4, True, True, 2),
        ("exact", 2, True, True, 2),
        ("exact", 1, False, True, 2),  # nobody to decode together with: the kernels for one sequence may be used
        ("fast", 4, False, False, 17),
        ("fast", 1, False, False, 17),
    ],
)
def test_exact_decoding_asks_for_kernels_whose_bits_do_not_depend_on_the_others(
    batching: str, max_slots: int, batch_invariant: bool, row_invariant: bool, min_gemm_tokens: int
) -> None:
    found = settings(decode_batching=batching, max_slots=max_slots)
    assert found.num_slots == max_slots
    assert (found.batch_invariant, found.row_invariant) == (batch_invariant, row_invariant)
    assert found.min_gemm_tokens == min_gemm_tokens


@pytest.mark.parametrize(("alone", "busy"), [(128, 64), (64, 128)])
def test_the_longest_step_is_the_larger_of_the_two_chunks(alone: int, busy: int) -> None:
    assert settings(prefill_chunk=alone, prefill_chunk_busy=busy).max_tokens == 128


@pytest.mark.parametrize(
    ("asked", "wide", "found"),
    [
        ("auto", False, "fp16"),
        ("auto", True, "bf16"),  # whose numbers exceed fp16's 65504
        ("fp16", True, "fp16"),
        ("bf16", False, "bf16"),
        ("fp8", True, "fp8"),
    ],
)
def test_the_kv_cache_is_fp16_where_the_models_numbers_allow_it_and_nobody_asks_otherwise(
    asked: str, wide: bool, found: str
) -> None:
    assert settings(wide, kv_cache=asked).kv_format.name == found


def test_a_kv_cache_that_the_kernels_do_not_have_is_refused_with_those_they_have() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache is 'fp32', which the cuda executor does not have; use auto, .*fp8"):
        settings(kv_cache="fp32")


def test_a_slot_holds_what_was_asked_for_up_to_the_bundles_context() -> None:
    assert settings().capacity == 4096, "of a model with more, for its memory's sake"
    assert settings(max_context=100).capacity == 100
    assert settings(max_context=32768).capacity == 32768
    with pytest.raises(ConfigError, match="max_context 32769 exceeds the bundle's 32768; export again with --max-context"):
        settings(max_context=32769)
