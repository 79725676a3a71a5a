"""Times what a caller gets: requests through the engine, with sampling, text and streaming, until deltas arrive."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from edgellm_ros.core import Request, SamplingParams
from edgellm_ros.errors import ConfigError
from edgellm_ros.llm import LLM
from edgellm_ros.runtime.generation import Generation


def time_first_token(llm: LLM, prompt: Sequence[int], sampling: SamplingParams) -> float:
    """Milliseconds from submitting a prompt that nothing is cached of to the arrival of its first token."""
    request = Request(prompt_ids=tuple(prompt), sampling=replace(sampling, max_tokens=1))
    started = time.perf_counter()
    generation = llm.submit(request)
    try:
        for delta in generation:
            if delta.token_ids:
                return (time.perf_counter() - started) * 1e3
    finally:
        generation.cancel()
    generation.result()  # raises the error with which it ended
    raise AssertionError("a generation without an error has a token")


def cache_prompts(llm: LLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
    """Compute each prompt in a session of its own, so that `time_decode` starts all of them at once."""
    for i, prompt in enumerate(prompts):
        llm.complete(_request(i, prompt, replace(sampling, max_tokens=1)))


def time_decode(llm: LLM, prompts: Sequence[Sequence[int]], num_tokens: int, sampling: SamplingParams) -> float:
    """Milliseconds between two tokens of one sequence while all `prompts` decode together.

    The clock runs from the moment when every sequence has its first token until the first one ends, and each has
    about `num_tokens` of its tokens in between. A thread for each reads its deltas, as a caller does. `cache_prompts`
    comes first. Raises ConfigError when the first sequence ends before the last one starts.
    """
    limited = replace(sampling, max_tokens=num_tokens + len(prompts))  # they start one after the other
    gate = threading.Event()
    readers = [_Reader(gate) for _ in prompts]
    generations: list[Generation] = []
    with ThreadPoolExecutor(len(prompts)) as pool:
        try:
            for i, prompt in enumerate(prompts):
                generations.append(llm.submit(_request(i, prompt, limited), readers[i].notify))
            reading = [pool.submit(reader.read, g) for reader, g in zip(readers, generations, strict=True)]
            gate.set()
            stamps = [future.result() for future in reading]
        finally:  # the pool waits for its threads, and these for their generations: Ctrl-C must end them
            gate.set()
            for generation in generations:
                generation.cancel()
    begin, end = max(times[0] for times in stamps), min(times[-1] for times in stamps)
    num_arrived = sum(begin < at <= end for times in stamps for at in times)
    if not num_arrived:
        raise ConfigError(
            f"--new-tokens {num_tokens} is too few: the first of {len(prompts)} sequences ended before the last one "
            "started; raise it"
        )
    return (end - begin) * 1e3 * len(prompts) / num_arrived


class _Reader:
    """Reads one generation, and knows when the engine handed each token over.

    The engine's thread takes the time: a reader of a very small model is woken for many tokens at once. The first
    delta holds the engine until all requests are there.
    """

    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate
        self._handed_over: list[float] = []  # one a delta

    def notify(self) -> None:
        self._gate.wait()
        self._handed_over.append(time.perf_counter())

    def read(self, generation: Generation) -> list[float]:
        """Times of the tokens; raises the error with which the generation ended."""
        counts = [len(delta.token_ids) for delta in generation]
        generation.result()
        # The last delta has no token, and its time may not be there yet.
        return [at for at, count in zip(self._handed_over, counts, strict=False) for _ in range(count)]


def _request(index: int, prompt: Sequence[int], sampling: SamplingParams) -> Request:
    return Request(prompt_ids=tuple(prompt), sampling=sampling, session_id=f"bench-{index}")
