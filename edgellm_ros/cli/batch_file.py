"""Reads TensorRT-Edge-LLM's request file strictly: what cannot be honoured is refused by its name and place.

Format: https://nvidia.github.io/TensorRT-Edge-LLM, "Input JSON Format". Defaults are those of that page.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_ros.core import ChatMessage, Request, SamplingParams
from edgellm_ros.errors import RequestError, UnsupportedError

_HALF = re.compile("[\ud800-\udfff]")
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
_OTHERS = {  # fields of that format which have no counterpart here
    "context_cache_lookup_policy": "prefixes are always reused; --no-prefix-cache turns that off",
    "context_cache_commit_policy": "prefixes are always kept while there is room",
    "spec_proposal_sampling": "there is no speculative decoding",
    "audio_buffers": "this version reads text only",
    "video": "this version reads text only",
}


@dataclass(frozen=True)
class BatchFile:
    """A request file: how many requests may run at once, and the requests in order."""

    batch_size: int
    requests: tuple[Request, ...]
    messages: tuple[list[dict[str, Any]], ...]  # each request's messages as the output file repeats them


@dataclass(frozen=True)
class _Globals:
    """The fields beside `requests`."""

    batch_size: int = 1
    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int = 50
    max_generate_length: int = 256
    sampling_seed: int | None = None
    num_logprobs: int = 0
    logit_bias: dict[str, float] = dataclasses.field(default_factory=dict)
    apply_chat_template: bool = True
    add_generation_prompt: bool = True
    enable_thinking: bool = False
    default_system_prompt: str = ""
    available_lora_weights: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class _Item:
    """The fields of one request beside `messages`; a field without a value falls back to the file's."""

    lora_name: str = ""
    save_system_prompt_kv_cache: bool = False
    disable_spec_decode: bool = False  # accepted: nothing is speculated, so nothing has to be disabled
    stop: list[str] = dataclasses.field(default_factory=list)
    num_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    formatted_system_prompt: str = ""
    formatted_complete_request: str = ""


_GLOBAL_TYPES = {
    "batch_size": int, "temperature": float, "top_p": float, "top_k": int, "max_generate_length": int,
    "sampling_seed": int, "num_logprobs": int, "logit_bias": dict, "apply_chat_template": bool,
    "add_generation_prompt": bool, "enable_thinking": bool, "default_system_prompt": str,
    "available_lora_weights": dict, "requests": list,
}  # fmt: skip
_ITEM_TYPES = {
    "messages": list, "lora_name": str, "save_system_prompt_kv_cache": bool, "disable_spec_decode": bool, "stop": list,
    "num_logprobs": int, "logit_bias": dict, "formatted_system_prompt": str, "formatted_complete_request": str,
}  # fmt: skip


