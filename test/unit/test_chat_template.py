"""The prompt text of a conversation: equal to Hugging Face's, and safe against the template itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import FAMILIES, FEATURES, QWEN3

from edgellm_ros.chat import ChatTemplate
from edgellm_ros.core import ChatMessage, Tool, ToolCall
from edgellm_ros.errors import RequestError, TemplateError, UnsupportedError
from edgellm_ros.manifest import TokenSpec

TOKENS = TokenSpec(bos_token="<s>", eos_token="</s>")
WEATHER = Tool("weather", "Look out of the window", '{"type": "object", "properties": {"city": {"type": "string"}}}')
WEATHER_HF = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look out of the window",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SYSTEM = (ChatMessage("system", "Be brief. <&\"'>"), {"role": "system", "content": "Be brief. <&\"'>"})
HELLO = (ChatMessage("user", " Grüß dich, 世界 \n"), {"role": "user", "content": " Grüß dich, 世界 \n"})
ANSWER = (ChatMessage("assistant", "Hi.\n"), {"role": "assistant", "content": "Hi.\n"})
AGAIN = (ChatMessage("user", "And now?"), {"role": "user", "content": "And now?"})
REASONED = (
    ChatMessage("assistant", "42", reasoning="Let me see.\n"),
    {"role": "assistant", "content": "42", "reasoning_content": "Let me see.\n"},
)
CALL = (
    ChatMessage("assistant", tool_calls=(ToolCall("weather", '{"city": "Zürich", "days": [1, 2]}', "abcdef123"),)),
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": "abcdef123",
                "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}},
            }
        ],
    },
)
RESULT = (
    ChatMessage("tool", '{"sun": true}', tool_call_id="abcdef123"),
    {"role": "tool", "content": '{"sun": true}', "tool_call_id": "abcdef123"},
)
CONVERSATIONS = {
    "user": [HELLO],
    "system": [SYSTEM, HELLO],
    "turns": [SYSTEM, HELLO, ANSWER, AGAIN],
    "tools": [HELLO, CALL, RESULT],
    "tools_and_answer": [SYSTEM, HELLO, CALL, RESULT, ANSWER, AGAIN],
    "reasoning": [HELLO, REASONED, AGAIN],
    "reasoning_last": [HELLO, REASONED],
}


def hugging_face(template: str, messages: list[dict[str, Any]], tools: bool, generate: bool, think: bool | None) -> str:
    from transformers.utils import chat_template_utils as utils

    extra = {} if think is None else {"enable_thinking": think}
    rendered, _ = utils.render_jinja_template(
        conversations=[messages],
        tools=[WEATHER_HF] if tools else None,
        chat_template=template,
        add_generation_prompt=generate,
        bos_token="<s>",
        eos_token="</s>",
        **extra,
    )
    return str(rendered[0])


def both(template: str, conversation: list[Any], tools: bool, generate: bool, think: bool | None) -> tuple[Any, Any]:
    """What we and Hugging Face make of it: a text, or the refusal's words."""
    ours: Any
    theirs: Any
    try:
        theirs = hugging_face(template, [hf for _, hf in conversation], tools, generate, think)
    except Exception as error:
        theirs = ("refused", str(error))
    try:
        given = [WEATHER] if tools else []
        ours = ChatTemplate(template, TOKENS).render([m for m, _ in conversation], given, generate, think)
    except TemplateError as error:
        ours = ("refused", str(error).removeprefix("the chat template refused the messages: "))
    return ours, theirs


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_equal_to_hugging_face_for_every_family(family: str, name: str) -> None:
    num_texts = 0
    for tools in (False, True):
        for generate in (False, True):
            for think in (None, False, True):
                ours, theirs = both(FAMILIES[family], CONVERSATIONS[name], tools, generate, think)
                if isinstance(theirs, tuple) and not isinstance(ours, tuple):
                    pytest.fail(f"Hugging Face refuses it: {theirs}")
                assert ours == theirs
                num_texts += isinstance(ours, str)
    assert num_texts or family == "llama2"  # llama2 knows no tools, the others must take everything


def smollm2_template(path: Path) -> str:
    import gguf

    field = gguf.GGUFReader(path).fields["tokenizer.chat_template"]
    return bytes(field.parts[field.data[0]]).decode()


def test_the_real_smollm2_template_is_equal_to_hugging_face(smollm2_gguf: Path) -> None:
    template = smollm2_template(smollm2_gguf)
    for name in ("user", "system", "turns"):
        for generate in (False, True):
            ours, theirs = both(template, CONVERSATIONS[name], False, generate, None)
            assert isinstance(ours, str) and ours == theirs


@pytest.mark.parametrize("template", FEATURES)
def test_what_hugging_face_offers_templates_means_the_same_here(template: str) -> None:
    ours, theirs = both(template, CONVERSATIONS["turns"], False, True, None)
    assert isinstance(theirs, str)
    assert ours == theirs


def render(template: str, **options: Any) -> str:
    return ChatTemplate(template, TOKENS).render([ChatMessage("user", "hello")], **options)


def test_a_refusal_carries_the_words_of_the_template() -> None:
    with pytest.raises(TemplateError, match=r"refused the messages: only one question"):
        render("{{ raise_exception('only one question') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ range(10 ** 9) | length }}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [[0] * 10 ** 5] * 10 ** 5 * 10 ** 5 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
    ],
)
@pytest.mark.timeout(60)  # a template without bounds would run for hours
def test_a_hostile_or_broken_template_ends_as_a_template_error(template: str) -> None:
    with pytest.raises(TemplateError):
        render(template)


def test_the_step_limit_is_for_one_rendering_and_not_for_the_templates_life() -> None:
    template = ChatTemplate("{% for a in range(60000) %}{% endfor %}x", TOKENS)
    assert {template.render([ChatMessage("user", "a")]) for _ in range(6)} == {"x"}


def test_a_long_conversation_is_within_the_limits() -> None:
    messages = [ChatMessage("user" if i % 2 == 0 else "assistant", "word " * 20) for i in range(2001)]
    assert ChatTemplate(QWEN3, TOKENS).render(messages).count("<|im_start|>") == 2002


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(TemplateError, match="line 2"):
        ChatTemplate("\n{% if %}", TOKENS)


def test_a_missing_template_says_what_to_do_instead() -> None:
    with pytest.raises(TemplateError, match="`prompt`"):
        render("")


def test_empty_messages_are_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        ChatTemplate("x", TOKENS).render([])


@pytest.mark.parametrize("arguments", ["", "{", "[1]", '"text"'])
def test_tool_arguments_that_are_no_json_object_are_named(arguments: str) -> None:
    message = ChatMessage("assistant", tool_calls=(ToolCall("weather", arguments),))
    with pytest.raises(RequestError, match=r"messages\[0\].*weather"):
        ChatTemplate("x", TOKENS).render([message])
    with pytest.raises(RequestError, match="parameters of tool 'f'"):
        render("x", tools=[Tool("f", parameters=arguments)])


def test_images_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"messages\[0\] has images"):
        ChatTemplate("x", TOKENS).render([ChatMessage("user", "look", images=(b"jpeg",))])


def test_a_text_in_a_message_is_never_run_as_a_template() -> None:
    message = ChatMessage("user", "{{ 7 * 7 }}{% raw %}")
    assert ChatTemplate("{{ messages[0].content }}", TOKENS).render([message]) == "{{ 7 * 7 }}{% raw %}"
