"""LLM: a bundle is opened whole or not at all, requests become the right tokens, and every field is honoured or refused."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doubles import BYTE_VOCAB, EOS, FakeExecutor, byte_tokenizer_json, fake_logits, reference_greedy

from edgellm_ros.bundle import CHAT_TEMPLATE, TOKENIZER, Bundle, hash_file
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import ChatMessage, FinishReason, Phase, Request, SamplingParams, Tool
from edgellm_ros.errors import BundleError, ConfigError, ContextOverflowError, RequestError, UnsupportedError
from edgellm_ros.llm import LLM
from edgellm_ros.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    GraphSpec,
    Manifest,
    ModelSpec,
    QuantSpec,
    SelfTest,
    SelfTestCase,
    TokenSpec,
)
from edgellm_ros.tokenizer import Tokenizer

TEMPLATE = (
    "{% if messages[0].role == 'system' and messages | length == 1 %}{{ raise_exception('a user is needed') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}[think]{% endif %}{% endif %}"
)


def write_bundle(
    root: Path, template: str | None = TEMPLATE, tests: tuple[SelfTestCase, ...] = (), **tokens: Any
) -> Path:
    """A bundle for FakeExecutor: no weights, but a tokenizer, a template and a manifest."""
    root.mkdir()
    (root / TOKENIZER).write_text(byte_tokenizer_json(), encoding="utf-8")
    if template is not None:
        (root / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    model = ModelSpec("llama", "fake", 1, 8, 8, 1, 1, 8, BYTE_VOCAB, 256, 1e-5)
    spec = TokenSpec(**{"stop_ids": (EOS,), "eos_token": "<eos>", **tokens})
    files = {p.name: hash_file(p) for p in root.iterdir()}
    manifest = Manifest(
        SCHEMA_VERSION, model, spec, QuantSpec("fp32"), GraphSpec(), {}, files, SelfTest("test", 1e-3, tests)
    )
    (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return root


def say(*texts: str, **fields: Any) -> Request:
    """Messages, the first one the system's where there are two or more."""
    roles = ["user"] if len(texts) == 1 else ["system", *["user", "assistant"] * len(texts)]
    messages = tuple(ChatMessage(role, text) for role, text in zip(roles, texts, strict=False))
    fields.setdefault("sampling", SamplingParams(temperature=0.0, max_tokens=6))
    return Request(messages=messages, **fields)


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    with LLM.open(write_bundle(tmp_path / "bundle"), executor=FakeExecutor(allowed=128)) as opened:
        yield opened


def test_messages_are_rendered_and_parsed_with_their_special_tokens(llm: LLM) -> None:
    request = say("Be brief.", "Hi")
    text = "<system>Be brief.<eos><user>Hi<eos><assistant>"
    assert llm.render(request) == text
    ids = llm.tokenize(text)
    assert len(ids) == len("Be brief.") + len("Hi") + 5
    result = llm.complete(request)
    assert list(result.token_ids) == reference_greedy(ids, 6, BYTE_VOCAB, 128)
    assert result.usage.prompt_tokens == len(ids)
    assert "".join(d.text for d in llm.generate(request)) == result.text == llm.detokenize(result.token_ids)


def test_a_raw_prompt_and_its_ids_give_the_same(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=5)
    by_text = llm.complete(Request(prompt="raw<eos>", sampling=sampling))
    by_ids = llm.complete(Request(prompt_ids=(114, 97, 119, EOS), sampling=sampling))
    assert by_text.token_ids == by_ids.token_ids
    assert llm.render(Request(prompt_ids=(114, EOS))) == "r<eos>"


