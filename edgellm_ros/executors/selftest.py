"""Compares a loaded executor with the reference logits in the bundle, so that a wrong engine never serves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import BundleError, ConfigError
from edgellm_ros.executors.base import Executor, SequenceStep
from edgellm_ros.manifest import Manifest
from edgellm_ros.vocab_map import VocabMap


@dataclass(frozen=True)
class SelfTestResult:
    """How close the executor came: relative error of the logits, and how many next tokens were the same."""

    error: float
    max_error: float
    num_agreeing: int
    num_tokens: int

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= self.max_error


def check_room(manifest: Manifest, capacity: int, remedy: str = "set it to at least") -> None:
    """Raise ConfigError when slots of `capacity` tokens are too short for the self-test; the remedy ends with how long.

    Before anything is loaded: executors only assert that a step fits.
    """
    needed = manifest.self_test.num_tokens
    if capacity < needed:
        raise ConfigError(
            f"max_context is {capacity} tokens, but the bundle's self-test needs {needed} or more; {remedy} {needed}, "
            "or load with self_test off"
        )


def measure_self_test(executor: Executor, manifest: Manifest) -> SelfTestResult:
    """Run the bundle's self-test cases in slot 0, which must be unused, and measure."""
    logits = (
        executor.step([SequenceStep(0, np.asarray(case.prompt_ids, np.int32), 0, len(case.next_ids))])
        for case in manifest.self_test.cases
    )
    return compare_self_test(manifest, logits, executor.info.vocab_map, executor.info.rounding)


def compare_self_test(
    manifest: Manifest,
    all_logits: Iterable[npt.NDArray[np.float32]],
    vocab: VocabMap | None,
    rounding: float = 0.0,
) -> SelfTestResult:
    """Measure logits (next ids of the case, rows of the head) that something computed for each case, in order.

    vocab: which token each row is, where the head was cut; rounding: what is allowed beside the self-test's max_error.
    """
    test = manifest.self_test
    difference = reference_energy = 0.0
    agreeing = tokens = 0
    for case, logits in zip(test.cases, all_logits, strict=True):
        expected = np.asarray(case.logits, np.float64)
        columns, best = np.asarray(case.logit_ids), logits.argmax(-1)
        if vocab is not None:
            columns, best = vocab.rows(columns), vocab.token_ids[best]
        got = logits[-1, columns].astype(np.float64)
        difference += float(np.sum((got - expected) ** 2))
        reference_energy += float(np.sum((expected - expected.mean()) ** 2))
        agreeing += int(np.sum(best == np.asarray(case.next_ids)))
        tokens += len(case.next_ids)
    error = float(np.sqrt(difference / reference_energy)) if reference_energy else 0.0
    return SelfTestResult(error, test.max_error + rounding, agreeing, tokens)


def run_self_test(executor: Executor, manifest: Manifest) -> SelfTestResult:
    """Measure, and raise BundleError with the numbers when the executor does not agree with the reference."""
    result = measure_self_test(executor, manifest)
    remedy = "export the model again"
    if executor.info.name == "tensorrt":
        remedy = "build the engine again with `edgellm build --force`, use the executor cuda"
    if not result.passed:
        raise BundleError(
            f"self-test failed: {executor.info.name}'s logits differ from "
            f"{manifest.self_test.reference or 'the reference'} by {result.error:.3g} (relative), allowed is "
            f"{result.max_error:.3g}; {result.num_agreeing} of {result.num_tokens} next tokens agree; {remedy}, or "
            f"load with self_test off to look into it"
        )
    return result
