"""`edgellm tune`: the fastest tile is found and kept, and what is kept is used only where it belongs."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgellm_ros.benchmark.tuning import num_timed, tune
from edgellm_ros.bundle import Bundle
from edgellm_ros.cli import tune as cli_tune
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors import cuda, cuda_tiles
from edgellm_ros.executors.cuda_tiles import PRODUCTS, Tiles, apply_tiles, read_tiles, tiles_file, write_tiles

INFO = {"name": "NVIDIA H200 (test)", "compute_capability": (9, 0), "num_sms": 132, "tiles_version": 2}
COUNTS = {"attn.qkv": 3, "attn.o": 4, "mlp.gate_up": 2, "mlp.down": 5, "head": 1}


class TimedDouble:
    """Stands in for `_native.Decoder`: a step takes 10 ms and what the tile of each product adds."""

    def __init__(self, added: dict[tuple[str, int], float]) -> None:
        self.added = added
        self.tiles: dict[tuple[str, int], int] = {}

    def num_tiles(self, product: str, batch: int) -> int:
        if product not in COUNTS:
            raise ValueError(f"the decoder has no product {product}")
        return COUNTS[product]

    def set_tile(self, product: str, batch: int, tile: int) -> None:
        assert -1 <= tile < COUNTS[product]
        self.tiles[product, batch] = tile

    def time_run(
        self, slots: Sequence[int], positions: Sequence[int], token_ids: Sequence[int], num_steps: int
    ) -> list[float]:
        batch = len(slots)
        ms = 10.0 + sum(self.added.get((p, t), 0.0) for (p, b), t in self.tiles.items() if b == batch)
        return [ms] * num_steps


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    import shutil

    shutil.copytree(tiny_bundle("llama").path, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle", verify=False)


def kept(bundle: Bundle) -> Tiles:
    return Tiles(cuda_tiles.gpu_of(INFO), cuda_tiles.weights_hash(bundle), INFO["tiles_version"])


def test_each_product_gets_its_fastest_tile_and_noise_changes_nothing() -> None:
    decoder = TimedDouble({("attn.o", 2): -1.0, ("attn.o", 3): -0.5, ("mlp.down", 0): -0.02, ("head", 0): 3.0})
    asked: list[tuple[int, int]] = []
    choices = {c.product: c for c in tune(decoder, 2, 100, lambda words, done, total: asked.append((done, total)))}
    assert {name: c.tile for name, c in choices.items()} == {
        "attn.qkv": -1, "attn.o": 2, "mlp.gate_up": -1, "mlp.down": -1, "head": -1
    }  # fmt: skip
    assert choices["attn.o"].ms == 9.0 and choices["attn.o"].default_ms == 10.0
    assert {tile for (product, batch), tile in decoder.tiles.items() if product == "attn.o" and batch == 2} == {2}
    total = num_timed(decoder, 2)
    assert total == sum(COUNTS.values()) + len(COUNTS)
    assert asked[0] == (0, total) and asked[-1] == (total, total)


def test_what_was_kept_is_given_to_the_next_decoder_in_its_mode_only(bundle: Bundle) -> None:
    tiles = kept(bundle)
    tiles.set("exact", "attn.o", cuda_tiles.ANY_BATCH, 3, 4)
    tiles.set("fast", "attn.o", 1, 2, 4)
    tiles.set("fast", "mlp.down", 4, -1, 5)
    path = write_tiles(bundle, INFO, tiles)
    assert path == bundle.path / "tiles" / "nvidia-h200-test-sm90-132.json"
    assert read_tiles(bundle, INFO) == tiles
    exact, fast = TimedDouble({}), TimedDouble({})
    assert apply_tiles(exact, bundle, INFO, True) and apply_tiles(fast, bundle, INFO, False)
    assert exact.tiles == {("attn.o", 1): 3}
    assert fast.tiles == {("attn.o", 1): 2, ("mlp.down", 4): -1}
    Bundle.open(bundle.path)  # the manifest does not know the file, and need not


@pytest.mark.parametrize(("batch_invariant", "tile"), [(True, 3), (False, 2)])
def test_a_load_takes_what_was_kept_between_the_weights_and_the_graphs(
    batch_invariant: bool, tile: int, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native module is a stand-in: before its weights a decoder has no products, afterwards graphs are captured."""

    class Loaded(Exception):
        pass

    class Loading(TimedDouble):
        def set_tile(self, product: str, batch: int, tile: int) -> None:
            events.append((product, batch, tile))

        def finish_load(self) -> None:
            events.append("finish_load")
            raise Loaded

    events: list[Any] = []
    tiles = kept(bundle)
    tiles.set("exact", "attn.o", cuda_tiles.ANY_BATCH, 3, 4)
    tiles.set("fast", "attn.o", 1, 2, 4)
    write_tiles(bundle, INFO, tiles)
    info = INFO | {"free_bytes": 1000, "integrated": False, "l2_bytes": 4 << 20, "bus_bits": 128}
    module = SimpleNamespace(
        device_info=lambda: info, MAX_BATCH=8, decide=lambda settings, *gpu: settings,
        plan_memory=lambda settings: {"weights": 900, "total": 1000}, Decoder=lambda settings: Loading({}),
    )  # fmt: skip
    monkeypatch.setattr(cuda.native, "load", lambda: module)
    monkeypatch.setattr(cuda.native, "products_reason", lambda module: "")
    monkeypatch.setattr(cuda, "_settings", lambda *given: SimpleNamespace(batch_invariant=batch_invariant))
    monkeypatch.setattr(cuda, "_upload", lambda *given: events.append("upload"))
    with pytest.raises(Loaded):
        cuda.CudaExecutor(bundle, EngineConfig())
    assert events == ["upload", ("attn.o", 1, tile), "finish_load"]


