"""The streamer: first text at once, the rest gathered, the end at once, and nothing lost."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from edgellm_ros.core import Completion, Delta, FinishReason, Phase, Usage
from edgellm_ros.errors import InactiveError
from edgellm_ros.ros.stream import Stream, Streamer
from edgellm_ros.runtime.generation import Channel, Generation


@pytest.fixture(params=[0.05])
def streamer(request):
    made = Streamer(lambda: request.param)
    yield made
    made.close()


class Listener:
    def __init__(self, streamer: Streamer) -> None:
        self.batches: list[tuple[float, object]] = []
        self.outcome = None
        self.ended = threading.Event()
        self.stream = Stream(streamer, lambda b: self.batches.append((time.monotonic(), b)), self._end)
        self.channel = Channel(self.stream.notify)
        self.stream.attach(Generation(self.channel))

    def _end(self, outcome) -> None:
        self.outcome = outcome
        self.ended.set()

    def put(self, text: str) -> None:
        self.channel.put(Delta(Phase.DECODE, text=text, token_ids=(1,)))

    def finish(self, text: str = "", reason=FinishReason.STOP, error=None) -> None:
        last = Delta(Phase.DONE, text=text, finish_reason=reason, usage=Usage(1), error=error)
        self.channel.finish(last, Completion(text, reason))


def test_the_first_text_goes_out_at_once_and_later_ones_are_gathered(streamer):
    listener = Listener(streamer)
    started = time.monotonic()
    for i in range(40):
        listener.put(f"{i} ")
        time.sleep(0.005)
    listener.finish("end")
    assert listener.ended.wait(2)
    times = [when for when, _ in listener.batches]
    assert times[0] - started < 0.02
    assert len(times) <= 8, "deltas were not gathered"
    gaps = [b - a for a, b in itertools.pairwise(times[:-1])]
    assert min(gaps) > 0.035
    text = "".join(batch.text for _, batch in listener.batches)
    assert text == listener.outcome.text == "".join(f"{i} " for i in range(40)) + "end"
    assert listener.batches[-1][1].completion_tokens == 40


def test_the_end_does_not_wait_for_the_period():
    streamer = Streamer(lambda: 5.0)
    listener = Listener(streamer)
    listener.put("a")
    time.sleep(0.05)
    listener.put("b")
    listener.finish("c")
    assert listener.ended.wait(1)
    assert listener.outcome.text == "abc"
    streamer.close()


def test_a_pause_in_the_stream_delays_nothing_after_it(streamer):
    listener = Listener(streamer)
    for text in "abc":
        listener.put(text)
        time.sleep(0.2)
    assert [batch.text for _, batch in listener.batches] == ["a", "b", "c"]
    listener.finish()


def test_streams_do_not_mix(streamer):
    listeners = [Listener(streamer) for _ in range(8)]
    for i in range(50):
        for number, listener in enumerate(listeners):
            listener.put(f"{number}:{i} ")
    for listener in listeners:
        listener.finish()
    for number, listener in enumerate(listeners):
        assert listener.ended.wait(2)
        assert listener.outcome.text == "".join(f"{number}:{i} " for i in range(50))
    assert streamer.wait_idle(1)


def test_a_cancel_before_the_engine_accepted_reaches_the_generation(streamer):
    outcomes = []
    stream = Stream(streamer, None, outcomes.append)
    stream.cancel()
    channel = Channel(stream.notify)
    stream.attach(Generation(channel))
    assert channel.cancelled


def test_cancel_all_gives_the_reason_and_wait_idle_waits(streamer):
    listener = Listener(streamer)
    reason = InactiveError("deactivated")
    streamer.cancel_all(reason)
    assert listener.channel.cancelled
    assert not streamer.wait_idle(0.05)
    listener.finish("part", FinishReason.CANCELLED)
    assert streamer.wait_idle(1)
    assert listener.outcome.error is reason and listener.outcome.text == "part"


def test_a_refused_request_ends_with_its_error(streamer):
    outcomes = []
    stream = Stream(streamer, None, outcomes.append)
    stream.fail(InactiveError("no"))
    assert isinstance(outcomes[0].error, InactiveError) and streamer.wait_idle(1)


def test_a_listener_that_raises_ends_its_own_stream_only(streamer):
    other = Listener(streamer)

    def explode(_: object) -> None:
        raise RuntimeError("boom")

    broken = Stream(streamer, explode, lambda _: None)
    channel = Channel(broken.notify)
    broken.attach(Generation(channel))
    channel.put(Delta(Phase.DECODE, text="x", token_ids=(1,)))
    deadline = time.monotonic() + 2
    while not channel.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert channel.cancelled
    other.put("fine")
    other.finish()
    assert other.ended.wait(2) and other.outcome.text == "fine"
