"""Which ROS parameters a node has: those that the fields of NodeConfig, EngineConfig and SamplingParams declare.

NodeConfig's stand alone, the others in the groups `engine.` and `sampling.`. A field that is declared dynamic may be
set while the node runs and is checked by its own dataclass; all others are read-only. None, where a field allows it,
is -1 as a parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    ParameterType,
    SetParametersResult,
)
from rclpy.node import Node
from rclpy.parameter import Parameter

from edgellm_ros.config import EngineConfig, NodeConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.errors import ConfigError, EdgeLLMError
from edgellm_ros.fields import Setting, settings_of

GROUPS: dict[str, type] = {"": NodeConfig, "engine.": EngineConfig, "sampling.": SamplingParams}
_TYPES = {
    bool: ParameterType.PARAMETER_BOOL,
    int: ParameterType.PARAMETER_INTEGER,
    float: ParameterType.PARAMETER_DOUBLE,
    str: ParameterType.PARAMETER_STRING,
    tuple: ParameterType.PARAMETER_STRING_ARRAY,
}
_NONE = -1
_RCLPYS_OWN = ("use_sim_time", "qos_overrides.", "start_type_description_service")


class NodeParameters:
    """A node's parameters as the dataclasses they came from; each is replaced, never changed, when one is set.

    node, engine and sampling hold the values that are valid now and may be read from any thread.
    """

    node: NodeConfig
    engine: EngineConfig
    sampling: SamplingParams

    def __init__(self, node: Node) -> None:
        """Declare every parameter on `node`; raises ConfigError or RequestError for an impossible value at start."""
        values: dict[str, dict[str, Any]] = {prefix: {} for prefix in GROUPS}
        for prefix, cls in GROUPS.items():
            for item in settings_of(cls):
                default = _to_parameter(item, item.default)
                parameter = node.declare_parameter(prefix + item.name, default, describe(item))
                values[prefix][item.name] = _from_parameter(item, parameter.value)
        _refuse_unknown(node)
        self._apply({prefix: cls(**values[prefix]) for prefix, cls in GROUPS.items()})
        node.add_on_set_parameters_callback(self._on_set)

    def _apply(self, configs: dict[str, Any]) -> None:
        self.node, self.engine, self.sampling = configs[""], configs["engine."], configs["sampling."]

    def _on_set(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        """Take all of `parameters` or none; the reason names the value and what is allowed."""
        configs: dict[str, Any] = {"": self.node, "engine.": self.engine, "sampling.": self.sampling}
        changes: dict[str, dict[str, Any]] = {prefix: {} for prefix in GROUPS}
        for parameter in parameters:
            group, _, name = parameter.name.rpartition(".")
            prefix = f"{group}." if group else ""
            item = next((s for s in settings_of(GROUPS[prefix]) if s.name == name), None) if prefix in GROUPS else None
            if item is not None:  # use_sim_time and the like are rclpy's
                changes[prefix][name] = _from_parameter(item, parameter.value)
        try:
            updated = {prefix: dataclasses.replace(configs[prefix], **changes[prefix]) for prefix in GROUPS}
        except EdgeLLMError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self._apply(updated)
        return SetParametersResult(successful=True)


def _refuse_unknown(node: Node) -> None:
    """Raise ConfigError for a parameter given at start that nothing here knows: rclpy would ignore it."""
    known = [prefix + item.name for prefix, cls in GROUPS.items() for item in settings_of(cls)]
    for name in node._parameter_overrides:
        if not node.has_parameter(name) and not name.startswith(_RCLPYS_OWN):
            raise ConfigError(f"unknown parameter {name!r}; known are {', '.join(known)}")


def describe(item: Setting) -> ParameterDescriptor:
    """A field's help, range, choices and unit as a descriptor."""
    descriptor = ParameterDescriptor(type=_TYPES[item.type], description=item.help, read_only=not item.dynamic)
    notes = []
    if item.unit:
        notes.append(f"in {item.unit}")
    if item.choices:
        notes.append(f"one of {', '.join(item.choices)}")
    if item.optional:
        notes.append(f"{_NONE} stands for none")
    descriptor.additional_constraints = "; ".join(notes)
    descriptor.dynamic_typing = item.type is tuple  # an empty list has no type of its own
    if item.minimum is not None and item.maximum is not None:
        if item.type is int:
            low = min(int(item.minimum), _NONE) if item.optional else int(item.minimum)
            high = min(int(item.maximum), 2**63 - 1)
            descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=0)]
        else:
            low_high = {"from_value": float(item.minimum), "to_value": float(item.maximum)}
            descriptor.floating_point_range = [FloatingPointRange(**low_high, step=0.0)]
    return descriptor


def _to_parameter(item: Setting, value: Any) -> Any:
    if value is None:
        return _NONE
    return list(value) if item.type is tuple else value


def _from_parameter(item: Setting, value: Any) -> Any:
    if item.optional and value == _NONE:
        return None
    if item.type is tuple:
        return tuple(value) if isinstance(value, (list, tuple)) else value
    return value
