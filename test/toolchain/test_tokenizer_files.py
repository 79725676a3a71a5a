"""Tokenizer files of Hugging Face directories: special tokens, stop ids and templates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
import transformers

from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.tokenizer_files import HfTokenizerFiles


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny.save_tokenizer(tmp_path)
    return tmp_path


def _change(path: Path, **values: Any) -> None:
    raw = json.loads(path.read_text()) if path.is_file() else {}
    raw.update(values)
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def test_tokenizer_json_is_passed_on_as_it_is(directory: Path) -> None:
    assert HfTokenizerFiles(directory).tokenizer_json() == (directory / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("slow", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_of_another_kind_is_refused_with_the_conversion(directory: Path, slow: str) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; download"):
        HfTokenizerFiles(directory).tokenizer_json()
    (directory / slow).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{slow} and no tokenizer\.json.*save_pretrained"):
        HfTokenizerFiles(directory).tokenizer_json()


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"model": 3}', '{"model": {"vocab": [1]}}',
                                  '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'])  # fmt: skip
def test_a_damaged_tokenizer_json_is_named(directory: Path, text: str) -> None:
    (directory / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        HfTokenizerFiles(directory).token_spec({})


def test_the_chat_template_is_found_in_each_of_its_homes(directory: Path) -> None:
    files, settings = HfTokenizerFiles(directory), directory / "tokenizer_config.json"
    _change(settings, chat_template="from settings")
    assert files.chat_template() == tiny.TEMPLATE
    (directory / "chat_template.jinja").unlink()
    assert files.chat_template() == "from settings"
    _change(settings, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert files.chat_template() == "d"
    _change(settings, chat_template=[{"name": "a", "template": "t"}, {"name": "b", "template": "d"}])
    with pytest.raises(CheckpointError, match="a, b none is called default"):
        files.chat_template()
    _change(settings, chat_template=["d"])
    with pytest.raises(CheckpointError, match=r"chat_template is \['d'\]; it must be a text, or a list of objects"):
        files.chat_template()
    _change(settings, chat_template=None)
    assert files.chat_template() is None
    _change(directory / "chat_template.json", chat_template="from json")
    assert files.chat_template() == "from json"


def test_the_chat_template_is_the_one_that_transformers_finds(directory: Path) -> None:
    assert (
        transformers.AutoTokenizer.from_pretrained(directory).chat_template
        == HfTokenizerFiles(directory).chat_template()
    )


def test_stop_ids_are_those_of_all_files_once(directory: Path) -> None:
    _change(directory / "generation_config.json", eos_token_id=[7, 8])
    assert HfTokenizerFiles(directory).token_spec({"eos_token_id": 7}).stop_ids == (7, 8, 2)
    assert HfTokenizerFiles(directory).token_spec({"eos_token_id": [9, 2]}).stop_ids == (7, 8, 9, 2)


def test_a_token_that_only_the_settings_add_is_refused_where_the_template_writes_it(directory: Path) -> None:
    added = {"316": {"content": "<turn>", "special": True}, "2": {"content": "<|im_end|>", "special": True}}
    _change(directory / "tokenizer_config.json", added_tokens_decoder=added)
    files = HfTokenizerFiles(directory)
    assert files.token_spec({}).stop_ids == (2,)  # no prompt has it
    (directory / "chat_template.jinja").write_text("<turn>{{ messages[0]['content'] }}<|im_end|>")
    assert len(transformers.AutoTokenizer.from_pretrained(directory)("<turn>").input_ids) == 1
    with pytest.raises(CheckpointError, match="adds the token '<turn>', which the chat template writes and tokenizer"):
        files.token_spec({})
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    assert files.token_spec({}).stop_ids == (2,)


def test_ids_that_the_model_does_not_have_are_none(directory: Path) -> None:
    _change(directory / "tokenizer_config.json", bos_token=None, pad_token=None)
    config = {"vocab_size": 320, "eos_token_id": None, "bos_token_id": None, "pad_token_id": -1}
    spec = HfTokenizerFiles(directory).token_spec(config)
    assert (spec.stop_ids, spec.bos_id, spec.pad_id) == ((2,), None, None)


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["x", {"a": 1}, float("nan"), -1, 320, 10**30, True, [7, -1], [[7]], 2.5])
def test_an_id_that_no_vocabulary_has_is_an_error(directory: Path, key: str, name: str, value: Any) -> None:
    config = {"vocab_size": 320, "eos_token_id": 2, "bos_token_id": 1}
    _change(directory / "tokenizer_config.json", bos_token=None)  # else its name says which it is
    if name == "config.json":
        config[key] = value
    else:
        _change(directory / name, **{key: value})
    shown = re.escape(f"{directory / name}: {key} is {value!r}; it must be a whole number from 0 to 319, a list of them")
    with pytest.raises(CheckpointError, match=shown):
        HfTokenizerFiles(directory).token_spec(config)


def test_tokens_beyond_the_embedding_are_neither_stop_tokens_nor_first_ones(directory: Path) -> None:
    """As where tokens were added and the embedding was not made larger: no step can give or take them."""
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 320, "content": "<|eot_id|>"})
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    (directory / "chat_template.jinja").write_text("<|eot_id|>")
    _change(directory / "tokenizer_config.json", bos_token="<|eot_id|>")
    spec = HfTokenizerFiles(directory).token_spec({"vocab_size": 320, "eos_token_id": 2, "bos_token_id": None})
    assert (spec.stop_ids, spec.bos_id, spec.add_bos) == ((2,), None, False)
    assert 320 in HfTokenizerFiles(directory).token_spec({"vocab_size": 384, "eos_token_id": 2}).stop_ids


def test_a_bos_id_is_not_looked_at_where_the_tokens_name_says_which_it_is(directory: Path) -> None:
    config = {"vocab_size": 320, "eos_token_id": 2, "bos_token_id": -1}
    assert HfTokenizerFiles(directory).token_spec(config).bos_id == 1


def test_ids_of_the_embeddings_padding_and_whole_floats_are_taken(directory: Path) -> None:
    size = len(tiny.make_tokenizer().get_vocab())
    config = {"vocab_size": size + 64, "eos_token_id": [size + 63, 7.0], "bos_token_id": [size]}
    _change(directory / "tokenizer_config.json", bos_token=None)
    spec = HfTokenizerFiles(directory).token_spec(config)
    assert (spec.stop_ids, spec.bos_id) == ((size + 63, 7, 2), size)
    with pytest.raises(CheckpointError, match="from 0 to 2147483647"):  # the family has the size
        HfTokenizerFiles(directory).token_spec({"eos_token_id": 10**30})


def test_an_end_of_turn_token_stops_only_if_the_template_writes_it(directory: Path) -> None:
    _change(directory / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert HfTokenizerFiles(directory).token_spec({"eos_token_id": 0}).stop_ids == (0, 2)
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert HfTokenizerFiles(directory).token_spec({"eos_token_id": 0}).stop_ids == (0,)
    (directory / "chat_template.jinja").write_text("<|eot_id|>")
    assert HfTokenizerFiles(directory).token_spec({"eos_token_id": 0}).stop_ids == (0,)


def test_special_tokens_are_texts_or_objects_in_either_file(directory: Path) -> None:
    spec = HfTokenizerFiles(directory).token_spec({})
    assert (spec.bos_token, spec.bos_id, spec.eos_token, spec.pad_id) == ("<|im_start|>", 1, "<|im_end|>", 0)
    _change(
        directory / "tokenizer_config.json", bos_token={"content": "<|endoftext|>", "lstrip": False}, eos_token=None
    )
    _change(directory / "special_tokens_map.json", eos_token={"content": "<|im_end|>"}, bos_token="<|im_end|>")
    spec = HfTokenizerFiles(directory).token_spec({})
    assert (spec.bos_token, spec.bos_id, spec.eos_token) == ("<|endoftext|>", 0, "<|im_end|>")


def test_without_a_text_the_ids_come_from_the_configuration(directory: Path) -> None:
    _change(directory / "tokenizer_config.json", bos_token=None, pad_token=None)
    spec = HfTokenizerFiles(directory).token_spec({"bos_token_id": 5, "pad_token_id": 6})
    assert (spec.bos_token, spec.bos_id, spec.pad_id) == ("", 5, 6)
    assert HfTokenizerFiles(directory).token_spec({}).bos_id is None


def test_bos_is_added_if_the_settings_or_else_the_post_processor_say_so(directory: Path) -> None:
    def adds() -> bool:
        return HfTokenizerFiles(directory).token_spec({}).add_bos

    assert not adds()
    tokenizer = tiny.make_tokenizer()
    template = tokenizers.processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    byte_level = tokenizers.processors.ByteLevel(trim_offsets=False)
    for processor in (template, tokenizers.processors.Sequence([byte_level, template])):
        tokenizer.post_processor = processor
        tokenizer.save(str(directory / "tokenizer.json"))
        _change(directory / "tokenizer_config.json", add_bos_token=None)
        assert adds()
        _change(directory / "tokenizer_config.json", add_bos_token=False)
        assert not adds()
    tiny.save_tokenizer(directory)
    _change(directory / "tokenizer_config.json", add_bos_token=True)
    assert adds()
    _change(directory / "tokenizer_config.json", bos_token=None)
    assert not adds()


def test_marks_of_reasoning_need_both_in_the_vocabulary_or_the_template(directory: Path) -> None:
    spec = HfTokenizerFiles(directory).token_spec({})
    assert (spec.think_start, spec.think_end) == ("<think>", "</think>")
    text = (directory / "tokenizer.json").read_text().replace("<think>", "<other>")
    (directory / "tokenizer.json").write_text(text)
    spec = HfTokenizerFiles(directory).token_spec({})
    assert (spec.think_start, spec.think_end) == ("", "")
    (directory / "chat_template.jinja").write_text("<think>\n\n</think>")
    assert HfTokenizerFiles(directory).token_spec({}).think_end == "</think>"
