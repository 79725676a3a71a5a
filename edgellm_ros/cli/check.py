"""One line of `edgellm doctor`'s table: what was looked for, what was found, and how to get it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path


class State(enum.Enum):
    """OK is here, MISSING can be done without, FAILED stops the base from working."""

    OK = "ok"
    MISSING = "missing"
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    group: str
    name: str
    state: State
    found: str
    remedy: str = ""


def read_text(path: Path) -> str:
    """A file of /proc or /etc; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
