"""The CUDA executor keeps the contract that every executor keeps: the very tests of test/unit, over its own bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from test_executor_contract import (
    CAPACITY,
    test_a_copied_and_a_restored_prefix_continue_like_the_original,
    test_a_sequence_in_a_batch_gets_the_bits_it_gets_alone,
    test_a_slot_can_be_filled_to_its_last_position,
    test_a_step_without_logits_still_writes_the_cache,
    test_any_chunking_of_a_prompt_gives_the_same_bits,
    test_decoding_allocates_no_arrays,
    test_logits_of_several_positions_are_those_of_each_prefix,
    test_prefill_and_decode_share_a_step,
    test_writing_at_an_earlier_position_forgets_what_came_after,
)

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors import Executor, create_executor

__all__ = [
    "test_a_copied_and_a_restored_prefix_continue_like_the_original",
    "test_a_sequence_in_a_batch_gets_the_bits_it_gets_alone",
    "test_a_slot_can_be_filled_to_its_last_position",
    "test_a_step_without_logits_still_writes_the_cache",
    "test_any_chunking_of_a_prompt_gives_the_same_bits",
    "test_decoding_allocates_no_arrays",
    "test_logits_of_several_positions_are_those_of_each_prefix",
    "test_prefill_and_decode_share_a_step",
    "test_writing_at_an_earlier_position_forgets_what_came_after",
]


@pytest.fixture(
    scope="module",
    params=[(model, weights) for model in ("gpu_qwen3", "smollm2") for weights in ("fp16", "int8", "int4")]
    + [("gpu_gemma3", "fp16")],
    ids="-".join,
)
def executor(
    request: pytest.FixtureRequest, gpu_bundle: Callable[..., Bundle], smollm2: Callable[[str], Bundle]
) -> Iterator[Executor]:
    """Over random weights, and over SmolLM2's own."""
    model, weights = request.param
    config = EngineConfig(executor="cuda", max_slots=4, max_context=CAPACITY)
    bundle = smollm2(weights) if model == "smollm2" else gpu_bundle(model, weights)
    made = create_executor(bundle, config)
    assert made.info.name == "cuda"
    yield made
    made.close()
