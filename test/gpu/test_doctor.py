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


def test_a_bundles_memory_is_what_the_executor_plans(
    gpu_bundle: Callable[..., Bundle], open_cuda: Callable[..., CudaExecutor]
) -> None:
    bundle = gpu_bundle("gpu_qwen3", "int4")
    found = plan_on_gpu(bundle, EngineConfig(max_slots=4))
    assert found is not None and found[1] > 0
    taken = open_cuda("gpu_qwen3", "int4").info.memory_bytes
    if native.load().device_info()["bus_bits"] >= 2048:
        assert found[0] == taken
    else:  # doctor takes the memory of a card for HBM, where copies may be larger
        assert 0.5 * taken < found[0] < 2 * taken
