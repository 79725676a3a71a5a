"""The CUDA executor compares its plan with what is free before it takes anything; no GPU: the native module is a stand-in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgellm_ros import memory
from edgellm_ros.benchmark.read_bandwidth import measure_read_bandwidth
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ConfigError
from edgellm_ros.executors import cuda

PLAN = {"weights": 1_500_000_000, "kv_cache": 400_000_000, "workspace": 100_000_000, "total": 2_000_000_000}


class Taken(Exception):
    """The decoder is made: memory would be taken."""


def open_with(
    monkeypatch: pytest.MonkeyPatch, free: int, integrated: bool, available: int, lacks: str = "", max_slots: int = 4,
    **others: Any,
) -> None:  # fmt: skip
    """others: what the module has in place of what takes memory, or decides."""

    def take(settings: Any) -> None:
        raise Taken

    def decide(settings: Any, *gpu: Any) -> Any:
        return SimpleNamespace(**vars(settings) | {"decided": gpu})

    def plan(settings: Any) -> dict[str, int]:
        assert settings.decided == (4 << 20, 128, not lacks), "what is left to the GPU is decided before"
        return PLAN

    module = SimpleNamespace(
        device_info=lambda: {"free_bytes": free, "integrated": integrated, "l2_bytes": 4 << 20, "bus_bits": 128},
        CUDA_MAJOR=13, MAX_BATCH=8, plan_memory=plan, **{"Decoder": take, "decide": decide} | others,
    )  # fmt: skip
    settings = SimpleNamespace(
        num_slots=4, capacity=4096, kv_bytes_per_token=24_576, max_tokens=512, max_adapters=0,
        kv_format=SimpleNamespace(name="bf16"),
    )  # fmt: skip
    quantization: Any = SimpleNamespace(quantization=None, model=None)
    bundle: Any = SimpleNamespace(manifest=quantization, vocab_map=lambda: None)
    monkeypatch.setattr(cuda.native, "load", lambda: module)
    monkeypatch.setattr(cuda, "_settings", lambda *arguments: settings)
    monkeypatch.setattr(cuda.native, "products_reason", lambda module: lacks)
    monkeypatch.setattr(cuda, "widenings", lambda *arguments: [])
    monkeypatch.setattr(memory, "available_memory", lambda: available)
    cuda.CudaExecutor(bundle, EngineConfig(max_slots=max_slots))


@pytest.mark.parametrize(
    ("free", "integrated", "available", "told"),
    [
        (1_900_000_000, False, 9_000_000_000, 1900),
        (9_000_000_000, True, 1_600_000_000, 1600),  # on a Jetson the CPU's programs and containers count too
        (300_000_000, True, 1_900_000_000, 1900),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_numbers_and_remedies(
    free: int, integrated: bool, available: int, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=rf"needs 2000 MB of GPU memory .* but {told} MB are free; lower max_slots") as refusal:
        open_with(monkeypatch, free, integrated, available)
    assert "max_slots 4 x max_context 4096 x 24576 bytes of KV cache" in str(refusal.value)
    assert "set kv_cache to fp8" in str(refusal.value)


def test_weights_that_fit_with_no_settings_are_said_to_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"weights alone take 1500 MB .* 1400 MB are free; .*--weights int4") as refusal:
        open_with(monkeypatch, 9_000_000_000, True, 1_400_000_000)
    assert "lower" not in str(refusal.value)


@pytest.mark.parametrize(
    ("lacks", "with_it", "without", "told"),
    [
        ("", True, True, ""),
        ("no such file", True, True, "prompts are read slowly: no cuBLASLt (no such file); install the CUDA toolkit"),
        ("no such file", True, False, "prompts are read more slowly where they are long: no cuBLASLt (no such file); "),
        ("no such file", False, False, ""),
    ],
)
def test_a_library_that_is_missing_is_missed_only_where_prompts_would_use_it(
    lacks: str, with_it: bool, without: bool, told: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def decide(settings: Any, *gpu: Any) -> Any:
        has = gpu[2:] in ((), (True,))
        return SimpleNamespace(**vars(settings) | {"decided": gpu, "needs_cublaslt": with_it if has else without})

    def upload(*arguments: Any) -> None:
        raise Taken

    monkeypatch.setattr(cuda, "_upload", upload)
    with caplog.at_level("WARNING"), pytest.raises(Taken):
        open_with(monkeypatch, 9_000_000_000, False, 0, lacks, decide=decide, Decoder=lambda settings: None)
    assert told in caplog.text and (caplog.text == "") == (told == "")


@pytest.mark.parametrize(("integrated", "told"), [(False, 100), (True, 1000)])
def test_a_jetsons_reading_is_timed_over_what_linux_can_give(
    integrated: bool, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few MiB, which CUDA calls free after a bundle was read, would be timed in the cache."""
    module = SimpleNamespace(
        device_info=lambda: {"free_bytes": 400 << 20, "integrated": integrated}, measure_read_bandwidth=lambda size: 50
    )  # fmt: skip
    monkeypatch.setattr(cuda.native, "load", lambda: module)
    monkeypatch.setattr(memory, "available_memory", lambda: 4000 << 20)
    assert measure_read_bandwidth("cuda").method == f"kernel that reads {told} MiB"


@pytest.mark.parametrize(("free", "integrated", "available"), [
    (2_000_000_000, False, 0),
    (9_000_000_000, True, 2_000_000_000),
    (300_000_000, True, 2_000_000_000),  # a Jetson whose memory holds the files of the bundle that was just checked
])  # fmt: skip
def test_a_plan_that_fits_is_told_and_then_taken(
    free: int, integrated: bool, available: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), pytest.raises(Taken):
        open_with(monkeypatch, free, integrated, available, lacks="" if integrated else "no such file")
    assert "GPU memory planned: weights 1500 MB, kv_cache 400 MB, workspace 100 MB, total 2000 MB" in caplog.text
    assert f"{(available if integrated else free) // 10**6} MB are free" in caplog.text


def test_files_that_a_container_holds_in_memory_are_not_taken_from_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers as Linux writes them: 6 of 8 MB are used, 5 of these by files that were read once."""
    for name, text in (("max", "8000000"), ("current", "6000000"), ("stat", "anon 900000\ninactive_file 5000000\n")):
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_memory() == 7_000_000
    (tmp_path / "memory.stat").unlink()
    assert memory.available_memory() == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() > 100_000_000


@pytest.mark.parametrize(("max_slots", "told"), [(8, False), (9, True)])
def test_more_slots_than_decode_in_one_step_are_warned_of(
    max_slots: int, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Taken):
        open_with(monkeypatch, 9_000_000_000, False, 0, max_slots=max_slots)
    assert ("max_slots is 9: 8 sequences decode in one step, more take turns" in caplog.text) is told
