"""A loaded model: requests in words go in, template and tokenizer make tokens of them, and answers stream out."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from edgellm_ros import executors
from edgellm_ros.bundle import CHAT_TEMPLATE, TOKENIZER, WEIGHTS, Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Completion, Delta, Request
from edgellm_ros.errors import BundleError, ConfigError, ContextOverflowError, RequestError, UnsupportedError
from edgellm_ros.executors.base import Executor, ExecutorInfo
from edgellm_ros.executors.lora_layout import open_packed
from edgellm_ros.runtime.engine import Engine
from edgellm_ros.runtime.generation import Generation
from edgellm_ros.runtime.kv_cache import common_prefix
from edgellm_ros.runtime.metrics import MetricsSnapshot
from edgellm_ros.runtime.prefix_cache import PinnedStore
from edgellm_ros.runtime.sequence import Job, Splitter
from edgellm_ros.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class LLM:
    """A bundle, its executor and the engine over them. All methods are thread-safe; close it, or use it in a `with`."""

    def __init__(
        self,
        bundle: Bundle,
        config: EngineConfig,
        executor: Executor,
        pinned_dir: Path | None = None,
    ) -> None:
        """Use `LLM.open`. Takes the executor over; nothing is left running when this throws."""
        from edgellm_ros.chat.template import ChatTemplate

        tokens = bundle.manifest.tokens
        self.bundle = bundle
        self.config = config
        self._tokens = tokens
        self._tokenizer = Tokenizer(bundle.read_text(TOKENIZER), visible=(tokens.think_start, tokens.think_end))
        self._template = ChatTemplate(bundle.read_text(CHAT_TEMPLATE), tokens) if bundle.has(CHAT_TEMPLATE) else None
        self._info = executor.info
        self.load_s = 0.0  # seconds that `open` took
        self._lora_lock = threading.Lock()
        if config.self_test and bundle.manifest.self_test.cases:
            from edgellm_ros.executors.selftest import run_self_test

            run_self_test(executor, bundle.manifest)
        quality = bundle.manifest.quality
        if quality.failed:
            _log.warning("%s: `edgellm verify` found: %s", bundle.path, quality.summary())
        for name in config.loras:
            executor.load_adapter(name, open_packed(bundle, name))
        self._engine = Engine(executor, self._tokenizer, config, self._pinned_store(pinned_dir))

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        config: EngineConfig | None = None,
        executor: Executor | None = None,
        pinned_dir: str | Path | None = None,
        loras: Sequence[str] = (),
    ) -> LLM:
        """Load a bundle; `executor` None creates the one that `config` names, and a given one is taken over.

        `pinned_dir` is where pinned system prompts are kept across restarts; None keeps them in memory only. `loras`
        names adapters of the bundle to load as well, beside those that `config` names.
        Raises BundleError for a bundle that is not whole or does not give what its self-test says, ConfigError for
        settings that do not fit it or the machine, RequestError for an adapter that it does not have, and DeviceError
        when the device fails.
        """
        started = time.monotonic()
        config = EngineConfig() if config is None else config
        verify = config.verify_files and not isinstance(bundle, Bundle)
        try:
            if not isinstance(bundle, Bundle):
                bundle = Bundle.open(bundle, verify=False)
            capacity = config.max_context if executor is None else executor.info.capacity
            if config.self_test and capacity:  # 0 is the bundle's own, which is long enough
                from edgellm_ros.executors.selftest import check_room

                check_room(bundle.manifest, capacity)
            config = _with_loras(config, bundle, loras)
            # Hashing takes as long as loading, on another core; nothing is served before it is done, and what it finds
            # explains whatever loading stumbles over.
            with ThreadPoolExecutor(1, "edgellm-verify") as pool:
                verified = pool.submit(bundle.verify) if verify else None
                try:
                    if executor is None:
                        executor = executors.create_executor(bundle, config)
                finally:
                    if verified is not None:
                        verified.result()
            llm = cls(bundle, config, executor, Path(pinned_dir) if pinned_dir is not None else None)
        except BaseException:
            if executor is not None:
                executor.close()
            raise
        llm.load_s = time.monotonic() - started
        return llm

    @property
    def loras(self) -> tuple[str, ...]:
        """The adapters that requests may name now."""
        return tuple(sorted(self._engine.adapters))

    def load_lora(self, name: str) -> None:
        """Make an adapter of the bundle ready, one packed since the bundle was opened included; waits for it.

        Raises RequestError for a name that the bundle does not have or that is loaded, when there is no place or its
        rank is too large (max_loras, max_lora_rank), and BundleError when its file is not as it was packed.
        """
        with self._lora_lock:
            fresh = Bundle.open(self.bundle.path, verify=False)
            packed = open_packed(fresh, name)
            if fresh.manifest.files[WEIGHTS] != self.bundle.manifest.files[WEIGHTS]:
                raise BundleError(f"{self.bundle.path} was exported anew since it was loaded; load it again")
            if self.config.verify_files:
                fresh.verify((fresh.lora_key(name),))
            self._engine.load_adapter(name, packed)

    def unload_lora(self, name: str) -> None:
        """Free an adapter's place. Raises RequestError for one that is not loaded, or that requests use."""
        with self._lora_lock:
            self._engine.unload_adapter(name)

    @property
    def info(self) -> ExecutorInfo:
        """What computes, and how much it holds."""
        return self._info

    def submit(self, request: Request, notify: Callable[[], object] | None = None) -> Generation:
        """Accept a request and return at once; `notify` is called on the engine's thread after every new delta.

        Raises what `Engine.submit` does, TemplateError, and UnsupportedError that names a field which this bundle
        cannot honour. Stop texts are looked for in the whole answer, reasoning included.
        """
        if request.lora and request.lora not in self._engine.adapters:
            raise RequestError(self._unknown_lora(request.lora))
        return self._engine.submit(self._job(request, notify))

    def generate(self, request: Request) -> Iterator[Delta]:
        """The deltas of an answer as they come; the request is accepted at once, and closing the iterator cancels it.

        Raises what `submit` does; an error afterwards is in the last delta.
        """
        return _deltas(self.submit(request))

    def complete(self, request: Request) -> Completion:
        """The whole answer. Raises what `submit` does, and the error with which the request ended."""
        generation = self.submit(request)
        try:
            return generation.result()
        finally:
            generation.cancel()

    def render(self, request: Request) -> str:
        """The text that a request's messages become (or its raw prompt)."""
        if not request.messages:
            return request.prompt or self.detokenize(request.prompt_ids, skip_special=False)
        if self._template is None:
            raise UnsupportedError(f"the bundle has no {CHAT_TEMPLATE}, so messages cannot be rendered; send a prompt")
        if any(message.images for message in request.messages):
            raise UnsupportedError("messages have images, but this bundle has no vision model")
        return self._template.render(
            request.messages, request.tools, request.add_generation_prompt, request.enable_thinking
        )

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of a text; `add_special` adds what a raw prompt gets (BOS). Special tokens in it are parsed."""
        ids = self._tokenizer.encode(text, add_special_tokens=add_special)
        bos = self._tokens.bos_id
        if add_special and self._tokens.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def detokenize(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        if any(not 0 <= token < 2**32 for token in ids):
            raise RequestError("a token id is negative or too large")
        return self._tokenizer.decode(ids, skip_special)

    def reset_session(self, session_id: str) -> bool:
        """Forget a session's KV cache, at its end where it is running; False when nothing is resident for it."""
        return self._engine.reset_session(session_id)

    def metrics(self) -> MetricsSnapshot:
        """Counters and timings of the engine up to now."""
        return self._engine.metrics()

    def close(self) -> None:
        """End all requests and free the device; closing twice is allowed."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _job(self, request: Request, notify: Callable[[], object] | None) -> Job:
        submitted_at = time.monotonic()
        splitter: Splitter | None = None
        pin_length = 0
        if request.messages:
            text = self.render(request)
            self._check_length(text)
            ids = tuple(self.tokenize(text))
            splitter = self._splitter(text)
            if request.pin_system_prompt:
                pin_length = self._system_length(request, ids)
        else:
            for name in ("tools", "enable_thinking", "pin_system_prompt"):
                if getattr(request, name):
                    raise RequestError(f"{name} needs messages; a raw prompt is taken as it is")
            self._check_length(request.prompt)
            ids = request.prompt_ids or tuple(self.tokenize(request.prompt, add_special=True))
        return Job(
            ids,
            request.sampling,
            self._stop_ids(request),
            request.priority,
            request.deadline_s,
            request.session_id,
            pin_length,
            splitter,
            notify,
            submitted_at,
            request.lora,
        )

    def _check_length(self, prompt: str) -> None:
        """Refuse what cannot fit before it is encoded: megabytes take seconds, in which no stream goes on."""
        fewest, capacity = self._tokenizer.min_tokens(prompt), self._info.capacity
        if fewest + 1 > capacity:
            raise ContextOverflowError(
                f"the prompt has {len(prompt)} characters, which are at least {fewest} tokens, and at least 1 must be "
                f"generated, but the context holds {capacity}; shorten the prompt or load with a larger max_context"
            )

    def _unknown_lora(self, name: str) -> str:
        loaded = self.loras
        others = sorted(set(self.bundle.manifest.loras) - set(loaded))
        more = f"; the bundle also has {', '.join(others)}, not loaded: load it first" if others else ""
        return f"lora is {name!r}; loaded are: {', '.join(loaded) or 'none'}{more}"

    def _stop_ids(self, request: Request) -> frozenset[int]:
        """The model's own end tokens, and stop texts that are a special token (which never shows as text)."""
        own = () if request.sampling.ignore_eos else self._tokens.stop_ids
        named = (self._tokenizer.token_to_id(text) for text in request.sampling.stop)
        return frozenset((*own, *(token for token in named if token in self._tokenizer.special_ids)))

    def _splitter(self, prompt: str) -> Splitter | None:
        start, end = self._tokens.think_start, self._tokens.think_end
        if not start or not end:
            return None
        from edgellm_ros.chat.reasoning import ReasoningSplitter, starts_inside

        return ReasoningSplitter(start, end, starts_inside(prompt, start, end))

    def _system_length(self, request: Request, ids: tuple[int, ...]) -> int:
        """How many leading tokens of a prompt do not depend on what follows its system messages.

        Some templates refuse system messages alone, so the prompt is compared with that of another user message.
        """
        if not self.config.prefix_cache or not self.config.pinned_tokens:
            raise UnsupportedError("pin_system_prompt needs prefix_cache and pinned_tokens above 0")
        num_system = next((i for i, m in enumerate(request.messages) if m.role != "system"), len(request.messages))
        other = dataclasses.replace(
            request.messages[-1], role="user", content="\u00b7", reasoning="", tool_calls=(), tool_call_id=""
        )
        twin = dataclasses.replace(request, messages=(*request.messages[:num_system], other))
        twin_ids = np.asarray(self.tokenize(self.render(twin)), np.int32)
        return common_prefix(np.asarray(ids, np.int32), twin_ids)

    def _pinned_store(self, directory: Path | None) -> PinnedStore:
        """What is saved depends on the model's files and on its layout; precision names the cache's format."""
        manifest = self.bundle.manifest
        adapters = set(map(self.bundle.lora_key, manifest.loras))  # what is pinned with one carries its fingerprint
        files = sorted((name, entry.sha256) for name, entry in manifest.files.items() if name not in adapters)
        info = self._info
        key = repr((files, info.name, info.precision, info.kv_bytes_per_token))
        try:
            return PinnedStore(self.config.pinned_tokens, directory, key)
        except OSError as error:
            raise ConfigError(f"pinned_dir {directory} cannot be used: {error}") from error


def _with_loras(config: EngineConfig, bundle: Bundle, loras: Sequence[str]) -> EngineConfig:
    """`config` with those adapters too, and with room for all that it names; RequestError for one that is not there."""
    names = tuple(dict.fromkeys((*config.loras, *loras)))
    for name in names:
        bundle.lora_file(name)
    return dataclasses.replace(
        config,
        loras=names,
        max_loras=max(config.max_loras, len(names)),
        max_lora_rank=max(config.max_lora_rank, *(bundle.manifest.loras[name].rank for name in names), 0),
    )


def _deltas(generation: Generation) -> Iterator[Delta]:
    try:
        yield from generation
    finally:
        generation.cancel()
