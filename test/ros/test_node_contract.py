"""What a node's clients get whatever executor computes: the library's own answers, streamed, at once, cut short and cancelled.

test/gpu/test_node_cuda.py runs these tests with a GPU. What they print (-s) is what the client measured.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from edgellm_ros.action import Chat
from edgellm_ros.msg import ErrorCode, ModelInfo
from edgellm_ros.srv import Generate
from node_process import NodeProcess, Probe

from edgellm_ros import errors
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import ChatMessage, Request, SamplingParams
from edgellm_ros.executors import ExecutorInfo
from edgellm_ros.llm import LLM
from edgellm_ros.ros.client import ChatResult, ChatStream, LLMClient

NUM_SLOTS, CONTEXT = 4, 2048
PROMPTS = (
    "Write a long story about a lighthouse keeper.",
    "Explain why the sky is blue, in many words.",
    "List a hundred things that a robot may find in a kitchen.",
    "How is a gearbox built? Describe every part.",
)
assert len(PROMPTS) == NUM_SLOTS


@dataclass(frozen=True)
class Library:
    """What the library says in this process, with the settings that the node gets."""

    answers: dict[str, str]  # by prompt, greedy
    info: ExecutorInfo


@pytest.fixture(scope="module")
def num_tokens() -> int:
    """Of an answer: enough for some feedback messages, which are a twentieth of a second apart."""
    return 48


@pytest.fixture(scope="module")
def library(bundle_path: Path, executor: str, num_tokens: int) -> Library:
    """Opened and closed before the node starts."""
    config = EngineConfig(executor=executor, max_slots=NUM_SLOTS, max_context=CONTEXT)
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    answers = {}
    with LLM.open(bundle_path, config) as llm:
        for prompt in PROMPTS:
            answer = llm.complete(Request(messages=(ChatMessage("user", prompt),), sampling=sampling))
            answers[prompt] = answer.text
            speed, first_ms = (num_tokens - 1) / answer.usage.decode_s, 1e3 * answer.usage.time_to_first_token_s
            print(f"{executor}, the library: {speed:.0f} tokens/s, first token after {first_ms:.1f} ms")
        return Library(answers, llm.info)


@pytest.fixture(scope="module")
def running(
    bundle_path: Path, library: Library, executor: str, program: tuple[str, ...]
) -> Iterator[Callable[[], NodeProcess]]:
    """The node of these tests, which loads the bundle as the library did; started again after a test that ended it."""
    parameters = {"engine.executor": executor, "engine.max_slots": NUM_SLOTS, "engine.max_context": CONTEXT}
    nodes: list[NodeProcess] = []
    with ExitStack() as stack:

        def get() -> NodeProcess:
            if not nodes or nodes[-1].process.poll() is not None:
                nodes.append(stack.enter_context(NodeProcess(bundle_path, parameters, program=program)))
            return nodes[-1]

        yield get


@pytest.fixture
def serving(running: Callable[[], NodeProcess]) -> NodeProcess:
    return running()


@pytest.fixture
def client(serving: NodeProcess) -> Iterator[LLMClient]:
    with LLMClient("llm") as made:
        yield made


def ask(client: LLMClient, prompt: str, num_tokens: int) -> ChatStream:
    return client.chat(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def tell(executor: str, what: str, stream: ChatStream, result: ChatResult) -> None:
    """Print what the client saw beside the engine's own figures."""
    seen_s, usage = time.monotonic() - stream.sent_at, result.usage
    print(
        f"{executor}, {what}: first delta {1e3 * (stream.first_delta_s or 0):.1f} ms after the goal, first token "
        f"{1e3 * usage.time_to_first_token:.1f} ({usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were there); "
        f"{usage.completion_tokens} tokens in {1e3 * seen_s:.0f} ms, in the engine "
        f"{1e3 * usage.total_time:.0f}; the engine decoded {(usage.completion_tokens - 1) / usage.decode_time:.0f} tokens/s"
    )


def test_an_answer_streams_and_is_the_librarys(
    client: LLMClient, library: Library, executor: str, num_tokens: int
) -> None:
    for prompt in PROMPTS[:2]:
        stream = ask(client, prompt, num_tokens)
        deltas = [(delta, stream.done) for delta in stream]
        result = stream.result()
        tell(executor, f"one goal, {len(deltas)} deltas", stream, result)
        assert sum(not done for _, done in deltas) >= 2, "the answer was not streamed"
        assert "".join(delta for delta, _ in deltas) == result.text == library.answers[prompt] != ""
        assert result.finish_reason == Chat.Result.FINISH_LENGTH and result.usage.completion_tokens == num_tokens


