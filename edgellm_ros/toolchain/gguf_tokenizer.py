"""How a GGUF file's vocabulary becomes a tokenizer.json: two models, and the text splits that `pre` names.

The patterns are those that the vocabularies were trained with; llama.cpp's llama-vocab.cpp gives them the same names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import TokenSpec
from edgellm_ros.toolchain.tokenizer_files import end_of_turn_ids, think_marks, unique

_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6
_SPACE = "▁"  # SentencePiece writes a space so

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _TAIL
_QWEN2 = _WORDS + r"|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN_WORDS = f"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*"
_TEKKEN = _TEKKEN_WORDS + r"|\p{N}" + _TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(own_split: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": own_split}


_GPT2_SPLITS = [_byte_level(True)]
_SMOLLM_SPLITS = [{"type": "Digits", "individual_digits": True}, _byte_level(True)]
_LLAMA3_SPLITS = [_split(_LLAMA3), _byte_level(False)]
_QWEN2_SPLITS = [_split(_QWEN2), _byte_level(False)]
_TEKKEN_SPLITS = [_split(_TEKKEN), _byte_level(False)]
_PRE_TOKENIZERS = {  # tokenizer.ggml.pre: how text is split before merging
    "gpt-2": _GPT2_SPLITS,
    "smollm": _SMOLLM_SPLITS,
    "llama-bpe": _LLAMA3_SPLITS,
    "llama3": _LLAMA3_SPLITS,
    "llama-v3": _LLAMA3_SPLITS,
    "smaug-bpe": _LLAMA3_SPLITS,  # what SmolLM3's files have: Llama 3's vocabulary, without BOS
    "qwen2": _QWEN2_SPLITS,
    "deepseek-r1-qwen": _QWEN2_SPLITS,
    "tekken": _TEKKEN_SPLITS,
}
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "tekken")
_WHOLE_FIRST = (*_BOS_BY_DEFAULT, "smaug-bpe")  # a word in the vocabulary is taken without merging


class GgufTokenizer:
    """The tokenizer's side of a GGUF file's metadata."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Check what there is; raises CheckpointError for a vocabulary of an unknown kind."""
        self.path = path
        self._architecture = metadata.get("general.architecture")
        self._meta = {k.removeprefix("tokenizer."): v for k, v in metadata.items() if k.startswith("tokenizer.")}
        self._model = self._meta.get("ggml.model")
        if self._model not in ("gpt2", "llama"):
            raise CheckpointError(f"{path}: tokenizer.ggml.model is {self._model!r}; known are gpt2 and llama")
        self._tokens: list[str] = self._meta.get("ggml.tokens") or []
        if not self._tokens:
            raise CheckpointError(f"{path} has no tokenizer.ggml.tokens; its vocabulary is missing")
        self._types: list[int] = self._meta.get("ggml.token_type") or [1] * len(self._tokens)
        if len(self._types) != len(self._tokens):
            raise CheckpointError(f"{path}: {len(self._tokens)} tokens and {len(self._types)} token types")
        self._vocab = {token: i for i, token in enumerate(self._tokens) if self._types[i] != _UNUSED}

    def tokenizer_json(self) -> str:
        """The text of a tokenizer.json with the same vocabulary."""
        parts = self._byte_pairs() if self._model == "gpt2" else self._sentence_pieces()
        return json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": self._added_tokens(),
                **parts,
                "post_processor": self._post_processor(),
            },
            ensure_ascii=False,
        )

    def chat_template(self) -> str | None:
        """tokenizer.chat_template."""
        template = self._meta.get("chat_template")
        return template if isinstance(template, str) else None

    def token_spec(self) -> TokenSpec:
        """Special tokens; stop ids are eos, eot and eom, then the template's end-of-turn tokens."""
        template = self.chat_template() or ""
        bos_id, eos_id = self._token_id("bos"), self._token_id("eos")
        stops = [self._token_id(key) for key in ("eos", "eot", "eom")]
        think_start, think_end = think_marks(self._vocab, template)
        return TokenSpec(
            stop_ids=unique([*(i for i in stops if i is not None), *end_of_turn_ids(self._vocab, template)]),
            bos_id=bos_id,
            pad_id=self._token_id("padding"),
            add_bos=self._adds_bos(),
            bos_token="" if bos_id is None else self._tokens[bos_id],
            eos_token="" if eos_id is None else self._tokens[eos_id],
            think_start=think_start,
            think_end=think_end,
        )

    def _byte_pairs(self) -> dict[str, Any]:
        pre = self._pre()
        if "ggml.merges" not in self._meta:
            raise CheckpointError(f"{self.path} has a gpt2 vocabulary and no tokenizer.ggml.merges")
        merges = [merge.split(" ") for merge in self._meta["ggml.merges"]]
        return {
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": self._bpe(merges, ignore_merges=pre in _WHOLE_FIRST),
        }

    def _sentence_pieces(self) -> dict[str, Any]:
        prefix = bool(self._meta.get("ggml.add_space_prefix", True))
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}, spaces] if prefix else [spaces]
        back: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": back},
            "model": self._bpe(
                self._merges_from_scores(), byte_fallback=True, fuse_unk=True, unk_token=self._unknown()
            ),
        }

    def _bpe(self, merges: list[list[str]], **options: Any) -> dict[str, Any]:
        plain = {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
        }
        return {"type": "BPE", **plain, **options, "vocab": self._vocab, "merges": merges}

    def _merges_from_scores(self) -> list[list[str]]:
        """Every way to make a piece of two others, best pieces first: SentencePiece's BPE merges by score."""
        scores = self._meta.get("ggml.scores")
        if not scores or len(scores) != len(self._tokens):
            raise CheckpointError(f"{self.path} has a llama vocabulary without a score for each token")
        pieces = {t: i for t, i in self._vocab.items() if self._types[i] not in (_CONTROL, _BYTE)}
        found: list[tuple[float, int, int, int, str, str]] = []
        for piece, index in pieces.items():
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [(pieces[a], pieces[b], a, b) for a, b in halves if a in pieces and b in pieces]
            found.extend((-scores[index], index, *pair) for pair in sorted(known))
        found.sort(key=lambda item: item[:2])
        return [[left, right] for _, _, _, _, left, right in found]

    def _added_tokens(self) -> list[dict[str, Any]]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        unknown = self._unknown() if self._model == "llama" else None
        return [
            {"id": index, "content": token, **flags, "special": self._types[index] != _USER_DEFINED}
            for token, index in self._vocab.items()
            if self._types[index] in (_CONTROL, _USER_DEFINED) or token == unknown
        ]

    def _post_processor(self) -> dict[str, Any] | None:
        bos_id = self._token_id("bos")
        if bos_id is None or not self._adds_bos():
            return _byte_level(True) if self._model == "gpt2" else None
        bos = self._tokens[bos_id]
        first, second = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
        marks = [{"SpecialToken": {"id": bos, "type_id": kind}} for kind in range(2)]
        return {
            "type": "TemplateProcessing",
            "single": [marks[0], first],
            "pair": [marks[0], first, marks[1], second],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        }

    def _adds_bos(self) -> bool:
        by_default = self._model == "llama" or self._meta.get("ggml.pre") in _BOS_BY_DEFAULT
        return bool(self._meta.get("ggml.add_bos_token", by_default)) and self._token_id("bos") is not None

    def _pre(self) -> str:
        pre = self._meta.get("ggml.pre", "default")
        if pre == "default" and str(self._architecture).startswith("qwen"):
            return "qwen2"  # files from before `pre` was written; one vocabulary for all models of that name
        if pre not in _PRE_TOKENIZERS:
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.pre is {pre!r}; known are {', '.join(_PRE_TOKENIZERS)}: convert the "
                "model again with a newer converter, or export from the Hugging Face directory"
            )
        return str(pre)

    def _unknown(self) -> str | None:
        index = self._token_id("unknown")
        index = 0 if index is None else index
        return self._tokens[index]

    def _token_id(self, key: str) -> int | None:
        index = self._meta.get(f"ggml.{key}_token_id")
        if index is None:
            return None
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self._tokens):
            size = len(self._tokens)
            raise CheckpointError(f"{self.path}: {key}_token_id is {index!r:.80}; the vocabulary has {size} tokens, "
                                  f"so it must be 0 to {size - 1}: convert the model again")  # fmt: skip
        return index
