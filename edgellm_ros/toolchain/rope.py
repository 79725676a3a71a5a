"""Which angle every position and channel pair is turned by: rotary tables, and the scaling read from a configuration.

Kinds of scaling: none (`default`), `linear` (positions divided, Kaiokendev 2023), `llama3` (low frequencies divided,
Llama 3.1), `yarn` (Peng et al. 2023, arXiv:2309.00071), `longrope` (one divisor a frequency, from a list for short
contexts or one for long ones; Ding et al. 2024, arXiv:2402.13753) and `factors` (one divisor a frequency, as GGUF has
them in rope_freqs.weight). One table serves all lengths: longrope's list is chosen by ModelSpec.max_context. A kind
whose table grows with the sequence (dynamic) is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import GLOBAL_ROPE, LOCAL_ROPE, ModelSpec
from edgellm_ros.toolchain.config_values import flag, positive_float, positive_int

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "factors")

Float32 = npt.NDArray[np.float32]


def rope_tables(spec: ModelSpec, num_positions: int, kind: str = GLOBAL_ROPE) -> tuple[Float32, Float32]:
    """Cosines and sines for positions 0 to num_positions - 1, of the layers whose rope is `kind` (global or local).

    Returns two arrays (num_positions, num_rotated // 2) float32; channel i is paired with channel i + num_rotated // 2,
    and the attention factor of yarn and longrope is already multiplied in. Frequencies and angles are rounded to
    float32 as Hugging Face's modules do, because far positions magnify the rounding. Raises CheckpointError for an
    unknown kind of scaling.
    """
    if kind == LOCAL_ROPE:
        spec = replace(spec, rope_theta=spec.local_rope_theta, rope_scaling=spec.local_rope_scaling)
    frequencies, attention_factor = rope_frequencies(spec)
    positions = np.arange(num_positions, dtype=np.float32)
    angles = (positions[:, None] * frequencies[None, :]).astype(np.float64)
    cos = (np.cos(angles) * attention_factor).astype(np.float32)
    sin = (np.sin(angles) * attention_factor).astype(np.float32)
    return cos, sin


def rope_frequencies(spec: ModelSpec) -> tuple[Float32, float]:
    """Radians a position for every channel pair (num_rotated // 2,) float32, and the factor on cosines and sines."""
    scaling = spec.rope_scaling
    kind = _rope_type(scaling)
    exponents = np.arange(0, spec.num_rotated, 2, dtype=np.float64) / spec.num_rotated
    plain = (1.0 / (spec.rope_theta**exponents).astype(np.float32)).astype(np.float32)
    if kind == "linear":
        return (plain / np.float32(scaling["factor"])).astype(np.float32), 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if kind == "yarn":
        return _yarn(plain, spec), float(scaling["attention_factor"])
    if kind == "longrope":
        which = "short_factor" if spec.max_context <= short_context(spec) else "long_factor"
        return plain / _factors(scaling[which], plain, spec), float(scaling["attention_factor"])
    if kind == "factors":
        return plain / _factors(scaling["factors"], plain, spec), 1.0
    return plain, 1.0


def short_context(spec: ModelSpec) -> int:
    """The longest context of longrope's list for short ones; without longrope all of the model's."""
    if spec.rope_scaling.get("rope_type") != "longrope":
        return spec.max_context
    return int(spec.rope_scaling["original_max_position_embeddings"])


def read_rope(
    config: Mapping[str, Any], max_context: int, default_theta: float = 10000.0, *, partial: bool = False
) -> tuple[float, dict[str, Any]]:
    """The base of the frequencies, and the scaling for ModelSpec.rope_scaling with every default filled in.

    Takes transformers 5's `rope_parameters` (with rope_theta inside) as well as the older `rope_theta` beside
    `rope_scaling`. Raises CheckpointError for an unknown kind, a missing or impossible number, or rotation of a part
    of the head only unless `partial` allows it.
    """
    raw = _raw(config)
    both = {**config, **{key: value for key, value in raw.items() if value is not None}}
    theta = positive_float(both, "rope_theta", default_theta)
    if not partial and positive_float(both, "partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"partial_rotary_factor is {both['partial_rotary_factor']}; whole heads are turned")
    kind = _rope_type(raw)
    originals = [source.get("original_max_position_embeddings") for source in (config, raw)]
    original = positive_int(
        {"original_max_position_embeddings": originals[0] or originals[1]},
        "original_max_position_embeddings",
        max_context,
    )
    if kind == "linear":
        return theta, {"rope_type": kind, "factor": positive_float(raw, "factor")}
    if kind == "llama3":
        scaling: dict[str, Any] = {"rope_type": kind, "original_max_position_embeddings": original}
        for key in ("factor", "low_freq_factor", "high_freq_factor"):
            scaling[key] = positive_float(raw, key)
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise CheckpointError(
                f"rope: high_freq_factor {scaling['high_freq_factor']} must be above "
                f"low_freq_factor {scaling['low_freq_factor']}"
            )
        return theta, scaling
    if kind == "yarn":
        return theta, _read_yarn(raw, original, max_context)
    if kind == "longrope":
        return theta, _read_longrope(raw, original, max_context)
    if kind == "factors":
        return theta, {"rope_type": kind, "factors": [float(f) for f in raw["factors"]]}
    return theta, {}


def read_rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    """Channels of a head that are turned: all, or the share `partial_rotary_factor` of them."""
    raw = _raw(config)
    share = positive_float({**config, **{k: v for k, v in raw.items() if v is not None}}, "partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * share)
    if share > 1.0 or rotary_dim % 2 or not rotary_dim:
        raise CheckpointError(
            f"partial_rotary_factor {share} turns {rotary_dim} of {head_dim} channels; it must be an even number"
        )
    return rotary_dim


def _raw(config: Mapping[str, Any]) -> Mapping[str, Any]:
    raw = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(raw, Mapping) or any(isinstance(value, Mapping) for value in raw.values()):
        raise CheckpointError(f"the configuration's rope settings {raw!r} are not one flat object for all layers")
    return raw


def _rope_type(scaling: Mapping[str, Any]) -> str:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "su" or (kind == "yarn" and "long_factor" in scaling):  # earlier names, in Phi-3's configurations
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    return str(kind)


def _llama3(plain: Float32, scaling: Mapping[str, Any]) -> Float32:
    """Long waves are slowed by `factor`, short ones kept, those between blended by how often they turn in a context."""
    factor, low, high = (np.float32(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = np.float32(scaling["original_max_position_embeddings"]) * plain / np.float32(2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0).astype(np.float32)
    blended: Float32 = ((1 - kept) * plain / factor + kept * plain).astype(np.float32)
    return blended


def _yarn(plain: Float32, spec: ModelSpec) -> Float32:
    """Channels that turn more than beta_fast times in the original context are kept, below beta_slow divided."""
    scaling = spec.rope_scaling

    def channel(turns: float) -> float:
        context = scaling["original_max_position_embeddings"]
        return spec.num_rotated * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    first, last = channel(scaling["beta_fast"]), channel(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, spec.num_rotated - 1)
    if first == last:
        last += 0.001
    divided = np.clip((np.arange(plain.size, dtype=np.float32) - first) / (last - first), 0.0, 1.0).astype(np.float32)
    blended: Float32 = (plain / np.float32(scaling["factor"]) * divided + plain * (1 - divided)).astype(np.float32)
    return blended


def _read_yarn(raw: Mapping[str, Any], original: int, max_context: int) -> dict[str, Any]:
    factor = positive_float(raw, "factor", max_context / original)
    attention = _yarn_mscale(factor)
    if raw.get("mscale") and raw.get("mscale_all_dim"):
        scale, all_dims = (positive_float(raw, key) for key in ("mscale", "mscale_all_dim"))
        attention = _yarn_mscale(factor, scale) / _yarn_mscale(factor, all_dims)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": positive_float(raw, "attention_factor", attention),
        "beta_fast": positive_float({"beta_fast": raw.get("beta_fast") or None}, "beta_fast", 32.0),
        "beta_slow": positive_float({"beta_slow": raw.get("beta_slow") or None}, "beta_slow", 1.0),
        "truncate": flag(raw, "truncate", True),
    }


def _read_longrope(raw: Mapping[str, Any], original: int, max_context: int) -> dict[str, Any]:
    lists: dict[str, Any] = {}
    for key in ("short_factor", "long_factor"):
        values = raw.get(key)
        if not isinstance(values, list) or not values:
            raise CheckpointError(f"longrope's {key} is {values!r}; it must be a list of numbers, one a frequency")
        lists[key] = [positive_float({key: value}, key) for value in values]
    factor = positive_float(raw, "factor", max_context / original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "attention_factor": positive_float(raw, "attention_factor", attention),
        **lists,
    }


def _factors(values: list[float], plain: Float32, spec: ModelSpec) -> Float32:
    factors = np.asarray(values, dtype=np.float32)
    if factors.shape != plain.shape:
        raise CheckpointError(
            f"{factors.size} rope factors; {spec.num_rotated} turned channels have {plain.size}"
        )
    return factors


def _yarn_mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
