"""Which token is drawn from a row of logits.

The order is that of Hugging Face's processors and warpers: logit bias, repetition penalty, frequency and presence
penalty, token mask, temperature, top-k, top-p, min-p. The draw is a function of (seed, index of the token) and of the
logits alone, so a request with a seed gives the same tokens whatever else runs.

Where the head is cut, logits have a column for each token of a VocabMap: ids go in and come out, columns stay inside.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.core import SamplingParams, TokenLogprob
from edgellm_ros.errors import DeviceError
from edgellm_ros.vocab_map import VocabMap

Floats = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.int64]

_MIN_TEMPERATURE = 1e-6  # below it only exact ties could differ, and the division would overflow
_GROUP = 128  # logits of which only the maximum is looked at first
_MASK64 = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for the `index`-th draw of `seed`: two rounds of SplitMix64 (Steele et al. 2014), 53 bits."""
    return (_mix(_mix(seed) + 0x9E3779B97F4A7C15 * (index + 1)) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


class Sampler:
    """Draws the tokens of one answer. `seed` is the one in use, also when the request left it open."""

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt_ids: Sequence[int] = (),
        vocab_map: VocabMap | None = None,
    ) -> None:
        """`prompt_ids` count for the repetition penalty; logit_bias ids must be below `vocab_size`.

        Logits have `vocab_size` columns, or with a `vocab_map` its columns: tokens that it drops are never drawn, and
        a bias on them has no effect.
        """
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._index = 0
        self._temperature = max(params.temperature, _MIN_TEMPERATURE)
        self._map = vocab_map
        num_columns = vocab_size if vocab_map is None else len(vocab_map)
        self._top_k = params.top_k if params.top_k < num_columns else 0
        self._bias_ids = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        if vocab_map is not None:
            columns = vocab_map.rows(self._bias_ids).astype(np.int64)
            self._bias_ids, self._bias = columns[columns >= 0], self._bias[columns >= 0]
            columns = vocab_map.rows(prompt_ids).astype(np.int64)
            prompt_ids = columns[columns >= 0].tolist()
        self._penalised = bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)
        self._seen: _SeenTokens | None = _SeenTokens(prompt_ids) if self._penalised else None
        self._plain = not self._penalised and not len(self._bias_ids)

    def draw(self, logits: Floats, mask: npt.NDArray[np.bool_] | None = None) -> int:
        """Draw the next token from `logits` (columns,), which are left as they are, and count it for the answer.

        `mask` (vocab,) allows tokens. Raises DeviceError when the logits are not finite.
        """
        scores = logits if self._plain and mask is None else self._processed(logits, mask)
        column = int(scores.argmax())
        best = float(scores[column])
        if not math.isfinite(best):
            raise DeviceError(f"the model's logits are not finite (token {self._token(column)} has {best})")
        if not self.params.greedy:
            columns, weights = self._candidates(scores, best)
            column = _pick(columns, weights, uniform(self.seed, self._index))
        self._index += 1
        if self._seen is not None:
            self._seen.add(column)
        return self._token(column)

    def distribution(self, logits: Floats, mask: npt.NDArray[np.bool_] | None = None) -> Floats:
        """The probabilities (vocab,) fp64 that the next `draw` draws from; changes nothing."""
        scores = self._processed(logits, mask)
        probabilities = np.zeros(len(scores))
        if self.params.greedy:
            probabilities[int(scores.argmax())] = 1.0
        else:
            columns, weights = self._candidates(scores, float(scores.max()))
            probabilities[slice(None) if columns is None else columns] = weights / weights.sum(dtype=np.float64)
        if self._map is None:
            return probabilities
        spread = np.zeros(self._map.vocab_size)
        spread[self._map.token_ids] = probabilities
        return spread

    def _token(self, column: int) -> int:
        return column if self._map is None else int(self._map.token_ids[column])

    def _processed(self, logits: Floats, mask: npt.NDArray[np.bool_] | None) -> Floats:
        scores: Floats = logits.astype(np.float32)
        if len(self._bias_ids):
            scores[self._bias_ids] += self._bias
        if self._seen is not None:
            self._seen.penalise(scores, self.params)
        if mask is not None:
            mask = mask if self._map is None else mask[self._map.token_ids]
            assert mask.shape == scores.shape and mask.any(), "a mask allows at least one token"
            scores[~mask] = -np.inf
        return scores

    def _candidates(self, scores: Floats, best: float) -> tuple[Ids | None, Floats]:
        """The columns that can be drawn (None: all) and their weights, the most likely token's being 1."""
        top_p, min_p, ids = self.params.top_p, self.params.min_p, None
        if self._top_k:
            ids = np.flatnonzero(scores >= _kth_largest(scores, self._top_k))
        elif min_p > 0.0 and top_p >= 1.0:
            ids = np.flatnonzero(scores >= best + self._temperature * math.log(min_p) - 1e-3)
        if ids is None:
            weights = np.exp((scores - np.float32(best)) / np.float32(self._temperature))
            if top_p >= 1.0:
                return None, weights
        else:
            weights = np.exp((scores[ids].astype(np.float64) - best) / self._temperature)
        if top_p < 1.0:
            ids, weights = _nucleus(ids, weights, top_p)
        if min_p > 0.0:
            assert ids is not None
            kept = weights >= min_p
            ids, weights = ids[kept], weights[kept]
        return ids, weights


