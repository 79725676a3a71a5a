"""A client outlives everything that cannot be sent: the error is the call's own, and the next call works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rclpy
from rclpy.context import Context

from edgellm_ros import errors
from edgellm_ros.ros.client import LLMClient

ROOT = Path(__file__).resolve().parent.parent.parent
LONG = {"max_tokens": 1500, "ignore_eos": True}


@pytest.fixture
def client(node) -> Iterator[LLMClient]:
    """One for each test: several of these break theirs, were the code they guard not there."""
    with LLMClient("llm") as made:
        yield made


def works(client: LLMClient) -> bool:
    count = client.generate("Hi", max_tokens=2, ignore_eos=True, timeout_s=10).usage.completion_tokens
    return count == 2 and bool(client.tokenize("hello"))


UNSENDABLE: dict[str, tuple[Callable[[LLMClient], object], str]] = {
    "a prompt": (lambda llm: llm.generate("a\ud800b", timeout_s=5), r"prompt has '\ud800' at character 1"),
    "a message": (lambda llm: llm.generate([("user", "\udfff")], timeout_s=5), r"messages[0].content has '\udfff'"),
    "a stop text that is a number": (lambda llm: llm.generate("x", stop=[5], timeout_s=5), "stop[0] is 5"),
    "a seed": (lambda llm: llm.generate("x", seed=2**63, timeout_s=5), "seed is 9223372036854775808"),
    "a number of tokens": (lambda llm: llm.generate("x", max_tokens=2**32 + 5), "max_tokens is 4294967301"),
    "a deadline": (lambda llm: llm.generate("x", deadline=float("nan")), "deadline is nan"),
    "a text to tokenize": (lambda llm: llm.tokenize("a\ud800b", timeout_s=5), r"text has '\ud800' at character 1"),
    "a session": (lambda llm: llm.reset_session("\ud800", timeout_s=5), r"session_id has '\ud800'"),
    "a session that is a number": (lambda llm: llm.reset_session(7, timeout_s=5), "session_id is 7"),
    "an adapter": (lambda llm: llm.load_lora("\ud800", timeout_s=5), r"name has '\ud800'"),
    "an adapter to free": (lambda llm: llm.unload_lora("\ud800", timeout_s=5), r"name has '\ud800'"),
}


@pytest.mark.parametrize("name", UNSENDABLE)
def test_what_cannot_be_sent_fails_its_own_call_alone(client, name):
    call, text = UNSENDABLE[name]
    with pytest.raises(errors.RequestError) as caught:
        call(client)
    assert text in str(caught.value)
    assert works(client)


def fail(*_: object, **__: object) -> None:
    raise SystemError("of rclpy's own")


def test_any_other_exception_of_sending_a_goal_reaches_its_stream_and_not_the_thread(client, monkeypatch):
    running = client.chat("Tell me a story.", **LONG)
    next(iter(running))
    with monkeypatch.context() as patch:
        patch.setattr(client._chat, "send_goal_async", fail)
        failed = client.chat("x")
        with pytest.raises(SystemError, match="rclpy's own"):
            failed.result(5)
        for _ in range(2):  # reading again ends at once, too
            with pytest.raises(SystemError, match="rclpy's own"):
                list(failed)
    assert not running.done
    assert works(client)


def test_any_exception_of_cancelling_or_of_asking_for_the_result_reaches_the_stream(client, monkeypatch):
    from rclpy.action.client import ClientGoalHandle

    running = client.chat("Tell me a story.", **LONG)
    next(iter(running))
    for method, stream in (("cancel_goal_async", lambda: running), ("get_result_async", lambda: client.chat("x"))):
        with monkeypatch.context() as patch:
            patch.setattr(ClientGoalHandle, method, fail)
            failed = stream()
            if method == "cancel_goal_async":
                failed.cancel()
            with pytest.raises(SystemError, match="rclpy's own"):
                failed.result(5)
        client._sender.send(failed._handle.cancel_goal_async)  # the node knows nothing of it
        assert works(client)


def test_any_other_exception_of_a_service_call_reaches_its_caller(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(client._reset, "call_async", fail)
        with pytest.raises(SystemError, match="rclpy's own"):
            client.reset_session("tour", timeout_s=5)
    assert works(client)


def test_a_shutdown_while_a_service_is_asked_ends_the_wait(node, monkeypatch):
    context = Context()
    rclpy.init(context=context)
    client = LLMClient("llm", node=rclpy.create_node("planner", context=context))
    monkeypatch.setattr(client._tokenize, "call_async", lambda request: rclpy.task.Future())  # never answered
    monkeypatch.setattr(client._tokenize, "wait_for_service", lambda timeout_s: True)
    client._sender.send(context.shutdown)
    with pytest.raises(errors.UnavailableError, match="^ROS was shut down in this process$"):
        client.tokenize("x", timeout_s=10)
    client.close()


SIGTERM = """
import os, signal, time
from edgellm_ros.errors import UnavailableError
from edgellm_ros.ros.client import LLMClient
llm = LLMClient("llm")
os.kill(os.getpid(), signal.SIGTERM)
while llm._context.ok():
    time.sleep(0.01)
for call in (llm.generate, llm.tokenize, llm.reset_session, llm.load_lora, llm.unload_lora):
    try:
        call("x")
    except UnavailableError as error:
        print(error)
"""


def test_after_sigterm_every_call_says_that_ros_was_shut_down(node):
    done = subprocess.run([sys.executable, "-c", SIGTERM], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["ROS was shut down in this process"] * 5, done.stderr


def test_sending_goes_on_in_order_after_a_failure(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(client._chat, "send_goal_async", fail)
        failed = [client.chat("x") for _ in range(3)]
        for stream in failed:
            with pytest.raises(SystemError):
                stream.result(5)
    streams = [client.chat("Hi", max_tokens=8, ignore_eos=True) for _ in range(5)]
    waits = [stream.result(20).usage.queue_time for stream in streams]
    assert waits[2:] == sorted(waits[2:])


BROKEN_YAML = "llm: [\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--params-file", "/nosuch.yaml"], "Couldn't parse params file: '--params-file /nosuch.yaml'"),
        (["--params-file", "{broken}"], "Couldn't parse params file"),
        (["--nosuch"], "--nosuch"),
        (["-r", "bad"], "Couldn't parse remap rule"),
        (["-p", "nosuch:=1"], "unknown parameter 'nosuch'"),
    ],
)
def test_a_wrong_start_argument_gives_one_fatal_line_and_no_traceback(tmp_path, arguments, text):
    broken = tmp_path / "broken.yaml"
    broken.write_text(BROKEN_YAML)
    arguments = [argument.format(broken=broken) for argument in arguments]
    command = [sys.executable, "-m", "edgellm_ros.ros.llm_node", "--ros-args", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    said = done.stderr.strip().splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert said[-1].startswith("[FATAL]") and text in said[-1]
    assert sum(line.startswith("[FATAL]") for line in said) == 1
