"""What the TensorRT executor decides without TensorRT: adapters in 16 bits, and what happens where no engine loads."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engines import ORIN, bindings_of, write_engine

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.errors import BundleError, ConfigError, DeviceError, UnsupportedError
from edgellm_ros.executors import create_executor, engine_preflight
from edgellm_ros.executors import tensorrt as executor_module
from edgellm_ros.executors.engines import list_engines, read_engine
from edgellm_ros.executors.tensorrt import balance, half_bits
from edgellm_ros.llm import LLM

RNG = np.random.default_rng(1)


@pytest.mark.parametrize("small", [1.0, 1e-3, 1e-6])
def test_adapters_keep_their_digits_in_fp16(small: float) -> None:
    a = RNG.standard_normal((32, 8)).astype(np.float32)
    b = (RNG.standard_normal((8, 48)) * small).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bits = [half_bits(values, False).view(np.float16).astype(np.float64) for values in balance(a, b)]
    assert np.linalg.norm(bits[0] @ bits[1] - exact) < 1e-3 * np.linalg.norm(exact)
    assert np.array_equal(np.multiply(*[v.max() for v in balance(a, b)]), np.float32(a.max() * b.max()))


def test_an_empty_or_zero_adapter_stays_as_it_is() -> None:
    for a, b in ((np.zeros((4, 0), np.float32), np.zeros((0, 4), np.float32)), (np.ones((4, 2), np.float32), np.zeros((2, 4), np.float32))):
        assert balance(a, b)[0] is a and balance(a, b)[1] is b


def test_bf16_is_rounded_to_the_nearest_even() -> None:
    import ml_dtypes

    values = np.concatenate([RNG.standard_normal(4096), [0.0, -0.0, 1.00390625, 1.01171875, 3e38, 1e-40]]).astype(np.float32)
    assert np.array_equal(half_bits(values, True), values.astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.fixture
def engine_here(tiny_bundle: Callable[..., Bundle], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with an engine that fits a machine which is made up."""
    import shutil

    bundle = Bundle.open(shutil.copytree(tiny_bundle("llama", "int8").path, tmp_path / "bundle"))
    write_engine(bundle, options=BuildOptions(max_input=32, max_context=64, activations="fp16"))
    monkeypatch.setattr(engine_preflight, "probe_machine", lambda: ORIN)
    return bundle


