"""Runs a bundle and its original over the same tokens, judges the difference, and stores the verdict in the manifest.

The bundle is run as a robot runs it, by its executor, prompts in pieces. Where no original is at hand, its figures of
an earlier run are used if they are of the same text.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edgellm_ros.bundle import MANIFEST, TOKENIZER, Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ToolchainError
from edgellm_ros.executors import Executor, SequenceStep, create_executor
from edgellm_ros.quality import Quality, TaskScore
from edgellm_ros.tokenizer import Tokenizer
from edgellm_ros.toolchain.verify.comparison import Comparison, Logits, TextFigures
from edgellm_ros.toolchain.verify.marks import judge, limits_for
from edgellm_ros.toolchain.verify.original import Original
from edgellm_ros.toolchain.verify.passages import Ids, Passage, Task, read_tasks, read_text, text_windows
from edgellm_ros.toolchain.weights import Progress

WINDOW = 512  # tokens that are read together, as llama.cpp's perplexity; less where the bundle's context is shorter
_LOGITS_AT_ONCE = 1 << 22  # of one model; a few arrays of this size are in memory
_MAX_PIECE = 128


def verify_bundle(
    bundle: Bundle,
    against: Path | None = None,
    text_file: Path | None = None,
    scheme: str = "",
    marks_file: Path | None = None,
    executor: str = "onnxruntime",
    progress: Progress | None = None,
) -> Quality:
    """Measure `bundle` and judge it by the marks of `scheme` (its own unless given); nothing is stored.

    against: the checkpoint it was made from; without it, perplexity and tasks only. executor: a name in EngineConfig.
    Raises ToolchainError, and what loading the bundle raises.
    """
    progress = progress or _silent
    scheme = scheme or bundle.manifest.quantization.weights
    limits = limits_for(scheme, marks_file)
    manifest = bundle.manifest
    text, encode = read_text(text_file), Tokenizer(bundle.read_text(TOKENIZER)).encode
    window = min(WINDOW, manifest.model.max_context)
    windows = text_windows(text, encode, manifest.tokens, window)
    tasks = read_tasks(encode, manifest.tokens, min(manifest.model.max_context, 2 * WINDOW))
    passages = [*windows, *(task.passage for task in tasks)]
    original = None
    if against is not None:
        original = Original(against, bundle, text.content)
        original.read(passages, progress)
    capacity = max(len(passage.ids) for passage in passages)
    config = EngineConfig(executor=executor, max_slots=1, max_context=capacity, prefill_chunk=_MAX_PIECE)
    runner = create_executor(bundle, config)
    try:
        figures = _compare(runner, original, windows, progress)
        scores = _ask(runner, original, tasks, len(windows), progress)
    finally:
        runner.close()
    quality = Quality(
        scheme=scheme,
        text=text.name,
        text_sha256=text.sha256,
        num_tokens=figures.num_tokens,
        window=window,
        executor=f"{runner.info.name} on {runner.info.device}",
        perplexity=figures.perplexity,
        tasks=scores,
        original=original.name if original is not None else "",
        original_perplexity=figures.original_perplexity,
        perplexity_ratio_error=figures.ratio_error,
        kl_divergence=figures.kl_divergence,
        kl_divergence_p99=figures.kl_divergence_p99,
        top1_agreement=figures.top1_agreement,
        cosine=figures.cosine,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    if original is None:
        quality = _with_earlier(quality, manifest.quality)
    return judge(quality, limits)


def store_quality(bundle: Bundle, quality: Quality) -> Bundle:
    """Put `quality` into the bundle's manifest; the file is replaced whole. Returns the bundle with it."""
    manifest = dataclasses.replace(bundle.manifest, quality=quality)
    path = bundle.path / MANIFEST
    partial = path.with_name(f".{MANIFEST}.partial-{os.getpid()}")
    try:
        partial.write_text(manifest.to_json(), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ToolchainError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Bundle(bundle.path, manifest)


def _compare(
    runner: Executor, original: Original | None, windows: Sequence[Passage], progress: Progress
) -> TextFigures:
    comparison = Comparison()
    for done, window in enumerate(windows):
        progress("text", done, len(windows))
        rows = _rows(runner, window.targets)
        for start, logits in _read(runner, window, len(window.ids)):
            stop = start + len(logits)
            theirs = None if original is None else original.logits(done, slice(start, stop))
            comparison.add(logits, rows[start:stop], theirs)
    progress("text", len(windows), len(windows))
    return comparison.figures()


def _ask(
    runner: Executor, original: Original | None, tasks: Sequence[Task], first: int, progress: Progress
) -> tuple[TaskScore, ...]:
    """`first` is the place of the first task among the passages that the original has read."""
    scores: dict[str, TaskScore] = {}
    for i, task in enumerate(tasks):
        progress("tasks", i, len(tasks))
        wanted = _rows(runner, task.passage.targets)
        count = len(wanted)
        best = np.concatenate([logits.argmax(-1) for _, logits in _read(runner, task.passage, count)])
        passed = np.array_equal(best, wanted)
        old = scores.get(task.kind, TaskScore(task.kind, 0, 0, None if original is None else 0))
        theirs = None
        if original is not None:
            best = original.logits(first + i, slice(len(task.passage.ids) - count, None)).argmax(-1)
            theirs = (old.original or 0) + int(np.array_equal(best, wanted))
        scores[task.kind] = TaskScore(task.kind, old.total + 1, old.passed + int(passed), theirs)
    progress("tasks", len(tasks), len(tasks))
    return tuple(scores.values())


def _read(runner: Executor, passage: Passage, count: int) -> Iterator[tuple[int, Logits]]:
    """Run a passage in pieces; gives the position and logits of the last `count` tokens, each piece till the next."""
    first = len(passage.ids) - count
    vocab = runner.info.vocab_map
    columns = runner.info.vocab_size if vocab is None else len(vocab)
    piece = max(8, min(_MAX_PIECE, _LOGITS_AT_ONCE // columns) // 8 * 8)
    for start in range(0, len(passage.ids), piece):
        ids = passage.ids[start : start + piece]
        wanted = max(0, start + len(ids) - max(first, start))
        logits = runner.step([SequenceStep(0, ids, start, wanted)])
        if wanted:
            yield start + len(ids) - wanted, logits


def _rows(runner: Executor, token_ids: Ids) -> Ids:
    """The logits' columns of some tokens; -1 for one that a reduced head has no row for."""
    vocab = runner.info.vocab_map
    return token_ids if vocab is None else vocab.rows(token_ids)


def _with_earlier(quality: Quality, earlier: Quality) -> Quality:
    """The original's own figures from an earlier run over the same tokens."""
    same = (earlier.text_sha256, earlier.window, earlier.num_tokens) == (
        quality.text_sha256, quality.window, quality.num_tokens,
    )  # fmt: skip
    if not same or earlier.original_perplexity is None:
        return quality
    answers = {score.kind: score.original for score in earlier.tasks}
    tasks = tuple(dataclasses.replace(score, original=answers.get(score.kind)) for score in quality.tasks)
    name, perplexity = earlier.original, earlier.original_perplexity
    return dataclasses.replace(quality, tasks=tasks, original=name, original_perplexity=perplexity)


def _silent(stage: str, done: int, total: int) -> None:
    """No progress wanted."""
