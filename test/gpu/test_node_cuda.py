"""The llm node as a process with the CUDA executor, and real clients: the tests of test/ros that hold for any executor."""

from __future__ import annotations

from typing import Any

import pytest
from own_domain import missing_ros, use_own_domain

from edgellm_ros import native

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)
use_own_domain()

from test_node_contract import (  # noqa: E402 - it needs ROS
    client,
    library,
    running,
    serving,
    test_a_cancelled_goal_has_the_beginning_of_its_answer_and_the_others_go_on,
    test_an_answer_streams_and_is_the_librarys,
    test_ctrl_c_in_the_middle_ends_goals_with_an_error_code_and_the_process_with_status_0,
    test_diagnostics_and_model_info_say_what_computes_and_with_how_much_memory,
    test_goals_in_every_slot_decode_together_and_get_what_each_gets_alone,
    test_the_model_is_freed_and_loaded_again,
    test_the_service_gives_the_same_answer,
)

__all__ = [
    "client",
    "library",
    "running",
    "serving",
    "test_a_cancelled_goal_has_the_beginning_of_its_answer_and_the_others_go_on",
    "test_an_answer_streams_and_is_the_librarys",
    "test_ctrl_c_in_the_middle_ends_goals_with_an_error_code_and_the_process_with_status_0",
    "test_diagnostics_and_model_info_say_what_computes_and_with_how_much_memory",
    "test_goals_in_every_slot_decode_together_and_get_what_each_gets_alone",
    "test_the_model_is_freed_and_loaded_again",
    "test_the_service_gives_the_same_answer",
]


@pytest.fixture(scope="module")
def executor() -> str:
    """What computes in this module's tests."""
    return "cuda"


@pytest.fixture(scope="module")
def num_tokens() -> int:
    """A GPU is through with a short answer before a second feedback message is due."""
    return 1900


def test_the_library_computed_on_this_machines_gpu(library: Any) -> None:
    assert native.load().device_info()["name"] in library.info.device
