"""What the engine counts and times, and how it is summed up for people and diagnostics."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from edgellm_ros.core import FinishReason, Usage

STAGES = ("queue", "prefill", "time_to_first_token", "prefill_step", "decode_step", "total")
_RESERVOIR = 2048  # newest samples of each stage that percentiles are taken of


@dataclass(frozen=True)
class Percentiles:
    """Of the newest samples of one stage, in seconds; `count` is of all samples ever."""

    count: int = 0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0


@dataclass(frozen=True)
class MetricsSnapshot:
    """The engine's state at one moment; tokens and seconds are since the start."""

    submitted: int
    rejected: int  # for a full queue
    finished: dict[FinishReason, int]
    waiting: int
    active: int
    prompt_tokens: int
    cached_tokens: int  # of the prompts, not computed again
    completion_tokens: int
    prefill_s: float  # spent in prefill steps
    decode_s: float  # spent in decode steps
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    stages: dict[str, Percentiles]


class Metrics:
    """Counters and bounded reservoirs. Written by the engine's thread, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._submitted = self._rejected = 0
        self._finished: Counter[FinishReason] = Counter()
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._prefill_tokens = self._decode_tokens = 0
        self._prefill_s = self._decode_s = 0.0
        self._samples: dict[str, deque[float]] = {stage: deque(maxlen=_RESERVOIR) for stage in STAGES}
        self._counts: Counter[str] = Counter()

    def count_submitted(self) -> None:
        """One request was accepted."""
        with self._lock:
            self._submitted += 1

    def count_rejected(self) -> None:
        """One request found the queue full."""
        with self._lock:
            self._rejected += 1

    def count_prefill(self, num_tokens: int, seconds: float) -> None:
        """One prefill step computed `num_tokens`."""
        with self._lock:
            self._prefill_tokens += num_tokens
            self._prefill_s += seconds
            self._add("prefill_step", seconds)

    def count_decode(self, num_tokens: int, seconds: float) -> None:
        """One decode step gave `num_tokens`, one for each sequence."""
        with self._lock:
            self._decode_tokens += num_tokens
            self._decode_s += seconds
            self._add("decode_step", seconds)

    def count_finished(self, reason: FinishReason, usage: Usage) -> None:
        """One request ended."""
        with self._lock:
            self._finished[reason] += 1
            self._prompt_tokens += usage.prompt_tokens
            self._cached_tokens += usage.cached_tokens
            self._completion_tokens += usage.completion_tokens
            self._add("queue", usage.queue_s)
            self._add("total", usage.total_s)
            if usage.completion_tokens:
                self._add("prefill", usage.prefill_s)
                self._add("time_to_first_token", usage.time_to_first_token_s)

    def snapshot(self, waiting: int, active: int) -> MetricsSnapshot:
        """Everything so far, with the number of requests that wait and run now."""
        with self._lock:
            samples = {stage: list(values) for stage, values in self._samples.items()}
            counts = dict(self._counts)
            state = {
                "submitted": self._submitted,
                "rejected": self._rejected,
                "finished": dict(self._finished),
                "prompt_tokens": self._prompt_tokens,
                "cached_tokens": self._cached_tokens,
                "completion_tokens": self._completion_tokens,
                "prefill_s": self._prefill_s,
                "decode_s": self._decode_s,
                "prefill_tokens_per_s": self._prefill_tokens / self._prefill_s if self._prefill_s else 0.0,
                "decode_tokens_per_s": self._decode_tokens / self._decode_s if self._decode_s else 0.0,
            }
        stages = {stage: _percentiles(values, counts.get(stage, 0)) for stage, values in samples.items()}
        return MetricsSnapshot(waiting=waiting, active=active, stages=stages, **state)  # type: ignore[arg-type]

    def _add(self, stage: str, seconds: float) -> None:
        self._samples[stage].append(seconds)
        self._counts[stage] += 1


def _percentiles(values: list[float], count: int) -> Percentiles:
    if not values:
        return Percentiles()
    p50, p95, p99 = (float(p) for p in np.percentile(values, (50, 95, 99)))
    return Percentiles(count, p50, p95, p99)