def logprob_of(logits: Floats, token: int, num_top: int, vocab_map: VocabMap | None = None) -> TokenLogprob:
    """Log-probability of `token` and of the `num_top` most likely ones under the model's own distribution.

    With a `vocab_map` that is the distribution over the tokens that it keeps, of which `token` must be one.
    """
    best = float(logits.max())
    total = best + math.log(float(np.exp(logits - np.float32(best)).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = np.flatnonzero(logits >= _kth_largest(logits, min(num_top, len(logits))))
        ids = ids[np.argsort(-logits[ids], kind="stable")][:num_top]
        named = ids if vocab_map is None else vocab_map.token_ids[ids]
        top = tuple((int(i), float(value) - total) for i, value in zip(named, logits[ids], strict=True))
    column = token if vocab_map is None else int(vocab_map.rows(token))
    return TokenLogprob(token, float(logits[column]) - total, top)


class _SeenTokens:
    """The distinct tokens of prompt and answer, and how often the answer has each."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        prompt = np.unique(np.asarray(prompt_ids, np.int64))
        self._size = len(prompt)
        self._ids: npt.NDArray[np.int64] = np.zeros(self._size + 256, np.int64)
        self._ids[: self._size] = prompt
        self._counts: npt.NDArray[np.float32] = np.zeros(self._size + 256, np.float32)
        self._place = {int(token): i for i, token in enumerate(prompt)}

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1

    def penalise(self, scores: Floats, params: SamplingParams) -> None:
        """Change `scores` in place: Keskar et al. 2019 (CTRL) for repetition, OpenAI's definition for the others."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        values = scores[ids]
        if params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            values = np.where(values < 0, values * penalty, values / penalty)
        values -= counts * np.float32(params.frequency_penalty)
        values -= (counts > 0) * np.float32(params.presence_penalty)
        scores[ids] = values


def _kth_largest(scores: Floats, k: int) -> float:
    """The k-th largest value, without ordering all of them where k is small.

    The k-th largest of the maxima of disjoint groups is a lower bound of it that few values reach.
    """
    num_groups = len(scores) // _GROUP
    if k <= num_groups:
        maxima = scores[: num_groups * _GROUP].reshape(_GROUP, num_groups).max(axis=0)
        bound = np.partition(maxima, num_groups - k)[num_groups - k]
        scores = scores[scores >= bound]
    return float(np.partition(scores, len(scores) - k)[len(scores) - k])


def _nucleus(ids: Ids | None, weights: Floats, top_p: float) -> tuple[Ids, Floats]:
    """Keep the most likely tokens whose predecessors have less than `top_p` of the mass (Holtzman et al. 2019)."""
    goal = top_p * float(weights.sum(dtype=np.float64))
    pool = weights
    for bound in (1e-2, 1e-4):  # mostly a few tokens have all of the mass that counts
        likely = weights[np.flatnonzero(weights >= bound)]
        if float(likely.sum(dtype=np.float64)) >= goal:
            pool = likely
            break
    # A quickselect by mass: the border lies in `pool`, and above that lie num_above weights with the mass `above`.
    above, num_above = 0.0, 0
    while len(pool) > 4096:
        sample = np.sort(pool[:: len(pool) // 32])
        is_high = pool >= sample[len(sample) // 2]
        high = pool[is_high]
        mass = above + float(high.sum(dtype=np.float64))
        if len(high) == len(pool):
            break
        if mass >= goal:
            pool = high
        else:
            above, num_above, pool = mass, num_above + len(high), pool[~is_high]
    falling = np.sort(pool)[::-1]
    place = int(np.searchsorted(above + np.cumsum(falling[:-1], dtype=np.float64), goal, side="left"))
    border, num_kept = falling[place], num_above + place + 1
    kept = np.flatnonzero(weights >= border)
    if len(kept) > num_kept:  # of equally likely tokens at the border the last ones go
        equal = np.flatnonzero(weights[kept] == border)
        kept = np.delete(kept, equal[num_kept - len(kept) :])
    return (kept if ids is None else ids[kept]), weights[kept]


def _pick(ids: Ids | None, weights: Floats, share: float) -> int:
    """The id at `share` of the mass; its block is looked for first, which saves the sums inside all others."""
    goal, first = None, 0
    if len(weights) > 16 * _GROUP:
        sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _GROUP), dtype=np.float64))
        goal = share * float(sums[-1])
        block = _place(sums, goal)
        goal -= float(sums[block - 1]) if block else 0.0
        first = block * _GROUP
        weights = weights[first : first + _GROUP]
    sums = np.cumsum(weights, dtype=np.float64)
    place = first + _place(sums, share * float(sums[-1]) if goal is None else goal)
    return place if ids is None else int(ids[place])


def _place(sums: Floats, goal: float) -> int:
    """Where the running sum passes `goal`; never at a weight of 0, also where rounding took `goal` to the end."""
    place = int(np.searchsorted(sums, goal, side="right"))
    return place if place < len(sums) else int(np.searchsorted(sums, sums[-1], side="left"))
