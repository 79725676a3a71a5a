"""A real error of the device under a node's running goal: clients are told, and the node answers until it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from own_domain import missing_ros, use_own_domain

from edgellm_ros import errors
from edgellm_ros.bundle import Bundle

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)
use_own_domain()

from node_process import NodeProcess, Probe  # noqa: E402 - it needs ROS

from edgellm_ros.ros.client import LLMClient  # noqa: E402

BAD_ADDRESS = "cudaError(IllegalAddress|InvalidAddressSpace)"  # some of that range can be another address space's


def test_goals_get_the_devices_error_and_the_node_goes_on_answering(
    gpu_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    program = (str(Path(__file__).with_name("breaking_node.py")), str(fault))
    bundle = gpu_bundle("gpu_qwen3", "int4").path
    with (
        NodeProcess(bundle, {"engine.executor": "cuda"}, program=program) as node,
        Probe() as probe,
        LLMClient("llm") as llm,
    ):
        newest = probe.diagnostics()
        assert llm.generate("Go", max_tokens=100, ignore_eos=True, timeout_s=20).usage.completion_tokens == 100
        fault.touch()
        with pytest.raises(errors.DeviceError, match=BAD_ADDRESS):
            for _ in range(1000):  # one of them runs when it happens
                llm.generate("Go", max_tokens=100, ignore_eos=True, timeout_s=20)
        with pytest.raises(errors.DeviceError, match=f"must be loaded again: .*{BAD_ADDRESS}"):
            llm.generate("Go", max_tokens=3, timeout_s=20)
        values = newest()
        print(values)
        assert values["level"] == "2" and "cudaError" in values["last error"]
        assert probe.state() == "active" and node.process.poll() is None
        # The context is lost to the process: loading again fails too, and says so, and the process can still be ended.
        assert probe.change("deactivate") and probe.change("cleanup")
        assert not probe.change("configure")
        assert newest()["level"] == "2" and node.process.poll() is None
        print(newest())
