"""The contract of an executor: token ids and positions in, logits out, over a linear KV cache of fixed slots.

One that can also draw tokens has a `DecodeRun`, which decodes without a trip to the host between two tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm_ros.core import SamplingParams, TokenLogprob
from edgellm_ros.errors import RequestError, UnsupportedError
from edgellm_ros.executors.lora import LoraAdapter
from edgellm_ros.executors.lora_layout import PackedLora
from edgellm_ros.vocab_map import VocabMap

ON_GPU = ("cuda", "tensorrt")  # names of the executors over the native module


@dataclass(frozen=True)
class ExecutorInfo:
    """What an executor is and what it can hold."""

    name: str  # onnxruntime, cuda, tensorrt
    device: str  # for people: "CPU, 2 threads"
    precision: str  # weights and cache, for people: "int4 weights, fp32 KV cache"
    num_slots: int
    capacity: int  # tokens a slot holds
    vocab_size: int  # token ids that a prompt may have
    kv_bytes_per_token: int
    memory_bytes: int  # weights + KV cache + workspace, as planned at load
    rounding: float = 0.0  # relative error of logits that the executor's own number formats add to the bundle's
    vocab_map: VocabMap | None = None  # which tokens the logits' columns are; None: all, in order
    batches: bool = True  # a step of several sequences reads the weights once, not once for each

    @property
    def on_gpu(self) -> bool:
        """Whether it computes from a GPU's memory."""
        return self.name in ON_GPU


@dataclass(frozen=True)
class SequenceStep:
    """One sequence's share of a step.

    `token_ids` are computed at positions `position` to `position + len - 1` of `slot` and their keys and values are
    written there; everything before `position` must already be in the slot. Writing at an earlier position than the
    last one is allowed: it overwrites (that is how a rejected draft or a shorter prefix is undone).
    `num_logits` asks for the logits of that many last tokens; 0 asks for none. `adapter` is the index of a loaded LoRA
    adapter (`Executor.adapters`), 0 for none; what an adapter computed must not be continued with another one.
    """

    slot: int
    token_ids: npt.NDArray[np.int32]  # (num_tokens,), num_tokens >= 1
    position: int
    num_logits: int = 1
    adapter: int = 0


@dataclass(frozen=True)
class LoadedAdapter:
    """A LoRA adapter that steps can name. `fingerprint` tells its contents apart, whatever its name and index."""

    index: int  # 1 and up, for SequenceStep.adapter; 0 is none
    fingerprint: str


NO_ADAPTER = LoadedAdapter(0, "")


@dataclass(frozen=True)
class RunSequence:
    """One sequence of a run: where it stands, and how its tokens are drawn from here on."""

    slot: int
    position: int  # of the last token drawn, which the run's first step computes
    answer_ids: Sequence[int]  # drawn so far, that token the last; at least one; read by `start` only
    prompt_ids: npt.NDArray[np.int32]  # (num_prompt,), for the repetition penalty
    sampling: SamplingParams
    seed: int  # in use, also where the request left it open; the n-th token of the answer is draw n - 1 of it
    masked: bool = False  # set_mask may be called for it
    adapter: int = 0  # as SequenceStep's


@dataclass(frozen=True)
class RunStep:
    """What one step of a run gave, a token for each of its sequences in their order."""

    token_ids: Sequence[int]  # -1: the logits were not finite
    logprobs: Sequence[TokenLogprob | None]  # None where the sequence did not ask for them


class DecodeRun(abc.ABC):
    """Decodes some sequences of an executor, each token feeding the next step, while the host reads one step behind.

    `start` begins a run and forgets the one before; `launch` computes one more token of every sequence and returns at
    once; `read` waits for the oldest step launched and not yet read. Every other call to the executor ends the run:
    steps not read by then are lost, and another `start` is due. Tokens do not depend on what else is in the run, and
    are those that the host draws from the same logits. A failure is a DeviceError, as the executor's.
    """

    max_sequences: int  # in one run

    @abc.abstractmethod
    def can_sample(self, params: SamplingParams) -> bool:
        """Whether tokens can be drawn with `params`; otherwise the host draws them from `Executor.step`'s logits."""

    @abc.abstractmethod
    def start(self, sequences: Sequence[RunSequence]) -> None:
        """Begin a run of 1 to `max_sequences` sequences, all of which `can_sample`."""

    @abc.abstractmethod
    def launch(self) -> None:
        """Compute the last token of every sequence and draw the next. None may be past its slot's last position."""

    @abc.abstractmethod
    def set_mask(self, index: int, mask: npt.NDArray[np.bool_]) -> None:
        """Allow sequence `index` of the run the tokens of `mask` (vocab,) only, from the next launch on.

        Only for a sequence started as `masked`, and when every step launched was read: a mask depends on the last
        token. Until the first call all tokens are allowed.
        """

    @abc.abstractmethod
    def read(self) -> RunStep:
        """Wait for the oldest step that was launched and not yet read."""


class Executor(abc.ABC):
    """Runs a decoder. Not thread-safe: one thread makes all calls.

    Implementations allocate everything in the constructor and check slot, position and capacity with `assert`:
    the scheduler never asks for more than fits. A failure while computing is a DeviceError, after which the
    executor is unusable.
    """

    info: ExecutorInfo
    run: DecodeRun | None = None  # None: tokens are drawn by the host

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The loaded LoRA adapters by name; none where an executor cannot load any."""
        return {}

    def enter_thread(self) -> None:  # noqa: B027  what needs nothing has nothing to do
        """Called first by the thread that makes all further calls, where it is not the constructor's."""

    def load_adapter(self, name: str, source: str | Path | LoraAdapter | PackedLora) -> LoadedAdapter:
        """Load a LoRA adapter, a bundle's or a PEFT directory, between steps; it stays in memory until unloaded.

        Raises RequestError, and changes nothing, for a name that is taken, when max_loras are loaded, and for an
        adapter that is damaged, of a larger rank than max_lora_rank or made for another model; UnsupportedError for
        what of it cannot be honoured, and where this executor runs none.
        """
        raise UnsupportedError(f"adapter {name!r}: the {self.info.name} executor runs no adapters")

    def unload_adapter(self, name: str) -> None:
        """Free an adapter's place. No sequence may continue with it. Raises RequestError for an unknown name."""
        raise RequestError(f"no adapter is named {name!r}; loaded are none")

    @abc.abstractmethod
    def step(self, batch: Sequence[SequenceStep]) -> npt.NDArray[np.float32]:
        """Compute all sequences of `batch` (distinct slots) and return their logits.

        Returns (sum of num_logits, vocab) fp32: the sequences in the batch's order, positions ascending; where `info`
        has a vocab_map, the columns are its tokens only. The array is only valid until the next call. Results do not
        depend on what else is in the batch.
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
