"""Real nodes in processes of their own, on a DDS domain of this test run alone."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_HAVE_ROS = importlib.util.find_spec("rclpy") is not None and importlib.util.find_spec("edgellm_ros.action") is not None
if not _HAVE_ROS:
    if os.environ.get("EDGELLM_REQUIRE_ROS"):
        raise RuntimeError("rclpy or the built interfaces are missing; `make test` installs and builds them")
    collect_ignore_glob = ["test_*.py"]
os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
if os.environ.get("ROS_DISTRO") == "humble":
    os.environ["ROS_LOCALHOST_ONLY"] = "1"


@pytest.fixture(scope="session")
def bundle_path(smollm2) -> Path:
    """SmolLM2-135M in int4."""
    return smollm2("int4").path


@pytest.fixture(scope="module")
def node(bundle_path: Path) -> Iterator[object]:
    """An active node named llm with 2 slots and a queue of 4, for the tests of one module."""
    from node_process import NodeProcess

    with NodeProcess(bundle_path, {"engine.max_slots": 2, "engine.max_queue": 4, "engine.num_threads": 2}) as process:
        yield process


@pytest.fixture(scope="module")
def llm(node) -> Iterator[object]:
    """A client of that node."""
    from edgellm_ros.ros.client import LLMClient

    with LLMClient("llm") as client:
        yield client
