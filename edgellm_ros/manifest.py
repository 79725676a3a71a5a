"""What manifest.json says of a bundle: the model, its weights' formats, its graphs, its files and its self-test.

Reading it is strict: a field that is missing, unknown or ill-typed is an error that names it.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any

from edgellm_ros.errors import BundleError
from edgellm_ros.quality import Quality

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
GLOBAL_ROPE, LOCAL_ROPE, NO_ROPE = "global", "local", "none"  # ModelSpec.layer_ropes
ROPE_STEMS = {GLOBAL_ROPE: "rope", LOCAL_ROPE: "rope.local"}


@dataclass(frozen=True)
class ModelSpec:
    """What the decoder is, in the terms that every executor needs."""

    family: str  # a name in toolchain/families/
    name: str  # for people
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int  # tokens the position tables and the model allow
    rms_norm_eps: float
    sliding_windows: tuple[int, ...] = ()  # per layer, 0 is none; empty when no layer has one
    qk_norm: bool = False
    tied_head: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] = dataclasses.field(default_factory=dict)
    embed_scale: float = 1.0
    head_rows: int = 0  # tokens that have a row in the head where a vocabulary map cuts it; 0 is all of them
    activation: str = "silu"  # of the MLP's gate: silu, or gelu_tanh (GELU by its tanh approximation)
    output_norms: bool = False  # attention's and MLP's outputs are normalised before they are added to the residual
    attention_scale: float = 0.0  # factor on attention scores; 0 is head_dim ** -0.5
    logit_softcap: float = 0.0  # logits become cap * tanh(logits / cap); 0 is no cap
    rotary_dim: int = 0  # first channels of a head that are turned by their position; 0 is all of them
    layer_ropes: tuple[str, ...] = ()  # per layer: global, local or none (no positions); empty when all are global
    local_rope_theta: float = 0.0  # rope_theta of the layers whose rope is local
    wide_activations: bool = False  # beyond fp16's largest number: engines compute in bf16
    local_rope_scaling: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Per layer, the powers of two that keys and values in the cache are divided by; in the weights; empty: 1
    kv_scales: tuple[tuple[float, float], ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the head: how many logits a position has."""
        return self.head_rows or self.vocab_size

    @property
    def score_scale(self) -> float:
        """The factor on attention scores."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def num_rotated(self) -> int:
        """Channels of a head that are turned by their position."""
        return self.rotary_dim or self.head_dim

    def window(self, layer: int) -> int:
        """Last positions that a layer sees, itself included; 0 is all of them."""
        return self.sliding_windows[layer] if self.sliding_windows else 0

    def rope(self, layer: int) -> str:
        """Which rotary table a layer uses: global, local or none."""
        return self.layer_ropes[layer] if self.layer_ropes else GLOBAL_ROPE

    def rope_tables(self) -> dict[str, str]:
        """Kind of rope to the stem of its tables (`.cos`, `.sin`) in the weight file; global is always there."""
        return {kind: stem for kind, stem in ROPE_STEMS.items() if kind == GLOBAL_ROPE or kind in self.layer_ropes}


@dataclass(frozen=True)
class TokenSpec:
    """The special tokens that the runtime needs by id, and those that the chat template needs by text."""

    stop_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    add_bos: bool = False
    bos_token: str = ""
    eos_token: str = ""
    think_start: str = ""  # the texts around reasoning, empty when the model has none
    think_end: str = ""


@dataclass(frozen=True)
class LinearFormat:
    """How one linear layer is stored; STEM.weight and, by scheme, STEM.scale and what the flags say."""

    scheme: str  # int4, int8, fp8, nvfp4, fp16, fp32
    group_size: int = 0  # input features that share a scale; 0: a row (fp8), or nothing (fp16, fp32)
    offset: bool = False  # STEM.offset [out, in / group] fp32 is added to every dequantised weight: zero points, minima
    input_factor: bool = False  # STEM.input_factor [in] fp32 multiplies the layer's input: ModelOpt's pre_quant_scale
    input_order: bool = False  # column j meets input feature STEM.input_order[j] [in] int32: GPTQ's activation order
    zero_points: bool = False  # every offset is a whole number from -15 to 15 of its group's scale
    # fp8: the portable graph rounds the layer's input to E4M3 with the scale STEM.input_scale [1] fp32, for an engine's
    # FP8 products. ONNX Runtime's graph and the cuda executor leave the input as it is.
    activation: str = ""


@dataclass(frozen=True)
class QuantSpec:
    """How weights.safetensors stores the linear layers, the head and the embedding."""

    weights: str  # int4, int8, fp8, nvfp4, fp16, fp32: most layers' scheme, where they differ
    group_size: int = 0  # along the input features; 0 when not quantised
    lm_head: str = ""
    embedding: str = ""
    # What differs from the above, by stem: layers.3.attn.qkv, attn.qkv for that of every layer, head, embed.
    formats: dict[str, LinearFormat] = dataclasses.field(default_factory=dict)
    kept: str = ""  # whose integers these are, such as "AWQ, 4 bit in groups of 128"; empty when export made them
    notes: tuple[str, ...] = ()  # what keeping them changed, or left out
    folded: bool = False  # unknown factors of AWQ or SmoothQuant are in the norms: other models' adapters do not fit

    def head_tensor(self, model: ModelSpec) -> str:
        """Stem of the tensors that hold the head: the embedding's own when it is tied, uncut and stored alike."""
        shared = model.tied_head and not model.head_rows and self.lm_head == self.embedding
        return "embed" if shared else "head"

    def format_of(self, stem: str) -> LinearFormat:
        """How the layer of `stem` (layers.0.attn.qkv, head, embed) is stored."""
        kind = stem.split(".", 2)[2] if stem.startswith("layers.") else stem
        found = self.formats.get(stem) or self.formats.get(kind)
        if found is not None:
            return found
        scheme = {"head": self.lm_head, "embed": self.embedding}.get(stem) or self.weights
        return LinearFormat(scheme, self.group_size if scheme in ("int4", "int8", self.weights) else 0)


