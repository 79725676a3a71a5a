"""Finds the fastest tile of each decode product on the GPU that is here, one product after the other.

A decode step is timed as a whole, because a product's kernel overlaps with its neighbours'.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm_ros.executors.cuda_tiles import PRODUCTS, TileDecoder

NOISE = 0.003  # a tile that is faster by less is left to the kernel's own choice
_STEPS = 24

Progress = Callable[[str, int, int], None]  # what is timed, tiles done, tiles in all


class TimedDecoder(TileDecoder, Protocol):
    """What of `_native.Decoder` times steps."""

    def time_run(
        self, slots: Sequence[int], positions: Sequence[int], token_ids: Sequence[int], num_steps: int
    ) -> Sequence[float]:
        """Milliseconds of each of `num_steps` greedy steps."""


@dataclass(frozen=True)
class Choice:
    """The tile of one product at one batch size; -1 is the kernel's own choice."""

    product: str
    tile: int
    count: int  # tiles that there were
    ms: float  # of a whole step with it
    default_ms: float  # of a whole step with the kernel's own choice of this product


def num_timed(decoder: TileDecoder, batch: int) -> int:
    """Tiles that `tune` will time."""
    return sum(decoder.num_tiles(product, batch) + 1 for product in PRODUCTS)


def tune(decoder: TimedDecoder, batch: int, context: int, progress: Progress | None = None) -> list[Choice]:
    """Time every tile of every product at `batch` sequences of `context` tokens and leave the decoder with the best.

    The slots 0 to batch - 1 must hold `context` tokens and have room for 64 more.
    """
    slots, positions, tokens = list(range(batch)), [context] * batch, [7] * batch
    chosen = []
    done, total = 0, num_timed(decoder, batch)
    for product in PRODUCTS:
        count = decoder.num_tiles(product, batch)
        times: dict[int, float] = {}
        for tile in range(-1, count):
            if progress is not None:
                progress(f"{product}, batch {batch}", done, total)
            decoder.set_tile(product, batch, tile)
            decoder.time_run(slots, positions, tokens, 4)  # captures the graph
            times[tile] = statistics.median(decoder.time_run(slots, positions, tokens, _STEPS))
            done += 1
        best = min(times, key=lambda tile: times[tile])
        if times[best] > (1.0 - NOISE) * times[-1]:
            best = -1
        decoder.set_tile(product, batch, best)
        chosen.append(Choice(product, best, count, times[best], times[-1]))
    if progress is not None:
        progress(f"batch {batch}", total, total)
    return chosen
