"""A node with the CUDA executor loads packed adapters, at start and by the service: the test of test/ros, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import ALL, ATTENTION, write_adapter
from own_domain import missing_ros, use_own_domain

from edgellm_ros.bundle import Bundle
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.lora import pack_adapter

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)
use_own_domain()

from test_node_lora import (  # noqa: E402 - it needs ROS
    expected,
    node,
    test_goals_name_adapters_that_were_loaded_at_start_or_by_the_service,
)

__all__ = ["expected", "node", "test_goals_name_adapters_that_were_loaded_at_start_or_by_the_service"]


@pytest.fixture(scope="module")
def executor() -> str:
    """What computes in this module's test."""
    return "cuda"


@pytest.fixture(scope="module")
def bundle(gpu_model: Callable[[str], tuple[Any, Path]], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model of a shape that the kernels take, with the adapters pick and place."""
    root = tmp_path_factory.mktemp("lora")
    model, checkpoint = gpu_model("gpu_qwen3")
    made = export_bundle(checkpoint, root / "bundle", weights="fp16", max_lora_rank=16)
    for name, targets, seed in (("pick", ALL, 1), ("place", ATTENTION, 2)):
        _, made = pack_adapter(write_adapter(root / name, model, dict.fromkeys(targets, 8), seed), made)
    return made
