"""launch/llm.launch.py describes one node; run where ROS 2 brings launch (its wheels do not)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent.parent / "launch" / "llm.launch.py"


def test_the_launch_file_has_one_node_and_its_arguments():
    pytest.importorskip("launch_ros", reason="launch_ros is not on PyPI; this test needs an installed ROS 2")
    from launch.actions import DeclareLaunchArgument
    from launch_ros.actions import LifecycleNode

    spec = importlib.util.spec_from_file_location("llm_launch", LAUNCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entities = module.generate_launch_description().entities
    arguments = {e.name: e for e in entities if isinstance(e, DeclareLaunchArgument)}
    assert set(arguments) == {"bundle", "namespace", "name", "params_file", "log_level"}
    assert arguments["bundle"].default_value is None
    assert sum(isinstance(e, LifecycleNode) for e in entities) == 1


def test_the_launch_files_parameters_exist():
    import yaml

    from edgellm_ros.fields import settings_of
    from edgellm_ros.ros.params import GROUPS

    text = (LAUNCH.parent.parent / "config" / "llm.yaml").read_text()
    parameters = yaml.safe_load(text)["/**"]["ros__parameters"]
    for key, value in parameters.items():
        prefix, names = (f"{key}.", value) if isinstance(value, dict) else ("", {key: value})
        known = {item.name for item in settings_of(GROUPS[prefix])}
        assert set(names) <= known, f"{prefix}: {set(names) - known}"
