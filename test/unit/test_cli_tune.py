"""`edgellm tune` from the command line: what it times, writes, says and forgets; the GPU and its executor are stand-ins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cuda_tiles import COUNTS, INFO, TimedDouble

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import DeviceError
from edgellm_ros.executors import SequenceStep
from edgellm_ros.executors.cuda_tiles import PRODUCTS, read_tiles

FILE = Path("tiles") / "nvidia-h200-test-sm90-132.json"


class Executor:
    """Stands in for CudaExecutor: tile 2 of attn.o and tile 1 of mlp.gate_up each save a millisecond of ten.

    As if a slow tile had been kept before, the load has applied one.
    """

    made: list[Executor]

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        self.config = config
        self.decoder = TimedDouble({("attn.o", 2): -1.0, ("mlp.gate_up", 1): -1.0, ("mlp.down", 3): 5.0})
        for batch in range(1, 9):
            self.decoder.set_tile("mlp.down", batch, 3)
        self.batch_invariant = config.decode_batching == "exact" and config.max_slots > 1
        self.device_info = INFO
        self.info = SimpleNamespace(vocab_size=bundle.manifest.model.vocab_size)
        self.filled: list[tuple[int, int, int]] = []  # slot, position, tokens
        self.closed = 0
        self.made.append(self)

    def step(self, batch: list[SequenceStep]) -> None:
        self.filled += [(step.slot, step.position, len(step.token_ids)) for step in batch]

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Executor]:
    """The executors that the command makes."""
    Executor.made = []
    monkeypatch.setattr("edgellm_ros.native.load", lambda: SimpleNamespace(device_info=lambda: INFO))
    monkeypatch.setattr("edgellm_ros.executors.cuda.CudaExecutor", Executor)
    return Executor.made


@pytest.fixture
def path(tiny_bundle: Callable[[str], Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle("llama").path, tmp_path / "bundle"))


def tune(path: Path, *options: str) -> int:
    return main(["tune", str(path), "--tokens", "16", *options])


@pytest.mark.parametrize(
    ("options", "mode", "batches", "keys", "slots"),
    [
        ((), "exact", [1], ["0"], 4),
        (("--max-slots", "1"), "fast", [1], ["1"], 1),
        (("--decode-batching", "fast", "--batch", "4", "1"), "fast", [1, 4], ["1", "4"], 4),
        (("--decode-batching", "fast", "--batch", "8"), "fast", [8], ["8"], 8),
    ],
)
def test_what_is_fastest_is_kept_under_the_mode_and_batch_that_will_use_it(
    options: tuple[str, ...], mode: str, batches: list[int], keys: list[str], slots: int, path: Path,
    made: list[Executor], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert tune(path, "--json", *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(path / FILE)
    for result, batch in zip(told["batches"], batches, strict=True):
        assert (result["batch"], result["ms_before"], result["ms_after"]) == (batch, 10.0, 8.0)
        assert [choice["product"] for choice in result["choices"]] == list(PRODUCTS)
    tiles = read_tiles(Bundle.open(path), INFO)
    best = {"attn.o": 2, "mlp.gate_up": 1}
    assert tiles is not None and tiles.choices == {
        mode: {product: {key: (best.get(product, -1), COUNTS[product]) for key in keys} for product in PRODUCTS}
    }
    (executor,) = made
    assert executor.closed == 1 and executor.config.max_slots == slots
    assert executor.filled == [(slot, 0, 16) for slot in range(batches[-1])], "timed after tokens that were computed"


def test_another_mode_is_added_to_what_was_kept_and_said_in_words(
    path: Path, made: list[Executor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(path) == tune(path, "--max-slots", "1") == 0
    said = capsys.readouterr().out
    assert said.count("batch 1: a step takes 8.000 ms instead of 10.000 (+20.0%)") == 2
    assert said.count("tile 2 of 4") == said.count("tile 1 of 2") == 2 and said.count("built-in choice") == 6
    assert said.count(f"kept in {path / FILE}; every load reads it") == 2
    assert set(json.loads((path / FILE).read_text())["choices"]) == {"exact", "fast"}


def test_what_was_kept_is_forgotten_for_this_gpu_alone_and_without_loading(
    path: Path, made: list[Executor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(path) == 0
    other = path / "tiles" / "orin-sm87-8.json"
    other.write_text("{}")
    capsys.readouterr()
    assert main(["tune", str(path), "--forget"]) == 0
    assert capsys.readouterr().out == f"removed {path / FILE}\n"
    assert not (path / FILE).exists() and other.exists() and len(made) == 1
    assert main(["tune", str(path), "--forget"]) == 0
    assert capsys.readouterr().out == f"there was no {path / FILE}\n"


def test_a_gpu_that_fails_while_timing_leaves_no_choice_and_no_executor(
    path: Path, made: list[Executor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise DeviceError("cudaGraphLaunch failed: cudaErrorLaunchFailure")

    monkeypatch.setattr(TimedDouble, "time_run", fail)
    assert tune(path) != 0
    assert "cudaErrorLaunchFailure" in capsys.readouterr().err
    assert made[0].closed == 1 and not (path / FILE).exists()