@dataclass(frozen=True)
class GraphSpec:
    """The tensor contract of the ONNX graphs: their inputs' and outputs' names by role.

    Layer names hold a `{layer}` that is replaced by 0 to num_layers - 1.
    """

    embeds: str = "inputs_embeds"  # [B, S, hidden]
    positions: str = "position_ids"  # [B, S] int64 (portable graph)
    write_indices: str = "write_indices"  # [B] int64 (portable graph)
    seqlens_k: str = "seqlens_k"  # [B] int32, last position of each sequence (ORT graph)
    total_length: str = "total_sequence_length"  # [] int32 (ORT graph)
    logit_indices: str = "logit_indices"  # [num_logits] int64, rows of the flattened [B * S]
    logits: str = "logits"  # [num_logits, num_rows] fp32
    past_key: str = "past_key.{layer}"  # [B, kv_heads, capacity, head_dim]
    past_value: str = "past_value.{layer}"
    present_key: str = "present_key.{layer}"
    present_value: str = "present_value.{layer}"
    # The plugin graph has one cache a layer instead, keys and then values: [B, 2, kv_heads, capacity, head_dim].
    past_kv: str = "past_kv.{layer}"
    present_kv: str = "present_kv.{layer}"
    activation_dtype: str = "float32"  # of the portable graph's embeddings, KV cache and LoRA inputs
    # Only in the graphs with adapters; {stem} is attn.qkv, attn.o, mlp.gate_up and mlp.down, R is 0 without an adapter.
    lora_a: str = "layers.{layer}.{stem}.lora_A"  # [in, R]
    lora_b: str = "layers.{layer}.{stem}.lora_B"  # [R, out]
    max_lora_rank: int = 0  # of a projection; R is the sum over those that are stacked; 0: there are no such graphs


@dataclass(frozen=True)
class SelfTestCase:
    """A prompt and what the reference says of it.

    next_ids: the most likely token after each of the last len(next_ids) prefixes of the prompt;
    logits: the next-token logits after the whole prompt, at logit_ids.
    """

    prompt_ids: tuple[int, ...]
    next_ids: tuple[int, ...]
    logit_ids: tuple[int, ...]
    logits: tuple[float, ...]


@dataclass(frozen=True)
class SelfTest:
    """What the loaded model must reproduce; `reference` says what computed it.

    max_error: largest allowed ‖logits - reference‖ / ‖reference - its mean‖ over all cases' logits.
    """

    reference: str = ""
    max_error: float = 0.0
    cases: tuple[SelfTestCase, ...] = ()


@dataclass(frozen=True)
class LoraEntry:
    """A packed adapter, `lora/NAME.safetensors`; its hash is among the files'."""

    rank: int  # the largest of its projections
    targets: tuple[str, ...]  # the projections that it changes
    base_sha256: str  # of the weights that it was packed for
    source: str = ""  # the directory that it came from


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and its sha256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json."""

    schema_version: int
    model: ModelSpec
    tokens: TokenSpec
    quantization: QuantSpec
    graph: GraphSpec
    provenance: dict[str, str]  # source, source sha256, tool versions, creation time
    files: dict[str, FileEntry]
    self_test: SelfTest = dataclasses.field(default_factory=SelfTest)
    loras: dict[str, LoraEntry] = dataclasses.field(default_factory=dict)
    quality: Quality = dataclasses.field(default_factory=Quality)

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse manifest.json; raises BundleError that names the field which is missing, unknown or ill-typed."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{MANIFEST} is not JSON: {error}") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            remedy = "update edgellm_ros" if newer else "export the model again"
            raise BundleError(
                f"{MANIFEST} has schema_version {version!r}; this version reads {SCHEMA_VERSION}; "
                f"{remedy}"
            )
        return typing.cast(Manifest, _from_plain(cls, raw, MANIFEST))


def _from_plain(hint: Any, value: Any, where: str) -> Any:
    """Turn JSON values into the dataclass or container that `hint` names."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise BundleError(f"{where} is {value!r}; it must be an object")
        hints = typing.get_type_hints(hint)
        fields = {f.name: f for f in dataclasses.fields(hint)}
        for key in value:
            if key not in fields:
                raise BundleError(
                    f"{where} has an unknown field {key!r}; known are {', '.join(fields)}; perhaps a newer "
                    "edgellm_ros wrote it: update this one, or export the model again"
                )
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in value:
                raise BundleError(f"{where} lacks the field {name!r}")
        return typing.cast(Any, hint)(**{k: _from_plain(hints[k], v, f"{where}: {k}") for k, v in value.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where} is {value!r}; it must be a list")
        return tuple(_from_plain(args[0], v, where) for v in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise BundleError(f"{where} is {value!r}; it must be an object")
        return {k: _from_plain(args[1], v, f"{where}: {k}") for k, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _from_plain(next(a for a in args if a is not type(None)), value, where)
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise BundleError(f"{where} is {value!r}; it must be of type {hint.__name__}")
    return value
