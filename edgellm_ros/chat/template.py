"""Decides what a conversation looks like as prompt text: the provider's Jinja template, run as Hugging Face runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jinja2

from edgellm_ros.chat.sandbox import ChatEnvironment, TemplateRefusal, check_length, limited_steps
from edgellm_ros.core import ChatMessage, Tool
from edgellm_ros.errors import EdgeLLMError, RequestError, TemplateError, UnsupportedError
from edgellm_ros.manifest import TokenSpec

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """A model's chat template, compiled once; `render` may be called from several threads.

    Gives the text of `transformers`' apply_chat_template for the same template, messages and tools.
    """

    def __init__(self, source: str, tokens: TokenSpec) -> None:
        """Compile `source`, which may be empty: then `render` says so. Raises TemplateError for a syntax error."""
        self._tokens = {
            name: text for name, text in (("bos_token", tokens.bos_token), ("eos_token", tokens.eos_token)) if text
        }
        self._template: jinja2.Template | None = None
        if source.strip():
            try:
                self._template = ChatEnvironment().from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise TemplateError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
    ) -> str:
        """The prompt's text, special tokens written out (encode it without adding any).

        enable_thinking None leaves the template's own default. Raises RequestError for messages or tools that are
        no conversation, TemplateError with the template's own words when it refuses them.
        """
        if not messages:
            raise RequestError("messages is empty; give at least one message")
        if self._template is None:
            raise TemplateError(
                "this model has no chat template; put the whole text into the request's `prompt` instead of `messages`"
            )
        variables: dict[str, Any] = {
            "messages": [_message_dict(message, index) for index, message in enumerate(messages)],
            "tools": [_tool_dict(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        try:
            with limited_steps():
                return _bounded_text(self._template, variables)
        except EdgeLLMError:
            raise
        except TemplateRefusal as error:
            raise TemplateError(f"the chat template refused the messages: {error}") from error
        except Exception as error:  # the template is foreign code: it can fail in every way that Python can
            raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error


def _bounded_text(template: jinja2.Template, variables: dict[str, Any]) -> str:
    parts: list[str] = []
    length = 0
    for part in template.generate(variables):
        length += len(part)
        check_length(length)
        parts.append(part)
    return "".join(parts)


def _message_dict(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message with the keys that templates written for Hugging Face look at; absent means absent."""
    if message.images:
        raise UnsupportedError(f"messages[{index}] has images; this version reads text only")
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        result["reasoning_content"] = result["thinking"] = message.reasoning
    if message.tool_calls:
        calls = []
        for call in message.tool_calls:
            where = f"messages[{index}]: the arguments of tool call {call.name!r}"
            function = {"name": call.name, "arguments": _json_object(call.arguments, where)}
            entry: dict[str, Any] = {"type": "function", "function": function}
            if call.id:
                entry["id"] = call.id
            calls.append(entry)
        result["tool_calls"] = calls
    if message.tool_call_id:
        result["tool_call_id"] = message.tool_call_id
    return result


def _tool_dict(tool: Tool) -> dict[str, Any]:
    """A tool as its OpenAI-style JSON schema, keys in the order of Hugging Face's get_json_schema."""
    if not tool.name:
        raise RequestError("a tool has no name; give the function's name")
    parameters = _json_object(tool.parameters, f"the parameters of tool {tool.name!r}")
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{where} are not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{where} are {text!r}; they must be a JSON object")
    return value
