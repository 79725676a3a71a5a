"""What manifest.json says of a bundle: the model, its weights' formats, its graphs, its files and its self-test.

Reading it is strict: a field that is missing, unknown, ill-typed or out of range is an error that names it. What one
field may hold stands beside its type; what fields mean together is in `_contradictions`.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from edgellm_ros.errors import BundleError
from edgellm_ros.fields import Allowed
from edgellm_ros.quality import Quality

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
GLOBAL_ROPE, LOCAL_ROPE, NO_ROPE = "global", "local", "none"  # ModelSpec.layer_ropes
ROPE_STEMS = {GLOBAL_ROPE: "rope", LOCAL_ROPE: "rope.local"}
_SCHEMES = ("int4", "int8", "fp8", "nvfp4", "fp16", "fp32")
_GROUPED = ("int4", "int8", "nvfp4")  # schemes that have a scale for each group_size input features, never for a row
_REMEDY = "export the model again"

_LARGEST = 2**31 - 1  # ids, positions and sizes are int32 in graphs and kernels
Size = Annotated[int, Allowed(1, _LARGEST)]
Count = Annotated[int, Allowed(0, _LARGEST)]
Positive = Annotated[float, Allowed(above=0.0)]
NotNegative = Annotated[float, Allowed(0.0)]
Name = Annotated[str, Allowed(pattern=r"[^{}]+", words="a tensor's name, without braces")]
LayerName = Annotated[str, Allowed(pattern=r"[^{}]*\{layer\}[^{}]*", words="a name with {layer} in it")]
StemName = Annotated[
    str, Allowed(pattern=r"[^{}]*\{layer\}[^{}]*\{stem\}[^{}]*", words="a name with {layer} and {stem} in it")
]


@dataclass(frozen=True)
class ModelSpec:
    """What the decoder is, in the terms that every executor needs."""

    family: str  # a name in toolchain/families/
    name: str  # for people
    num_layers: Annotated[int, Allowed(1, 4096)]  # beyond any model; names are made for each
    hidden_size: Size
    intermediate_size: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    vocab_size: Size
    max_context: Size  # tokens the position tables and the model allow
    rms_norm_eps: Positive
    sliding_windows: tuple[Count, ...] = ()  # per layer, 0 is none; empty when no layer has one
    qk_norm: bool = False
    tied_head: bool = False
    rope_theta: Positive = 10000.0
    rope_scaling: dict[str, Any] = dataclasses.field(default_factory=dict)
    embed_scale: Positive = 1.0
    head_rows: Count = 0  # tokens that have a row in the head where a vocabulary map cuts it; 0 is all of them
    # Of the MLP's gate; gelu_tanh is GELU by its tanh approximation
    activation: Annotated[str, Allowed(choices=("silu", "gelu_tanh"))] = "silu"
    output_norms: bool = False  # attention's and MLP's outputs are normalised before they are added to the residual
    attention_scale: NotNegative = 0.0  # factor on attention scores; 0 is head_dim ** -0.5
    logit_softcap: NotNegative = 0.0  # logits become cap * tanh(logits / cap); 0 is no cap
    rotary_dim: Count = 0  # first channels of a head that are turned by their position; 0 is all of them
    # Per layer, none is no positions; empty when all are global
    layer_ropes: tuple[Annotated[str, Allowed(choices=(GLOBAL_ROPE, LOCAL_ROPE, NO_ROPE))], ...] = ()
    local_rope_theta: NotNegative = 0.0  # rope_theta of the layers whose rope is local
    wide_activations: bool = False  # beyond fp16's largest number: engines compute in bf16
    local_rope_scaling: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Per layer, the powers of two that keys and values in the cache are divided by; in the weights; empty: 1
    kv_scales: tuple[tuple[Positive, Positive], ...] = ()

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

    stop_ids: tuple[Count, ...] = ()
    bos_id: Count | None = None
    pad_id: Count | None = None
    add_bos: bool = False
    bos_token: str = ""
    eos_token: str = ""
    think_start: str = ""  # the texts around reasoning, empty when the model has none
    think_end: str = ""


@dataclass(frozen=True)
class LinearFormat:
    """How one linear layer is stored; STEM.weight and, by scheme, STEM.scale and what the flags say."""

    scheme: Annotated[str, Allowed(choices=_SCHEMES)]
    group_size: Count = 0  # input features that share a scale; 0: a row (fp8), or nothing (fp16, fp32)
    offset: bool = False  # STEM.offset [out, in / group] fp32 is added to every dequantised weight: zero points, minima
    input_factor: bool = False  # STEM.input_factor [in] fp32 multiplies the layer's input: ModelOpt's pre_quant_scale
    input_order: bool = False  # column j meets input feature STEM.input_order[j] [in] int32: GPTQ's activation order
    zero_points: bool = False  # every offset is a whole number from -15 to 15 of its group's scale
    # fp8: the portable graph rounds the layer's input to E4M3 with the scale STEM.input_scale [1] fp32, for an engine's
    # FP8 products. ONNX Runtime's graph and the cuda executor leave the input as it is.
    activation: Annotated[str, Allowed(choices=("", "fp8"))] = ""


@dataclass(frozen=True)
class QuantSpec:
    """How weights.safetensors stores the linear layers, the head and the embedding."""

    weights: Annotated[str, Allowed(choices=_SCHEMES)]  # most layers' scheme, where they differ
    group_size: Count = 0  # along the input features; 0 when not quantised
    lm_head: Annotated[str, Allowed(choices=("", *_SCHEMES))] = ""
    embedding: Annotated[str, Allowed(choices=("", *_SCHEMES))] = ""
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

    embeds: Name = "inputs_embeds"  # [B, S, hidden]
    positions: Name = "position_ids"  # [B, S] int64 (portable graph)
    write_indices: Name = "write_indices"  # [B] int64 (portable graph)
    seqlens_k: Name = "seqlens_k"  # [B] int32, last position of each sequence (ORT graph)
    total_length: Name = "total_sequence_length"  # [] int32 (ORT graph)
    logit_indices: Name = "logit_indices"  # [num_logits] int64, rows of the flattened [B * S]
    logits: Name = "logits"  # [num_logits, num_rows] fp32
    past_key: LayerName = "past_key.{layer}"  # [B, kv_heads, capacity, head_dim]
    past_value: LayerName = "past_value.{layer}"
    present_key: LayerName = "present_key.{layer}"
    present_value: LayerName = "present_value.{layer}"
    # The plugin graph has one cache a layer instead, keys and then values: [B, 2, kv_heads, capacity, head_dim].
    past_kv: LayerName = "past_kv.{layer}"
    present_kv: LayerName = "present_kv.{layer}"
    # Of the portable graph's embeddings, KV cache and LoRA inputs
    activation_dtype: Annotated[str, Allowed(choices=("float32", "float16"))] = "float32"
    # Only in the graphs with adapters; {stem} is attn.qkv, attn.o, mlp.gate_up and mlp.down, R is 0 without an adapter.
    lora_a: StemName = "layers.{layer}.{stem}.lora_A"  # [in, R]
    lora_b: StemName = "layers.{layer}.{stem}.lora_B"  # [R, out]
    max_lora_rank: Count = 0  # of a projection; R is the sum over those that are stacked; 0: there are no such graphs


@dataclass(frozen=True)
class SelfTestCase:
    """A prompt and what the reference says of it.

    next_ids: the most likely token after each of the last len(next_ids) prefixes of the prompt;
    logits: the next-token logits after the whole prompt, at logit_ids.
    """

    prompt_ids: tuple[Count, ...]
    next_ids: tuple[Count, ...]
    logit_ids: tuple[Count, ...]
    logits: tuple[Annotated[float, Allowed()], ...]


@dataclass(frozen=True)
class SelfTest:
    """What the loaded model must reproduce; `reference` says what computed it.

    max_error: largest allowed ‖logits - reference‖ / ‖reference - its mean‖ over all cases' logits; two unrelated
    vectors have about 1.4.
    """

    reference: str = ""
    max_error: Annotated[float, Allowed(0.0, 1.0)] = 0.0
    cases: tuple[SelfTestCase, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that a slot must hold for it: those of the longest prompt."""
        return max((len(case.prompt_ids) for case in self.cases), default=0)


