"""Random checkpoints of every family, small enough to make in a test: safetensors directories and the same as GGUF.

All parameters are random, norms and biases too, so that a forgotten or exchanged one changes the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

try:
    import gguf
except ModuleNotFoundError:  # the tests of the GPU need no GGUF files
    gguf = None

VOCAB_SIZE = 320
MAX_CONTEXT = 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<think>", "</think>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = (
    "The arm lifts the red cube and puts it on the green table.",
    "Battery at 37 %, 12.5 metres to the dock; turning left in 3 2 1.",
    "Ich fahre zur Tür, là-bas à droite, 左に曲がって 停止。 🤖🚪👩‍🚒",
    "def stop(self):\n    if self.speed > 0:\n\t\tself.brake(force=1e-3)\r\n\n\n",
    "  two  spaces   and    tabs\t\tand the robot's don't WE'LL i'm\u00a0x\u3000y ",
    "e\u0301 cafe\u0301 \u1100\u1161 ¼ ② ٣٤ १२",
    "",
    " ",
    "\n",
)

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.01, 1.02, 1.1, 1.2, 1.3, 1.5, 2.0],
             "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0], "original_max_position_embeddings": 160}  # fmt: skip
_GEMMA3 = {"full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
           "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "llama_tied": lambda: transformers.LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "llama_bias": lambda: transformers.LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True),
    "llama_llama3": lambda: transformers.LlamaConfig(**_COMMON, rope_parameters=_LLAMA3),
    "llama_linear": lambda: transformers.LlamaConfig(**_COMMON, rope_parameters=_LINEAR),
    "llama_yarn": lambda: transformers.LlamaConfig(**_COMMON, rope_parameters=_YARN),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, sliding_window=16, head_dim=48),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen2_window": lambda: transformers.Qwen2Config(
        **_COMMON, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=32),
    "smollm3": lambda: transformers.SmolLM3Config(**{**_COMMON, "num_hidden_layers": 4}),
    "smollm3_window": lambda: transformers.SmolLM3Config(
        **_COMMON, no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=16, tie_word_embeddings=False
    ),
    "phi3": lambda: transformers.Phi3Config(**_COMMON, sliding_window=16),
    "phi3_longrope": lambda: transformers.Phi3Config(
        **_COMMON, rope_parameters=_LONGROPE, original_max_position_embeddings=160
    ),
    "phi3_partial": lambda: transformers.Phi3Config(
        **{**_COMMON, "hidden_size": 128}, tie_word_embeddings=True, original_max_position_embeddings=160,
        rope_parameters={**_LONGROPE, "partial_rotary_factor": 0.5},
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**_COMMON, "num_hidden_layers": 7}, head_dim=32, sliding_window=16, query_pre_attn_scalar=24
    ),
    "gemma3_scaled": lambda: transformers.Gemma3TextConfig(
        **_COMMON, head_dim=32, sliding_window=16, rope_parameters=_GEMMA3, final_logit_softcapping=5.0,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
}
FAMILIES = tuple(CONFIGS)
# GGUF says nothing about which layers of a Qwen2 or SmolLM3 have a window; Phi-3 and Gemma 3 are not read from it.
GGUF_KINDS = tuple(kind for kind in FAMILIES if not kind.startswith(("phi3", "gemma3")) and "_window" not in kind)


def make_model(kind: str, seed: int = 0) -> Any:
    """A transformers model (fp32, eager attention) of one of FAMILIES, every parameter random."""
    config = CONFIGS[kind]()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.12 * noise)
    return model


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE of 315 tokens: special ones first, then bytes and what TEXTS merge to, then user-defined ones."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level  # so that numbers merge, which only the split below prevents
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 5 - len(USER_DEFINED),
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, *TEXTS, *["x12 y2024"] * 9], trainer)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in USER_DEFINED])
    return tokenizer


def save_tokenizer(path: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    make_tokenizer().save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "add_bos_token": False,
        "model_max_length": MAX_CONTEXT,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def save_checkpoint(kind: str, path: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "50GB") -> Any:
    """Write a Hugging Face directory and return the model; small `shard_size`s such as "50KB" make several files."""
    model = make_model(kind).to(dtype)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size=shard_size)
    save_tokenizer(path)
    return model


def save_gguf(
    kind: str,
    path: Path,
    quantisation: str = "F32",
    pack: Callable[[str, np.ndarray], tuple[str, np.ndarray]] | None = None,
) -> Any:
    """Write the same model as a GGUF file and return it; `quantisation` is of the matrices (F16, BF16, Q8_0, Q4_0, …).

    pack(name, matrix) instead says each matrix's type and its bytes, for types that the gguf package cannot make.

    Names come from the gguf package's own table, rope factors from transformers' formulas.
    """
    model = make_model(kind)
    config = model.config
    family = config.model_type
    arch = "llama" if family == "mistral" else family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"tiny {kind}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family in ("llama", "mistral"):
        writer.add_rope_dimension_count(head_dim)
    if head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family == "mistral":
        writer.add_sliding_window(config.sliding_window)
    _add_rope(writer, config, head_dim)
    _add_tokenizer(writer)
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if arch in ("llama", "smollm3") and "self_attn.q_proj" in name:
            array = _interleave(array, config.num_attention_heads)
        if arch in ("llama", "smollm3") and "self_attn.k_proj" in name:
            array = _interleave(array, config.num_key_value_heads)
        gguf_name = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        kind_of_data = gguf.GGMLQuantizationType[quantisation if array.ndim == 2 else "F32"]
        if pack is not None and array.ndim == 2:
            type_name, data = pack(name, array)
            kind_of_data = gguf.GGMLQuantizationType[type_name]
        else:
            data = gguf.quants.quantize(array, kind_of_data)
        writer.add_tensor(gguf_name, data, raw_dtype=kind_of_data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the two halves of a head take turns."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _add_rope(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    raw = json.loads(make_tokenizer().to_str())
    added = {token["id"]: token for token in raw["added_tokens"]}
    by_id = {index: token for token, index in raw["model"]["vocab"].items()}
    by_id |= {index: token["content"] for index, token in added.items()}
    types = []
    for index in range(VOCAB_SIZE):
        if index in added:
            types.append(gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(VOCAB_SIZE)])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in raw["model"]["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
