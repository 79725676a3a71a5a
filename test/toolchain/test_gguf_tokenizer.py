"""GGUF vocabularies as tokenizer.json, compared with llama.cpp, transformers and sentencepiece."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tiny
import tokenizers
import transformers

from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.gguf_file import GgufFile
from edgellm_ros.toolchain.gguf_tokenizer import GgufTokenizer

SMOLLM2_IDS = {  # by llama.cpp (llama-cpp-python 0.3.36) on the same file
    "Turn left in 12 metres, then stop!": [24202, 2049, 281, 216, 33, 34, 13897, 28, 965, 2853, 17],
    "  two  spaces\tand\r\n\n tabs ": [216, 827, 216, 5600, 197, 397, 201, 1116, 29416, 216],
    "Tür 左に曲がって 🤖👩‍🚒 ¼": [
        68,
        18736,
        13223,
        132,
        116,
        41152,
        44392,
        127,
        7365,
        230,
        7365,
        113,
        7365,
        116,
        15107,
        114,
        240,
        10813,
        235,
        119,
        321,
        231,
        10813,
        244,
        236,
        216,
        28151,
    ],
    "<|im_start|>user\nI'll wait 2024-05-06<|im_end|>\n": [
        1,
        4093,
        198,
        57,
        3060,
        5847,
        216,
        34,
        32,
        34,
        36,
        29,
        32,
        37,
        29,
        32,
        38,
        2,
        198,
    ],
}


def _texts() -> list[str]:
    """TEXTS, special tokens in text, and random mixtures of letters, digits, spaces, signs and scripts."""
    generator = random.Random(0)
    pools = ["abc XYZ'", "0123456789 .,", "\n\t \r", "äöüßéñ", "日本語한국어", "🤖🚪", "!?#$%^&*()_+-=/", "<|>im_start"]
    mixed = [
        "".join(generator.choice(generator.choice(pools)) for _ in range(generator.randint(1, 30))) for _ in range(150)
    ]
    marked = ["<|im_start|>user\nhello<|im_end|>\n", "a<think>b </think> c", "<|im_start|><|im_start|> x", " " * 40]
    return [*tiny.TEXTS, *marked, *mixed]


# ---- GGUF, byte-level BPE


def _gguf(path: Path, pre: str = "smollm", architecture: str = "llama", **changes: Any) -> GgufTokenizer:
    tiny.save_gguf("llama", path)
    metadata = {**GgufFile(path).metadata, "tokenizer.ggml.pre": pre, "general.architecture": architecture}
    metadata.update({f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()})
    return GgufTokenizer(path, {key: value for key, value in metadata.items() if value is not None})


def _load(tokenizer: GgufTokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json())


def _assert_same(ours: tokenizers.Tokenizer, theirs: tokenizers.Tokenizer) -> None:
    for text in _texts():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text


def test_a_vocabulary_that_went_through_gguf_encodes_and_decodes_as_before(tmp_path: Path) -> None:
    _assert_same(_load(_gguf(tmp_path / "x.gguf")), tiny.make_tokenizer())


def test_the_real_smollm2_vocabulary_encodes_as_llama_cpp_does(smollm2_gguf: Path) -> None:
    tokenizer = GgufTokenizer(smollm2_gguf, GgufFile(smollm2_gguf).metadata)
    loaded = _load(tokenizer)
    for text, ids in SMOLLM2_IDS.items():
        assert loaded.encode(text).ids == ids
        assert loaded.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_spec().stop_ids == (2,)


@pytest.mark.parametrize("pre", ["llama-bpe", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "tekken"])
def test_text_is_split_as_transformers_splits_it_for_the_same_file(pre: str, tmp_path: Path) -> None:
    tiny.save_gguf("llama", tmp_path / "x.gguf")
    _set_pre(tmp_path / "x.gguf", pre)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf").backend_tokenizer
    theirs.normalizer = tokenizers.normalizers.NFC() if pre == "qwen2" else None  # as in Qwen's own tokenizer.json
    _assert_same(_load(GgufTokenizer(tmp_path / "x.gguf", GgufFile(tmp_path / "x.gguf").metadata)), theirs)


def test_qwens_vocabulary_encodes_as_transformers_own_qwen_class(tmp_path: Path) -> None:
    raw = json.loads(tiny.make_tokenizer().to_str())
    merges = [tuple(pair) for pair in raw["model"]["merges"]]
    theirs = transformers.Qwen2Tokenizer(vocab=raw["model"]["vocab"], merges=merges, unk_token=None)
    ours = _load(_gguf(tmp_path / "x.gguf", "qwen2"))
    for text in tiny.TEXTS:
        assert ours.encode(text).ids == theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids, text


def test_llama3s_whole_words_are_taken_before_merging(tmp_path: Path) -> None:
    tokens = list(_gguf(tmp_path / "x.gguf")._tokens)
    tokens[-1] = "zzqzz"
    types = [1] * len(tokens)
    assert _load(_gguf(tmp_path / "x.gguf", "llama-bpe", ggml__tokens=tokens, ggml__token_type=types)).encode(
        "zzqzz"
    ).ids[-1:] == [len(tokens) - 1]
    assert (
        len(_load(_gguf(tmp_path / "x.gguf", "qwen2", ggml__tokens=tokens, ggml__token_type=types)).encode("zzqzz")) > 1
    )


@pytest.mark.parametrize("pre", ["default", "deepseek-coder", None])
def test_an_unknown_split_is_refused_beside_the_known(pre: str | None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"pre is '{pre or 'default'}'; known are gpt-2, smollm, llama-bpe"):
        _gguf(tmp_path / "x.gguf", pre or "", **({} if pre else {"ggml__pre": None})).tokenizer_json()


def test_an_old_qwen_file_without_pre_is_split_as_qwen(tmp_path: Path) -> None:
    old = _load(_gguf(tmp_path / "x.gguf", architecture="qwen2", ggml__pre=None))
    _assert_same(old, _load(_gguf(tmp_path / "y.gguf", "qwen2")))


def test_unused_rows_of_the_vocabulary_have_no_token(tmp_path: Path) -> None:
    loaded = _load(_gguf(tmp_path / "x.gguf"))
    assert loaded.id_to_token(tiny.VOCAB_SIZE - 1) is None
    assert loaded.get_vocab_size() == tiny.make_tokenizer().get_vocab_size()


@pytest.mark.parametrize(("pre", "flag", "adds"), [("smollm", None, False), ("llama-bpe", None, True),
                                                   ("llama-bpe", False, False), ("smollm", True, True),
                                                   ("smaug-bpe", None, False)])  # fmt: skip
def test_bos_is_added_by_flag_or_else_by_the_kind_of_vocabulary(
    pre: str, flag: bool | None, adds: bool, tmp_path: Path
) -> None:
    tokenizer = _gguf(tmp_path / "x.gguf", pre, ggml__add_bos_token=flag)
    assert tokenizer.token_spec().add_bos == adds
    assert _load(tokenizer).encode("a", add_special_tokens=True).ids[:1] == (
        [1] if adds else _load(tokenizer).encode("a").ids
    )
    assert 1 not in _load(tokenizer).encode("a", add_special_tokens=False).ids


def test_stop_ids_are_eos_eot_and_the_templates_end_of_turn(tmp_path: Path) -> None:
    spec = _gguf(tmp_path / "x.gguf", ggml__eos_token_id=0, ggml__eot_token_id=9).token_spec()
    assert spec.stop_ids == (0, 9, 2)
    assert (spec.eos_token, spec.bos_token, spec.pad_id) == ("<|endoftext|>", "<|im_start|>", 0)
    assert (spec.think_start, spec.think_end) == ("<think>", "</think>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__model": "bert"}, "model is 'bert'; known are gpt2 and llama"),
        ({"ggml__tokens": None}, "vocabulary is missing"),
        ({"ggml__token_type": [1, 2]}, "320 tokens and 2 token types"),
        ({"ggml__merges": None}, "no tokenizer.ggml.merges"),
        ({"ggml__eos_token_id": 5000}, "eos_token_id is 5000; the vocabulary has 320"),
        ({"ggml__eos_token_id": "x"}, "eos_token_id is 'x'; the vocabulary has 320 tokens, so it must be 0 to 319"),
        ({"ggml__model": "llama"}, "without a score"),
    ],
)
def test_an_unusable_vocabulary_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer = _gguf(tmp_path / "x.gguf", **changes)
        tokenizer.tokenizer_json()
        tokenizer.token_spec()


# ---- GGUF, SentencePiece


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_become_merges_that_encode_as_sentencepiece_does(prefix: bool, tmp_path: Path) -> None:
    theirs = _train_sentencepiece(prefix)
    ours = _load(_sentencepiece_gguf(theirs, prefix, tmp_path / "x.gguf"))
    for text in [text for text in _texts() if "<" not in text]:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text


def test_special_tokens_of_a_sentencepiece_vocabulary_are_parsed(tmp_path: Path) -> None:
    tokenizer = _sentencepiece_gguf(_train_sentencepiece(True), True, tmp_path / "x.gguf")
    ours, spec = _load(tokenizer), tokenizer.token_spec()
    assert spec.add_bos
    assert (spec.bos_token, spec.eos_token, spec.stop_ids) == ("<s>", "</s>", (2,))
    ids = ours.encode("go</s>").ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert ours.decode(ids) == "go"


def _train_sentencepiece(prefix: bool) -> Any:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in tiny.TEXTS if text.strip()] * 3), model_writer=model, vocab_size=400,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=prefix, character_coverage=0.98, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _sentencepiece_gguf(model: Any, prefix: bool, path: Path) -> GgufTokenizer:
    def kind(index: int) -> gguf.TokenType:
        for question, answer in (
            (model.is_unknown, gguf.TokenType.UNKNOWN),
            (model.is_control, gguf.TokenType.CONTROL),
            (model.is_byte, gguf.TokenType.BYTE),
        ):
            if question(index):
                return answer
        return gguf.TokenType.NORMAL

    size = model.get_piece_size()
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in range(size)],
        "tokenizer.ggml.scores": [model.get_score(index) for index in range(size)],
        "tokenizer.ggml.token_type": [int(kind(index)) for index in range(size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return GgufTokenizer(path, metadata)


def _set_pre(path: Path, pre: str) -> None:
    """Rewrite the file with another tokenizer.ggml.pre."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kinds = [kind for kind in field.types if kind != gguf.GGUFValueType.ARRAY]
        value = pre if key == "tokenizer.ggml.pre" else field.contents()
        writer.add_key_value(key, value, field.types[0], kinds[0] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)
