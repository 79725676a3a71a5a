"""Which angle every position and channel pair is turned by: rotary tables, and the scaling read from a configuration.

Kinds of scaling: none (`default`), `linear` (positions divided, Kaiokendev 2023), `llama3` (low frequencies divided,
Llama 3.1), `yarn` (Peng et al. 2023, arXiv:2309.00071) and `factors` (one divisor a frequency, as GGUF stores them in
rope_freqs.weight). A kind whose table depends on the length of the sequence (dynamic, longrope) is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.bundle import ModelSpec
from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.config_values import flag, positive_float, positive_int

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "factors")

Float32 = npt.NDArray[np.float32]


def rope_tables(spec: ModelSpec, num_positions: int) -> tuple[Float32, Float32]:
    """Cosines and sines for positions 0 to num_positions - 1.

    Returns two arrays (num_positions, head_dim // 2) float32; channel i is paired with channel i + head_dim // 2, and
    yarn's attention factor is already multiplied in. Frequencies and angles are rounded to float32 as Hugging Face's
    modules do, because far positions magnify the rounding. Raises CheckpointError for an unknown kind of scaling.
    """
    frequencies, attention_factor = rope_frequencies(spec)
    positions = np.arange(num_positions, dtype=np.float32)
    angles = (positions[:, None] * frequencies[None, :]).astype(np.float64)
    cos = (np.cos(angles) * attention_factor).astype(np.float32)
    sin = (np.sin(angles) * attention_factor).astype(np.float32)
    return cos, sin


def rope_frequencies(spec: ModelSpec) -> tuple[Float32, float]:
    """Radians a position for every channel pair (head_dim // 2,) float32, and the factor on cosines and sines."""
    scaling = spec.rope_scaling
    kind = _rope_type(scaling)
    exponents = np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim
    plain = (1.0 / (spec.rope_theta**exponents).astype(np.float32)).astype(np.float32)
    if kind == "linear":
        return (plain / np.float32(scaling["factor"])).astype(np.float32), 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if kind == "yarn":
        return _yarn(plain, spec), float(scaling["attention_factor"])
    if kind == "factors":
        factors = np.asarray(scaling["factors"], dtype=np.float32)
        if factors.shape != plain.shape:
            raise CheckpointError(f"{factors.size} rope factors; a head of {spec.head_dim} channels has {plain.size}")
        return plain / factors, 1.0
    return plain, 1.0


def read_rope(config: Mapping[str, Any], max_context: int) -> tuple[float, dict[str, Any]]:
    """The base of the frequencies, and the scaling for ModelSpec.rope_scaling with every default filled in.

    Takes transformers 5's `rope_parameters` (with rope_theta inside) as well as the older `rope_theta` beside
    `rope_scaling`. Raises CheckpointError for an unknown kind, a missing or impossible number, or rotation of a part
    of the head only.
    """
    raw = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(raw, Mapping) or any(isinstance(value, Mapping) for value in raw.values()):
        raise CheckpointError(f"the configuration's rope settings {raw!r} are not one flat object for all layers")
    both = {**config, **{key: value for key, value in raw.items() if value is not None}}
    theta = positive_float(both, "rope_theta", 10000.0)
    if positive_float(both, "partial_rotary_factor", 1.0) != 1.0:
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
    if kind == "factors":
        return theta, {"rope_type": kind, "factors": [float(f) for f in raw["factors"]]}
    return theta, {}


def _rope_type(scaling: Mapping[str, Any]) -> str:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
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
        return spec.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    first, last = channel(scaling["beta_fast"]), channel(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, spec.head_dim - 1)
    if first == last:
        last += 0.001
    divided = np.clip((np.arange(plain.size, dtype=np.float32) - first) / (last - first), 0.0, 1.0).astype(np.float32)
    blended: Float32 = (plain / np.float32(scaling["factor"]) * divided + plain * (1 - divided)).astype(np.float32)
    return blended


def _read_yarn(raw: Mapping[str, Any], original: int, max_context: int) -> dict[str, Any]:
    factor = positive_float(raw, "factor", max_context / original)
    scale, all_dims = raw.get("mscale"), raw.get("mscale_all_dim")
    attention = _yarn_mscale(factor)
    if scale and all_dims:
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


def _yarn_mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
