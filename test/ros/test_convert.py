"""Messages become core's words and back without loss, and every sentinel means the node's parameter."""

from __future__ import annotations

import math

import pytest
from builtin_interfaces.msg import Duration
from edgellm_ros.action import Chat
from edgellm_ros.msg import ChatMessage, Sampling, Tool, ToolCall
from edgellm_ros.srv import Generate
from sensor_msgs.msg import CompressedImage

from edgellm_ros.core import FinishReason, SamplingParams, Usage
from edgellm_ros.errors import DeviceError, RequestError, UnsupportedError
from edgellm_ros.fields import settings_of
from edgellm_ros.ros.convert import fill_result, request_from_goal, sampling_from_msg, set_error
from edgellm_ros.ros.goal import make_goal

NODE = SamplingParams(
    temperature=0.3, top_p=0.9, top_k=7, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5,
    frequency_penalty=-0.5, max_tokens=33, seed=5, stop=("END",), ignore_eos=True,
)  # fmt: skip


def test_an_untouched_sampling_message_is_the_nodes_parameters():
    assert sampling_from_msg(Sampling(), NODE) == NODE


def test_every_sampling_parameter_of_the_node_has_a_message_field_of_its_name():
    fields = set(Sampling.get_fields_and_field_types())
    assert fields == {item.name for item in settings_of(SamplingParams)}


def test_every_field_that_is_set_wins_over_the_node():
    given = {
        "temperature": 0.0, "top_p": 0.5, "top_k": 0, "min_p": 0.25, "repetition_penalty": 1.0,
        "presence_penalty": -1.0, "frequency_penalty": -1.0, "max_tokens": 1, "seed": 0,
    }  # fmt: skip
    merged = sampling_from_msg(Sampling(**given, stop=["a", "b"]), NODE)
    assert {name: getattr(merged, name) for name in given} == given
    assert merged.stop == ("a", "b")


def test_the_sentinels_are_no_valid_settings():
    for item in settings_of(SamplingParams):
        if item.type in (int, float):
            sentinel = Sampling.UNSET if item.type is float else Sampling.UNSET_INT
            with pytest.raises(RequestError):
                SamplingParams(**{item.name: item.type(sentinel)})


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -999.0, 1e300])
def test_impossible_numbers_are_refused_by_the_name_of_their_field(field, value):
    with pytest.raises(RequestError, match=field):
        sampling_from_msg(Sampling(**{field: value}), NODE)


def test_the_prompt_follows_the_messages_and_the_system_prompt_leads_where_there_is_none():
    goal = Chat.Goal(messages=[ChatMessage(role="assistant", content="Yes?")], prompt="Hello")
    roles = [(m.role, m.content) for m in request_from_goal(goal, NODE, "Be brief.").messages]
    assert roles == [("system", "Be brief."), ("assistant", "Yes?"), ("user", "Hello")]
    goal.messages = [ChatMessage(role="system", content="Be long.")]
    assert [m.content for m in request_from_goal(goal, NODE, "Be brief.").messages] == ["Be long.", "Hello"]


def test_a_raw_prompt_gets_neither_system_prompt_nor_messages():
    request = request_from_goal(Chat.Goal(prompt="Once", raw_prompt=True), NODE, "Be brief.")
    assert request.prompt == "Once" and not request.messages


def test_tool_calls_and_tools_come_through_whole():
    call = ToolCall(id="1", name="move", arguments='{"x": 1}')
    goal = Chat.Goal(
        messages=[
            ChatMessage(role="user", content="Go"),
            ChatMessage(role="assistant", tool_calls=[call]),
            ChatMessage(role="tool", content="done", tool_call_id="1"),
        ],
        tools=[Tool(name="move", description="Moves.", parameters='{"type": "object"}'), Tool(name="stop")],
    )
    request = request_from_goal(goal, NODE)
    got = request.messages[1].tool_calls[0]
    assert (got.id, got.name, got.arguments) == ("1", "move", '{"x": 1}')
    assert request.messages[2].tool_call_id == "1"
    assert request.tools[0].parameters == '{"type": "object"}' and request.tools[1].parameters
    goal.tool_choice = "none"
    assert request_from_goal(goal, NODE).tools == ()


