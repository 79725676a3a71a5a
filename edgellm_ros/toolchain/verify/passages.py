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

from edgellm_ros.bundle import TokenSpec
from edgellm_ros.errors import ToolchainError

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
    """`passage` ends before the last token of the answer; its targets are the answer and the end of its line."""

    kind: str
    question: str
    answer: str
    passage: Passage


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


def read_tasks(encode: Encode, tokens: TokenSpec, longest: int) -> list[Task]:
    """The built-in tasks; those that take more than `longest` tokens are left out."""
    content = files("edgellm_ros.quality").joinpath("tasks.yaml").read_text(encoding="utf-8")
    kinds: dict[str, dict[str, Any]] = yaml.safe_load(content)
    start = [tokens.bos_id] if tokens.add_bos and tokens.bos_id is not None else []
    found = []
    for kind, group in kinds.items():
        for question, answer in group["tasks"]:
            prompt = group["examples"] + group["question"].format(question)
            asked = [*start, *encode(prompt)]
            whole = [*start, *encode(f"{prompt} {answer}\n")]
            same = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
            targets = whole[same:]
            if len(whole) - 1 <= longest:
                passage = Passage(np.asarray(whole[:-1], np.int32), np.asarray(targets, np.int32))
                found.append(Task(kind, question, answer, passage))
    return found
