"""Whether a token drawn elsewhere lies where the host's sampler would draw: what tests of the device's sampling share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.runtime.sampling import Sampler, uniform


def agrees(sampler: Sampler, index: int, logits: npt.NDArray[np.float32], token: int, mask: Any = None) -> bool:
    """Whether `token` lies where draw `index` falls, give or take the rounding of the weights."""
    probabilities = sampler.distribution(logits, mask)
    if sampler.params.greedy:
        return token == int(probabilities.argmax())
    share, sums = uniform(sampler.seed, index), np.cumsum(probabilities)
    return bool(probabilities[token] > 0 and sums[token] - probabilities[token] - 2e-5 <= share <= sums[token] + 2e-5)
