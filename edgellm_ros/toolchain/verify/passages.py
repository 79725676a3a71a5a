"""Makes what the models read: windows of a text, and tasks with their one right answer, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from edgellm_ros.errors import ToolchainError
from edgellm_ros.manifest import TokenSpec

Encode = Callable[[str], list[int]]
Ids = npt.NDArray[np.int32]
MIN_TOKENS = 64  # of a text: fewer say nothing


@dataclass(frozen=True)
class Passage:
    """Tokens to read, and those that follow the last `len(targets)` of them."""

    ids: Ids  # (num_tokens,)
    targets: Ids  # (num_targets,), num_targets <= num_tokens


@dataclass(frozen=True)
class Task:
    """`answer` and the end of its line are the targets `first` to `stop` of the passage that asks it."""

    kind: str
    question: str
    answer: str
    first: int
    stop: int


@dataclass(frozen=True)
class Sheet:
    """Questions of one kind in a row: examples, then each question after those before it with their right answers."""

    passage: Passage  # whose targets begin with the first answer
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Text:
    """A text and what it is called; the built-in one is `built-in`."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of its UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(path: Path | None) -> Text:
    """The built-in text, or a UTF-8 file; raises ToolchainError for one that cannot be read."""
    if path is None:
        return Text("built-in", files("edgellm_ros.quality").joinpath("text.txt").read_text(encoding="utf-8"))
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ToolchainError(f"{path} is not UTF-8 text ({error}); convert it, or choose another file") from error
    except OSError as error:
        raise ToolchainError(f"{path} cannot be read: {error}") from error


def text_windows(text: Text, encode: Encode, tokens: TokenSpec, window: int) -> list[Passage]:
    """The text in pieces of at most `window` tokens, each read alone (after BOS where the model wants it).

    Every token is a target once, but the first where there is no BOS before it. Raises ToolchainError for a text
    of fewer than MIN_TOKENS tokens.
    """
    ids = encode(text.content)
    if len(ids) < MIN_TOKENS:
        raise ToolchainError(f"text {text.name} has {len(ids)} tokens; it needs {MIN_TOKENS}, better 4,000")
    start = [tokens.bos_id] if tokens.add_bos and tokens.bos_id is not None else []
    step = window - len(start)
    found = []
    for begin in range(0, len(ids) - 1, step):
        piece = np.asarray([*start, *ids[begin : begin + step + 1]], np.int32)
        found.append(Passage(piece[:-1], piece[1:]))
    return found


def read_tasks(encode: Encode, tokens: TokenSpec, longest: int) -> list[Sheet]:
    """The built-in tasks on sheets of at most `longest` tokens; those too long even alone are left out."""
    content = files("edgellm_ros.quality").joinpath("tasks.yaml").read_text(encoding="utf-8")
    kinds: dict[str, dict[str, Any]] = yaml.safe_load(content)
    start = [tokens.bos_id] if tokens.add_bos and tokens.bos_id is not None else []
    found = []
    for kind, group in kinds.items():
        lines = [(question, group["question"].format(question), answer) for question, answer in group["tasks"]]
        while lines:
            count = len(lines)
            while count and len(start) + len(encode(group["examples"] + _asked(lines[:count]))) - 1 > longest:
                count -= 1
            if count:
                found.append(_sheet(kind, group["examples"], lines[:count], encode, start))
            lines = lines[max(count, 1) :]
    return found


def _asked(lines: list[tuple[str, str, str]]) -> str:
    return "".join(f"{prompt} {answer}\n" for _, prompt, answer in lines)


def _sheet(kind: str, examples: str, lines: list[tuple[str, str, str]], encode: Encode, start: list[int]) -> Sheet:
    whole = [*start, *encode(examples + _asked(lines))]

    def shared(text: str) -> int:
        """How many tokens `text` has in common with the whole; it may end within a token."""
        ids = [*start, *encode(text)]
        return next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))

    places = []
    for i, (_, prompt, _) in enumerate(lines):
        before = examples + _asked(lines[:i]) + prompt
        places.append((shared(before), shared(examples + _asked(lines[: i + 1]))))
    origin = places[0][0]
    passage = Passage(np.asarray(whole[:-1], np.int32), np.asarray(whole[origin:], np.int32))
    return Sheet(passage, tuple(
        Task(kind, question, answer, first - origin, stop - origin)
        for (question, _, answer), (first, stop) in zip(lines, places, strict=True)
    ))  # fmt: skip
