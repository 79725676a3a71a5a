"""Which tokens `edgellm reduce-vocab` keeps: what must stay always does, and a corpus is covered as asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from doubles import sentencepiece_tokenizer_json
from tiny import TEMPLATE, TEXTS, VOCAB_SIZE, make_tokenizer

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import ChatMessage, Request, SamplingParams
from edgellm_ros.errors import CheckpointError, ToolchainError
from edgellm_ros.llm import LLM
from edgellm_ros.manifest import TokenSpec
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.corpus import count_tokens
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.reduce_vocab import choose_tokens, reduce_vocab
from edgellm_ros.toolchain.required_tokens import required_tokens

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ("README.md", "CONTRIBUTING.md", "docs/design.md", "docs/bench.md")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    (root / "deep").mkdir()
    for i, name in enumerate(CORPUS):
        (root / ("deep" if i % 2 else ".") / Path(name).name).write_bytes((ROOT / name).read_bytes())
    (root / "image.bin").write_bytes(b"\x89PNG\xff\xfe\0\0")
    (root / ".hidden").write_text("zebra " * 1000)
    return root


@pytest.fixture(scope="module")
def real_counts(smollm2_gguf: Path) -> Counter[int]:
    """Each file encoded in one piece."""
    tokenizer = tokenizers.Tokenizer.from_str(open_checkpoint(smollm2_gguf).tokenizer_json())
    counts: Counter[int] = Counter()
    for name in CORPUS:
        counts.update(tokenizer.encode((ROOT / name).read_text(encoding="utf-8"), add_special_tokens=False).ids)
    return counts


@pytest.mark.parametrize("coverage", [0.5, 0.97, 1.0])
def test_a_share_of_the_corpus_is_covered_with_as_few_tokens_as_possible(
    coverage: float, corpus: Path, real_counts: Counter[int], smollm2_gguf: Path
) -> None:
    found = reduce_vocab(smollm2_gguf, corpus, coverage=coverage)
    kept = set(found.vocab.token_ids.tolist())
    total = sum(real_counts.values())
    assert found.corpus is not None and found.corpus.num_files == len(CORPUS) and found.corpus.num_tokens == total
    assert [p.name for p in found.corpus.skipped] == ["image.bin"]
    share = sum(count for token, count in real_counts.items() if token in kept) / total
    assert found.covered == pytest.approx(share, abs=1e-12) and share >= coverage
    assert len(kept) % 64 == 0
    source = open_checkpoint(smollm2_gguf)
    reasons = required_tokens(source.tokenizer_json(), source.token_spec(), source.chat_template(), 49152)
    stays = set().union(*reasons.values())
    assert stays <= kept and found.num_required == len(stays)
    # One block of 64 fewer, filled with the most frequent ones, would not reach it, unless everything must stay.
    rest = sorted((n for token, n in real_counts.items() if token not in stays), reverse=True)
    fewer = sum(real_counts[token] for token in stays) + sum(rest[: max(len(kept) - 64 - len(stays), 0)])
    assert fewer / total < coverage or len(kept) - 64 < len(stays)
    lost = sorted((n for token, n in real_counts.items() if token not in kept), reverse=True)
    assert [n for _, n in found.dropped] == lost[:12]


def test_counts_do_not_depend_on_how_a_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join((*TEXTS, "")) * 40
    (tmp_path / "text").write_text(text, encoding="utf-8", newline="")
    tokenizer = make_tokenizer()
    lines = [part for part in text.splitlines(keepends=True) if part]
    monkeypatch.setattr("edgellm_ros.toolchain.corpus._BLOCK", 1)
    found = count_tokens(tmp_path / "text", tokenizer.to_str(), VOCAB_SIZE)
    assert found.num_bytes == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(lines[0]).ids) == lines[0]
    bytes_of = sum(int(n) * len(tokenizer.decode([i], skip_special_tokens=False)) for i, n in enumerate(found.counts))
    assert bytes_of >= len(text) - text.count("\n")


def test_a_size_is_rounded_up_to_64_and_filled_by_frequency_then_id() -> None:
    counts = np.zeros(1000, np.int64)
    counts[[900, 800, 700]] = [5, 9, 5]
    named = np.ones(1000, np.bool_)
    named[[0, 2]] = False
    chosen = choose_tokens(counts, named, {3, 999}, size=65, coverage=None)
    assert len(chosen) == 128
    assert set(chosen) == {3, 999, 900, 800, 700} | set([i for i in range(1000) if i not in (0, 2, 3)][: 128 - 5])
    few = choose_tokens(counts, named, set(range(100, 162)), size=64, coverage=None)
    assert set(few) == set(range(100, 162)) | {800, 700}, "of equally frequent ones the lower id"
    with pytest.raises(ToolchainError, match="size is 3, but 70 tokens stay in any case; choose at least 128"):
        choose_tokens(counts, named, set(range(70)), size=3, coverage=None)


def test_every_text_can_be_spelt_and_a_chat_can_end(tiny_checkpoint: Callable[[str], Path]) -> None:
    tokenizer = make_tokenizer()
    spec = TokenSpec(stop_ids=(2,), bos_id=1, pad_id=0, think_start="<think>", think_end="</think>")
    found = required_tokens(tokenizer.to_str(), spec, TEMPLATE, VOCAB_SIZE)
    stays = set().union(*found.values())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert {tokenizer.token_to_id(char) for char in alphabet} <= stays and len(alphabet) == 256
    assert {0, 1, 2, tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")} <= stays
    for text in ("<|im_start|>", "<|im_end|>\n", "<|im_start|>assistant\n", "0123456789", '{"name": "'):
        assert set(tokenizer.encode(text).ids) <= stays, text
    numbers = {i for token, i in tokenizer.get_vocab().items() if token.removeprefix("Ġ").isdecimal()}
    assert {i for i in numbers if i not in stays} == set()
    assert any(len(tokenizer.id_to_token(i)) > 1 for i in numbers), "numbers of several digits were among them"
    assert len(stays) < VOCAB_SIZE - 20


def test_byte_fallback_of_sentencepiece_stays() -> None:
    text = sentencepiece_tokenizer_json()
    vocab = json.loads(text)["model"]["vocab"]
    found = required_tokens(text, TokenSpec(stop_ids=(2,)), None, len(vocab))
    stays = set().union(*found.values())
    assert {vocab[f"<0x{byte:02X}>"] for byte in range(256)} <= stays
    assert {vocab["\u2581"], vocab["a"], vocab["w"]} <= stays
    assert vocab["lo"] not in stays and vocab["\u00e9"] not in stays


def test_without_bytes_every_single_character_stays_and_without_those_nothing_can_be_cut() -> None:
    vocab = {"[UNK]": 0, "é": 1, "##é": 2, "木": 3, "word": 4, "##ing": 5}
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    found = required_tokens(inner.to_str(), TokenSpec(), None, 6)
    assert found["bytes and single characters"] == {1, 2, 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    with pytest.raises(CheckpointError, match="neither bytes nor single characters"):
        required_tokens(words.to_str(), TokenSpec(), None, 2)


def test_the_literal_texts_of_a_template_stay_whatever_tags_it_has() -> None:
    tokenizer = make_tokenizer()
    template = "{% generation %}The arm{% endgeneration %}{{ x + 'the robot\\'s\\n' }}{# the table #}"
    found = required_tokens(tokenizer.to_str(), TokenSpec(), template, VOCAB_SIZE)["chat template"]
    assert set(tokenizer.encode("The arm").ids) | set(tokenizer.encode("the robot's\n").ids) <= found
    assert not set(tokenizer.encode(" table").ids) <= found
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        required_tokens(tokenizer.to_str(), TokenSpec(), "{{ 'open", VOCAB_SIZE)


def test_a_token_list_stays_whole(smollm2_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("40000\nĠrobot\n\n48999\r\n", encoding="utf-8")
    found = reduce_vocab(smollm2_gguf, tokens=tmp_path / "mine.txt")
    tokenizer = tokenizers.Tokenizer.from_str(open_checkpoint(smollm2_gguf).tokenizer_json())
    kept = set(found.vocab.token_ids.tolist())
    assert {40000, tokenizer.token_to_id("Ġrobot"), 48999} <= kept
    assert len(kept) == -(-(found.num_required + 3) // 64) * 64 and found.corpus is None
    (tmp_path / "mine.txt").write_text("Ġrobot\nno such token\n", encoding="utf-8")
    with pytest.raises(ToolchainError, match="mine.txt:2 is 'no such token', which is neither"):
        reduce_vocab(smollm2_gguf, tokens=tmp_path / "mine.txt")
    (tmp_path / "mine.txt").write_text("49152", encoding="utf-8")
    with pytest.raises(ToolchainError, match="has token id 49152; the model's are 0 to 49151"):
        reduce_vocab(smollm2_gguf, tokens=tmp_path / "mine.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a corpus, a token list or both"),
        ({"corpus": "."}, "exactly one of --size N and --coverage"),
        ({"corpus": ".", "size": 5, "coverage": 0.5}, "exactly one of"),
        ({"corpus": ".", "coverage": 1.1}, "coverage is 1.1; it is a share"),
        ({"corpus": ".", "size": 321}, "size is 321; .* has 1 to 320 tokens"),
        ({"corpus": ".", "size": 64}, "size is 64, but .* tokens stay in any case"),
        ({"corpus": "nowhere", "size": 320}, "nowhere does not exist"),
        ({"corpus": "latin.txt", "size": 320}, "latin.txt is not UTF-8 text"),
        ({"corpus": "empty", "size": 320}, "empty holds no text"),
        ({"tokens": "gone.txt"}, "token list .*gone.txt cannot be read"),
        ({"tokens": "blank.txt"}, "token list .*blank.txt is empty"),
        ({"tokens": "all.txt"}, "all 320 tokens of .* would stay"),
        ({"tokens": "other.json"}, "other.json is a map for another tokenizer.json or vocabulary size"),
        ({"tokens": "all.txt", "coverage": 0.5}, "--coverage needs --corpus"),
    ],
)
def test_impossible_wishes_are_refused_by_value(
    options: dict, message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes("Tür".encode("latin-1"))
    (tmp_path / "all.txt").write_text("\n".join(map(str, range(VOCAB_SIZE))))
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "other.json").write_text('{"token_ids": [7], "vocab_size": 320, "tokenizer_sha256": "of another"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "some.txt").write_text("some")
    paths = {key: tmp_path / value for key, value in options.items() if isinstance(value, str)}
    with pytest.raises(ToolchainError, match=message):
        reduce_vocab(tiny_checkpoint("llama"), **{**options, **paths})


def test_the_real_model_chats_with_a_third_of_its_head(
    corpus: Path,
    smollm2: Callable[[str], Bundle],
    smollm2_gguf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    map_path = tmp_path / "map.safetensors"
    command = ["reduce-vocab", str(smollm2_gguf), "--corpus", str(corpus), "--size", "16300", "-o", str(map_path)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "16320 of 49152 tokens" in shown and "the tied head gets rows of its own" in shown
    assert main(command) == 2 and "--force" in capsys.readouterr().err
    cut = export_bundle(smollm2_gguf, tmp_path / "cut", weights="int4", max_context=2048, vocab_map=map_path)
    whole = smollm2("int4")
    ids = safetensors.numpy.load_file(map_path)["vocab_map"]
    table, head = whole.weights(), cut.weights()
    assert np.array_equal(head["head.weight"], table["embed.weight"][ids])
    assert np.array_equal(head["head.scale"], table["embed.scale"][ids])
    masked = {int(i): -1000.0 for i in np.setdiff1d(np.arange(49152), ids)}
    answers = []
    for bundle, bias in ((whole, masked), (cut, {})):
        with LLM.open(bundle, EngineConfig(executor="onnxruntime", max_slots=1, max_context=256)) as llm:
            sampling = SamplingParams(max_tokens=32, temperature=0.0, logit_bias=bias)
            messages = (ChatMessage("user", "What is the capital of France?"),)
            answers.append(llm.complete(Request(messages=messages, sampling=sampling)))
    assert answers[1].text == answers[0].text and answers[1].token_ids == answers[0].token_ids
    assert "France" in answers[1].text and len(answers[1].token_ids) > 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("map.json", "{path} is a directory; name a file in it"),
        ("file/map.json", "{path} cannot be written ({path.parent} is not a directory); name another file"),
    ],
)
def test_an_output_that_cannot_be_a_file_is_refused_before_the_corpus_is_read(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "map.json").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / name
    read: list[object] = []
    monkeypatch.setattr("edgellm_ros.toolchain.reduce_vocab.reduce_vocab", lambda *args: read.append(args))
    assert main(["reduce-vocab", "checkpoint", "--tokens", "t", "-o", str(path), "--force"]) == 2
    assert capsys.readouterr().err == f"error: {message.format(path=path)}\n" and not read
