"""What scales of a KV cache do to the layers around it: keys and values are stored divided by powers of two.

E4M3 is floating point, so a power of two only moves numbers away from its ends (448, and the subnormals below 2^-6);
it is exact in bf16 and fp32, and in fp16 between 2^-14 and 65504. So no kernel knows of scales: the rows of q, k and v,
and attention's output projection, have them in their weights, and what is added to those, an adapter, gets them too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgellm_ros.manifest import ModelSpec

FloatArray = npt.NDArray[np.float32]


def projection_factors(model: ModelSpec, layer: int) -> dict[str, float]:
    """The factor on the output of a layer's projections; those that are missing have 1.

    Norms of queries and keys undo what is before them, so the norms' gains have their factors then.
    """
    if not model.kv_scales:
        return {}
    key, value = model.kv_scales[layer]
    of_scores = {"q_norm": key, "k_norm": 1 / key} if model.qk_norm else {"q_proj": key, "k_proj": 1 / key}
    return {**of_scores, "v_proj": 1 / value, "o_proj": value}


def row_factors(model: ModelSpec, stem: str) -> FloatArray | None:
    """(out,) factors on the rows of the stored layer `stem` (layers.0.attn.qkv, …); None where all are 1."""
    if not (model.kv_scales and stem.endswith(("attn.qkv", "attn.o"))):
        return None
    factors = projection_factors(model, int(stem.split(".")[1]))
    if stem.endswith("attn.o"):
        return np.full(model.hidden_size, factors["o_proj"], np.float32)
    widths = {"q_proj": model.num_heads, "k_proj": model.num_kv_heads, "v_proj": model.num_kv_heads}
    parts = [np.full(heads * model.head_dim, factors.get(name, 1.0), np.float32) for name, heads in widths.items()]
    return np.concatenate(parts)
