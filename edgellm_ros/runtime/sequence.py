"""One request: whether it can be served, how far it is computed, what was drawn, and what of its text may be shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgellm_ros.core import Completion, Delta, FinishReason, Phase, SamplingParams, TokenLogprob, Usage
from edgellm_ros.errors import ContextOverflowError, DeviceError, RequestError
from edgellm_ros.executors.base import NO_ADAPTER, ExecutorInfo, LoadedAdapter
from edgellm_ros.runtime.detokenize import Detokenizer
from edgellm_ros.runtime.generation import Channel
from edgellm_ros.runtime.sampling import Floats, Sampler, logprob_of
from edgellm_ros.runtime.stop import StopStrings
from edgellm_ros.tokenizer import Tokenizer
from edgellm_ros.vocab_map import VocabMap


class Splitter(Protocol):
    """Parts content from reasoning; both functions return (content, reasoning)."""

    def push(self, text: str) -> tuple[str, str]:
        """Take new text and return what is certain."""

    def finish(self) -> tuple[str, str]:
        """Return what was held back."""


@dataclass(frozen=True)
class Job:
    """What the engine is asked for, in tokens. deadline_s counts from submission."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    deadline_s: float | None = None
    session_id: str = ""
    pin_length: int = 0  # leading tokens whose KV cache is kept past eviction; 0 is none
    splitter: Splitter | None = None
    notify: Callable[[], object] | None = None
    submitted_at: float = field(default_factory=time.monotonic)  # when its caller asked: rendering and encoding count
    lora: str = ""  # name of a loaded adapter; empty is none


def check_job(job: Job, info: ExecutorInfo, tokenizer: Tokenizer) -> None:
    """Raise RequestError or ContextOverflowError, as Engine.submit says, for what the model cannot be asked."""
    length, capacity, vocab = len(job.prompt_ids), info.capacity, info.vocab_size
    if not length:
        raise RequestError("the prompt has no tokens")
    if length + 1 > capacity:
        raise ContextOverflowError(
            f"the prompt has {length} tokens and at least 1 must be generated, but the context holds {capacity}; "
            "shorten the prompt or load with a larger max_context"
        )
    ids = np.asarray(job.prompt_ids)
    if ids.dtype.kind not in "iu" or int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise RequestError(f"the prompt has a token id that is not a whole number from 0 to {vocab - 1}")
    kept = info.vocab_map
    for token, bias in job.sampling.logit_bias.items():
        if token >= vocab:
            raise RequestError(f"logit_bias has token id {token}; the model's are 0 to {vocab - 1}")
        if bias > 0 and kept is not None and token not in kept:
            raise RequestError(
                f"logit_bias favours token {token} ({tokenizer.id_to_token(token)!r}), which the model cannot give: "
                f"its head was cut to {len(kept)} of {vocab} tokens; leave it out, or export with a vocabulary map "
                "that keeps it"
            )


