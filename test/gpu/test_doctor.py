"""`edgellm doctor` on a GPU: what cuda-python says of the card is what the module runs on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.check import State
from edgellm_ros.cli.gpu_checks import check_gpus, plan_on_gpu, survey_cuda_python
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors.cuda import CudaExecutor


def test_cuda_python_and_the_native_module_name_the_same_card_and_driver() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    survey, info = survey_cuda_python(), native.load().device_info()
    assert survey is not None and not survey.reason
    card = survey.gpus[info["index"]]
    assert (card.name, card.capability) == (info["name"], tuple(info["compute_capability"]))
    assert card.total_bytes == pytest.approx(info["total_bytes"], rel=0.05)
    assert 0 < card.free_bytes <= card.total_bytes
    version = info["driver_cuda_version"]
    assert survey.driver_cuda == (version // 1000, version % 1000 // 10)


def test_the_kernels_are_said_to_be_used(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {check.name: check for check in check_gpus()}
    assert found["NVIDIA GPU"].state is State.OK and found["driver"].state is State.OK
    assert found["CUDA kernels"].state is State.OK and "used by the executor `cuda`" in found["CUDA kernels"].found
    monkeypatch.setenv("COLUMNS", "300")
    main(["doctor"])
    assert native.load().device_info()["name"] in capsys.readouterr().out


@pytest.mark.parametrize(("weights", "lacks"), [("int4", ""), ("int8", ""), ("int4", "no such file")])
def test_a_bundles_memory_is_what_the_executor_plans_and_takes(
    weights: str, lacks: str, gpu_bundle: Callable[..., Bundle], open_cuda: Callable[..., CudaExecutor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """lacks: why there is no cuBLASLt, said of any GPU. With int4 the decoder then plans none, though it finds it."""
    if lacks:
        monkeypatch.setattr(native, "products_reason", lambda module: lacks)
    found = plan_on_gpu(gpu_bundle("gpu_qwen3", weights), EngineConfig(max_slots=4))
    assert found is not None and found[1] > 0
    executor = open_cuda("gpu_qwen3", weights, max_slots=4)
    assert found[0] == executor.memory_plan["total"] == executor._decoder.plan["total"]
