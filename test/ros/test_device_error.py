"""A device that fails under a running goal: the node stays up, answers with that error, and can be loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgellm_ros.msg import ErrorCode
from edgellm_ros.srv import Generate
from node_process import NodeProcess, Probe

from edgellm_ros import errors
from edgellm_ros.ros.client import LLMClient

PLACE = "graph.hpp:49: cudaGraphLaunch failed: cudaErrorIllegalAddress"


def test_goals_get_the_devices_error_until_the_node_is_configured_again(tiny_bundle, tmp_path):
    fault = tmp_path / "fault"
    fault.touch()
    program = (str(Path(__file__).with_name("failing_node.py")), str(fault))
    settings = {"engine.executor": "onnxruntime", "engine.max_context": 128}
    with (
        NodeProcess(tiny_bundle("qwen3", "fp16").path, settings, program=program) as node,
        Probe() as probe,
        LLMClient("llm") as llm,
    ):
        newest = probe.diagnostics()
        stream = llm.chat("Go", max_tokens=60, ignore_eos=True)
        assert next(iter(stream))  # it fails in the middle of an answer
        with pytest.raises(errors.DeviceError, match=PLACE):
            stream.result(20)
        for _ in range(2):
            with pytest.raises(errors.DeviceError, match=f"must be loaded again: {PLACE}"):
                llm.generate("Go", max_tokens=3)
        response = probe.call(Generate, "generate", Generate.Request(prompt="Go", max_tokens=3))
        assert response.error_code == ErrorCode.DEVICE_FAILED and PLACE in response.error_msg
        values = newest()
        assert values["level"] == "2" and PLACE in values["last error"]
        assert probe.state() == "active" and node.process.poll() is None

        fault.unlink()
        for transition in ("deactivate", "cleanup", "configure", "activate"):
            assert probe.change(transition), transition
        assert llm.generate("Go", max_tokens=60, ignore_eos=True).usage.completion_tokens == 60
        assert newest()["level"] == "0"
