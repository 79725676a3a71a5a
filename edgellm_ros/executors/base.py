"""The contract of an executor: token ids and positions in, logits out, over a linear KV cache of fixed slots."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ExecutorInfo:
    """What an executor is and what it can hold."""

    name: str  # onnxruntime, cuda, tensorrt
    device: str  # for people: "CPU, 2 threads"
    precision: str  # weights and cache, for people: "int4 weights, fp32 KV cache"
    num_slots: int
    capacity: int  # tokens a slot holds
    vocab_size: int
    kv_bytes_per_token: int
    memory_bytes: int  # weights + KV cache + workspace, as planned at load
    rounding: float = 0.0  # relative error of logits that the executor's own number formats add to the bundle's


@dataclass(frozen=True)
class SequenceStep:
    """One sequence's share of a step.

    `token_ids` are computed at positions `position` to `position + len - 1` of `slot` and their keys and values are
    written there; everything before `position` must already be in the slot. Writing at an earlier position than the
    last one is allowed: it overwrites (that is how a rejected draft or a shorter prefix is undone).
    `num_logits` asks for the logits of that many last tokens; 0 asks for none.
    """

    slot: int
    token_ids: npt.NDArray[np.int32]  # (num_tokens,), num_tokens >= 1
    position: int
    num_logits: int = 1


class Executor(abc.ABC):
    """Runs a decoder. Not thread-safe: one thread makes all calls.

    Implementations allocate everything in the constructor and check slot, position and capacity with `assert`:
    the scheduler never asks for more than fits. A failure while computing is a DeviceError, after which the
    executor is unusable.
    """

    info: ExecutorInfo

    @abc.abstractmethod
    def step(self, batch: Sequence[SequenceStep]) -> npt.NDArray[np.float32]:
        """Compute all sequences of `batch` (distinct slots) and return their logits.

        Returns (sum of num_logits, vocab) fp32: the sequences in the batch's order, positions ascending. The array is
        only valid until the next call. Results do not depend on what else is in the batch.
        """

    @abc.abstractmethod
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens' keys and values from slot `source` to slot `target`."""

    @abc.abstractmethod
    def save_prefix(self, slot: int, length: int) -> npt.NDArray[np.uint8]:
        """Return the first `length` tokens' keys and values as host bytes that `load_prefix` accepts."""

    @abc.abstractmethod
    def load_prefix(self, slot: int, data: npt.NDArray[np.uint8], length: int) -> None:
        """Write what `save_prefix` returned for `length` tokens into `slot`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the device. Later calls fail; closing twice is allowed."""
