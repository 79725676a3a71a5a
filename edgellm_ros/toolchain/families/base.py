"""What a model family has to tell: how its configuration becomes a ModelSpec, and which tensors it must bring.

The four families share one decoder (RMS norm, rotary attention with grouped keys, gated SiLU); a member says only
where it differs. Tensor names and shapes are Hugging Face's, [out, in].
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from edgellm_ros.bundle import ModelSpec
from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.config_values import flag, positive_float, positive_int
from edgellm_ros.toolchain.rope import read_rope

_MAX_LAYERS = 4096  # beyond any model; a damaged file's number would fill the memory with names


class Family(abc.ABC):
    """A group of models with the same decoder; stateless."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]  # config.json's model_type
    architectures: ClassVar[tuple[str, ...]]  # config.json's architectures
    gguf_architectures: ClassVar[tuple[str, ...]]  # GGUF's general.architecture
    gguf_interleaved_rope: ClassVar[bool] = False  # GGUF stores q and k rows in pairs (2i, 2i + 1)
    qk_norm: ClassVar[bool] = False

    def spec(self, config: Mapping[str, Any], name: str) -> ModelSpec:
        """The decoder that `config` describes; `name` is for people. Raises CheckpointError for what cannot be."""
        activation = config.get("hidden_act") or "silu"
        if activation not in ("silu", "swish"):
            raise CheckpointError(f"the configuration's hidden_act is {activation!r}; the {self.name} family has silu")
        hidden_size = positive_int(config, "hidden_size")
        num_heads = positive_int(config, "num_attention_heads")
        num_kv_heads = positive_int(config, "num_key_value_heads", self.default_kv_heads(num_heads))
        if num_heads % num_kv_heads:
            raise CheckpointError(f"{num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly")
        head_dim = positive_int(config, "head_dim", self.default_head_dim(hidden_size, num_heads))
        if head_dim % 2:
            raise CheckpointError(f"head_dim is {head_dim}; rotary position embedding needs an even one")
        max_context = positive_int(config, "max_position_embeddings")
        rope_theta, rope_scaling = read_rope(config, max_context)
        num_layers = positive_int(config, "num_hidden_layers")
        if num_layers > _MAX_LAYERS:
            raise CheckpointError(f"the configuration's num_hidden_layers is {num_layers}; the limit is {_MAX_LAYERS}")
        windows = self.sliding_windows(config, num_layers)
        windows = tuple(w if w < max_context else 0 for w in windows)  # a longer window hides nothing
        return ModelSpec(
            family=self.name,
            name=name,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=positive_int(config, "intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=positive_int(config, "vocab_size"),
            max_context=max_context,
            rms_norm_eps=positive_float(config, "rms_norm_eps", 1e-6),
            sliding_windows=windows if any(windows) else (),
            qk_norm=self.qk_norm,
            tied_head=flag(config, "tie_word_embeddings", False),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
        )

    def expected_tensors(self, spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of this family holds."""
        hidden, inner = spec.hidden_size, spec.intermediate_size
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        qkv_bias, out_bias, mlp_bias = self.biases(config)
        linears = {
            "self_attn.q_proj": (queries, hidden, qkv_bias),
            "self_attn.k_proj": (keys, hidden, qkv_bias),
            "self_attn.v_proj": (keys, hidden, qkv_bias),
            "self_attn.o_proj": (hidden, queries, out_bias),
            "mlp.gate_proj": (inner, hidden, mlp_bias),
            "mlp.up_proj": (inner, hidden, mlp_bias),
            "mlp.down_proj": (hidden, inner, mlp_bias),
        }
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
        for layer in range(spec.num_layers):
            prefix = f"model.layers.{layer}."
            tensors[prefix + "input_layernorm.weight"] = (hidden,)
            for linear, (num_out, num_in, bias) in linears.items():
                tensors[f"{prefix}{linear}.weight"] = (num_out, num_in)
                if bias:
                    tensors[f"{prefix}{linear}.bias"] = (num_out,)
            if spec.qk_norm:
                tensors[prefix + "self_attn.q_norm.weight"] = (spec.head_dim,)
                tensors[prefix + "self_attn.k_norm.weight"] = (spec.head_dim,)
            tensors[prefix + "post_attention_layernorm.weight"] = (hidden,)
        tensors["model.norm.weight"] = (hidden,)
        if not spec.tied_head:
            tensors["lm_head.weight"] = (spec.vocab_size, hidden)
        return tensors

    @abc.abstractmethod
    def biases(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        """Whether the query, key and value, the attention output, and the MLP projections have a bias."""

    def sliding_windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
        """How many last positions each layer sees, itself included; 0 is all of them."""
        return (0,) * num_layers

    def default_kv_heads(self, num_heads: int) -> int:
        """Key-value heads when config.json does not say."""
        return num_heads

    def default_head_dim(self, hidden_size: int, num_heads: int) -> int:
        """Channels of a head when config.json does not say."""
        return hidden_size // num_heads


def layer_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Windows by `layer_types`, or for the layers from `max_window_layers` on, where `use_sliding_window` is true."""
    types = config.get("layer_types")
    if types is not None:
        found = f"layer_types has {len(types)} entries"
        unknown = sorted({str(t) for t in types} - {"full_attention", "sliding_attention"})
        if unknown or len(types) != num_layers:
            raise CheckpointError(
                f"the configuration's {found} and {', '.join(unknown) or 'no unknown kinds'}; "
                f"it must have {num_layers} of full_attention and sliding_attention"
            )
    if not flag(config, "use_sliding_window", False) or config.get("sliding_window") is None:
        return (0,) * num_layers
    window = positive_int(config, "sliding_window")
    if types is None:
        first = config.get("max_window_layers")
        first = 28 if first is None else int(first)
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
