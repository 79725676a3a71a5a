"""Many short requests of every kind at once, for as long as asked: equal answers, and memory that stays where it is."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgellm_ros.core import Request, SamplingParams
from edgellm_ros.errors import EdgeLLMError
from edgellm_ros.llm import LLM

_KINDS: tuple[dict[str, object], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 0.7, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "logprobs": 2},
)
CANCEL_SHARE = 0.1  # of the requests, after a token or some


@dataclass
class SoakReport:
    """What happened; `samples` are (seconds, requests so far, resident bytes of the process, device bytes in use)."""

    num_requests: int = 0
    num_tokens: int = 0
    num_cancelled: int = 0
    seconds: float = 0.0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    different: list[int] = field(default_factory=list)  # requests whose answer was not that of their first time
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)

    def growth(self) -> tuple[int, int]:
        """Bytes by which resident and device memory grew from a quarter of the samples to the last one."""
        begin, end = self.samples[len(self.samples) // 4], self.samples[-1]
        return end[2] - begin[2], end[3] - begin[3]


def make_requests(count: int, vocab_size: int, capacity: int, seed: int = 0) -> list[Request]:
    """`count` different requests, of 4 to capacity / 2 prompt tokens and 1 to 40 new ones; some share a beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(5, vocab_size) for _ in range(capacity // 4)]
    requests = []
    for i in range(count):
        own = [rng.randrange(5, vocab_size) for _ in range(rng.randint(4, capacity // 4))]
        ids = (shared if i % 3 == 0 else []) + own
        kind = _KINDS[i % len(_KINDS)]
        sampling = SamplingParams(**kind, seed=i, max_tokens=rng.randint(1, 40), ignore_eos=i % 2 == 0)  # type: ignore[arg-type]
        session = f"session {i % 7}" if i % 5 == 0 else ""
        requests.append(Request(prompt_ids=tuple(ids), sampling=sampling, priority=i % 3, session_id=session))
    return requests


def soak(
    llm: LLM,
    requests: list[Request],
    num_requests: int,
    num_callers: int,
    device_bytes: Callable[[], int] = lambda: 0,
    sample_s: float = 1.0,
) -> SoakReport:
    """Send `num_requests`, drawn from `requests`, from `num_callers` threads, and compare each answer with its first.

    One of ten is cancelled, and must then be the beginning of its answer. Nothing is raised: errors are in the report.
    """
    report = SoakReport()
    lock = threading.Lock()
    answers: dict[int, tuple[int, ...]] = {}
    started = time.monotonic()
    done = threading.Event()

    def call(seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with lock:
                if report.num_requests >= num_requests:
                    return
                report.num_requests += 1
            index = rng.randrange(len(requests))
            cancel_after = rng.randint(1, 12) if rng.random() < CANCEL_SHARE else None
            try:
                tokens, reason = _answer(llm, requests[index], cancel_after)
            except EdgeLLMError as error:
                with lock:
                    report.errors.append(f"request {index}: {error}")
                continue
            with lock:
                report.num_tokens += len(tokens)
                report.finish_reasons[reason] += 1
                report.num_cancelled += reason == "cancelled"
                known = answers.get(index)
                if known is None and reason != "cancelled":
                    answers[index] = tokens
                elif known is not None and tokens != (known[: len(tokens)] if reason == "cancelled" else known):
                    report.different.append(index)

    def watch() -> None:
        while not done.wait(sample_s):
            report.samples.append((time.monotonic() - started, report.num_requests, resident_bytes(), device_bytes()))

    watcher = threading.Thread(target=watch, name="soak-memory")
    callers = [threading.Thread(target=call, args=(seed,), name=f"soak-{seed}") for seed in range(num_callers)]
    watcher.start()
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    done.set()
    watcher.join()
    report.seconds = time.monotonic() - started
    report.samples.append((report.seconds, report.num_requests, resident_bytes(), device_bytes()))
    return report


def resident_bytes() -> int:
    """Of this process, as Linux counts it."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def _answer(llm: LLM, request: Request, cancel_after: int | None) -> tuple[tuple[int, ...], str]:
    generation = llm.submit(request)
    tokens: list[int] = []
    try:
        for delta in generation:
            tokens += delta.token_ids
            if cancel_after is not None and len(tokens) >= cancel_after:
                generation.cancel()
        completion = generation.result()
    finally:
        generation.cancel()
    return tuple(completion.token_ids), str(completion.finish_reason.value)
