"""Helper modules of this directory, which pytest's importlib mode does not put on the path itself, and the engines that tests start."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from doubles import FakeExecutor, byte_tokenizer
from runtime_steps import Gate

from edgellm_ros.config import EngineConfig
from edgellm_ros.runtime.engine import Engine


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """`start(executor, max_queue=4)`: an engine that is closed at the test's end, held at a step or not."""
    engines: list[tuple[Engine, FakeExecutor]] = []

    def make(executor: FakeExecutor | None = None, **settings: Any) -> Engine:
        executor = executor or FakeExecutor(allowed=128)
        engines.append((Engine(executor, byte_tokenizer(), EngineConfig(**settings)), executor))
        return engines[-1][0]

    yield make
    for engine, executor in engines:
        if isinstance(executor.before_step, Gate):
            executor.before_step.open()
        engine.close()
