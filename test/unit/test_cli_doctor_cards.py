"""`edgellm doctor` where there are several GPUs: it names the one that is used, and the choice of one that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cli_doctor_gpu import checks, install_cuda_python, install_native
from test_cli_doctor_gpu import nothing_here as nothing_here

from edgellm_ros import native
from edgellm_ros.cli.check import State
from edgellm_ros.cli.engine_checks import check_tensorrt
from edgellm_ros.errors import DeviceError

T400, H200, A4000 = ("NVIDIA T400", (7, 5)), ("NVIDIA H200", (9, 0)), ("NVIDIA RTX A4000", (8, 6))


def install_cards(monkeypatch: pytest.MonkeyPatch, *cards: tuple[str, tuple[int, int]]) -> Any:
    """Cards in CUDA's order that cuda-python lists, and a native module that runs on 8.x and 9.0."""
    install_cuda_python(monkeypatch, list(cards))
    return install_first_card(monkeypatch, *cards)


def install_first_card(monkeypatch: pytest.MonkeyPatch, *cards: tuple[str, tuple[int, int]]) -> Any:
    """The same without cuda-python: the native module counts the cards and knows the first."""
    module = install_native(monkeypatch, capability=cards[0][1])
    info = module.device_info() | {"name": cards[0][0]}
    module.device_info, module.count_devices = lambda: info, lambda: (len(cards), "")
    return module


def list_in_proc(root: Path, num_cards: int) -> None:
    for index in range(num_cards):
        information = root / "nvidia" / "gpus" / f"0000:0{index}:00.0" / "information"
        information.parent.mkdir(parents=True)
        information.write_text("Model: \t\t NVIDIA Testcard\n")


def test_of_several_gpus_the_one_that_is_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cards(monkeypatch, H200, T400)
    kernels = checks()["CUDA kernels"]
    assert kernels.state is State.OK and not kernels.remedy
    assert kernels.found.endswith("; used by the executor `cuda` on NVIDIA H200 (device 0 of 2)")


def test_a_gpu_that_can_be_used_is_the_remedy_where_the_first_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    module = install_cards(monkeypatch, T400, ("NVIDIA T4", (7, 5)), H200)
    kernels = checks()["CUDA kernels"]
    assert kernels.state is State.MISSING and kernels.remedy == "CUDA_VISIBLE_DEVICES=2 uses NVIDIA H200"
    assert "not used: NVIDIA T400 (device 0 of 3) has compute capability 7.5" in kernels.found
    module.TENSORRT_HEADERS = "10.3"
    monkeypatch.setattr(native, "find_tensorrt", lambda module: ("libnvinfer.so.10", (10, 3), ""))
    (tensorrt,) = check_tensorrt()
    assert "NVIDIA T400 has compute capability 7.5" in tensorrt.found
    assert "use the CPU executor" not in kernels.found + tensorrt.found + tensorrt.remedy


def test_where_no_other_gpu_can_be_used_the_remedy_is_that_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cards(monkeypatch, T400, T400)
    assert checks()["CUDA kernels"].remedy == "use the CPU executor"
    module = install_cards(monkeypatch, H200, A4000)
    module.ARCHITECTURES = ("100",)
    assert checks()["CUDA kernels"].remedy.startswith("EDGELLM_CUDA_ARCHS=90a make native")


@pytest.mark.parametrize("chosen", ["3, 0", "GPU-0a1b,GPU-2c3d"])
def test_a_gpu_is_called_what_cuda_visible_devices_calls_it(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA counts anew what the variable names: its second card is not the machine's second."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    install_cards(monkeypatch, T400, H200)
    kernels = checks()["CUDA kernels"]
    assert f"not used: NVIDIA T400 (device 0 of CUDA_VISIBLE_DEVICES={chosen}) has" in kernels.found
    assert kernels.remedy == f"CUDA_VISIBLE_DEVICES={chosen.split(',')[1].strip()} uses NVIDIA H200"


def test_a_variable_that_hides_gpus_is_named_and_with_one_gpu_it_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    install_cards(monkeypatch, H200)
    list_in_proc(tmp_path, 1)
    assert checks()["CUDA kernels"].found.endswith("; used by the executor `cuda`")
    list_in_proc(tmp_path / "more", 2)
    monkeypatch.setattr("edgellm_ros.cli.gpu_checks._PROC", tmp_path / "more" / "nvidia")
    assert checks()["CUDA kernels"].found.endswith(" on NVIDIA H200 (device 0 of CUDA_VISIBLE_DEVICES=1)")
    install_cards(monkeypatch, T400)
    remedy = "let CUDA_VISIBLE_DEVICES choose another card, if one fits, or use the CPU executor"
    assert checks()["CUDA kernels"].remedy == remedy


def test_gpus_that_only_the_native_module_counts_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    install_first_card(monkeypatch, H200, T400)
    assert checks()["CUDA kernels"].found.endswith(" on NVIDIA H200 (device 0 of 2)")
    install_first_card(monkeypatch, T400, H200)
    remedy = "let CUDA_VISIBLE_DEVICES choose another card, if one fits, or use the CPU executor"
    assert checks()["CUDA kernels"].remedy == remedy


def test_a_gpu_that_fails_is_told_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise DeviceError("cudaMemGetInfo: out of memory")

    install_cards(monkeypatch, A4000, H200).device_info = fail
    kernels = checks()["CUDA kernels"]
    assert kernels.state is State.MISSING and kernels.remedy == "CUDA_VISIBLE_DEVICES=1 uses NVIDIA H200"
    assert "not used: NVIDIA RTX A4000 (device 0 of 2): the GPU fails: cudaMemGetInfo: out of" in kernels.found
