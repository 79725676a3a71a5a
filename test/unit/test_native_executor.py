"""What an executor over the native module hands to its decoder; the decoder is a stand-in, and no GPU is needed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import byte_tokenizer

from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import DeviceError, RequestError
from edgellm_ros.executors import ExecutorInfo, SequenceStep
from edgellm_ros.executors.adapter_table import AdapterTable
from edgellm_ros.executors.base import LoadedAdapter
from edgellm_ros.executors.native_executor import NativeExecutor
from edgellm_ros.runtime.engine import Engine


class Decoder:
    """Stands in for `_native.TokenLoop`: it notes what it is told."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[Any, ...]]] = []
        self.unloaded: list[int] = []
        self.threads: list[int] = []

    def step(self, rows: list[tuple[Any, ...]]) -> np.ndarray:
        self.steps.append(rows)
        return np.zeros((sum(row[3] for row in rows), 99), np.float32)

    def unload_adapter(self, index: int) -> None:
        self.unloaded.append(index)


    def make_current(self) -> None:
        self.threads.append(threading.get_ident())


class Executor(NativeExecutor):
    """The least that a subclass makes: two slots of 16 tokens and two places for adapters."""

    def __init__(self, decoder: Decoder) -> None:
        self.info = ExecutorInfo("cuda", "none", "none", 2, 16, 99, 4, 0)
        self._decoder, self._adapters, self._max_loras = decoder, AdapterTable(2), 2

    def load_adapter(self, name: str, source: str | Path | Any) -> LoadedAdapter:
        return self._adapters.add(name, self._adapters.free_place(name), str(source))


def test_a_step_hands_over_every_sequence_with_its_own_adapter() -> None:
    decoder = Decoder()
    prompt, token = np.array([5, 6, 7], np.int32), np.array([8], np.int32)
    rows = Executor(decoder).step([SequenceStep(1, prompt, 3, 2, 2), SequenceStep(0, token, 9)])
    assert decoder.steps == [[(1, prompt, 3, 2, 2), (0, token, 9, 1, 0)]] and rows.shape == (3, 99)


def test_the_thread_that_serves_takes_the_decoders_gpu_before_all_else() -> None:
    decoder = Decoder()
    engine = Engine(Executor(decoder), byte_tokenizer(), EngineConfig())
    engine.close()
    (thread,) = decoder.threads
    assert thread != threading.get_ident() and not decoder.steps


def test_an_adapter_leaves_the_decoder_as_well_as_the_list() -> None:
    decoder = Decoder()
    executor = Executor(decoder)
    executor.load_adapter("red", 1)
    executor.load_adapter("blue", 2)
    executor.unload_adapter("blue")
    assert decoder.unloaded == [2] and set(executor.adapters) == {"red"}
    with pytest.raises(RequestError, match="no adapter is named 'blue'; loaded are red"):
        executor.unload_adapter("blue")
    assert decoder.unloaded == [2]


def test_a_closed_executor_says_so() -> None:
    executor = Executor(Decoder())
    executor.close()
    with pytest.raises(DeviceError, match="the cuda executor is closed"):
        executor.step([SequenceStep(0, np.array([5], np.int32), 0)])
