"""Which model family a checkpoint belongs to, and whether its tensors are the ones that the family has."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

from edgellm_ros.errors import CheckpointError, UnknownModelError
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint
from edgellm_ros.toolchain.families import FAMILIES, Family
from edgellm_ros.toolchain.families.left_out import why_left_out

_OF_QUANTISED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".scales", ".qzeros")
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # a table that old versions of transformers saved
_MAX_NAMED = 4
_ROWS = 4096


def detect(checkpoint: Checkpoint) -> Family:
    """The family by model_type and architectures (a GGUF's general.architecture stands as model_type).

    Raises UnknownModelError that says what was found and which families there are, or why this one is left out.
    """
    model_type, architectures = checkpoint.config.get("model_type"), _architectures(checkpoint.config)
    for family in FAMILIES:
        if checkpoint.kind == "gguf":
            if model_type in family.gguf_architectures:
                return family
            continue
        known = set(architectures) & set(family.architectures)
        if known and (model_type is None or model_type in family.model_types):
            return family
        if not architectures and model_type in family.model_types:
            return family
    if checkpoint.kind == "gguf" and any(model_type == family.name for family in FAMILIES):
        raise UnknownModelError(
            f"{checkpoint.path} is GGUF; the {model_type} family is read from a Hugging Face directory only"
        )
    reason = why_left_out(checkpoint.config)
    if reason:
        raise UnknownModelError(f"{checkpoint.path} is left out: {reason}")
    if checkpoint.kind == "gguf":
        found = f"general.architecture {model_type!r}"
        table = "; ".join(f"{f.name}: {', '.join(f.gguf_architectures)}" for f in FAMILIES if f.gguf_architectures)
    else:
        found = f"model_type {model_type!r} and architectures {architectures!r}"
        table = "; ".join(f"{f.name}: {', '.join(f.model_types)}, {f.architectures[0]}" for f in FAMILIES)
    raise UnknownModelError(f"{checkpoint.path} has {found}; the families that can be exported are {table}")


def load_spec(checkpoint: Checkpoint) -> tuple[Family, ModelSpec]:
    """The checkpoint's family and what its configuration says; nothing is read from the weights."""
    family = detect(checkpoint)
    return family, family.spec(checkpoint.config, checkpoint.name())

def check_tensors(checkpoint: Checkpoint, family: Family, spec: ModelSpec) -> None:
    """Raise CheckpointError that counts and names missing, extra and wrongly shaped tensors.

    Tolerated extras: saved rotary tables, biases of zeros at quantised weights, and beside a tied head an
    lm_head.weight that equals the embedding.
    """
    expected = family.expected_tensors(spec, checkpoint.config)
    present = set(checkpoint.names())
    missing = [name for name in expected if name not in present]
    extra = [name for name in checkpoint.names() if name not in expected and not name.endswith(_IGNORED_SUFFIXES)]
    extra = [name for name in extra if not _is_zero_bias(checkpoint, name)]
    if spec.tied_head and "lm_head.weight" in extra:
        if not _same(checkpoint, "lm_head.weight", "model.embed_tokens.weight"):
            raise CheckpointError(
                f"{checkpoint.path}: config.json says tie_word_embeddings, yet lm_head.weight differs from "
                "model.embed_tokens.weight; set tie_word_embeddings to false if the model has its own head"
            )
        extra.remove("lm_head.weight")
    shaped = [
        f"{name} is {list(checkpoint.shape(name))} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in present and checkpoint.shape(name) != shape
    ]
    problems = [
        f"{len(names)} {what} ({_some(names)})"
        for names, what in ((missing, "missing"), (extra, "extra"), (shaped, "wrongly shaped"))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: the tensors are not those of a {family.name} model with {spec.num_layers} layers: "
            + ", ".join(problems)
            + _hint(checkpoint, extra)
        )


def _hint(checkpoint: Checkpoint, extra: list[str]) -> str:
    if not checkpoint.quantization() and any(name.endswith(_OF_QUANTISED) for name in extra):
        return (
            "; these are of quantised layers, but config.json has no quantization_config that says how: "
            "download the whole checkpoint, or take the original one"
        )
    return "; download the checkpoint again, or correct config.json"


def _is_zero_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Tools that quantise give every layer a bias, of zeros where the model has none."""
    weight = f"{name.removesuffix('.bias')}.weight"
    quantised = name.endswith(".bias") and weight in checkpoint and checkpoint.scheme(weight) is not None
    return quantised and not checkpoint.read(name).any()


def _architectures(config: dict[str, Any]) -> list[str]:
    value = config.get("architectures") or []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _MAX_NAMED
    return ", ".join(islice(names, _MAX_NAMED)) + (f" and {more} more" if more > 0 else "")


def _same(checkpoint: Checkpoint, first: str, second: str) -> bool:
    if second not in checkpoint or checkpoint.shape(first) != checkpoint.shape(second):
        return False
    num_rows = checkpoint.shape(first)[0]
    for start in range(0, num_rows, _ROWS):
        stop = min(start + _ROWS, num_rows)
        if not np.array_equal(checkpoint.read_rows(first, start, stop), checkpoint.read_rows(second, start, stop)):
            return False
    return True