class Refuses:
    """Stands for the executor where loading fails."""

    error: Exception = UnsupportedError("TensorRT refuses the plan")

    def __init__(self, *_: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        UnsupportedError("TensorRT refuses the plan"), BundleError("logits is float16"), ConfigError("9 MB are free"),
        DeviceError("TensorRT: enqueueV3 failed"),
    ],
)  # fmt: skip
def test_auto_goes_on_without_an_engine_that_cannot_be_loaded_and_says_so(
    error: Exception, engine_here: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(executor_module, "TensorRTExecutor", Refuses)
    monkeypatch.setattr(Refuses, "error", error)
    monkeypatch.setattr("edgellm_ros.executors._cuda_reason", lambda bundle: "no NVIDIA GPU")
    with caplog.at_level(logging.INFO):
        made = create_executor(engine_here, EngineConfig())
    made.close()
    assert made.info.name == "onnxruntime"
    assert any(r.levelno == logging.WARNING and str(error) in r.message for r in caplog.records)
    assert any(f"tensorrt: {error}; cuda: no NVIDIA GPU" in r.message for r in caplog.records)
    with pytest.raises(type(error), match=str(error)):
        create_executor(engine_here, EngineConfig(executor="tensorrt"))


class Wrong:
    """Stands for the executor of an engine whose logits are wrong."""

    closed = False

    def __init__(self, bundle: Bundle, *_: Any) -> None:
        self.info = SimpleNamespace(name="tensorrt", device="Orin", vocab_map=None, rounding=0.03)
        self._vocab = bundle.manifest.model.vocab_size

    def step(self, batch: Any) -> np.ndarray:
        return np.tile(np.arange(self._vocab, dtype=np.float32), (sum(item.num_logits for item in batch), 1))

    def close(self) -> None:
        Wrong.closed = True


def test_auto_goes_on_without_an_engine_whose_logits_are_not_the_bundles(
    engine_here: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(executor_module, "TensorRTExecutor", Wrong)
    monkeypatch.setattr("edgellm_ros.executors._cuda_reason", lambda bundle: "no NVIDIA GPU")
    made = create_executor(engine_here, EngineConfig())
    made.close()
    assert made.info.name == "onnxruntime" and Wrong.closed
    assert any(r.levelno == logging.WARNING and "self-test failed: tensorrt's logits differ" in r.message for r in caplog.records)
    assert create_executor(engine_here, EngineConfig(self_test=False)).info.name == "tensorrt"
    with pytest.raises(BundleError, match="self-test failed: tensorrt's logits .* build the engine again"):
        LLM.open(engine_here, EngineConfig(executor="tensorrt"))


class NativeOfATest:
    """Stands for the native module: an engine that is what its report says, and a decoder that notes what it is given."""

    MAX_BATCH = 8

    def __init__(self, bundle: Bundle, free: int, context: int = 1 << 20) -> None:
        engine = read_engine(list_engines(bundle)[0])
        self.calls: list[str] = []
        calls, found = self.calls, [tuple(vars(binding).values()) for binding in bindings_of(engine, bundle)]
        self._info = {"free_bytes": free, "integrated": False}

        class TrtEngine:
            context_bytes, bindings, num_profiles, version = context, found, 2, (10, 13, 3, 9)

            def __init__(self, path: str, candidates: list[str], plugins: str) -> None:
                assert path == str(engine.file) and plugins == ""
                calls.append("engine")

            def take_log(self) -> list[tuple[str, str]]:
                return [("warning", "a warning of the library")]

        class TrtDecoder:
            def __init__(self, engine: Any, settings: Any) -> None:
                calls.append("decoder")
                self.config = SimpleNamespace(max_verify_tokens=0)

            def load_embedding(self, values: np.ndarray, scale: Any) -> None:
                calls.append(f"embedding {values.dtype} {values.shape}")

            def finish_load(self) -> None:
                calls.append("finish")

        self.TrtEngine, self.TrtDecoder = TrtEngine, TrtDecoder

    def device_info(self) -> dict[str, Any]:
        return self._info

    def plan_trt_memory(self, settings: Any, context_bytes: int) -> dict[str, int]:
        return {"kv_cache": 1 << 20, "context": context_bytes, "total": (1 << 20) + context_bytes}


@pytest.fixture
def load_with(engine_here: Bundle, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, NativeOfATest]]:
    def load(**settings: int) -> tuple[Any, NativeOfATest]:
        module = NativeOfATest(engine_here, **settings)
        loop = SimpleNamespace(
            num_slots=4, capacity=64, vocab_size=320, kv_bytes_per_token=96, max_adapters=0,
            embedding_format=SimpleNamespace(name="int8"),
        )  # fmt: skip
        monkeypatch.setattr(executor_module, "engine_settings", lambda *_: SimpleNamespace(loop=loop))
        monkeypatch.setattr(executor_module, "probe_machine", lambda: ORIN)
        monkeypatch.setattr("edgellm_ros.native.load", lambda: module)
        monkeypatch.setattr("edgellm_ros.native.tensorrt_candidates", lambda _: ["libnvinfer.so.10"])
        try:
            return executor_module.TensorRTExecutor(engine_here, EngineConfig()), module
        except ConfigError as error:
            return error, module

    return load


def test_an_engine_is_planned_loaded_compared_and_then_memory_is_taken(
    load_with: Callable[..., tuple[Any, NativeOfATest]], caplog: pytest.LogCaptureFixture
) -> None:
    executor, module = load_with(free=1 << 30)
    assert module.calls == ["engine", "decoder", "embedding int8 (320, 64)", "finish"]
    plan = executor.memory_plan
    assert plan["total"] == plan["engine"] + plan["kv_cache"] + plan["context"] == executor.info.memory_bytes
    assert executor.info.name == "tensorrt" and "TensorRT 10.13.3" in executor.info.device
    assert any("a warning of the library" in record.message for record in caplog.records)
    executor.close()
    with pytest.raises(DeviceError, match="the tensorrt executor is closed"):
        executor.step([])


def test_trees_without_an_engine_of_them_are_refused_with_the_build_that_makes_it(
    load_with: Callable[..., tuple[Any, NativeOfATest]]
) -> None:
    executor, _ = load_with(free=1 << 30)
    assert executor.max_tree_nodes == 0
    with pytest.raises(UnsupportedError, match=r"takes chains of drafts, as steps, and no trees; build .* --trees`"):
        executor.verify_tree(0, 0, np.zeros(2, np.int32), np.array([-1, -1], np.int32))


def test_memory_that_is_short_is_refused_before_the_engine_is_loaded(
    load_with: Callable[..., tuple[Any, NativeOfATest]]
) -> None:
    error, module = load_with(free=2 << 20)  # its report says 2 MiB of context, beside 1 MiB of cache
    assert isinstance(error, ConfigError) and module.calls == []
    assert "MB are free; lower max_slots 4" in str(error)


def test_memory_that_tensorrt_asks_for_beyond_the_report_is_refused_before_it_is_taken(
    load_with: Callable[..., tuple[Any, NativeOfATest]]
) -> None:
    error, module = load_with(free=64 << 20, context=512 << 20)
    assert isinstance(error, ConfigError) and module.calls == ["engine"]


def test_the_engine_that_fits_is_handed_over_and_the_choice_is_logged(
    engine_here: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[Any] = []

    def make(bundle: Bundle, config: EngineConfig, engine: Any) -> Any:
        given.append(engine.key)
        return SimpleNamespace(info=SimpleNamespace(name="tensorrt", device="Orin, TensorRT 10.13.3"))

    monkeypatch.setattr(executor_module, "TensorRTExecutor", make)
    with caplog.at_level(logging.INFO):
        create_executor(engine_here, EngineConfig(self_test=False))
    assert given == ["tensorrt-10.13.3.9-sm87"]
    assert any("executor: tensorrt on Orin" in r.message and "tensorrt-10.13.3.9-sm87 fits" in r.message for r in caplog.records)


class Stands:
    """Stands for the executor of an engine that is right: ONNX Runtime computes, under the engine's name."""

    def __init__(self, bundle: Bundle, config: EngineConfig, engine: Any) -> None:
        from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor

        self._inner = OnnxRuntimeExecutor(bundle, replace(config, executor="onnxruntime"))
        self.info = replace(self._inner.info, name="tensorrt", device=f"Orin by {engine.key}")
        self.step, self.close = self._inner.step, self._inner.close


def test_verify_reads_a_bundle_by_the_engine_that_fits_or_by_what_auto_chooses(
    engine_here: Bundle, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A robot answers when it is asked, and waits when it is not. " * 8, encoding="utf-8")
    arguments = ["verify", str(engine_here.path), "--text", str(text), "--executor"]
    assert main([*arguments, "tensorrt"]) == 2  # its slots hold 64 tokens
    assert re.search(r"max_context \d+ exceeds the engine's 64; rebuild with `edgellm build", capsys.readouterr().err)
    write_engine(engine_here, "longer", BuildOptions(max_input=32, max_context=256, activations="fp16"))
    monkeypatch.setattr(executor_module, "TensorRTExecutor", Stands)
    measured = []
    for executor, device in (("tensorrt", "tensorrt on Orin by longer"), ("auto", "tensorrt on Orin by longer"), ("onnxruntime", "onnxruntime on CPU")):
        assert main([*arguments, executor]) == 0
        quality = Bundle.open(engine_here.path).manifest.quality
        assert quality.executor.startswith(device)
        measured.append((quality.perplexity, quality.tasks))
    assert measured[0] == measured[1] == measured[2] and measured[0][0] > 1