def test_nothing_kept_is_no_reason_to_complain(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    assert not apply_tiles(TimedDouble({}), bundle, INFO, True)
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "0.0.1"}, "edgellm_ros 0.0.1 wrote it"),
        ({"weights": "0" * 64}, "another GPU or other weights"),
        ({"gpu": "another"}, "another GPU or other weights"),
        ({"kernels": 1}, "other kernels"),
        ({"choices": {"exact": {"attn.o": {"0": [1, 3]}}}}, "other kernels"),  # there are 4
        ({"choices": {"exact": {"attn.o": {"0": [4, 4]}}}}, "other kernels"),
        ({"choices": {"exact": {"mlp.up": {"0": [0, 1]}}}}, "other kernels"),
        ({"choices": {"exact": {"attn.o": {"0": "x"}}}}, "cannot be read"),
        ({"choices": {"exact": {"attn.o": {"all": [1, 4]}}}}, "cannot be read"),
        ({"choices": {"exact": {"attn.o": {"9": [1, 4]}}}}, "batch 9 is not 0 to 8"),
        ({"choices": {"exact": {"attn.o": {"0": [float("inf"), 4]}}}}, "cannot be read"),
        ({"choices": 3}, "cannot be read"),
        ({"more": 1}, "cannot be read"),
    ],
)
def test_a_file_that_does_not_belong_is_named_and_left_alone(
    change: dict[str, Any], said: str, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    tiles = kept(bundle)
    tiles.set("exact", "attn.o", 0, 1, 4)
    path = write_tiles(bundle, INFO, tiles)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    decoder = TimedDouble({})
    with caplog.at_level(logging.WARNING):
        assert not apply_tiles(decoder, bundle, INFO, True)
    assert decoder.tiles == {}
    assert said in caplog.text and str(path) in caplog.text and "edgellm tune" in caplog.text


def test_a_damaged_file_does_not_stop_a_load(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiles(bundle, INFO, kept(bundle))
    path.write_bytes(path.read_bytes()[:20] + b"\xff")
    assert not apply_tiles(TimedDouble({}), bundle, INFO, True)
    assert "cannot be read" in caplog.text


def test_where_choices_cannot_be_kept_is_said_before_minutes_of_timing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle.path / "tiles").write_text("in the way")  # also for root, whom permissions do not stop
    monkeypatch.setattr("edgellm_ros.native.load", lambda: None)
    assert main(["tune", str(bundle.path), "--tokens", "16"]) == 2
    said = capsys.readouterr().err
    assert "cannot be kept in" in said and "make it writable" in said and said.count("\n") == 1


def test_tokens_must_fit_the_slots_that_will_be_loaded_not_only_the_model(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bundle.manifest.model
    assert main(["tune", str(bundle.path), "--tokens", str(model.max_context)]) == 2
    assert f"do not fit the {model.max_context} tokens of a slot; lower it\n" in capsys.readouterr().err
    monkeypatch.setattr("edgellm_ros.executors.cuda.DEFAULT_CONTEXT", 100)  # smaller than the model's, as of most models
    assert main(["tune", str(bundle.path), "--tokens", "37"]) == 2
    said = f"do not fit the 100 tokens of a slot; lower it or give --max-context, up to {model.max_context}"
    assert said in capsys.readouterr().err


def test_without_tokens_a_short_slot_is_timed_as_full_as_it_gets(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    config = EngineConfig(executor="cuda", max_context=100)
    assert cli_tune._tokens(bundle, config, None) == 36  # 64 are for the steps
    assert cli_tune._tokens(bundle, dataclasses.replace(config, max_context=8192), None) == 512
    assert main(["tune", str(bundle.path), "--max-context", "64"]) == 2
    assert "--tokens 1 and 64 more do not fit the 64 tokens of a slot" in capsys.readouterr().err


def test_every_product_is_one_that_a_decoder_has() -> None:
    assert set(PRODUCTS) == set(COUNTS)
    assert tiles_file(Bundle(Path("b"), None), INFO).parent == Path("b/tiles")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "2"], "in exact mode every batch has one choice"),
        (["--decode-batching", "fast", "--batch", "9"], "--batch 9: allowed is 1 to 8"),
        (["--decode-batching", "fast", "--max-slots", "2", "--batch", "3"], "--batch 3: allowed is 1 to 2"),
        (["--tokens", "0"], "--tokens 0: allowed is 1 to"),
    ],
)
def test_bad_settings_are_named_before_anything_is_loaded(
    arguments: list[str], said: str, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", str(bundle.path), *arguments]) == 2
    assert said in capsys.readouterr().err
