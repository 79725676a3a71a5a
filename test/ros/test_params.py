"""ROS parameters are the dataclasses' fields: their names, ranges, defaults, and their own checks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rclpy
from rclpy.node import Node
from rclpy.parameter import Parameter

from edgellm_ros.config import EngineConfig, NodeConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.errors import ConfigError
from edgellm_ros.fields import settings_of
from edgellm_ros.ros.params import GROUPS, NodeParameters


@pytest.fixture
def context() -> Iterator[rclpy.Context]:
    context = rclpy.Context()
    rclpy.init(context=context)
    yield context
    rclpy.shutdown(context=context)


@pytest.fixture
def node(context) -> Iterator[Node]:
    node = rclpy.create_node("params", context=context)
    yield node
    node.destroy_node()


def names() -> list[tuple[str, object]]:
    return [(prefix + item.name, item) for prefix, cls in GROUPS.items() for item in settings_of(cls)]


def test_every_field_is_a_parameter_with_its_help_range_and_default(node):
    parameters = NodeParameters(node)
    assert len(names()) >= 20
    for name, item in names():
        descriptor = node.describe_parameter(name)
        assert descriptor.description == item.help
        assert descriptor.read_only is not item.dynamic
        if item.minimum is not None and item.maximum is not None and not item.optional:
            ranges = descriptor.integer_range if item.type is int else descriptor.floating_point_range
            assert (ranges[0].from_value, ranges[0].to_value) == (item.minimum, pytest.approx(item.maximum))
        for choice in item.choices:
            assert choice in descriptor.additional_constraints
    assert parameters.node == NodeConfig()
    assert parameters.engine == EngineConfig()
    assert parameters.sampling == SamplingParams()


def test_dynamic_parameters_change_and_read_only_ones_do_not(node):
    parameters = NodeParameters(node)
    results = node.set_parameters(
        [
            Parameter("sampling.temperature", value=0.25),
            Parameter("sampling.stop", value=["a", "b"]),
            Parameter("sampling.seed", value=4),
            Parameter("system_prompt", value="Be brief."),
        ]
    )
    assert all(result.successful for result in results), results
    assert parameters.sampling == SamplingParams(temperature=0.25, stop=("a", "b"), seed=4)
    assert parameters.node.system_prompt == "Be brief."
    assert not node.set_parameters([Parameter("engine.max_slots", value=2)])[0].successful
    assert not node.set_parameters([Parameter("bundle", value="/elsewhere")])[0].successful
    assert parameters.engine == EngineConfig() and parameters.node.bundle == ""


def test_none_is_minus_one_and_an_empty_list_is_no_stop_text(node):
    parameters = NodeParameters(node)
    assert node.get_parameter("sampling.seed").value == -1
    assert node.set_parameters([Parameter("sampling.stop", value=["a"]), Parameter("sampling.seed", value=3)])
    assert node.set_parameters([Parameter("sampling.seed", value=-1)])[0].successful
    assert node.set_parameters([Parameter("sampling.stop", Parameter.Type.STRING_ARRAY, [])])[0].successful
    assert parameters.sampling == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampling.temperature", -1.0),
        ("sampling.temperature", float("nan")),
        ("sampling.top_p", 1.5),
        ("sampling.max_tokens", 0),
        ("sampling.stop", [""]),
        ("sampling.stop", 3),
        ("sampling.temperature", "hot"),
        ("feedback_period_s", -1.0),
    ],
)
def test_an_impossible_value_is_refused_with_a_reason_and_changes_nothing(node, name, value):
    parameters = NodeParameters(node)
    result = node.set_parameters([Parameter(name, value=value)])[0]
    assert not result.successful and (name.rpartition(".")[2] in result.reason or "type" in result.reason)
    assert parameters.sampling == SamplingParams() and parameters.node == NodeConfig()


def test_one_impossible_value_keeps_all_of_an_atomic_set_back(node):
    parameters = NodeParameters(node)
    result = node.set_parameters_atomically(
        [Parameter("sampling.top_k", value=5), Parameter("sampling.stop", value=[""])]
    )
    assert not result.successful
    assert parameters.sampling.top_k == SamplingParams().top_k


def test_rclpys_own_parameters_pass(node):
    NodeParameters(node)
    assert node.set_parameters([Parameter("use_sim_time", value=True)])[0].successful


def test_an_unknown_parameter_at_start_is_refused_by_name(context):
    node = rclpy.create_node("unknown", context=context, parameter_overrides=[Parameter("max_slots", value=2)])
    with pytest.raises(ConfigError, match=r"unknown parameter 'max_slots'; known are .*engine\.max_slots"):
        NodeParameters(node)
    node.destroy_node()


def test_overrides_at_start_reach_the_dataclasses_and_are_checked(context):
    overrides = [Parameter("engine.max_slots", value=2), Parameter("sampling.stop", value=["x"])]
    node = rclpy.create_node("given", context=context, parameter_overrides=overrides)
    parameters = NodeParameters(node)
    assert parameters.engine.max_slots == 2 and parameters.sampling.stop == ("x",)
    node.destroy_node()
    bad = rclpy.create_node("bad", context=context, parameter_overrides=[Parameter("engine.executor", value="abacus")])
    with pytest.raises(Exception, match="abacus"):
        NodeParameters(bad)
    bad.destroy_node()
