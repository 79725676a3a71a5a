"""What a model family has to tell: how its configuration becomes a ModelSpec, and which tensors it must bring.

All families share one decoder (RMS norm, rotary attention with grouped keys, gated MLP); a member says only where it
differs, and what differs while computing is a field of ModelSpec. Tensor names and [out, in] are Hugging Face's.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import GLOBAL_ROPE, ModelSpec
from edgellm_ros.toolchain.config_values import flag, positive_float, positive_int
from edgellm_ros.toolchain.rope import read_rope, read_rotary_dim

_MAX_LAYERS = 4096  # beyond any model; a damaged file's number would fill the memory with names

# Stem of a stored linear layer -> the checkpoint's modules, stacked along the output features.
SEPARATE: Mapping[str, tuple[str, ...]] = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
FUSED: Mapping[str, tuple[str, ...]] = {
    **SEPARATE,
    "attn.qkv": ("self_attn.qkv_proj",),
    "mlp.gate_up": ("mlp.gate_up_proj",),
}


@dataclass(frozen=True)
class Ropes:
    """Every field of ModelSpec that says how positions turn queries and keys."""

    theta: float
    scaling: dict[str, Any]
    layers: tuple[str, ...] = ()  # as ModelSpec.layer_ropes
    local_theta: float = 0.0
    local_scaling: dict[str, Any] | None = None


class Family(abc.ABC):
    """A group of models with the same decoder; stateless."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]  # config.json's model_type
    architectures: ClassVar[tuple[str, ...]]  # config.json's architectures
    gguf_architectures: ClassVar[tuple[str, ...]] = ()  # GGUF's general.architecture
    gguf_interleaved_rope: ClassVar[bool] = False  # GGUF stores q and k rows in pairs (2i, 2i + 1)
    linears: ClassVar[Mapping[str, tuple[str, ...]]] = SEPARATE
    # Stored stem -> the checkpoint's module, of width hidden_size, then of width head_dim.
    norms: ClassVar[Mapping[str, str]] = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
    head_norms: ClassVar[Mapping[str, str]] = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
    norm_offset: ClassVar[float] = 0.0  # what norms add to the stored gain; a bundle stores the sum
    activation_key: ClassVar[str] = "hidden_act"
    activations: ClassVar[Mapping[str, str]] = {"silu": "silu", "swish": "silu"}  # the first is the default
    qk_norm: ClassVar[bool] = False
    tied_by_default: ClassVar[bool] = False
    default_eps: ClassVar[float] = 1e-6
    default_theta: ClassVar[float] = 10000.0
    partial_rotary: ClassVar[bool] = False  # whether partial_rotary_factor may be below 1

    def spec(self, config: Mapping[str, Any], name: str) -> ModelSpec:
        """The decoder that `config` describes; `name` is for people. Raises CheckpointError for what cannot be."""
        hidden_size = positive_int(config, "hidden_size")
        num_heads = positive_int(config, "num_attention_heads")
        num_kv_heads = positive_int(config, "num_key_value_heads", self.default_kv_heads(num_heads))
        if num_heads % num_kv_heads:
            raise CheckpointError(f"{num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly")
        head_dim = positive_int(config, "head_dim", self.default_head_dim(hidden_size, num_heads))
        if head_dim % 2:
            raise CheckpointError(f"head_dim is {head_dim}; rotary position embedding needs an even one")
        max_context = positive_int(config, "max_position_embeddings")
        num_layers = positive_int(config, "num_hidden_layers")
        if num_layers > _MAX_LAYERS:
            raise CheckpointError(f"the configuration's num_hidden_layers is {num_layers}; the limit is {_MAX_LAYERS}")
        ropes = self.ropes(config, num_layers, max_context)
        windows = self.sliding_windows(config, num_layers)
        windows = tuple(w if w < max_context else 0 for w in windows)  # a longer window hides nothing
        rotary_dim = read_rotary_dim(config, head_dim) if self.partial_rotary else head_dim
        if rotary_dim % 16:  # GroupQueryAttention's cos_cache
            raise CheckpointError(
                f"positions turn {rotary_dim} of a head's {head_dim} channels; ONNX Runtime's attention takes "
                "multiples of 16"
            )
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
            rms_norm_eps=positive_float(config, "rms_norm_eps", self.default_eps),
            sliding_windows=windows if any(windows) else (),
            qk_norm=self.qk_norm,
            tied_head=flag(config, "tie_word_embeddings", self.tied_by_default),
            rope_theta=ropes.theta,
            rope_scaling=ropes.scaling,
            activation=self._activation(config),
            rotary_dim=0 if rotary_dim == head_dim else rotary_dim,
            layer_ropes=ropes.layers if set(ropes.layers) - {GLOBAL_ROPE} else (),
            local_rope_theta=ropes.local_theta,
            local_rope_scaling=ropes.local_scaling or {},
            **self.extra_facts(config),
        )

    def expected_tensors(self, spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of this family holds."""
        hidden, inner = spec.hidden_size, spec.intermediate_size
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        qkv_bias, out_bias, mlp_bias = self.biases(config)
        of_stem = {  # rows of its modules where they are separate, input features, whether it has a bias
            "attn.qkv": ((queries, keys, keys), hidden, qkv_bias),
            "attn.o": ((hidden,), queries, out_bias),
            "mlp.gate_up": ((inner, inner), hidden, mlp_bias),
            "mlp.down": ((hidden,), inner, mlp_bias),
        }
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
        for layer in range(spec.num_layers):
            prefix = f"model.layers.{layer}."
            for stem, modules in self.linears.items():
                rows, num_in, bias = of_stem[stem]
                for module, num_out in zip(modules, rows if len(modules) > 1 else (sum(rows),), strict=True):
                    tensors[f"{prefix}{module}.weight"] = (num_out, num_in)
                    if bias:
                        tensors[f"{prefix}{module}.bias"] = (num_out,)
            for module in self.norms.values():
                tensors[f"{prefix}{module}.weight"] = (hidden,)
            for module in self.head_norms.values() if spec.qk_norm else ():
                tensors[f"{prefix}{module}.weight"] = (spec.head_dim,)
        tensors["model.norm.weight"] = (hidden,)
        if not spec.tied_head:
            tensors["lm_head.weight"] = (spec.vocab_size, hidden)
        return tensors

    @abc.abstractmethod
    def biases(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        """Whether the query, key and value, the attention output, and the MLP projections have a bias."""

    def ropes(self, config: Mapping[str, Any], num_layers: int, max_context: int) -> Ropes:
        """How positions turn queries and keys; one table for all layers unless a family says otherwise."""
        return Ropes(*read_rope(config, max_context, self.default_theta, partial=self.partial_rotary))

    def extra_facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Further fields of ModelSpec, for what only some families have."""
        return {}

    def sliding_windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
        """How many last positions each layer sees, itself included; 0 is all of them."""
        return (0,) * num_layers

    def default_kv_heads(self, num_heads: int) -> int:
        """Key-value heads when config.json does not say."""
        return num_heads

    def default_head_dim(self, hidden_size: int, num_heads: int) -> int:
        """Channels of a head when config.json does not say."""
        return hidden_size // num_heads

    def _activation(self, config: Mapping[str, Any]) -> str:
        asked = config.get(self.activation_key) or next(iter(self.activations))
        if not isinstance(asked, str) or asked not in self.activations:
            raise CheckpointError(
                f"the configuration's {self.activation_key} is {asked!r}; the {self.name} family has "
                f"{next(iter(self.activations))}"
            )
        return self.activations[asked]


def layer_kinds(config: Mapping[str, Any], num_layers: int) -> tuple[str, ...] | None:
    """`layer_types`: full_attention or sliding_attention for each layer; None when the configuration has none."""
    types = config.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list):
        raise CheckpointError(f"the configuration's layer_types is {types!r}; it must be a list, one a layer")
    unknown = sorted({str(t) for t in types} - {"full_attention", "sliding_attention"})
    if unknown or len(types) != num_layers:
        raise CheckpointError(
            f"the configuration's layer_types has {len(types)} entries and {', '.join(unknown) or 'no unknown kinds'}; "
            f"it must have {num_layers} of full_attention and sliding_attention"
        )
    return tuple(types)


def layer_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Windows by `layer_types`, or for the layers from `max_window_layers` on, where `use_sliding_window` is true."""
    types = layer_kinds(config, num_layers)
    if not flag(config, "use_sliding_window", False) or config.get("sliding_window") is None:
        return (0,) * num_layers
    window = positive_int(config, "sliding_window")
    if types is None:
        first = config.get("max_window_layers")
        first = 28 if first is None else int(first)
        types = tuple("sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers))
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
