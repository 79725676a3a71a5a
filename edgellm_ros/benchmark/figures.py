"""What was measured, and how it is written to JSON: the terminal's tables and the plot are made of the same dictionary.

Every time is in milliseconds and every round is kept; tokens/s and GB/s are of the median. tokens_per_s counts all
sequences of a batch, ms_per_token is the time between two tokens of one of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgellm_ros.benchmark.read_bandwidth import ReadBandwidth
from edgellm_ros.executors.base import ExecutorInfo

SCHEMA = "edgellm-bench"
SCHEMA_VERSION = 1


@dataclass
class Prefill:
    """One prompt length. Either half is empty until it is measured."""

    prompt_tokens: int
    flops: float
    executor_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)  # through the engine

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        executor = engine = None
        if self.executor_ms:
            ms = statistics.median(self.executor_ms)
            executor = {
                "ms": spread(self.executor_ms),
                "ms_per_token": ms / self.prompt_tokens,
                "tokens_per_s": 1e3 * self.prompt_tokens / ms,
                "tflop_per_s": self.flops / ms * 1e-9,
            }
        if self.first_token_ms:
            ms = statistics.median(self.first_token_ms)
            engine = {
                "time_to_first_token_ms": spread(self.first_token_ms),
                "tokens_per_s": 1e3 * self.prompt_tokens / ms,
            }
        return {"prompt_tokens": self.prompt_tokens, "executor": executor, "engine": engine}


@dataclass
class Decode:
    """One context length; `context` tokens are in the cache before the first of `new_tokens` is computed."""

    batch: int
    context: int
    new_tokens: int
    bytes_per_step: float  # weights and cache, half of the new tokens in it
    executor_ms: list[float] = field(default_factory=list)
    engine_ms: list[float] = field(default_factory=list)

    def to_dict(self, read: ReadBandwidth | None) -> dict[str, Any]:
        """For the report; without `read` the share is not known."""
        paths = {name: self._path(ms, read) for name, ms in self._measured().items()}
        ratio = None
        if self.executor_ms and self.engine_ms:
            ratio = statistics.median(self.engine_ms) / statistics.median(self.executor_ms)
        return {
            "batch": self.batch,
            "context": self.context,
            "new_tokens": self.new_tokens,
            "bytes_per_step": round(self.bytes_per_step),
            **paths,
            "engine_over_executor": ratio,
        }

    def _measured(self) -> dict[str, list[float]]:
        return {"executor": self.executor_ms, "engine": self.engine_ms}

    def _path(self, rounds: list[float], read: ReadBandwidth | None) -> dict[str, Any] | None:
        if not rounds:
            return None
        ms = statistics.median(rounds)
        gb_per_s = self.bytes_per_step / ms * 1e-6
        return {
            "ms_per_token": spread(rounds),
            "tokens_per_s": 1e3 * self.batch / ms,
            "gb_per_s": gb_per_s,
            "read_share": gb_per_s / read.gb_per_s if read else None,
        }


@dataclass
class Ratios:
    """Steps of a device that feeds itself, by graphs or plain launches, and with tokens drawn there or on the host."""

    context: int
    new_tokens: int
    graph_ms: list[float] = field(default_factory=list)
    plain_ms: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        median = statistics.median
        return {
            "context": self.context,
            "new_tokens": self.new_tokens,
            "graph_ms": spread(self.graph_ms),
            "plain_launches_ms": spread(self.plain_ms),
            "plain_launches_over_graph": median(self.plain_ms) / median(self.graph_ms),
            "drawn_on_device_ms": spread(self.device_ms),
            "drawn_on_host_ms": spread(self.host_ms),
            "host_over_device": median(self.host_ms) / median(self.device_ms),
        }


@dataclass
class Run:
    """One loaded model: an executor and a batch size."""

    info: ExecutorInfo
    batch: int
    load_s: float  # hashes and self-test included, as LLM.open does it
    interleaved: bool = False  # rounds of the engine and of the executor alone in turns, with two copies loaded
    planned_parts: dict[str, int] | None = None  # purpose -> bytes, of info.memory_bytes; None where not known
    resident_bytes: int = 0  # of the process with one copy, all contexts computed once
    peak_bytes: int = 0
    device_bytes: int | None = None  # what the GPU has less free; None on a CPU, and where it has more
    read: ReadBandwidth | None = None
    prefill: list[Prefill] = field(default_factory=list)
    decode: list[Decode] = field(default_factory=list)
    ratios: Ratios | None = None  # where the device feeds itself

    @property
    def has_figures(self) -> bool:
        """Whether anything was timed."""
        prefill = any(figure.executor_ms or figure.first_token_ms for figure in self.prefill)
        return prefill or any(figure.executor_ms or figure.engine_ms for figure in self.decode)

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        info = self.info
        return {
            "executor": info.name,
            "device": info.device,
            "precision": info.precision,
            "batch": self.batch,
            "capacity": info.capacity,
            "load_s": self.load_s,
            "interleaved": self.interleaved,
            "memory": {
                "planned_bytes": info.memory_bytes,
                "planned_parts": self.planned_parts,
                "resident_bytes": self.resident_bytes,
                "peak_bytes": self.peak_bytes,
                "device_bytes": self.device_bytes,
            },
            "read_bandwidth": {"gb_per_s": self.read.gb_per_s, "method": self.read.method} if self.read else None,
            "prefill": [figure.to_dict() for figure in self.prefill],
            "decode": [figure.to_dict(self.read) for figure in self.decode],
            "ratios": self.ratios.to_dict() if self.ratios else None,
        }


def spread(rounds: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and all rounds."""
    return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "rounds": list(rounds)}
