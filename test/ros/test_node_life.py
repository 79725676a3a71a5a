"""How the llm node starts, changes state, loses clients and ends: each test has a node of its own."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from edgellm_ros.msg import ModelInfo
from node_process import NodeProcess, Probe, run_client

from edgellm_ros import errors
from edgellm_ros.ros.client import LLMClient

PROMPT = "Write a long story about a lighthouse keeper."


def test_an_abandoned_goal_is_cancelled_and_a_crashed_client_harms_nobody(bundle_path):
    with NodeProcess(bundle_path, {"engine.max_slots": 2}), Probe() as probe:
        diagnostics = probe.diagnostics()
        crashed = run_client(PROMPT, "1800", "crash")
        crashed.wait(timeout=20)
        assert crashed.returncode == -signal.SIGKILL
        quitter = run_client(PROMPT, "1900", stderr=subprocess.PIPE)
        quitter.send_signal(signal.SIGTERM)  # ends at once, without cancelling
        _, said = quitter.communicate(timeout=20)
        assert said.rstrip().endswith("UnavailableError: ROS was shut down in this process"), said
        assert "RCLError" not in said and "InvalidHandle" not in said
        with LLMClient("llm") as llm:
            assert llm.generate("Hi", max_tokens=5, ignore_eos=True).usage.completion_tokens == 5
        probe.wait_for(lambda: diagnostics()["active requests"] == "0", 60)
        # A script that just ends has cancelled its goal, and has no thread left that Python would end inside ROS.
        leaver = run_client(PROMPT, "1900", "leave")
        said, _ = leaver.communicate(timeout=20)
        assert (said, leaver.returncode) == ("[]\n", 0)
        probe.wait_for(lambda: diagnostics()["active requests"] == "0", 2)


def test_lifecycle_goals_are_refused_while_inactive_and_cancelled_by_deactivate(bundle_path):
    with NodeProcess(bundle_path, {"autostart": False}, wait_active=False), Probe() as probe, LLMClient("llm") as llm:
        models = probe.listen(ModelInfo, "llm/model_info", latched=True)
        assert probe.state() == "unconfigured"
        with pytest.raises(errors.InactiveError):
            llm.generate("Hi")
        assert probe.change("configure")
        with pytest.raises(errors.InactiveError, match="inactive"):
            llm.generate("Hi")
        assert llm.tokenize("hello")  # needs no generation
        assert probe.change("activate")
        stream = llm.chat(PROMPT, max_tokens=1900, ignore_eos=True)
        next(iter(stream))
        assert probe.change("deactivate")
        with pytest.raises(errors.InactiveError, match="deactivated"):
            stream.result(10)
        assert probe.change("cleanup")
        with pytest.raises(errors.InactiveError):
            llm.tokenize("hello")
        for label in ("configure", "activate"):
            assert probe.change(label)
        assert llm.generate("Hi", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
        probe.wait_for(lambda: len(models) >= 3, 10)
        assert [bool(model.name) for model in models] == [True, False, True]
        assert models[0].max_context >= 1024 and models[0].executor == "onnxruntime" and models[0].chat


def test_a_missing_bundle_leaves_the_node_up_saying_why(tmp_path):
    with NodeProcess(tmp_path / "nowhere", wait_active=False) as node, Probe() as probe:
        newest = probe.diagnostics()
        assert probe.state() == "unconfigured"
        values = newest()
        assert values["level"] == "2" and "nowhere" in values["last error"] and "edgellm export" in values["message"]
        assert not probe.change("configure")
        with LLMClient("llm") as llm, pytest.raises(errors.InactiveError, match="not configured: .*nowhere"):
            llm.generate("hi", timeout_s=10.0)
        assert node.process.poll() is None


def test_an_engine_that_is_asked_for_and_not_there_is_said_with_its_remedy(bundle_path):
    with NodeProcess(bundle_path, {"engine.executor": "tensorrt"}, wait_active=False) as node, Probe() as probe:
        newest = probe.diagnostics()
        assert probe.state() == "unconfigured"
        assert "executor is 'tensorrt': the bundle has no engine" in newest()["last error"]
        assert f"edgellm build {bundle_path}" in newest()["last error"] and node.process.poll() is None


def test_an_impossible_parameter_ends_the_process_with_its_name(bundle_path):
    node = NodeProcess(bundle_path, {"engine.max_slots": 1000}, wait_active=False)
    assert node.process.wait(timeout=30) == 1
    assert "engine.max_slots" in node.log()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_running_goals_with_an_error_code_and_the_process_with_status_0(bundle_path, number):
    with NodeProcess(bundle_path) as node, LLMClient("llm") as llm:
        stream = llm.chat(PROMPT, max_tokens=1900, ignore_eos=True)
        next(iter(stream))
        assert node.stop(number) == 0
        with pytest.raises(errors.ShuttingDownError):
            stream.result(5)
        assert "Traceback" not in node.log()


@pytest.mark.slow
def test_two_thousand_goals_do_not_grow_the_node(bundle_path):
    # One thread, and a prompt of which all but 2 of 34 tokens are resident from the goal before: little is computed.
    settings = {"result_timeout_s": 1.0, "engine.num_threads": 1}
    with NodeProcess(bundle_path, settings, huge_pages=False) as node, LLMClient("llm") as llm:
        sizes = []
        for count in range(2300):
            llm.generate("Hi, you.", max_tokens=1, ignore_eos=True)
            if count in (299, 2299):
                time.sleep(2.5)  # results expire
                sizes.append(node.resident_bytes())
    assert sizes[1] - sizes[0] < 1e6
