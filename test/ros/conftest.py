"""Real nodes in processes of their own, on a DDS domain of this test run alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_domain import missing_ros, use_own_domain

if missing_ros():
    if os.environ.get("EDGELLM_REQUIRE_ROS"):
        raise RuntimeError(missing_ros())
    collect_ignore_glob = ["test_*.py"]
use_own_domain()


@pytest.fixture(scope="session")
def executor() -> str:
    """What computes in the tests that test/gpu runs too, with another."""
    return "onnxruntime"


@pytest.fixture(scope="session")
def program() -> tuple[str, ...]:
    """Python's arguments that start a node in those tests."""
    return ("-m", "edgellm_ros.ros.llm_node")


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