@dataclass(frozen=True)
class LoraEntry:
    """A packed adapter, `lora/NAME.safetensors`; its hash is among the files'."""

    rank: Size  # the largest of its projections
    targets: tuple[str, ...]  # the projections that it changes
    base_sha256: str  # of the weights that it was packed for
    source: str = ""  # the directory that it came from


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and its sha256."""

    size: Annotated[int, Allowed(0)]
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
        """Parse manifest.json; raises BundleError that names the field which is not as it must be."""
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
        found = typing.cast(Manifest, _from_plain(cls, raw, MANIFEST))
        fault = next(_contradictions(found), "")
        if fault:
            raise BundleError(f"{MANIFEST}: {fault}; {_REMEDY}")
        return found


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """What is wrong of fields that do not fit each other: the field, its value and what it must be."""
    model, tokens, quant = manifest.model, manifest.tokens, manifest.quantization
    if model.head_dim % 2:
        yield f"model: head_dim is {model.head_dim}; it must be even, since positions turn pairs of channels"
    if model.rotary_dim > model.head_dim or model.rotary_dim % 2:
        yield f"model: rotary_dim is {model.rotary_dim}; it must be even and at most head_dim, {model.head_dim}"
    if model.head_rows > model.vocab_size:
        yield f"model: head_rows is {model.head_rows}; allowed is 0 to vocab_size, which is {model.vocab_size}"
    if LOCAL_ROPE in model.layer_ropes and not model.local_rope_theta:
        yield "model: local_rope_theta is 0; it must be above 0, since layer_ropes has local ones"
    for name in ("sliding_windows", "layer_ropes", "kv_scales"):
        count = len(getattr(model, name))
        if count not in (0, model.num_layers):
            yield f"model: {name} has {count} entries; allowed are 0, or num_layers, which is {model.num_layers}"
    ids = f"allowed is 0 to {model.vocab_size - 1}, the ids of the vocabulary"
    if tokens.add_bos and (tokens.bos_id is None or tokens.bos_id >= model.vocab_size):
        yield f"tokens: bos_id is {tokens.bos_id} with add_bos; {ids}"
    forms = {f"formats: {stem}: group_size": form for stem, form in quant.formats.items()}
    for field, form in {"group_size": LinearFormat(quant.weights, quant.group_size), **forms}.items():
        if form.scheme in _GROUPED and not form.group_size:
            yield f"quantization: {field} is 0; allowed is 1 or more with {form.scheme}"
    needed = manifest.self_test.num_tokens
    if model.max_context < needed:
        yield f"model: max_context is {model.max_context}; the self-test's prompts need {needed} or more"
    for number, case in enumerate(manifest.self_test.cases):
        at = f"self_test: cases[{number}]"
        most = {"prompt_ids": needed, "next_ids": len(case.prompt_ids), "logit_ids": model.vocab_size}
        for name, limit in most.items():
            tokens_of_case = getattr(case, name)
            if not 1 <= len(tokens_of_case) <= limit:
                yield f"{at}: {name} has {len(tokens_of_case)} entries; allowed are 1 to {limit}"
            for i, token in enumerate(tokens_of_case):
                if token >= model.vocab_size:
                    yield f"{at}: {name}[{i}] is {token}; {ids}"
        if len(case.logits) != len(case.logit_ids):
            yield f"{at}: logits has {len(case.logits)} entries; it must have those of logit_ids, {len(case.logit_ids)}"


def _refusal(where: str, value: object, demand: str) -> BundleError:
    return BundleError(f"{where} is {reprlib.repr(value)}; {demand}; {_REMEDY}")


def _from_plain(hint: Any, value: Any, where: str) -> Any:
    """Turn JSON values into the dataclass or container that `hint` names."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        found = _from_plain(args[0], value, where)
        demand = next((d for d in (rule.demand(found) for rule in args[1:]) if d), "")
        if demand:
            raise _refusal(where, found, demand)
        return found
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise _refusal(where, value, "it must be an object")
        hints = typing.get_type_hints(hint, include_extras=True)
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
                raise BundleError(f"{where} lacks the field {name!r}; {_REMEDY}")
        return typing.cast(Any, hint)(**{k: _from_plain(hints[k], v, f"{where}: {k}") for k, v in value.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise _refusal(where, value, "it must be a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise _refusal(where, value, f"it must be a list of {len(args)}")
        numbered = not dataclasses.is_dataclass(args[0])  # of objects the field that follows is said
        return tuple(_from_plain(args[0], v, f"{where}[{i}]" if numbered else where) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _refusal(where, value, "it must be an object")
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
        raise _refusal(where, value, f"it must be of type {hint.__name__}")
    return value