def test_bos_is_added_to_a_raw_prompt_only_where_the_model_wants_it(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle", bos_id=257, add_bos=True)
    with LLM.open(path, executor=FakeExecutor()) as llm:
        assert llm.tokenize("a", add_special=True) == [257, 97]
        assert llm.tokenize("<user>a", add_special=True) == [257, 97]
        assert llm.tokenize("a") == [97]


def test_the_end_token_stops_unless_told_not_to(llm: LLM) -> None:
    bias = {EOS: 200.0}
    stopped = llm.complete(say("Hi", sampling=SamplingParams(temperature=0.0, max_tokens=5, logit_bias=bias)))
    assert stopped.finish_reason is FinishReason.STOP and stopped.token_ids == (EOS,)
    onward = SamplingParams(temperature=0.0, max_tokens=5, logit_bias=bias, ignore_eos=True)
    assert llm.complete(say("Hi", sampling=onward)).token_ids == (EOS,) * 5


def test_a_stop_text_that_is_a_special_token_stops(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=5, logit_bias={257: 200.0}, stop=("<user>",))
    assert llm.complete(say("Hi", sampling=sampling)).finish_reason is FinishReason.STOP


def test_reasoning_is_split_from_content_whichever_way_it_starts(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle", think_start="[think]", think_end="[/think]")

    class Scripted(FakeExecutor):
        """Answers with a fixed text, whatever the prompt."""

        answer = b""

        def step(self, batch: Any) -> Any:
            logits = super().step(batch)
            for i, s in enumerate(batch):
                done = s.position + len(s.token_ids) - self.prompt_length
                logits[i, (self.answer + bytes(64))[done] if done < len(self.answer) else EOS] = 999.0
            return logits

    executor = Scripted()
    with LLM.open(path, executor=executor) as llm:
        for thinking, answer in ((None, "[think]why[/think]so"), (True, "why[/think]so")):
            request = say("Hi", enable_thinking=thinking, sampling=SamplingParams(temperature=0.0, max_tokens=60))
            executor.answer, executor.prompt_length = answer.encode(), len(llm.tokenize(llm.render(request)))
            result = llm.complete(request)
            assert (result.reasoning, result.text, result.finish_reason) == ("why", "so", FinishReason.STOP)
            deltas = list(llm.generate(request))
            assert ("".join(d.reasoning for d in deltas), "".join(d.text for d in deltas)) == ("why", "so")


def test_a_pinned_system_prompt_is_kept_and_found_again_after_a_restart(tmp_path: Path) -> None:
    path, pins = write_bundle(tmp_path / "bundle"), tmp_path / "pins"
    system = "You are a robot with a rather long system prompt."
    for _ in range(2):
        executor = FakeExecutor(num_slots=1, allowed=128)
        with LLM.open(path, executor=executor, pinned_dir=pins) as llm:
            first = llm.complete(say(system, "Hi", pin_system_prompt=True))
            llm.complete(say("something else altogether, over the same slot"))
            again = llm.complete(say(system, "Who are you?"))
    assert first.usage.cached_tokens >= len(system) - 8 and again.usage.cached_tokens >= len(system) - 8
    assert not executor.saves


def test_a_prefix_saved_in_one_cache_format_is_not_loaded_into_another(tmp_path: Path) -> None:
    path, pins = write_bundle(tmp_path / "bundle"), tmp_path / "pins"
    system = "You are a robot with a rather long system prompt."
    loads = []
    for cache in ("bf16 KV cache", "fp16 KV cache", "bf16 KV cache"):
        executor = FakeExecutor(num_slots=1, allowed=128)
        executor.info = dataclasses.replace(executor.info, precision=f"int4 weights, {cache}")
        with LLM.open(path, executor=executor, pinned_dir=pins) as llm:
            llm.complete(say(system, "Hi", pin_system_prompt=True))
        loads.append(len(executor.loads))
    assert loads == [0, 0, 1]


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request(prompt="a", tools=(Tool("f"),)), RequestError, "tools needs messages"),
        (Request(prompt="a", enable_thinking=True), RequestError, "enable_thinking needs messages"),
        (Request(prompt="a", pin_system_prompt=True), RequestError, "pin_system_prompt needs messages"),
        (Request(messages=(ChatMessage("user", "a", images=(b"x",)),)), UnsupportedError, "images"),
        (say("x" * 300), ContextOverflowError, "holds 256"),
        (Request(prompt_ids=(5000,)), RequestError, "token id"),
        (Request(prompt="a\ud800"), RequestError, "lone surrogate"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    llm: LLM, request_: Request, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        llm.generate(request_)
    assert llm.metrics().submitted == 0


def test_pinning_without_a_cache_is_refused(tmp_path: Path) -> None:
    config = EngineConfig(prefix_cache=False)
    refused = pytest.raises(UnsupportedError, match="pin_system_prompt needs prefix_cache")
    with LLM.open(write_bundle(tmp_path / "bundle"), config, FakeExecutor()) as llm, refused:
        llm.submit(say("s", "u", pin_system_prompt=True))


def test_messages_need_a_template(tmp_path: Path) -> None:
    refused = pytest.raises(UnsupportedError, match=CHAT_TEMPLATE)
    with LLM.open(write_bundle(tmp_path / "bundle", template=None), executor=FakeExecutor()) as llm, refused:
        llm.submit(say("Hi"))


def test_a_closed_iterator_cancels_its_request(llm: LLM) -> None:
    deltas = llm.generate(say("Hi", sampling=SamplingParams(temperature=0.0, max_tokens=10**6)))
    next(deltas)
    deltas.close()  # type: ignore[attr-defined]
    unread = llm.generate(say("Hi again", sampling=SamplingParams(temperature=0.0, max_tokens=10**6)))
    del unread
    gc.collect()
    end = time.monotonic() + 20
    while llm.metrics().active + llm.metrics().waiting:
        assert time.monotonic() < end
        time.sleep(0.002)


def test_an_executor_that_fails_the_self_test_is_refused_and_closed(tmp_path: Path) -> None:
    ids = tuple(range(0, BYTE_VOCAB, 10))
    right = fake_logits(b"self", BYTE_VOCAB)
    case = SelfTestCase(tuple(b"self"), (int(right.argmax()),), ids, tuple(map(float, right[list(ids)])))
    LLM.open(write_bundle(tmp_path / "good", tests=(case,)), executor=FakeExecutor()).close()
    wrong = dataclasses.replace(case, logits=tuple(-value for value in case.logits))
    bad = write_bundle(tmp_path / "bad", tests=(wrong,))
    executor = FakeExecutor()
    with pytest.raises(BundleError):
        LLM.open(bad, executor=executor)
    assert executor.closed
    LLM.open(bad, EngineConfig(self_test=False), FakeExecutor()).close()


SHORT = r"max_context is {} tokens, but the bundle's self-test needs 4 or more; set it to at least 4, or load .*self_test off"


def case_of(prompt: bytes) -> SelfTestCase:
    right = fake_logits(prompt, BYTE_VOCAB)
    return SelfTestCase(tuple(prompt), (int(right.argmax()),), (7, 9), (float(right[7]), float(right[9])))


@pytest.mark.parametrize("max_context", [1, 3])
def test_a_context_too_short_for_the_self_test_is_refused_before_anything_is_loaded(
    max_context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_bundle(tmp_path / "bundle", tests=(case_of(b"be"), case_of(b"self")))
    made: list[FakeExecutor] = []

    def create(bundle: Bundle, config: EngineConfig) -> FakeExecutor:
        made.append(FakeExecutor(capacity=config.max_context))
        return made[-1]

    monkeypatch.setattr("edgellm_ros.executors.create_executor", create)
    with pytest.raises(ConfigError, match=SHORT.format(max_context)):
        LLM.open(path, EngineConfig(max_context=max_context))
    assert not made
    LLM.open(path, EngineConfig(max_context=4)).close()
    LLM.open(path, EngineConfig(max_context=max_context, self_test=False)).close()


def test_a_slot_too_short_for_the_self_test_is_refused_whatever_made_it_short(tmp_path: Path) -> None:
    executor = FakeExecutor(capacity=3)
    with pytest.raises(ConfigError, match=SHORT.format(3)):
        LLM.open(write_bundle(tmp_path / "bundle", tests=(case_of(b"self"),)), executor=executor)
    assert executor.closed and not executor.calls


def test_a_prompt_that_cannot_fit_is_refused_without_being_encoded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = len("<assistant>")
    encoded: list[str] = []
    encode = Tokenizer.encode

    def spy(self: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
        encoded.append(text)
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", spy)
    for request in (Request(prompt="x" * longest * 256), say("x" * longest * 256)):
        with pytest.raises(ContextOverflowError, match=r"at least 25\d tokens, and at least 1 must be .* holds 256; shorten"):
            llm.submit(request)
    assert not encoded
    with pytest.raises(ContextOverflowError, match="holds 256"):  # not by its length alone
        llm.submit(Request(prompt="x" * longest * 255))
    assert encoded
    assert llm.complete(Request(prompt="<assistant>" * 255, sampling=SamplingParams(max_tokens=1))).usage.prompt_tokens == 255


def test_half_a_surrogate_pair_is_named_wherever_it_is(llm: LLM) -> None:
    for request in (say("Hi \ud800"), Request(prompt="\udfff"), say("Hi", sampling=SamplingParams(stop=("\ud800",)))):
        with pytest.raises(RequestError, match=r"lone surrogate '\\ud\w+' at character \d+, .* UTF-8 .* replace it"):
            llm.submit(request)


def test_a_changed_file_is_named_and_the_given_executor_closed(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle")
    text = (path / TOKENIZER).read_text(encoding="utf-8")
    (path / TOKENIZER).write_text(text.replace("a", "b", 1), encoding="utf-8")
    executor = FakeExecutor()
    with pytest.raises(BundleError, match=TOKENIZER):
        LLM.open(path, executor=executor)
    assert executor.closed


def test_a_pinned_dir_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle")
    with pytest.raises(ConfigError, match="pinned_dir"):
        LLM.open(path, executor=FakeExecutor(), pinned_dir=path / TOKENIZER / "below")


def test_the_loaded_model_says_what_it_is(tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "bundle"))
    with LLM.open(bundle, executor=FakeExecutor(num_slots=3)) as llm:
        assert llm.bundle is bundle and llm.info.num_slots == 3 and llm.load_s > 0
        assert not llm.reset_session("unknown")
        assert list(llm.generate(say("Hi")))[-1].phase is Phase.DONE