class Sequence:
    """A job's state. Made by the submitting thread, then touched by the engine's thread only (but for the channel)."""

    def __init__(
        self,
        job: Job,
        order: int,
        tokenizer: Tokenizer,
        vocab_size: int,
        capacity: int,
        vocab_map: VocabMap | None = None,
    ) -> None:
        self.job = job
        self.adapter: LoadedAdapter = NO_ADAPTER  # set when it is accepted
        self.channel = Channel(job.notify)
        self.submitted_at = job.submitted_at
        self.expires_at = self.submitted_at + job.deadline_s if job.deadline_s is not None else float("inf")
        self.rank = (-job.priority, order)  # smaller is served first
        self.prompt: npt.NDArray[np.int32] = np.asarray(job.prompt_ids, np.int32)
        self.token_ids: list[int] = []
        self.max_tokens = min(job.sampling.max_tokens, capacity - len(self.prompt))
        self.slot = -1
        self.ended = False
        self.on_device: bool | None = None  # where tokens after the first are drawn; None: not yet decided
        self.prefill_started = False
        self.num_computed = 0  # tokens whose keys and values are in the slot
        self.num_cached = 0  # of the prompt, found and not computed
        self.queue_position = -1
        self._vocab_map = vocab_map
        self._sampler = Sampler(job.sampling, vocab_size, job.prompt_ids, vocab_map)
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(job.sampling.stop)
        self._stopped = False  # by a stop text
        self._admitted_at = self._first_token_at = self._last_token_at = 0.0
        self._texts: list[str] = []
        self._reasonings: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt is still to be computed."""
        return self.num_computed < len(self.prompt)

    def queued(self, position: int) -> None:
        """Tell the caller the place in the queue when it is new."""
        if position != self.queue_position:
            self.queue_position = position
            self.channel.put(Delta(Phase.QUEUED, queue_position=position))

    def admitted(self, slot: int) -> None:
        """The sequence has a slot now."""
        self.queued(0)
        self.slot = slot
        self._admitted_at = time.monotonic()
        self.channel.put(Delta(Phase.PREFILL))

    def due(self, now: float) -> FinishReason | None:
        """CANCELLED or DEADLINE when the caller or the clock has ended this."""
        if self.channel.cancelled:
            return FinishReason.CANCELLED
        return FinishReason.DEADLINE if now >= self.expires_at else None

    @property
    def seed(self) -> int:
        """The seed of the draws, also where the request left it open."""
        return self._sampler.seed

    def accept_logits(self, logits: Floats) -> FinishReason | None:
        """Draw the next token from the executor's `logits` for one position and `accept` it."""
        token = self._sampler.draw(logits)
        num_top = self.job.sampling.logprobs
        return self.accept(token, None if num_top is None else logprob_of(logits, token, num_top, self._vocab_map))

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> FinishReason | None:
        """Take the next token, show its text, and say whether the answer ends with it.

        A final delta is not sent: `finish` is. A token of -1 stands for logits that were not finite: DeviceError.
        """
        if token < 0:
            raise DeviceError("the model's logits are not finite")
        self._last_token_at = time.monotonic()
        if not self.token_ids:
            self._first_token_at = self._last_token_at
        self.token_ids.append(token)
        logprobs = () if logprob is None else (logprob,)
        self._logprobs += logprobs
        reason: FinishReason | None = None
        text = reasoning = ""
        if token in self.job.stop_ids:
            reason = FinishReason.STOP
        else:
            text, stopped = self._stops.push(self._detokenizer.push(token))
            if stopped:
                reason = FinishReason.STOP
            elif len(self.token_ids) >= self.max_tokens:
                reason = FinishReason.LENGTH
            self._stopped = stopped
            text, reasoning = self._split(text)
        self.channel.put(Delta(Phase.DECODE, text, reasoning, (token,), logprobs))
        return reason

    def finish(self, reason: FinishReason, error: Exception | None = None) -> Usage:
        """Show what was held back, and end the answer."""
        text = reasoning = ""
        if not self._stopped:
            tail, stopped = self._stops.push(self._detokenizer.finish())
            if stopped and reason is FinishReason.LENGTH:
                reason = FinishReason.STOP
            text, reasoning = self._split(tail if stopped else tail + self._stops.finish())
        if self.job.splitter is not None:
            content, thought = self.job.splitter.finish()
            text, reasoning = text + content, reasoning + thought
            self._texts.append(content)
            self._reasonings.append(thought)
        return self._close(reason, error, text, reasoning)

    def abandon(self, error: Exception) -> Usage:
        """End the answer with an error and without what was held back."""
        return self._close(FinishReason.ERROR, error)

    def _close(self, reason: FinishReason, error: Exception | None, text: str = "", reasoning: str = "") -> Usage:
        usage = self._usage()
        texts, reasonings = "".join(self._texts), "".join(self._reasonings)
        completion = Completion(texts, reason, reasonings, tuple(self.token_ids), tuple(self._logprobs), usage)
        last = Delta(Phase.DONE, text, reasoning, finish_reason=reason, usage=usage, error=error)
        self.channel.finish(last, completion)
        return usage

    def _split(self, text: str) -> tuple[str, str]:
        content, reasoning = (text, "") if self.job.splitter is None else self.job.splitter.push(text)
        if content:
            self._texts.append(content)
        if reasoning:
            self._reasonings.append(reasoning)
        return content, reasoning

    def _usage(self) -> Usage:
        now = time.monotonic()
        drawn = bool(self.token_ids)
        return Usage(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.num_cached,
            completion_tokens=len(self.token_ids),
            queue_s=(self._admitted_at or now) - self.submitted_at,
            time_to_first_token_s=self._first_token_at - self.submitted_at if drawn else 0.0,
            prefill_s=self._first_token_at - self._admitted_at if drawn else 0.0,
            decode_s=self._last_token_at - self._first_token_at,
            total_s=now - self.submitted_at,
        )
