"""How ROS messages become the words of core, and back: pure functions, no node and no waiting.

A field that cannot be honoured is refused by name. Bytes arrive in messages; a path or URL in one is never opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from edgellm_ros.bundle import CHAT_TEMPLATE, Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import ChatMessage, FinishReason, Request, SamplingParams, Tool, ToolCall, Usage
from edgellm_ros.errors import EdgeLLMError, RequestError, UnsupportedError
from edgellm_ros.executors.base import ExecutorInfo
from edgellm_ros.msg import ChatMessage as ChatMessageMsg
from edgellm_ros.msg import ModelInfo, Sampling
from edgellm_ros.msg import Usage as UsageMsg

_THINKING = {0: None, 1: True, 2: False}  # Goal.THINKING_AUTO, _ON, _OFF
_TOOL_CHOICES = ("", "auto", "none")


def sampling_from_msg(msg: Any, defaults: SamplingParams) -> SamplingParams:
    """The sampling of a goal: its fields that are not the sentinel, over the node's parameters.

    Raises RequestError for a value out of range, NaN included.
    """
    given: dict[str, Any] = {}
    for name in msg.get_fields_and_field_types():
        value = getattr(msg, name)
        if name == "stop":
            if len(value):
                given[name] = tuple(value)
        elif isinstance(value, bool):
            if value:
                given[name] = True
        elif value != (Sampling.UNSET if isinstance(value, float) else Sampling.UNSET_INT):
            given[name] = value
    return dataclasses.replace(defaults, **given)


def message_from_msg(msg: Any) -> ChatMessage:
    """A conversation's message; raises RequestError for an unknown role, UnsupportedError for images."""
    if msg.images:
        raise UnsupportedError("messages have images, but this version serves text only; send none")
    calls = tuple(ToolCall(call.name, call.arguments, call.id) for call in msg.tool_calls)
    return ChatMessage(msg.role, msg.content, msg.reasoning, (), calls, msg.tool_call_id)


def request_from_goal(goal: Any, defaults: SamplingParams, system_prompt: str = "") -> Request:
    """The request of a Chat goal or a Generate request, which have the same fields.

    `defaults` fill in for sampling sentinels; `system_prompt` is put in front when the messages have no system message.
    Raises RequestError for contradictory or impossible fields, UnsupportedError for ones that cannot be honoured.
    """
    _refuse_unsupported(goal)
    if goal.thinking not in _THINKING:
        raise RequestError(f"thinking is {goal.thinking}; allowed are 0 (auto), 1 (on) and 2 (off)")
    if goal.tool_choice not in _TOOL_CHOICES:
        raise UnsupportedError(f"tool_choice is {goal.tool_choice!r}; this version knows auto and none")
    common: dict[str, Any] = {
        "sampling": sampling_from_msg(goal.sampling, defaults),
        "enable_thinking": _THINKING[goal.thinking],
        "priority": goal.priority,
        "deadline_s": _deadline_s(goal.deadline),
        "session_id": goal.session_id,
        "lora": goal.lora,
        "pin_system_prompt": goal.pin_system_prompt,
    }
    if goal.raw_prompt:
        if goal.messages:
            raise RequestError("raw_prompt takes prompt as it is, but messages are given too; send one of them")
        if goal.tools:
            raise RequestError("tools need messages; a raw prompt is taken as it is")
        if not goal.prompt:
            raise RequestError("raw_prompt is set, but prompt is empty")
        return Request(prompt=goal.prompt, **common)
    messages = [message_from_msg(message) for message in goal.messages]
    if goal.prompt:
        messages.append(ChatMessage("user", goal.prompt))
    if not messages:
        raise RequestError("messages and prompt are both empty; one of them must be given")
    if system_prompt and not any(message.role == "system" for message in messages):
        messages.insert(0, ChatMessage("system", system_prompt))
    tools = () if goal.tool_choice == "none" else tuple(_tool(tool) for tool in goal.tools)
    return Request(messages=tuple(messages), tools=tools, **common)


def fill_result(
    result: Any, text: str, reasoning: str, reason: FinishReason, usage: Usage, error: Exception | None = None
) -> Any:
    """Fill a Chat.Result or a Generate.Response, which have the same fields, and return it."""
    result.message = ChatMessageMsg(role="assistant", content=text, reasoning=reasoning)
    result.finish_reason = reason.value
    result.usage = usage_to_msg(usage)
    if error is not None:
        set_error(result, error)
    return result


def set_error(result: Any, error: Exception) -> Any:
    """Put an exception's code and message into anything that has error_code and error_msg, and return it."""
    if isinstance(error, EdgeLLMError):
        result.error_code, result.error_msg = error.code, str(error) or type(error).__name__
    else:
        result.error_code, result.error_msg = EdgeLLMError.code, f"{type(error).__name__}: {error}; the log has more"
    return result


def usage_to_msg(usage: Usage) -> Any:
    """What a request took."""
    return UsageMsg(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
        queue_time=usage.queue_s,
        time_to_first_token=usage.time_to_first_token_s,
        decode_time=usage.decode_s,
        total_time=usage.total_s,
    )


def model_info_to_msg(bundle: Bundle, info: ExecutorInfo, config: EngineConfig, loras: Sequence[str] = ()) -> Any:
    """What the node serves; `loras` are the adapters that are loaded."""
    return ModelInfo(
        name=bundle.manifest.model.name,
        family=bundle.manifest.model.family,
        executor=info.name,
        precision=info.precision,
        device=info.device,
        max_context=info.capacity,
        max_slots=info.num_slots,
        max_queue=config.max_queue,
        vocab_size=info.vocab_size,
        memory_bytes=info.memory_bytes,
        adapters=list(loras),
        chat=bundle.has(CHAT_TEMPLATE),
    )


def _refuse_unsupported(goal: Any) -> None:
    if goal.images:
        raise UnsupportedError("images are given, but this version serves text only; send none")
    if goal.json_schema:
        raise UnsupportedError("json_schema is given, but this version has no constrained output; leave it empty")


def _tool(msg: Any) -> Tool:
    if not msg.name:
        raise RequestError("tools has one without a name")
    return Tool(msg.name, msg.description, msg.parameters) if msg.parameters else Tool(msg.name, msg.description)


def _deadline_s(msg: Any) -> float | None:
    seconds = float(msg.sec) + float(msg.nanosec) * 1e-9
    if seconds < 0.0:
        raise RequestError(f"deadline is {seconds} s; it must be above 0, or 0 for none")
    return seconds or None