def test_deadline_priority_session_and_thinking_come_through():
    goal = Chat.Goal(
        prompt="x", deadline=Duration(sec=1, nanosec=500_000_000), priority=9, session_id="s", thinking=2,
        pin_system_prompt=True,
    )  # fmt: skip
    request = request_from_goal(goal, NODE)
    assert request.deadline_s == pytest.approx(1.5)
    assert (request.priority, request.session_id, request.enable_thinking) == (9, "s", False)
    assert request.pin_system_prompt
    assert request_from_goal(Chat.Goal(prompt="x", lora="pirate"), NODE).lora == "pirate"
    assert request_from_goal(Chat.Goal(prompt="x"), NODE).lora == ""
    assert request_from_goal(Chat.Goal(prompt="x"), NODE).deadline_s is None
    assert request_from_goal(Chat.Goal(prompt="x"), NODE).enable_thinking is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", [CompressedImage(format="png", data=b"x")]),
        ("json_schema", "{}"),
        ("tool_choice", "required"),
        ("messages", [ChatMessage(role="user", images=[CompressedImage(format="png", data=b"x")])]),
    ],
)
def test_what_this_version_cannot_honour_is_refused_by_name(field, value):
    name = "images" if field == "messages" else field
    with pytest.raises(UnsupportedError, match=name):
        request_from_goal(Chat.Goal(prompt="x", **{field: value}), NODE)


@pytest.mark.parametrize(
    "goal",
    [
        Chat.Goal(),
        Chat.Goal(raw_prompt=True),
        Chat.Goal(prompt="x", raw_prompt=True, tools=[Tool(name="t")]),
        Chat.Goal(prompt="x", tools=[Tool()]),
        Chat.Goal(prompt="x", thinking=3),
        Chat.Goal(prompt="x", deadline=Duration(sec=-1)),
    ],
)
def test_contradictions_are_request_errors(goal):
    with pytest.raises(RequestError):
        request_from_goal(goal, NODE)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("temperature", "hot", "double"),
        ("max_tokens", None, "int32"),
        ("priority", "high", "uint8"),
        ("raw_prompt", "yes", "boolean"),
    ],
)
def test_the_client_refuses_a_value_of_another_type_by_name(name, value, kind):
    with pytest.raises(RequestError, match=f"{name} is {value!r}; its ROS type is {kind}"):
        make_goal("x", **{name: value})


def test_generate_takes_and_gives_what_chat_does():
    assert Generate.Request.get_fields_and_field_types() == Chat.Goal.get_fields_and_field_types()
    assert Generate.Response.get_fields_and_field_types() == Chat.Result.get_fields_and_field_types()


def test_finish_reasons_are_the_constants_of_the_action():
    constants = {
        Chat.Result.FINISH_STOP, Chat.Result.FINISH_LENGTH, Chat.Result.FINISH_CANCELLED,
        Chat.Result.FINISH_DEADLINE, Chat.Result.FINISH_ERROR,
    }  # fmt: skip
    assert constants == {reason.value for reason in FinishReason}


def test_a_result_keeps_text_usage_and_the_code_of_its_error():
    usage = Usage(3, 1, 2, queue_s=0.1, time_to_first_token_s=0.2, decode_s=0.3, total_s=0.6)
    result = fill_result(Chat.Result(), "hi", "hm", FinishReason.ERROR, usage, DeviceError("gone"))
    assert (result.message.role, result.message.content, result.message.reasoning) == ("assistant", "hi", "hm")
    assert (result.usage.prompt_tokens, result.usage.cached_tokens, result.usage.completion_tokens) == (3, 1, 2)
    assert result.usage.total_time == 0.6
    assert (result.error_code, result.error_msg) == (400, "gone")


def test_an_unexpected_exception_is_an_internal_error_and_never_success():
    result = set_error(Chat.Result(), ZeroDivisionError("x"))
    assert result.error_code == 9 and "ZeroDivisionError" in result.error_msg
