"""Runs a bundle and its original over the same tokens, judges the difference, and stores the verdict in the manifest.

The bundle is run as a robot runs it, by its executor, prompts in pieces. Where no original is at hand, its figures of
an earlier run are used if they are of the same text. A quantised checkpoint is measured as its scales say, activations
included, which no executor here rounds.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgellm_ros.bundle import TOKENIZER, Bundle
from edgellm_ros.errors import ToolchainError
from edgellm_ros.manifest import MANIFEST, TokenSpec
from edgellm_ros.quality import Quality, TaskScore
from edgellm_ros.tokenizer import Tokenizer
from edgellm_ros.toolchain.verify.comparison import Comparison, TextFigures
from edgellm_ros.toolchain.verify.executor_reading import ExecutorReading
from edgellm_ros.toolchain.verify.marks import judge, limits_for, scheme_of
from edgellm_ros.toolchain.verify.passages import Ids, Passage, Sheet, Text, read_tasks, read_text, text_windows
from edgellm_ros.toolchain.verify.reading import CheckpointReading
from edgellm_ros.toolchain.weights import Progress

WINDOW = 512  # tokens that are read together, as llama.cpp's perplexity; less where the bundle's context is shorter


def verify_bundle(
    bundle: Bundle,
    against: Path | CheckpointReading | None = None,
    text_file: Path | None = None,
    scheme: str = "",
    marks_file: Path | None = None,
    executor: str = "onnxruntime",
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Quality:
    """Measure `bundle` and judge it by the marks of `scheme` (its own unless given); nothing is stored.

    against: the checkpoint it was made from, or one that was read before; without it, perplexity and tasks only.
    executor: a name in EngineConfig. cache: a directory where the hidden states of a checkpoint that is opened here are
    kept for the next time. Raises ToolchainError, and what loading the bundle raises.
    """
    progress = progress or _silent
    manifest = bundle.manifest
    scheme = scheme or scheme_of(manifest.quantization)
    limits = limits_for(scheme, marks_file)
    tokenizer, context = bundle.read_text(TOKENIZER), manifest.model.max_context
    material = _Material.make(read_text(text_file), tokenizer, manifest.tokens, context)
    original = CheckpointReading(against, cache=cache) if isinstance(against, Path) else against
    if original is not None:
        original.check_same(manifest.model, tokenizer, material.text.content)
    candidate = ExecutorReading(bundle, material.passages, executor)  # first: that it cannot run is said at once
    try:
        if original is not None:
            original.read(material.passages, context, bundle.vocab_map(), progress)
        quality = _measure(candidate, original, material, scheme, progress)
    finally:
        candidate.close()
    return judge(quality if original is not None else _with_earlier(quality, manifest.quality), limits)


def verify_checkpoint(
    path: Path,
    against: Path | CheckpointReading,
    text_file: Path | None = None,
    scheme: str = "",
    marks_file: Path | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Quality:
    """Measure a quantised checkpoint, activations rounded as its scales say, and judge it.

    cache: as above, of both checkpoints. Raises ToolchainError, also for a checkpoint that is not quantised and no
    `scheme` given.
    """
    progress = progress or _silent
    candidate = CheckpointReading(path, rounded=True, cache=cache)
    how = candidate.source.quantization()
    if not how and not scheme:
        raise ToolchainError(f"{path} is neither a bundle nor a quantised checkpoint; name the marks with --scheme")
    scheme = scheme or scheme_of(None, how)
    limits = limits_for(scheme, marks_file)
    tokenizer, context = candidate.source.tokenizer_json(), candidate.model.max_context
    material = _Material.make(read_text(text_file), tokenizer, candidate.source.token_spec(), context)
    original = CheckpointReading(against, cache=cache) if isinstance(against, Path) else against
    original.check_same(candidate.model, tokenizer, material.text.content)
    original.read(material.passages, context, None, progress)
    candidate.read(material.passages, context, None, progress, "checkpoint")
    return judge(_measure(candidate, original, material, scheme, progress), limits)


@dataclasses.dataclass(frozen=True)
class _Material:
    """What both models read."""

    text: Text
    window: int
    windows: list[Passage]
    sheets: list[Sheet]

    @property
    def passages(self) -> list[Passage]:
        """The windows, then the tasks'."""
        return [*self.windows, *(sheet.passage for sheet in self.sheets)]

    @classmethod
    def make(cls, text: Text, tokenizer_json: str, tokens: TokenSpec, max_context: int) -> _Material:
        """For a model of that tokenizer and context."""
        encode, window = Tokenizer(tokenizer_json).encode, min(WINDOW, max_context)
        sheets = read_tasks(encode, tokens, min(max_context, 2 * WINDOW))
        return cls(text, window, text_windows(text, encode, tokens, window), sheets)


def _measure(
    candidate: ExecutorReading | CheckpointReading,
    original: CheckpointReading | None,
    material: _Material,
    scheme: str,
    progress: Progress,
) -> Quality:
    figures = _compare(candidate, original, material.windows, progress)
    return Quality(
        scheme=scheme,
        text=material.text.name,
        text_sha256=material.text.sha256,
        num_tokens=figures.num_tokens,
        window=material.window,
        executor=candidate.description,
        perplexity=figures.perplexity,
        tasks=_ask(candidate, original, material.sheets, len(material.windows), progress),
        original=original.name if original is not None else "",
        original_perplexity=figures.original_perplexity,
        perplexity_ratio_error=figures.ratio_error,
        kl_divergence=figures.kl_divergence,
        kl_divergence_p99=figures.kl_divergence_p99,
        top1_agreement=figures.top1_agreement,
        cosine=figures.cosine,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


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
    candidate: ExecutorReading | CheckpointReading,
    original: CheckpointReading | None,
    windows: Sequence[Passage],
    progress: Progress,
) -> TextFigures:
    comparison = Comparison()
    for done, window in enumerate(windows):
        progress("text", done, len(windows))
        rows = candidate.rows(window.targets)
        for start, logits in candidate.pieces(done, len(window.ids)):
            stop = start + len(logits)
            theirs = None if original is None else original.logits(done, slice(start, stop))
            comparison.add(logits, rows[start:stop], theirs)
    progress("text", len(windows), len(windows))
    return comparison.figures()


def _ask(
    candidate: ExecutorReading | CheckpointReading,
    original: CheckpointReading | None,
    sheets: Sequence[Sheet],
    first: int,
    progress: Progress,
) -> tuple[TaskScore, ...]:
    """`first` is the place of the first sheet among the passages."""
    scores: dict[str, TaskScore] = {}
    for i, sheet in enumerate(sheets):
        progress("tasks", i, len(sheets))
        wanted = candidate.rows(sheet.passage.targets)
        found = _most_likely(candidate, first + i, len(wanted))
        theirs = None if original is None else _most_likely(original, first + i, len(wanted))
        for task in sheet.tasks:
            part = slice(task.first, task.stop)
            old = scores.get(task.kind, TaskScore(task.kind, 0, 0, None if original is None else 0))
            right = None if theirs is None else (old.original or 0) + int(np.array_equal(theirs[part], wanted[part]))
            passed = old.passed + int(np.array_equal(found[part], wanted[part]))
            scores[task.kind] = TaskScore(task.kind, old.total + 1, passed, right)
    progress("tasks", len(sheets), len(sheets))
    return tuple(scores.values())


def _most_likely(model: ExecutorReading | CheckpointReading, passage: int, count: int) -> Ids:
    """(count,) the rows with the largest logit at the last positions of a passage."""
    best: Ids = np.concatenate([logits.argmax(-1) for _, logits in model.pieces(passage, count)])
    return best


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
