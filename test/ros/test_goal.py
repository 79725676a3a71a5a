"""What cannot be sent as it is, is refused on the caller's thread with its value, what is allowed and the remedy."""

from __future__ import annotations

import math

import pytest
from builtin_interfaces.msg import Duration
from edgellm_ros.action import Chat
from edgellm_ros.msg import ChatMessage, Sampling, Tool, ToolCall
from edgellm_ros.srv import LoadLora, ResetSession, Tokenize
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import Header

from edgellm_ros.errors import RequestError
from edgellm_ros.ros.goal import make_goal, make_message

HUGE = 10**5000  # Python refuses to write it
INT32, INT64 = "-2147483648 to 2147483647", f"{-(2**63)} to {2**63 - 1}"


@pytest.mark.parametrize(
    ("name", "value", "kind", "allowed"),
    [
        ("max_tokens", 2**32 + 5, "int32", INT32),
        ("max_tokens", 2**40, "int32", INT32),
        ("max_tokens", -(2**31) - 1, "int32", INT32),
        ("top_k", 2**32 + 1, "int32", INT32),
        ("top_k", 2**31, "int32", INT32),
        ("seed", 2**63, "int64", INT64),
        ("seed", 2**64 + 7, "int64", INT64),
        ("priority", 256, "uint8", "0 to 255"),
        ("priority", -1, "uint8", "0 to 255"),
        ("thinking", 257, "uint8", "0 to 255"),
    ],
)
def test_a_number_that_its_field_cannot_hold_is_refused_and_never_wrapped(name, value, kind, allowed):
    with pytest.raises(RequestError) as caught:
        make_goal("x", **{name: value})
    assert str(caught.value) == f"{name} is {value}; its ROS type is {kind}: give {allowed}"


def test_the_ends_of_every_range_are_sent_as_they_are():
    goal = make_goal("x", max_tokens=2**31 - 1, top_k=-(2**31), seed=2**63 - 1, priority=255, deadline=2**31 - 1)
    arrived = deserialize_message(serialize_message(goal.sampling), Sampling)
    assert (arrived.max_tokens, arrived.top_k, arrived.seed) == (2**31 - 1, -(2**31), 2**63 - 1)
    assert (goal.priority, goal.deadline.sec) == (255, 2**31 - 1)


@pytest.mark.parametrize("value", [math.inf, math.nan, HUGE, [], "many", 5.7], ids=range(6))
def test_what_is_no_integer_is_refused_by_the_name_of_its_option(value):
    with pytest.raises(RequestError, match="^max_tokens is .*its ROS type is int32"):
        make_goal("x", max_tokens=value)


def test_a_number_that_no_double_can_hold_is_refused():
    with pytest.raises(RequestError, match="temperature is of type int and too large to be shown; .* double"):
        make_goal("x", temperature=HUGE)


def png(**fields) -> CompressedImage:
    return CompressedImage(data=b"x", **fields)


BAD, WORD = "a\ud800b", r"has '\ud800' at character 1"
TEXTS = {
    "the prompt": (BAD, {}, "prompt"),
    "a pair's content": ([("user", "hi"), ("user", BAD)], {}, "messages[1].content"),
    "a pair's role": ([(BAD, "hi")], {}, "messages[0].role"),
    "a message": ([ChatMessage(role="user", content=BAD)], {}, "messages[0].content"),
    "messages as an option": ("", {"messages": [ChatMessage(role="user", reasoning=BAD)]}, "messages[0].reasoning"),
    "a tool call": (
        [ChatMessage(role="assistant", tool_calls=[ToolCall(name="move", arguments=BAD)])],
        {},
        "messages[0].tool_calls[0].arguments",
    ),
    "a message's image": ([ChatMessage(role="user", images=[png(format=BAD)])], {}, "messages[0].images[0].format"),
    "an image": ("x", {"images": [png(header=Header(frame_id=BAD))]}, "images[0].header.frame_id"),
    "a stop text": ("x", {"stop": ["end", BAD]}, "stop[1]"),
    "the only stop text": ("x", {"stop": BAD}, "stop[0]"),
    "a whole sampling": ("x", {"sampling": Sampling(stop=[BAD])}, "sampling.stop[0]"),
    "a tool": ("x", {"tools": [Tool(name="move", description=BAD)]}, "tools[0].description"),
    "a tool as a dict": ("x", {"tools": [{"name": "stop"}, {"name": BAD}]}, "tools[1].name"),
    "an adapter": ("x", {"lora": BAD}, "lora"),
    "a session": ("x", {"session_id": BAD}, "session_id"),
    "a schema": ("x", {"json_schema": BAD}, "json_schema"),
    "a tool choice": ("x", {"tool_choice": BAD}, "tool_choice"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_lone_surrogate_is_refused_wherever_a_text_goes(name):
    prompt, options, where = TEXTS[name]
    with pytest.raises(RequestError) as caught:
        make_goal(prompt, **options)
    assert str(caught.value).startswith(f"{where} {WORD}, which a ROS string cannot hold")
    str(caught.value).encode()  # the error itself can be sent and printed


def test_a_text_is_not_cut_at_a_nul():
    assert deserialize_message(serialize_message(ChatMessage(content="a\0b")), ChatMessage).content == "a", "no need"
    with pytest.raises(RequestError, match=r"^prompt has '\\x00' at character 1"):
        make_goal("a\0b")


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        (Tokenize.Request, {"text": BAD}, f"text {WORD}"),
        (Tokenize.Request, {"text": 5}, "text is 5; its ROS type is string"),
        (Tokenize.Request, {"text": "x", "add_special": "no"}, "add_special is 'no'; its ROS type is boolean"),
        (Tokenize.Request, {"token_ids": [1, 2**32]}, "token_ids[1] is 4294967296; its ROS type is uint32"),
        (ResetSession.Request, {"session_id": BAD}, f"session_id {WORD}"),
        (ResetSession.Request, {"session_id": None}, "session_id is None; its ROS type is string"),
        (LoadLora.Request, {"name": BAD}, f"name {WORD}"),
        (LoadLora.Request, {"path": "x"}, "unknown field path; known are name, unload"),
    ],
)
def test_a_services_request_is_checked_as_a_goal_is(kind, fields, text):
    with pytest.raises(RequestError) as caught:
        make_message(kind, **fields)
    assert text in str(caught.value)