def read_batch_file(path: Path, overrides: Mapping[str, Any] | None = None) -> BatchFile:
    """Read and check a whole request file before anything runs; `overrides` replace fields of its top level.

    Raises RequestError that names the place (`requests[2].messages[0].role`), or UnsupportedError for a field of the
    format which this version cannot honour.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        raise RequestError(f"{path} is {encoding.upper()}; save it as UTF-8: iconv -f {encoding} -t utf-8")
    try:
        data = json.loads(content.decode("utf-8-sig"))  # Windows' editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from error
    if isinstance(data, dict):
        data.update(overrides or {})
    return parse_batch(data)


def parse_batch(data: Any) -> BatchFile:
    """The same for JSON that is already read."""
    _check_characters(data)
    fields = _checked(data, _GLOBAL_TYPES, "")
    if "requests" not in fields:
        raise RequestError("the request file has no requests; it needs a list of them")
    items = fields.pop("requests")
    common = _Globals(**fields)
    if common.batch_size < 1:
        raise RequestError(f"batch_size is {common.batch_size}; it must be at least 1")
    if common.available_lora_weights:
        raise UnsupportedError(
            "available_lora_weights gives files, but adapters are read from the bundle alone; put them into it with "
            "`edgellm lora pack ADAPTER --bundle BUNDLE --name NAME`, leave the field out, and name them in lora_name"
        )
    if not items:
        raise RequestError("requests is empty; give at least one request")
    if common.enable_thinking and not common.apply_chat_template:
        raise RequestError("enable_thinking needs apply_chat_template; without a template nothing can be enabled")
    requests, messages = [], []
    for index, item in enumerate(items):
        request, shown = _parse_item(item, common, f"requests[{index}]")
        requests.append(request)
        messages.append(shown)
    return BatchFile(common.batch_size, tuple(requests), tuple(messages))


def _check_characters(data: Any) -> None:
    """Raise RequestError for half of a UTF-16 pair: JSON's escapes can write one, no tokenizer or file can hold it."""
    waiting = [("", data)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, str):
            if half := _HALF.search(value):
                raise RequestError(f"{where or 'the request file'} has \\u{ord(half[0]):04x}, half of a UTF-16 pair; "
                                   "write the other half too, or the character itself")  # fmt: skip
        elif isinstance(value, dict):
            waiting += [(f"the field {name!r}", name) for name in value]
            waiting += [(f"{where}.{name}" if where else name, inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{where}[{index}]", inner) for index, inner in enumerate(value)]


def _parse_item(data: Any, common: _Globals, where: str) -> tuple[Request, list[dict[str, Any]]]:
    fields = _checked(data, _ITEM_TYPES, where)
    if not fields.get("messages"):
        raise RequestError(f"{where} has no messages; give at least one")
    raw = fields.pop("messages")
    item = _Item(**fields)
    messages = [_parse_message(m, f"{where}.messages[{i}]") for i, m in enumerate(raw)]
    shown = [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in messages]
    if common.default_system_prompt and all(m.role != "system" for m in messages):
        messages.insert(0, ChatMessage("system", common.default_system_prompt))
    formatted = item.formatted_complete_request
    prompt = formatted or ("" if common.apply_chat_template else "".join(m.content for m in messages))
    pin = item.save_system_prompt_kv_cache
    if pin and (prompt or messages[0].role != "system"):
        raise RequestError(f"{where}.save_system_prompt_kv_cache needs a system message and the chat template")
    try:
        sampling = _sampling(common, item, where)
        if prompt or not common.apply_chat_template:
            return Request(prompt=prompt, sampling=sampling, lora=item.lora_name), shown
        return Request(
            messages=tuple(messages),
            sampling=sampling,
            enable_thinking=common.enable_thinking,
            add_generation_prompt=common.add_generation_prompt,
            pin_system_prompt=pin,
            lora=item.lora_name,
        ), shown
    except RequestError as error:
        raise type(error)(f"{where}: {error}") from error


def _parse_message(data: Any, where: str) -> ChatMessage:
    fields = _checked(data, {"role": str, "content": object}, where)
    for name in ("role", "content"):
        if name not in fields:
            raise RequestError(f"{where} has no {name}")
    content = fields["content"]
    if isinstance(content, list):
        content = "".join(_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"{where}.content is {content!r}; it must be a string or a list of parts")
    try:
        return ChatMessage(fields["role"], content)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


def _parse_part(data: Any, where: str) -> str:
    kind = data.get("type") if isinstance(data, dict) else None
    if kind is not None and kind != "text":
        raise UnsupportedError(f"{where}.type is {kind!r}; this version reads only parts of type 'text'")
    fields = _checked(data, {"type": str, "text": str}, where)
    if "type" not in fields or "text" not in fields:
        raise RequestError(f"{where} needs a type and a text")
    text: str = fields["text"]
    return text


def _sampling(common: _Globals, item: _Item, where: str) -> SamplingParams:
    bias = common.logit_bias if item.logit_bias is None else item.logit_bias
    num_logprobs = common.num_logprobs if item.num_logprobs is None else item.num_logprobs
    for token, value in bias.items():
        if not token.isdecimal() or isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError(f"logit_bias has {token!r}: {value!r}; it maps token ids to numbers")
    if common.max_generate_length < 1:
        raise RequestError(f"max_generate_length is {common.max_generate_length}; it must be at least 1")
    return SamplingParams(
        temperature=common.temperature,
        top_p=common.top_p,
        top_k=common.top_k,
        max_tokens=common.max_generate_length,
        seed=common.sampling_seed,
        stop=tuple(item.stop),
        logprobs=num_logprobs or None,
        logit_bias={int(token): float(value) for token, value in bias.items()},
    )


def _checked(data: Any, types: Mapping[str, type], where: str) -> dict[str, Any]:
    """The fields of an object whose names and types are known; null means that a field is not given."""
    if not isinstance(data, dict):
        raise RequestError(f"{where or 'the request file'} is {data!r}; it must be an object")
    prefix = f"{where}." if where else ""
    for name, value in data.items():
        if name in _OTHERS:
            raise UnsupportedError(f"{prefix}{name} cannot be honoured: {_OTHERS[name]}")
        if name not in types:
            raise RequestError(f"{prefix}{name} is not a known field; known are {', '.join(types)}")
        kind = types[name]
        accepted: Any = (int, float) if kind is float else kind
        is_bool = isinstance(value, bool) and kind in (int, float)
        if value is not None and (is_bool or not isinstance(value, accepted)):
            raise RequestError(f"{prefix}{name} is {value!r}; it must be {_KINDS[kind]}")
    return {name: value for name, value in data.items() if value is not None}
