"""Makes the self-test that a bundle carries: prompts, the reference's logits, and how far others may be from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edgellm_ros.bundle import Bundle
from edgellm_ros.errors import ToolchainError
from edgellm_ros.executors.selftest import compare_self_test
from edgellm_ros.manifest import Manifest, SelfTestCase
from edgellm_ros.toolchain.layerwise import first_logits
from edgellm_ros.toolchain.reference import FloatArray
from edgellm_ros.vocab_map import VocabMap

# Own sentences of the kinds a robot meets; long enough that a wrong position or mask shows.
_TEXTS = (
    "The robot moves to the kitchen, opens the fridge and takes out a bottle of",
    "Question: What is the capital of France?\nAnswer: The capital of France is",
    'def add(a, b):\n    """Return the sum of two numbers."""\n    return',
)
_NUM_TOP = 48
_NUM_SPREAD = 48

# Largest relative error of the logits that an export may have, by scheme. The rounding of int4 moves logits a lot and
# a wrong graph moves them by about 1.4 (two unrelated vectors), so these separate the two with room on both sides.
_QUALITY_MARKS = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.15, "int4": 0.6}
_KEPT_MARK = 0.3  # 0.02 to 0.04 is usual; random weights of a tiny Gemma gave 0.16
_MARGIN = 1.5  # an executor on other hardware rounds differently from the one that measured here
_FLOOR = {"fp32": 1e-3, "fp16": 2e-2, "fp8": 2e-2, "int8": 5e-2, "nvfp4": 5e-2, "int4": 0.1}


def encode_prompts(tokenizer_json: str, vocab_size: int) -> list[npt.NDArray[np.int64]]:
    """The texts as token ids."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    prompts = [np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64) for text in _TEXTS]
    for prompt in prompts:
        if prompt.size == 0 or prompt.max() >= vocab_size:
            raise ToolchainError(
                f"the tokenizer gives ids up to {prompt.max(initial=0)} but the model has {vocab_size} embeddings; "
                "tokenizer and weights are not of the same model"
            )
    return prompts


def make_cases(
    prompts: list[npt.NDArray[np.int64]], logits: list[FloatArray], vocab: VocabMap | None = None
) -> tuple[SelfTestCase, ...]:
    """One case a prompt; logits are (last positions, vocab), or have the columns of a vocabulary map."""
    cases = []
    for prompt, rows in zip(prompts, logits, strict=True):
        last = rows[-1]
        top = np.argsort(-last)[:_NUM_TOP]
        spread = np.linspace(0, len(last) - 1, min(_NUM_SPREAD, len(last))).astype(np.int64)
        columns = np.unique(np.concatenate([top, spread]))
        best = rows.argmax(-1)
        ids, next_ids = (columns, best) if vocab is None else (vocab.token_ids[columns], vocab.token_ids[best])
        cases.append(
            SelfTestCase(
                prompt_ids=tuple(map(int, prompt)),
                next_ids=tuple(map(int, next_ids)),
                logit_ids=tuple(map(int, ids)),
                logits=tuple(round(float(v), 5) for v in last[columns]),
            )
        )
    return tuple(cases)


def finish_self_test(root: Path, manifest: Manifest) -> Manifest:
    """Run the exported decoder, refuse it when it is too far from the reference, and set how far others may be."""
    scheme = manifest.quantization.weights
    cases = manifest.self_test.cases
    bundle = Bundle(root, manifest)
    prompts = [np.asarray(case.prompt_ids, np.int32) for case in cases]
    logits = first_logits(bundle, prompts, [len(case.next_ids) for case in cases])
    result = compare_self_test(manifest, logits, bundle.vocab_map())
    # Integers that were kept are compared with what they stand for: only activations are rounded.
    mark = _KEPT_MARK if manifest.quantization.kept else _QUALITY_MARKS[scheme]
    if not result.error <= mark:
        raise ToolchainError(
            f"the {scheme} bundle's logits differ from the original's by {result.error:.3g} (relative), allowed is "
            f"{mark:.3g}; {result.num_agreeing} of {result.num_tokens} next tokens agree; "
            "choose more bits with --weights"
        )
    allowed = max(_MARGIN * result.error, _FLOOR[scheme])
    return replace(manifest, self_test=replace(manifest.self_test, max_error=allowed))
