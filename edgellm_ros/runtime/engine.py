"""The loop that serves every request: one thread makes all calls to the executor, and sleeps when there is no work.

Each turn ends what was cancelled or is late, admits what waits, computes at most one chunk of one prompt, and then one
token of every sequence that decodes, together in one step. Where the executor draws the tokens itself (DecodeRun), the
next step is under way while this thread works on the tokens of the last one.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from edgellm_ros.config import EngineConfig
from edgellm_ros.core import FinishReason, Usage
from edgellm_ros.errors import (
    DeviceError,
    EdgeLLMError,
    QueueFullError,
    RequestError,
    ShuttingDownError,
)
from edgellm_ros.executors.base import NO_ADAPTER, Executor, LoadedAdapter, SequenceStep
from edgellm_ros.executors.lora_layout import PackedLora
from edgellm_ros.runtime.device_run import DeviceRun
from edgellm_ros.runtime.errands import Errands, do
from edgellm_ros.runtime.generation import Generation
from edgellm_ros.runtime.kv_cache import SlotTable
from edgellm_ros.runtime.metrics import Metrics, MetricsSnapshot
from edgellm_ros.runtime.prefix_cache import PinnedStore, reuse_prefix
from edgellm_ros.runtime.scheduler import Scheduler
from edgellm_ros.runtime.sequence import Job, Sequence, check_job
from edgellm_ros.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Engine:
    """Serves jobs over an executor, which it owns from now on: `close` closes it too. All methods are thread-safe."""

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        config: EngineConfig,
        pinned: PinnedStore | None = None,
    ) -> None:
        """Start the thread. `pinned` brings pinned prefixes from an earlier run; None starts without any."""
        self._executor = executor
        self._tokenizer = tokenizer
        self._config = config
        self._info = executor.info
        self._pinned = PinnedStore(config.pinned_tokens) if pinned is None else pinned
        self._slots = SlotTable(self._info.num_slots, self._info.capacity)
        self._scheduler = Scheduler(config, self._info.num_slots)
        self._run = DeviceRun(executor.run)
        self._adapters = dict(executor.adapters)  # those that jobs may name; the executor may have more for a moment
        self._errands = Errands()
        self._metrics = Metrics()
        self._changed = threading.Condition()  # guards the waiting list, who has which slot, and what follows
        self._num_submitted = 0
        self._closing = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="edgellm-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, job: Job) -> Generation:
        """Accept a job and return at once.

        Raises, before any work: RequestError for token ids that the model does not have, a bias for a token that its
        head lacks or an adapter that is not loaded, ContextOverflowError for a prompt that leaves no room for one
        token, QueueFullError, ShuttingDownError after `close`, and DeviceError after the executor has failed. An
        answer longer than the rest of the context ends with FinishReason.LENGTH.
        """
        check_job(job, self._info, self._tokenizer)
        with self._changed:
            self._num_submitted += 1
            order = self._num_submitted
        info = self._info
        sequence = Sequence(job, order, self._tokenizer, info.vocab_size, info.capacity, info.vocab_map)
        with self._changed:
            self._check_serving()
            # Under the lock that puts the sequence among those that use the adapter: none is unloaded in between.
            sequence.adapter = self._adapter(job.lora)
            if self._scheduler.is_full():
                self._metrics.count_rejected()
                raise QueueFullError(
                    f"all {self._info.num_slots} slots are busy and {self._config.max_queue} requests wait already "
                    "(max_queue); try again later"
                )
            self._scheduler.enqueue(sequence)
            self._metrics.count_submitted()
            self._changed.notify()
        return Generation(sequence.channel)

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The LoRA adapters that jobs may name."""
        with self._changed:
            return dict(self._adapters)

    def load_adapter(self, name: str, source: PackedLora) -> None:
        """Load an adapter between two steps, and return when jobs may name it.

        Raises what Executor.load_adapter does, ShuttingDownError and DeviceError as `submit`.
        """

        def work() -> None:
            loaded = self._executor.load_adapter(name, source)
            with self._changed:
                self._adapters[name] = loaded

        self._do(work)

    def unload_adapter(self, name: str) -> None:
        """Free an adapter's place. Raises RequestError for an unknown name, and while requests use it."""
        with self._changed:
            self._check_serving()
            adapter = self._adapter(name) if name else NO_ADAPTER
            if adapter is NO_ADAPTER:
                raise RequestError("the adapter to unload has no name")
            sequences = (*self._scheduler.waiting, *self._scheduler.active)
            users = sum(sequence.adapter is adapter for sequence in sequences)
            if users:
                raise RequestError(f"adapter {name!r} is used by {users} requests; cancel them or wait for their end")
            del self._adapters[name]  # from here on no job can name it
        self._do(lambda: self._executor.unload_adapter(name))

    def reset_session(self, session_id: str) -> bool:
        """Forget what is resident for a session, at its end where it is running; False when there is nothing."""
        with self._changed:
            return self._slots.forget_session(session_id)

    def metrics(self) -> MetricsSnapshot:
        """Counters and timings up to now."""
        with self._changed:
            waiting, active = len(self._scheduler.waiting), len(self._scheduler.active)
        return self._metrics.snapshot(waiting, active)

    def close(self) -> None:
        """End everything and wait for the thread: what runs ends CANCELLED, what waits with ShuttingDownError."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        atexit.unregister(self.close)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _do(self, work: Callable[[], None]) -> None:
        """Have the engine's thread do `work` between two steps, and wait for it."""
        assert threading.current_thread() is not self._thread, "the engine cannot wait for itself"
        with self._changed:
            self._check_serving()
            done = self._errands.add(work)
            self._changed.notify()
        done.result()

    def _check_serving(self) -> None:
        if self._failure is not None:
            raise DeviceError(f"the executor failed earlier and must be loaded again: {self._failure}")
        if self._closing:
            raise ShuttingDownError("the engine is closed")

    def _adapter(self, name: str) -> LoadedAdapter:
        if not name:
            return NO_ADAPTER
        if name not in self._adapters:
            raise RequestError(f"lora is {name!r}; loaded are: {', '.join(sorted(self._adapters)) or 'none'}")
        return self._adapters[name]

    def _serve(self) -> None:
        try:
            self._executor.enter_thread()
            while self._wait():
                self._turn()
        except Exception as error:
            _log.exception("the engine stops: the executor failed")
            if not isinstance(error, DeviceError):
                cause, error = error, DeviceError(f"the executor failed: {type(error).__name__}: {error}")
                error.__cause__ = cause
            with self._changed:
                self._failure = error
            self._end_all(FinishReason.ERROR, error)
        else:
            self._end_all(FinishReason.CANCELLED, None)
        finally:
            try:
                self._executor.close()
            except Exception:
                _log.exception("the executor could not be closed")

    def _wait(self) -> bool:
        """Sleep until there is work; False when the engine is to end."""
        with self._changed:
            while not (self._closing or self._scheduler.waiting or self._scheduler.active or self._errands):
                self._changed.wait()
            return not self._closing

    def _turn(self) -> None:
        self._run_errands()
        self._reap()
        self._admit()
        sequence = self._scheduler.next_prefill()
        if sequence is not None:
            self._drain()
            self._prefill(sequence)
        self._decode()
        if not self._scheduler.active:
            self._drain()

    def _run_errands(self) -> None:
        with self._changed:
            errands = self._errands.take()
        try:
            if errands:
                self._drain()
            while errands:
                do(*errands[0])
                del errands[0]
        except Exception:
            with self._changed:
                self._errands.put_back(errands)  # `_end_all` tells those who wait for them what has failed
            raise

    def _reap(self) -> None:
        """End what was cancelled or is late."""
        now = time.monotonic()
        with self._changed:
            waiting = list(self._scheduler.waiting)
        for sequence in (*waiting, *self._scheduler.active):
            reason = sequence.due(now)
            if reason is not None:
                self._end(sequence, reason)

    def _admit(self) -> None:
        admitted = []
        with self._changed:
            while self._scheduler.can_admit():
                sequence = self._scheduler.admit()
                slot = self._slots.choose(sequence.prompt, sequence.job.session_id, sequence.adapter.fingerprint)
                assert slot is not None, "a running sequence has a slot"
                self._slots.acquire(slot, sequence.job.session_id)
                admitted.append((sequence, slot))
            waiting = list(self._scheduler.waiting)
        for sequence, slot in admitted:
            sequence.admitted(slot)
        for position, sequence in enumerate(waiting):
            sequence.queued(position)

    def _prefill(self, sequence: Sequence) -> None:
        """Compute one chunk of a prompt; its last one gives the first token."""
        started = time.monotonic()
        slot = sequence.slot
        if not sequence.prefill_started:
            sequence.prefill_started = True
            if self._config.prefix_cache:
                adapter = sequence.adapter.fingerprint
                count = reuse_prefix(self._executor, self._slots, self._pinned, slot, sequence.prompt, adapter)
                sequence.num_computed = sequence.num_cached = count
            else:
                self._slots.restart(slot, sequence.adapter.fingerprint)
        start = sequence.num_computed
        end = start + self._scheduler.chunk(sequence)
        last = end == len(sequence.prompt)
        tokens = sequence.prompt[start:end]
        logits = self._executor.step([SequenceStep(slot, tokens, start, int(last), sequence.adapter.index)])
        self._slots.extend(slot, tokens)
        sequence.num_computed = end
        self._metrics.count_prefill(len(tokens), time.monotonic() - started)
        self._pin(sequence)
        if last:
            self._accept(sequence, partial(sequence.accept_logits, logits[0]))

    def _decode(self) -> None:
        """Bring every sequence that has drawn a token one token further."""
        on_device, on_host = self._decoding()
        if self._run.sequences and (on_host or on_device != self._run.sequences):
            self._drain()
            on_device, on_host = self._decoding()
        if on_host:
            self._step(on_host)
        groups = self._run.groups(on_device)
        # A step further ahead is of no use when something else is due before it would be read.
        alone = not on_host and len(groups) == 1 and self._scheduler.next_prefill() is None
        for group in groups:
            if self._run.sequences != group:
                self._drain()
                self._run.start(group)
            self._advance(2 if alone else 1)

    def _decoding(self) -> tuple[list[Sequence], list[Sequence]]:
        """The sequences with a drawn token to compute: those whose next one the device draws, and the others."""
        batch = self._scheduler.decoding()
        on_device = [sequence for sequence in batch if self._run.takes(sequence)]
        return on_device, [sequence for sequence in batch if not self._run.takes(sequence)]

    def _step(self, batch: list[Sequence]) -> None:
        """Compute one token of each, and draw the next on the host."""
        started = time.monotonic()
        tokens = np.array([sequence.token_ids[-1] for sequence in batch], np.int32)
        logits = self._executor.step(
            [
                SequenceStep(s.slot, tokens[i : i + 1], s.num_computed, adapter=s.adapter.index)
                for i, s in enumerate(batch)
            ]
        )
        for sequence, row in zip(batch, logits, strict=True):
            self._computed(sequence)
            self._accept(sequence, partial(sequence.accept_logits, row))
        self._metrics.count_decode(len(batch), time.monotonic() - started)

    def _advance(self, num_ahead: int) -> None:
        """Launch steps of the run until `num_ahead` are under way, and read one unless it is the only one."""
        started = time.monotonic()
        while self._run.num_unread < num_ahead and self._run.can_launch():
            self._run.launch()
        if self._run.num_unread > 1 or not self._run.can_launch():
            count = self._read_step()
            self._metrics.count_decode(count, time.monotonic() - started)

    def _drain(self) -> None:
        """End the run: every token that is under way is taken. Due before any other call to the executor."""
        while self._run.num_unread:
            started = time.monotonic()
            count = self._read_step()
            self._metrics.count_decode(count, time.monotonic() - started)
        self._run.stop()

    def _read_step(self) -> int:
        """Take the tokens of the run's oldest step; returns how many there were."""
        entries = self._run.read()
        for sequence, token, logprob in entries:
            self._computed(sequence)
            self._accept(sequence, partial(sequence.accept, token, logprob))
        return len(entries)

    def _computed(self, sequence: Sequence) -> None:
        """Note that the last token drawn is in the slot now."""
        self._slots.append(sequence.slot, sequence.token_ids[-1])
        sequence.num_computed += 1

    def _accept(self, sequence: Sequence, accept: Callable[[], FinishReason | None]) -> None:
        """Take the next token; what goes wrong here ends this sequence only."""
        reason = sequence.due(time.monotonic())
        if reason is None:
            try:
                reason = accept()
            except Exception as error:
                _log.exception("a generation failed")
                self._end(sequence, FinishReason.ERROR, error)
                return
        if reason is not None:
            self._end(sequence, reason)

    def _pin(self, sequence: Sequence) -> None:
        """Keep the start of a prompt past eviction, as soon as it is computed, where the job asks for it."""
        length = sequence.job.pin_length
        if not length or sequence.num_computed < length:
            return
        tokens, adapter = sequence.prompt[:length], sequence.adapter.fingerprint
        if self._pinned.fits(tokens) and not self._pinned.touch(tokens, adapter):
            self._pinned.add(tokens, self._executor.save_prefix(sequence.slot, length), adapter)

    def _end(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        with self._changed:
            sequence.ended = True
            self._scheduler.remove(sequence)
            if sequence.slot >= 0:
                self._slots.release(sequence.slot, keep=reason is not FinishReason.ERROR)
        if error is not None and not isinstance(error, EdgeLLMError):
            cause, error = error, EdgeLLMError(f"the generation failed: {type(error).__name__}: {error}")
            error.__cause__ = cause
        usage = _finish(sequence, reason, error)
        self._metrics.count_finished(reason, usage)

    def _end_all(self, reason: FinishReason, error: Exception | None) -> None:
        with self._changed:
            self._closing = True
            waiting, active = list(self._scheduler.waiting), list(self._scheduler.active)
            errands = self._errands.take()
        for _, done in errands:
            done.set_exception(error or ShuttingDownError("the engine is closing"))
        for sequence in active:
            self._end(sequence, reason, error)
        for sequence in waiting:
            self._end(sequence, FinishReason.ERROR, error or ShuttingDownError("the engine is closing"))


def _finish(sequence: Sequence, reason: FinishReason, error: Exception | None) -> Usage:
    try:
        return sequence.finish(reason, error)
    except Exception as fault:  # a splitter that fails at the end must not leave a caller waiting
        _log.exception("the end of a generation failed")
        return sequence.abandon(error or EdgeLLMError(f"the end of the generation failed: {fault}"))