def test_the_service_gives_the_same_answer(serving: NodeProcess, library: Library, num_tokens: int) -> None:
    request = Generate.Request(prompt=PROMPTS[0])
    request.sampling.temperature, request.sampling.max_tokens, request.sampling.ignore_eos = 0.0, num_tokens, True
    with Probe() as probe:
        response = probe.call(Generate, "generate", request, 60)
    assert response.error_code == ErrorCode.NONE, response.error_msg
    assert response.message.content == library.answers[PROMPTS[0]]


def test_goals_in_every_slot_decode_together_and_get_what_each_gets_alone(
    client: LLMClient, library: Library, executor: str, num_tokens: int
) -> None:
    streams = {prompt: ask(client, prompt, num_tokens) for prompt in PROMPTS}
    for stream in streams.values():
        next(iter(stream))
    assert not any(stream.done for stream in streams.values()), "they did not run together"
    for prompt, stream in streams.items():
        result = stream.result(120)
        tell(executor, f"one of {NUM_SLOTS}", stream, result)
        assert result.text == library.answers[prompt]


def test_a_cancelled_goal_has_the_beginning_of_its_answer_and_the_others_go_on(
    client: LLMClient, library: Library, executor: str, num_tokens: int
) -> None:
    kept, cancelled = (ask(client, prompt, num_tokens) for prompt in PROMPTS[:2])
    next(iter(kept))
    for _, _ in zip(range(2), cancelled, strict=False):
        pass
    started = time.perf_counter()
    cancelled.cancel()
    result = cancelled.result(20)
    print(f"{executor}, cancelled: the result came {1e3 * (time.perf_counter() - started):.1f} ms after the call, "
          f"with {result.usage.completion_tokens} of {num_tokens} tokens")  # fmt: skip
    assert not kept.done
    assert result.finish_reason == Chat.Result.FINISH_CANCELLED and 0 < result.usage.completion_tokens < num_tokens
    assert result.text and library.answers[PROMPTS[1]].startswith(result.text.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert kept.result(60).text == library.answers[PROMPTS[0]]


def test_diagnostics_and_model_info_say_what_computes_and_with_how_much_memory(
    serving: NodeProcess, library: Library, executor: str
) -> None:
    with Probe() as probe:
        infos = probe.listen(ModelInfo, "llm/model_info", latched=True)
        values = probe.diagnostics()()
        probe.wait_for(lambda: bool(infos), 10)
    print({key: value for key, value in values.items() if not key.startswith("finished")})
    info = library.info
    assert (values["level"], values["state"]) == ("0", "active")
    assert values["executor"] == infos[-1].executor == info.name == executor
    assert values["device"] == infos[-1].device == info.device != ""
    assert infos[-1].memory_bytes == info.memory_bytes > 0
    assert values["planned memory (MB)"] == f"{info.memory_bytes / 1e6:.0f}"
    assert (infos[-1].max_slots, infos[-1].max_context) == (NUM_SLOTS, CONTEXT)


def test_the_model_is_freed_and_loaded_again(serving: NodeProcess, library: Library, num_tokens: int) -> None:
    with Probe() as probe, LLMClient("llm") as client:
        for transition in ("deactivate", "cleanup"):
            assert probe.change(transition), transition
        with pytest.raises(errors.InactiveError):
            client.generate(PROMPTS[0], timeout_s=20)
        for transition in ("configure", "activate"):
            assert probe.change(transition), transition
        assert ask(client, PROMPTS[0], num_tokens).result(60).text == library.answers[PROMPTS[0]]


def test_ctrl_c_in_the_middle_ends_goals_with_an_error_code_and_the_process_with_status_0(
    serving: NodeProcess, client: LLMClient, num_tokens: int
) -> None:
    streams = [ask(client, prompt, num_tokens) for prompt in PROMPTS]
    for stream in streams:
        next(iter(stream))
    assert serving.stop(signal.SIGINT) == 0, serving.log()
    for stream in streams:
        with pytest.raises(errors.ShuttingDownError):
            stream.result(5)
    assert "Traceback" not in serving.log()
