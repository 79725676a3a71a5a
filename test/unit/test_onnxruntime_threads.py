"""How many threads the onnxruntime executor takes of those that were asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import pytest

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (2, 2), (3, 2), (1024, 2)])
def test_more_threads_than_logical_cpus_are_not_taken_and_both_numbers_are_said(
    asked: int,
    taken: int,
    tiny_bundle: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    with caplog.at_level(logging.WARNING):
        executor = OnnxRuntimeExecutor(tiny_bundle("llama"), EngineConfig(max_slots=1, num_threads=asked))
    assert executor.info.device == f"CPU, {taken} threads"
    executor.close()
    told = [f"num_threads is {asked}, but this process has 2 logical CPUs: 2 threads compute"] if asked > 2 else []
    assert [record.getMessage() for record in caplog.records] == told
