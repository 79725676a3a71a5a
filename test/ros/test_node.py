"""The llm node as its clients see it: every node and every rival client is a process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import threading
import time

import pytest
from edgellm_ros.action import Chat
from edgellm_ros.msg import ChatMessage, ErrorCode, Tool
from edgellm_ros.srv import Generate, LoadLora, ResetSession, Tokenize
from node_process import Probe, run_client
from std_msgs.msg import String

from edgellm_ros import errors

PROMPT = "Write a long story about a lighthouse keeper."


def finish(process: subprocess.Popen) -> dict:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(output)


def test_an_answer_streams_while_it_is_generated_and_the_result_is_its_sum(llm):
    stream = llm.chat(PROMPT, max_tokens=64, ignore_eos=True)
    deltas = []
    for delta in stream:
        deltas.append((delta, stream.done))
    result = stream.result()
    assert "".join(delta for delta, _ in deltas) == result.text != ""
    assert not deltas[0][1], "the first delta came only with the result"
    assert len(deltas) >= 4, "the answer was not streamed"
    assert result.finish_reason == Chat.Result.FINISH_LENGTH
    assert result.usage.completion_tokens == 64
    assert result.usage.prompt_tokens > 10
    assert 0 < result.usage.time_to_first_token < result.usage.total_time


def test_feedback_counts_without_gaps_and_begins_at_once(node):
    from rclpy.action import ActionClient

    def ask(client: ActionClient, max_tokens: int) -> list:
        feedbacks, done = [], threading.Event()
        goal = Chat.Goal(prompt=PROMPT)
        goal.sampling.max_tokens = max_tokens

        def send() -> None:
            future = client.send_goal_async(goal, lambda m: feedbacks.append(m.feedback))
            future.add_done_callback(lambda f: f.result().get_result_async().add_done_callback(lambda _: done.set()))

        probe.on_its_thread(send)
        assert done.wait(30)
        return feedbacks

    with Probe() as probe:
        client = ActionClient(probe.node, Chat, "llm/chat")
        assert client.wait_for_server(10)
        # A client knows the server before the server's feedback publisher knows the client: wait until it does.
        for _ in range(50):
            if ask(client, 1):
                break
        feedbacks = ask(client, 32)
        client.destroy()
    assert [f.seq for f in feedbacks] == list(range(len(feedbacks)))
    assert feedbacks[0].state == Chat.Feedback.STATE_QUEUED and not feedbacks[0].delta
    assert feedbacks[-1].state == Chat.Feedback.STATE_DECODE
    text = ""
    for feedback in feedbacks:
        assert feedback.offset == len(text)
        text += feedback.delta
    assert feedbacks[-1].completion_tokens == 32


def test_two_clients_stream_at_once_and_one_that_cancels_does_not_change_the_others_text(node):
    alone = finish(run_client(PROMPT, "120"))
    assert alone["reason"] == "length"
    keeper = run_client(PROMPT, "120")
    leaver = run_client("Count from one to one thousand.", "1500", "cancel")
    kept, left = finish(keeper), finish(leaver)
    assert left["reason"] == "cancelled" and left["text"]
    assert kept["text"] == alone["text"]
    assert kept["reason"] == "length"


def test_a_cancel_is_answered_and_takes_effect_while_others_run(llm):
    others = [llm.chat(PROMPT, max_tokens=1500, ignore_eos=True, temperature=1.0) for _ in range(3)]
    next(iter(others[0]))
    while others:
        stream = others.pop()
        stream.cancel()
        result = stream.result(10)
        assert result.finish_reason == "cancelled" and result.usage.completion_tokens < 1500
        assert not any(other.done for other in others)


def test_goals_are_served_in_the_order_in_which_they_were_sent(llm):
    streams = [llm.chat(PROMPT, max_tokens=30, ignore_eos=True) for _ in range(6)]
    waits = [stream.result(30).usage.queue_time for stream in streams]
    assert waits[2:] == sorted(waits[2:]) and max(waits[:2]) < waits[2]


def test_twenty_goals_at_once_fill_slots_and_queue_and_the_rest_are_told_so(llm):
    streams = [llm.chat(PROMPT, max_tokens=40, ignore_eos=True) for _ in range(20)]
    served, refused = 0, 0
    for stream in streams:
        try:
            assert stream.result(60).usage.completion_tokens == 40
            served += 1
        except errors.QueueFullError as error:
            assert "max_queue" in str(error)
            refused += 1
    assert (served, refused) == (6, 14)


BAD = {
    "nothing at all": ({}, errors.RequestError, "both empty"),
    "an unknown role": ({"messages": [ChatMessage(role="robot", content="x")]}, errors.RequestError, "'robot'"),
    "raw prompt and messages": (
        {"prompt": "x", "raw_prompt": True, "messages": [ChatMessage(role="user", content="x")]},
        errors.RequestError,
        "raw_prompt",
    ),
    "a negative temperature": ({"prompt": "x", "temperature": -1.0}, errors.RequestError, "temperature is -1.0"),
    "a temperature that is NaN": ({"prompt": "x", "temperature": math.nan}, errors.RequestError, "temperature is nan"),
    "an infinite penalty": ({"prompt": "x", "presence_penalty": math.inf}, errors.RequestError, "presence_penalty"),
    "a huge top_p": ({"prompt": "x", "top_p": 1e30}, errors.RequestError, "top_p"),
    "no tokens": ({"prompt": "x", "max_tokens": 0}, errors.RequestError, "max_tokens is 0"),
    "a negative seed": ({"prompt": "x", "seed": -5}, errors.RequestError, "seed is -5"),
    "an empty stop text": ({"prompt": "x", "stop": ["a", ""]}, errors.RequestError, "stop"),
    "a negative deadline": ({"prompt": "x", "deadline": -1.0}, errors.RequestError, "deadline"),
    "a prompt beyond the context": ({"prompt": "word " * 5000}, errors.ContextOverflowError, "context"),
    "a schema": ({"prompt": "x", "json_schema": "{}"}, errors.UnsupportedError, "json_schema"),
    "an adapter": ({"prompt": "x", "lora": "pirate"}, errors.RequestError, "lora is 'pirate'; loaded are: none"),
    "a tool choice": ({"prompt": "x", "tool_choice": "required"}, errors.UnsupportedError, "tool_choice"),
    "a thinking mode": ({"prompt": "x", "thinking": 9}, errors.RequestError, "thinking is 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_and_breaks_nothing(llm, name):
    options, kind, text = BAD[name]
    with pytest.raises(errors.EdgeLLMError) as caught:
        llm.generate(**options, timeout_s=20)
    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert llm.generate("Hi", max_tokens=2, ignore_eos=True, timeout_s=20).usage.completion_tokens == 2


def test_a_deadline_gives_the_answer_so_far(llm):
    result = llm.generate(PROMPT, max_tokens=1500, ignore_eos=True, deadline=0.7, timeout_s=20)
    assert result.finish_reason == "deadline"
    assert 0 < result.usage.completion_tokens < 1500


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(llm):
    full = llm.generate("Count: one, two, three", max_tokens=40, temperature=0.0).text
    stop = full[len(full) // 2 :][:4]
    cut = llm.generate("Count: one, two, three", max_tokens=40, temperature=0.0, stop=[stop])
    assert cut.text == full[: full.index(stop)]


def test_generate_waits_without_holding_up_other_callbacks(node):
    with Probe() as probe:
        tokenize = lambda: probe.call(Tokenize, "tokenize", Tokenize.Request(text="hello world"))  # noqa: E731
        tokens = tokenize()
        answer: list = []
        request = Generate.Request(prompt=PROMPT)
        request.sampling.max_tokens, request.sampling.ignore_eos = 300, True
        thread = threading.Thread(target=lambda: answer.append(probe.call(Generate, "generate", request)))
        thread.start()
        time.sleep(0.3)
        for _ in range(5):
            assert tokenize().token_ids == tokens.token_ids
        assert not answer, "generate had ended before the other calls; nothing was shown"
        thread.join(60)
    assert answer[0].error_code == ErrorCode.NONE
    assert answer[0].usage.completion_tokens == 300
    assert answer[0].message.role == "assistant" and answer[0].message.content


def test_tokenize_goes_there_and_back_and_services_name_their_errors(node):
    with Probe() as probe:
        ids = probe.call(Tokenize, "tokenize", Tokenize.Request(text="Grüße, 机器人 🤖")).token_ids
        assert probe.call(Tokenize, "tokenize", Tokenize.Request(token_ids=ids)).text == "Grüße, 机器人 🤖"
        both = probe.call(Tokenize, "tokenize", Tokenize.Request(text="x", token_ids=ids))
        assert both.error_code == ErrorCode.REQUEST_INVALID
        lora = probe.call(LoadLora, "load_lora", LoadLora.Request(name="pirate"))
        assert lora.error_code == ErrorCode.REQUEST_INVALID and "no adapter 'pirate'" in lora.error_msg
        assert not probe.call(ResetSession, "reset_session", ResetSession.Request(session_id="nobody")).existed
        empty = probe.call(ResetSession, "reset_session", ResetSession.Request())
        assert empty.error_code == ErrorCode.REQUEST_INVALID


def test_a_session_is_resident_until_it_is_reset(llm):
    llm.generate(PROMPT, max_tokens=4, session_id="tour")
    assert llm.reset_session("tour")
    assert not llm.reset_session("tour")


def test_a_prompt_on_the_topic_is_answered_on_topics(node):
    with Probe() as probe:
        responses, tokens = probe.listen(String, "llm/response"), probe.listen(String, "llm/tokens")
        publisher = probe.node.create_publisher(String, "llm/prompt", 1)
        probe.wait_for(lambda: publisher.get_subscription_count() > 0, 10)
        probe.wait_for(lambda: probe.node.count_publishers("llm/response") > 0, 10)
        time.sleep(0.3)
        publisher.publish(String(data="Say hello."))
        probe.wait_for(lambda: bool(responses), 60)
        assert responses[0].data and "".join(t.data for t in tokens) == responses[0].data


def test_tools_are_rendered_or_left_out_but_never_lost_in_silence(llm):
    tool = Tool(name="move", description="Moves the robot.", parameters='{"type": "object"}')
    result = llm.generate("Hi", tools=[tool], tool_choice="none", max_tokens=2)
    assert result.usage.prompt_tokens > 0


def test_sampling_parameters_change_at_run_time_and_a_bad_value_is_refused_with_its_reason(node, llm):
    from rcl_interfaces.srv import SetParameters
    from rclpy.parameter import Parameter

    with Probe() as probe:

        def set_parameter(name, value):
            request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
            return probe.call(SetParameters, "set_parameters", request).results[0]

        assert set_parameter("sampling.max_tokens", 3).successful
        assert llm.generate(PROMPT, ignore_eos=True).usage.completion_tokens == 3
        refused = set_parameter("sampling.temperature", -2.0)
        assert not refused.successful and "temperature" in refused.reason
        stop = set_parameter("sampling.stop", [""])
        assert not stop.successful and "stop" in stop.reason
        assert not set_parameter("engine.max_slots", 3).successful
        assert set_parameter("sampling.max_tokens", 256).successful


def test_diagnostics_tell_state_speed_and_queue(node, llm):
    with Probe() as probe:
        newest = probe.diagnostics()
        llm.generate(PROMPT, max_tokens=20, ignore_eos=True)
        values = newest()
    assert values["level"] == "0" and values["state"] == "active"
    assert float(values["decode (tokens/s)"]) > 1
    assert float(values["time to first token p50 (ms)"]) > 0
    assert values["waiting requests"] == "0"
