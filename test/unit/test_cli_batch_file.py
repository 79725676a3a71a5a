"""The request file: read as TensorRT-Edge-LLM documents it, and refused by name where it cannot be honoured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgellm_ros.cli.batch_file import parse_batch, read_batch_file
from edgellm_ros.core import ChatMessage
from edgellm_ros.errors import RequestError, UnsupportedError

USER = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}


def one(item: dict[str, Any] | None = None, **fields: Any) -> Any:
    return parse_batch({"requests": [{"messages": [USER], **(item or {})}], **fields})


def test_the_defaults_are_the_documented_ones() -> None:
    batch = one()
    request = batch.requests[0]
    sampling = request.sampling
    assert batch.batch_size == 1
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (1.0, 0.8, 50, 256)
    assert request.enable_thinking is False and request.add_generation_prompt is True
    assert request.messages == (ChatMessage("user", "Hello"),)
    assert not request.pin_system_prompt


def test_every_field_of_the_format_arrives() -> None:
    batch = parse_batch(
        {
            "batch_size": 3,
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 7,
            "max_generate_length": 9,
            "sampling_seed": 11,
            "logit_bias": {"5": -1.5},
            "num_logprobs": 2,
            "apply_chat_template": True,
            "add_generation_prompt": False,
            "enable_thinking": True,
            "available_lora_weights": {},
            "default_system_prompt": "Default.",
            "requests": [
                {
                    "messages": [
                        SYSTEM,
                        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    ],
                    "lora_name": None,
                    "save_system_prompt_kv_cache": True,
                    "disable_spec_decode": True,
                    "stop": ["x", "y"],
                    "num_logprobs": 0,
                    "logit_bias": {"6": 1},
                },
                {"messages": [USER]},
            ],
        }
    )
    first, second = batch.requests
    assert batch.batch_size == 3
    assert first.messages == (ChatMessage("system", "Be brief."), ChatMessage("user", "ab"))
    assert first.pin_system_prompt and first.enable_thinking is True and not first.add_generation_prompt
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.0, 0.5, 7, 9)
    assert (sampling.seed, sampling.stop, sampling.logprobs, sampling.logit_bias) == (11, ("x", "y"), None, {6: 1.0})
    assert second.messages[0] == ChatMessage("system", "Default.")
    assert (second.sampling.logprobs, second.sampling.logit_bias) == (2, {5: -1.5})
    assert batch.messages[0][1] == {"role": "user", "content": [{"type": "text", "text": "ab"}]}


def test_without_the_chat_template_the_messages_are_the_raw_prompt() -> None:
    batch = parse_batch({"apply_chat_template": False, "requests": [{"messages": [SYSTEM, USER]}]})
    assert batch.requests[0].prompt == "Be brief.Hello" and not batch.requests[0].messages
    assert batch.requests[0].enable_thinking is None


def test_a_formatted_request_replaces_the_template() -> None:
    batch = one({"formatted_system_prompt": "<s>", "formatted_complete_request": "<s>[INST] Hello [/INST]"})
    assert batch.requests[0].prompt == "<s>[INST] Hello [/INST]"


def test_a_request_names_its_adapter() -> None:
    assert one({"lora_name": "fr"}).requests[0].lora == "fr"
    assert one({"lora_name": "fr"}, apply_chat_template=False).requests[0].lora == "fr"
    assert one({}).requests[0].lora == ""


@pytest.mark.parametrize(
    ("item", "fields", "name"),
    [
        ({}, {"temprature": 1}, "temprature"),
        ({"lora": "x"}, {}, r"requests\[0\]\.lora"),
        ({"messages": [{**USER, "name": "x"}]}, {}, r"requests\[0\]\.messages\[0\]\.name"),
        ({"messages": [{"role": "user"}]}, {}, r"messages\[0\] has no content"),
        ({"messages": [{"role": "robot", "content": ""}]}, {}, r"messages\[0\]: role is 'robot'"),
        ({"messages": [{"role": "user", "content": 5}]}, {}, r"messages\[0\]\.content is 5"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, {}, r"content\[0\] needs a type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image": "y"}]}]},
            {},
            r"content\[0\]\.image",
        ),
        ({"messages": []}, {}, r"requests\[0\] has no messages"),
        ({"messages": ["Hello"]}, {}, r"messages\[0\] is 'Hello'"),
        ({"stop": "x"}, {}, r"requests\[0\]\.stop is 'x'; it must be a list"),
        ({"stop": [""]}, {}, r"requests\[0\]: stop"),
        ({"save_system_prompt_kv_cache": 1}, {}, "must be true or false"),
        ({"save_system_prompt_kv_cache": True}, {}, "needs a system message"),
        ({"logit_bias": {"a": 1}}, {}, "logit_bias"),
        ({"logit_bias": {"1": True}}, {}, "logit_bias"),
        ({"num_logprobs": 99}, {}, "logprobs"),
        ({}, {"temperature": -1}, "temperature"),
        ({}, {"temperature": True}, "temperature is True; it must be a number"),
        ({}, {"temperature": float("nan")}, "temperature"),
        ({}, {"top_p": 2}, "top_p"),
        ({}, {"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({}, {"max_generate_length": 0}, "max_generate_length is 0"),
        ({}, {"batch_size": 0}, "batch_size is 0"),
        ({}, {"apply_chat_template": False, "enable_thinking": True}, "enable_thinking needs"),
        ({}, {"requests": []}, "requests is empty"),
        ({}, {"requests": {}}, "requests is {}; it must be a list"),
        ({}, {"requests": None}, "has no requests"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name_and_place(
    item: dict[str, Any], fields: dict[str, Any], name: str
) -> None:
    with pytest.raises(RequestError, match=name):
        one(item, **fields)


@pytest.mark.parametrize(
    ("item", "fields", "name"),
    [
        ({}, {"available_lora_weights": {"fr": "fr.safetensors"}}, "available_lora_weights.*edgellm lora pack"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
            {},
            r"content\[0\]\.type is 'image'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
            {},
            r"content\[0\]\.type is 'video'",
        ),
        ({}, {"context_cache_lookup_policy": "use_cache"}, "context_cache_lookup_policy"),
    ],
)
def test_what_cannot_be_honoured_yet_is_unsupported_by_name(
    item: dict[str, Any], fields: dict[str, Any], name: str
) -> None:
    with pytest.raises(UnsupportedError, match=name):
        one(item, **fields)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\xff"])
def test_a_file_that_is_no_json_object_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "in.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError):
        read_batch_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere\.json"):
        read_batch_file(tmp_path / "nowhere.json")


def test_overrides_replace_the_files_own_values(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text('{"batch_size": 2, "requests": [{"messages": [{"role": "user", "content": "x"}]}]}')
    batch = read_batch_file(path, {"batch_size": 5, "max_generate_length": 3})
    assert batch.batch_size == 5 and batch.requests[0].sampling.max_tokens == 3


def test_a_byte_order_mark_of_utf8_is_no_part_of_the_json(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text(json.dumps({"requests": [{"messages": [{"role": "user", "content": "é"}]}]}), encoding="utf-8-sig")
    assert read_batch_file(path).requests[0].messages[0].content == "é"


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "is UTF-16; save it as UTF-8: iconv -f utf-16 -t utf-8"),
        ("utf-16-le", "is UTF-16-LE; save it as UTF-8: iconv"),
        ("latin-1", r"is not UTF-8 \(invalid continuation byte at byte \d+\); save it as UTF-8"),
    ],
)
def test_another_encoding_is_named_with_the_remedy(tmp_path: Path, encoding: str, message: str) -> None:
    path = tmp_path / "in.json"
    path.write_text('{"requests": [{"messages": [{"role": "user", "content": "é!"}]}]}', encoding=encoding)
    with pytest.raises(RequestError, match=f"{path} {message}"):
        read_batch_file(path)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"default_system_prompt": "\udfff"}, r"default_system_prompt has \\udfff"),
        ({"requests": [{"messages": [USER], "stop": ["a", "b\ud800"]}]}, r"requests\[0\]\.stop\[1\] has \\ud800"),
        ({"\ud800": 1}, r"the field '\\ud800' has \\ud800"),
    ],
)
def test_half_of_a_utf16_pair_is_refused_by_its_place(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(RequestError, match=f"^{place}, half of a UTF-16 pair; write the other half too"):
        parse_batch({"requests": [{"messages": [USER]}], **fields})
    assert json.loads('"\\ud83e\\udd16"') == "🤖"  # both halves are one character before anything is looked at