NESTED = {
    "a whole sampling": (lambda: {"sampling": Sampling(max_tokens=2**32 + 5)}, "sampling.max_tokens is 4294967301; its ROS type"),
    "a whole deadline": (lambda: {"deadline": Duration(sec=2**31)}, "deadline.sec is 2147483648; its ROS type is int32"),
    "a real number without a point": (lambda: {"sampling": Sampling(temperature=1)}, "sampling.temperature is 1; its ROS type"),
    "a text as deadline": (lambda: {"deadline": "soon"}, "deadline is 'soon'; its ROS type is builtin_interfaces/Duration"),
    "a sampling as a dict": (lambda: {"sampling": {"seed": 1}}, "sampling is {'seed': 1}; its ROS type is edgellm_ros/Sampling"),
    "a content that is no text": (lambda: {"prompt": [("user", 5)]}, "messages[0].content is 5; its ROS type is string"),
    "a message as a dict": (lambda: {"prompt": [{"role": "user", "content": "x"}]}, "messages[0] is {'role': 'user', 'content'"),
    "three parts": (lambda: {"prompt": [("user", "x", "y")]}, "(role, content) pairs"),
    "a number as prompt": (lambda: {"prompt": 5}, "prompt is 5; allowed is a text, or ChatMessage"),
    "pairs as messages": (lambda: {"messages": [("user", "x")]}, "messages[0] is ('user', 'x'); its ROS type is edgellm_ros/Chat"),
    "a path as image": (lambda: {"images": ["a.png"]}, "images[0] is 'a.png'; its ROS type is sensor_msgs/CompressedImage"),
    "one text as images": (lambda: {"images": "a.png"}, "images is 'a.png'; its ROS type is sequence<sensor_msgs/CompressedImage>"),
    "a stop that is no text": (lambda: {"stop": ["a", 5]}, "stop[1] is 5; its ROS type is string"),
    "an unknown field of a tool": (lambda: {"tools": [{"nam": "x"}]}, "unknown field tools[0].nam; known are name, description"),
    "a schema as a dict": (lambda: {"tools": [{"name": "x", "parameters": {}}]}, "tools[0].parameters is {}; its ROS type is"),
    "a tool that is not in a list": (lambda: {"tools": {"name": "x"}}, "tools[0] is 'name'; allowed is a list of Tool"),
    "a number of tools": (lambda: {"tools": 1}, "tools is 1; allowed is a list of Tool"),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_what_is_inside_a_message_is_checked_and_named_by_its_place(name):
    make, text = NESTED[name]
    try:
        options = make()
    except AssertionError:
        pytest.skip("the messages of this ROS 2 check their fields themselves")
    with pytest.raises(RequestError) as caught:
        make_goal(**options)
    assert text in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -1e-9, 2**31, 1e300, 10**400], ids=range(8))
def test_an_impossible_deadline_is_a_request_error(value):
    with pytest.raises(RequestError, match=r"^deadline is .* s; allowed is 0 \(none\) to 2147483647 s$"):
        make_goal("x", deadline=value)


@pytest.mark.parametrize(
    ("value", "sec", "nanosec"),
    [(0, 0, 0), (0.7, 0, 700_000_000), (1.5, 1, 500_000_000), (0.9999999999, 1, 0), (1e-12, 0, 1), (30, 30, 0)],
)
def test_a_deadline_arrives_to_the_nanosecond_and_none_only_of_zero(value, sec, nanosec):
    assert make_goal("x", deadline=value).deadline == Duration(sec=sec, nanosec=nanosec)


def test_what_can_be_sent_arrives_whole():
    message = ChatMessage(role="user", content="Grüße, 机器人 🤖", images=[png(format="png")])
    goal = make_goal([message, ("assistant", "ja"), ["user", "so"]], tools=[{"name": "t"}], stop=("a", "b"), seed=3)
    assert [(m.role, m.content) for m in goal.messages[1:]] == [("assistant", "ja"), ("user", "so")]
    arrived = deserialize_message(serialize_message(goal.messages[0]), ChatMessage)
    assert arrived.content == "Grüße, 机器人 🤖" and bytes(arrived.images[0].data) == b"x"
    assert goal.tools == [Tool(name="t")] and goal.sampling == Sampling(stop=["a", "b"], seed=3)
    assert isinstance(goal, Chat.Goal)
