"""How a GGUF file becomes a Hugging Face checkpoint: its metadata's keys, its tensors' names and their row order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import TokenSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint
from edgellm_ros.toolchain.config_values import positive_int
from edgellm_ros.toolchain.families import FAMILIES
from edgellm_ros.toolchain.families.left_out import why_left_out
from edgellm_ros.toolchain.gguf_file import GgufFile
from edgellm_ros.toolchain.gguf_tokenizer import GgufTokenizer
from edgellm_ros.toolchain.quantized.gguf_blocks import KEPT, unpack
from edgellm_ros.toolchain.quantized.packed import PackedWeight, Scheme

_KEYS = {  # Hugging Face's name: GGUF's, after the architecture
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
}
_REFUSED = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")  # other decoders
_YARN_KEYS = {
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "original_context_length": "original_max_position_embeddings",
}
_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_ROPE_FACTORS = "rope_freqs.weight"


class GgufCheckpoint(Checkpoint):
    """A GGUF file, quantised or not; reading a tensor dequantises it."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        """Parse the header; raises CheckpointError for a part of a split model, and for what is not whole."""
        self.path = path
        self._file = GgufFile(path)
        parts = self._file.metadata.get("split.count", 0)  # 0 or 1: it is whole
        if parts not in (0, 1):
            raise CheckpointError(f"{path} is one of {parts} parts; join them: llama-gguf-split --merge FIRST WHOLE")
        self._names = {_hf_name(name): name for name in self._file.names() if name != _ROPE_FACTORS}
        architecture = str(self._file.metadata.get("general.architecture"))
        families = [family for family in FAMILIES if architecture in family.gguf_architectures]
        self._interleaved = any(family.gguf_interleaved_rope for family in families)
        # what an unknown architecture's keys mean is not known either; detect() refuses it by name
        self.config = self._translate(architecture) if families else {"model_type": architecture}

    def name(self) -> str:
        """general.name, or the file's."""
        return str(self._file.metadata.get("general.name") or self.path.stem)

    def names(self) -> list[str]:
        """All tensor names; one without a Hugging Face counterpart keeps its own."""
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._file.shape(self._own_name(name))

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start to stop - 1 of the first axis, q and k rows in Hugging Face's order."""
        own = self._own_name(name)
        order = self._row_order(name)
        if order is None:
            return self._file.read_rows(own, start, stop)
        return self._file.read_rows(own, 0, len(order))[order[start:stop]]

    def _row_order(self, name: str) -> npt.NDArray[np.int64] | None:
        """Which of the file's rows are q's and k's in Hugging Face's order; None where they are in it."""
        if not (self._interleaved and re.search(r"self_attn\.[qk]_proj\.", name)):
            return None
        num_rows = self.shape(name)[0]
        heads = positive_int(self.config, "num_attention_heads" if ".q_proj." in name else "num_key_value_heads")
        if num_rows % (2 * heads):
            own = self._own_name(name)
            raise CheckpointError(f"{self.path}: {own} has {num_rows} rows, which do not make {heads} heads")
        order: npt.NDArray[np.int64] = np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return order

    def quantization(self) -> str:
        """Which of GGUF's block types the matrices have; empty when all are floats."""
        counts = Counter(self._file.type_name(own) for own in self._names.values() if len(self._file.shape(own)) == 2)
        kinds = [kind for kind, _ in counts.most_common() if kind not in _FLOATS]
        return "GGUF " + ", ".join(kinds) if kinds else ""

    def quantization_notes(self) -> list[str]:
        """The types whose blocks are not kept."""
        kinds = {self._file.type_name(own) for own in self._names.values() if len(self._file.shape(own)) == 2}
        lost = sorted(kind for kind in kinds if kind not in _FLOATS and kind not in KEPT)
        return [f"{kind} blocks are not kept: dequantised to fp16" for kind in lost]

    def scheme(self, name: str) -> Scheme | None:
        """A matrix's, for block types that are kept."""
        own = self._own_name(name)
        return KEPT.get(self._file.type_name(own)) if len(self._file.shape(own)) == 2 else None

    def packed(self, name: str) -> PackedWeight:
        """See Checkpoint.packed; q and k rows in Hugging Face's order."""
        own = self._own_name(name)
        weight = unpack(self._file.type_name(own), *self._file.raw_rows(own, 0, self.shape(name)[0]))
        order = self._row_order(name)
        return weight if order is None else weight.take(order)

    def packed_parts(self, name: str, step: int) -> Iterator[PackedWeight]:
        """See Checkpoint.packed_parts; only a part's bytes are read."""
        own = self._own_name(name)
        if self._row_order(name) is not None:
            yield from super().packed_parts(name, step)
            return
        total = self._file.shape(own)[0]
        for start in range(0, total, step):
            yield unpack(self._file.type_name(own), *self._file.raw_rows(own, start, min(start + step, total)))

    def num_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return self._file.num_bytes()

    def source_files(self) -> list[Path]:
        """The file."""
        return [self.path]

    def tokenizer_json(self) -> str:
        """Built from the vocabulary, merges or scores in the metadata."""
        return self._tokenizer().tokenizer_json()

    def chat_template(self) -> str | None:
        """tokenizer.chat_template."""
        return self._tokenizer().chat_template()

    def token_spec(self) -> TokenSpec:
        """From the metadata's token ids."""
        return self._tokenizer().token_spec()

    def _tokenizer(self) -> GgufTokenizer:
        return GgufTokenizer(self.path, self._file.metadata)

    def _own_name(self, name: str) -> str:
        if name not in self._names:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._names[name]

    def _translate(self, architecture: str) -> dict[str, Any]:
        known = {
            k.removeprefix(architecture + "."): v
            for k, v in self._file.metadata.items()
            if k.startswith(architecture + ".")
        }
        experts = why_left_out({"num_experts": known.get("expert_count")})
        if experts:
            raise CheckpointError(f"{self.path} is left out: {experts}")
        for key in _REFUSED:
            if known.get(key):
                raise CheckpointError(f"{self.path}: {architecture}.{key} is {known[key]}; no family has that")
        config: dict[str, Any] = {ours: known[theirs] for ours, theirs in _KEYS.items() if theirs in known}
        config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
        config.setdefault("sliding_window", None)
        config["model_type"] = architecture
        if architecture == "llama" and config["sliding_window"]:
            config["model_type"] = "mistral"  # both are written as llama; only one family has a window
        config["use_sliding_window"] = bool(config["sliding_window"])
        if "model.embed_tokens.weight" in self:
            config["vocab_size"] = self.shape("model.embed_tokens.weight")[0]
        if "head_dim" not in config:
            config["head_dim"] = positive_int(config, "hidden_size") // positive_int(config, "num_attention_heads")
        if known.get("attention.value_length", config.get("head_dim")) != config.get("head_dim"):
            raise CheckpointError(
                f"{self.path}: values of {known['attention.value_length']} channels a head, "
                f"keys of {config.get('head_dim')}; no family has that"
            )
        config["tie_word_embeddings"] = "lm_head.weight" not in self
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in self
        config["rope_parameters"] = self._rope(known, config)
        return config

    def _rope(self, known: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        rope: dict[str, Any] = {}
        if "rope.dimension_count" in known and known["rope.dimension_count"] != config.get("head_dim"):
            turned = positive_int(known, "rope.dimension_count")
            rope["partial_rotary_factor"] = turned / positive_int(config, "head_dim")
        scaling = {k.removeprefix("rope.scaling."): v for k, v in known.items() if k.startswith("rope.scaling.")}
        scaling.pop("finetuned", None)  # says how the model came about
        if known.get("rope.scale_linear", 1.0) != 1.0:  # what old files have
            scaling = {"type": "linear", "factor": known["rope.scale_linear"]}
        kind = scaling.pop("type", "none")
        if _ROPE_FACTORS in self._file:
            if kind not in ("none", "linear") or scaling.get("factor", 1.0) != 1.0:
                raise CheckpointError(f"{self.path} has both {_ROPE_FACTORS} and {kind} rope scaling; one is known")
            factors = self._file.read_rows(_ROPE_FACTORS, 0, self._file.shape(_ROPE_FACTORS)[0])
            return {**rope, "rope_type": "factors", "factors": factors.tolist()}
        if kind == "none":
            return rope
        rope.update(rope_type=kind, factor=scaling.pop("factor", None))
        if kind == "linear":
            scaling.pop("original_context_length", None)
        if kind == "yarn":
            for theirs, ours in _YARN_KEYS.items():
                if theirs in scaling:
                    rope[ours] = scaling.pop(theirs)
        if scaling:
            keys = ", ".join(f"rope.scaling.{key}" for key in scaling)
            raise CheckpointError(f"{self.path}: {keys} beside {kind} rope scaling is not understood")
        return rope


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{kind}"
    return name
