"""DeepSeek-R1's distills are Qwen2 and Llama models with a tokenizer, a template and special tokens of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
import transformers
from test_export import PROMPT, hf_greedy, hf_logits, run_executor

from edgellm_ros.config import EngineConfig
from edgellm_ros.core import ChatMessage, Request, SamplingParams
from edgellm_ros.llm import LLM
from edgellm_ros.toolchain.export import export_bundle

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# As the distills' templates: BOS is written by the template, earlier reasoning is cut, and an answer starts as reasoning.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
MESSAGES = [("user", "Turn left."), ("assistant", "<think>\nWhich way?\n</think>\n\nLeft it is."), ("user", "And now?")]


def _added(text: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": text, "lstrip": False, "normalized": True, "rstrip": False,
            "single_word": False}  # fmt: skip


def _tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [BOS, EOS, "<｜User｜>", "<｜Assistant｜>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=tiny.VOCAB_SIZE - 6, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(tiny.TEXTS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return tokenizer


def _save(kind: str, path: Path) -> Any:
    """A checkpoint with the files that the distills have: keys as in theirs, sizes tiny."""
    model = tiny.make_model(kind)
    model.save_pretrained(path)
    tokenizer = _tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"add_bos_token": True, "add_eos_token": False, "bos_token": _added(BOS), "eos_token": _added(EOS),
                "pad_token": _added(EOS), "unk_token": None, "clean_up_tokenization_spaces": False,
                "legacy": True, "model_max_length": 16384, "tokenizer_class": "LlamaTokenizerFast",
                "chat_template": TEMPLATE}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ids = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)}
    (path / "generation_config.json").write_text(json.dumps({**ids, "do_sample": True, "temperature": 0.6}))
    config = json.loads((path / "config.json").read_text())
    config |= {**ids, "use_mrope": False, "max_window_layers": 21}
    (path / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(("kind", "family"), [("qwen2_window", "qwen2"), ("llama_llama3", "llama")])
def test_a_distill_is_exported_as_its_base_with_its_own_special_tokens(kind: str, family: str, tmp_path: Path) -> None:
    model = _save(kind, tmp_path / "distill")
    bundle = export_bundle(tmp_path / "distill", tmp_path / "bundle", weights="fp32")
    tokens = bundle.manifest.tokens
    assert bundle.manifest.model.family == family
    assert (tokens.bos_token, tokens.eos_token) == (BOS, EOS) and tokens.add_bos
    assert tokens.stop_ids == (_tokenizer().token_to_id(EOS),)
    assert (tokens.think_start, tokens.think_end) == ("<think>", "</think>")
    logits, greedy = run_executor(bundle, PROMPT, 32)
    assert np.abs(logits - hf_logits(model, PROMPT)).max() < 3e-4
    assert greedy == hf_greedy(model, PROMPT, 32)


def test_a_distills_prompt_is_transformers_and_its_answer_begins_as_reasoning(tmp_path: Path) -> None:
    _save("qwen2", tmp_path / "distill")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "distill" / "tokenizer.json"), bos_token=BOS, eos_token=EOS
    )
    messages = [{"role": role, "content": text} for role, text in MESSAGES]
    expected = theirs.apply_chat_template(
        messages, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    export_bundle(tmp_path / "distill", tmp_path / "bundle", weights="fp32")
    ours = tuple(ChatMessage(role, text) for role, text in MESSAGES)
    request = Request(messages=ours, sampling=SamplingParams(temperature=0.0, max_tokens=8))
    with LLM.open(tmp_path / "bundle", EngineConfig(max_slots=1, max_context=128)) as llm:
        prompt = llm.render(request)
        ids = llm.tokenize(prompt)
        answer = llm.complete(request)
        raw = llm.tokenize("hello", add_special=True)
    assert "Which way" not in prompt and prompt.endswith("<｜Assistant｜><think>\n")
    assert ids == expected and ids.count(ids[0]) == 1, "one BOS, the template's"
    assert raw[0] == ids[0], "a raw prompt gets it, too"
    assert answer.reasoning and not answer.text, "no </think> came: all of it is reasoning"
