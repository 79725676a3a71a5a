"""What the TensorRT executor decides without TensorRT: adapters in 16 bits, and what happens where no engine loads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engines import ORIN, write_engine

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.errors import BundleError, UnsupportedError
from edgellm_ros.executors import create_executor, engine_preflight
from edgellm_ros.executors import tensorrt as executor_module
from edgellm_ros.executors.tensorrt import balance, half_bits

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


@pytest.mark.parametrize("error", [UnsupportedError("TensorRT refuses the plan"), BundleError("logits is float16")])
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


def test_the_engine_that_fits_is_handed_over_and_the_choice_is_logged(
    engine_here: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from types import SimpleNamespace

    given: list[Any] = []

    def make(bundle: Bundle, config: EngineConfig, engine: Any) -> Any:
        given.append(engine.key)
        return SimpleNamespace(info=SimpleNamespace(name="tensorrt", device="Orin, TensorRT 10.13.3"))

    monkeypatch.setattr(executor_module, "TensorRTExecutor", make)
    with caplog.at_level(logging.INFO):
        create_executor(engine_here, EngineConfig())
    assert given == ["tensorrt-10.13.3.9-sm87"]
    assert any("executor: tensorrt on Orin" in r.message and "tensorrt-10.13.3.9-sm87 fits" in r.message for r in caplog.records)
