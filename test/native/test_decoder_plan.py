"""What the compiled module decides without a GPU: which models its kernels take, and how much memory they will use."""

from __future__ import annotations

from typing import Any

import pytest

from edgellm_ros import native
from edgellm_ros.executors.cuda_tiles import MAX_BATCH

NATIVE, NO_MODULE = native.import_module()
pytestmark = pytest.mark.skipif(bool(NO_MODULE), reason=NO_MODULE)

LLAMA_1B = {
    "num_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_heads": 32, "num_kv_heads": 8,
    "head_dim": 64, "vocab_size": 128256, "tied_head": True,
}  # fmt: skip
LLAMA_8B = {
    "num_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32, "num_kv_heads": 8,
    "head_dim": 128, "vocab_size": 128256, "tied_head": False,
}  # fmt: skip
QWEN3_4B = {
    "num_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "num_heads": 32, "num_kv_heads": 8,
    "head_dim": 128, "vocab_size": 151936, "tied_head": True, "qk_norm": True,
}  # fmt: skip
GEMMA3_1B = {
    "num_layers": 26, "hidden_size": 1152, "intermediate_size": 6912, "num_heads": 4, "num_kv_heads": 1,
    "head_dim": 256, "vocab_size": 262144, "tied_head": True, "qk_norm": True, "output_norms": True,
}  # fmt: skip
MODELS = {"llama-1b": LLAMA_1B, "llama-8b": LLAMA_8B, "qwen3-4b": QWEN3_4B, "gemma3-1b": GEMMA3_1B}
# As the models' cards publish them.
PARAMETERS = {
    "llama-1b": 1_235_814_400, "llama-8b": 8_030_261_248, "qwen3-4b": 4_022_468_096, "gemma3-1b": 999_885_952,
}  # fmt: skip
CONTEXT = 4096


def settings(model: dict[str, Any], **changed: Any) -> Any:
    config = NATIVE.DecoderConfig()
    values = {**model, "num_positions": CONTEXT, "capacity": CONTEXT, "num_slots": 4, "max_tokens": 512, **changed}
    for name, value in values.items():
        setattr(config, name, value)
    return config


def test_what_is_known_without_the_module_is_what_it_has() -> None:
    assert NATIVE.MAX_BATCH == MAX_BATCH



def test_the_module_runs_without_a_gpu_and_names_what_it_was_compiled_for() -> None:
    assert NATIVE.ARCHITECTURES and all(name.rstrip("af").isdigit() for name in NATIVE.ARCHITECTURES)
    assert NATIVE.PTX_ARCHITECTURE in ("", NATIVE.ARCHITECTURES[-1])
    assert NATIVE.CUDA_VERSION // 1000 == NATIVE.CUDA_MAJOR >= 12
    count, reason = NATIVE.count_devices()
    if count == 0:
        assert native.unavailable_reason() == f"no NVIDIA GPU: {reason}"


@pytest.mark.parametrize("name", MODELS)
def test_planned_weights_are_the_published_parameters(name: str) -> None:
    model = MODELS[name]
    plan = NATIVE.plan_memory(settings(model))
    rope = CONTEXT * model["head_dim"] // 2 * 2 * 4  # cosines and sines, fp32
    padding = 256 * (12 * model["num_layers"] + 8)  # each tensor begins at a multiple of 256 bytes
    assert 0 <= plan["weights"] - 2 * PARAMETERS[name] - rope <= padding


@pytest.mark.parametrize("name", MODELS)
def test_the_planned_cache_holds_k_and_v_of_every_layer_slot_and_token(name: str) -> None:
    model = MODELS[name]
    per_token = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"] * 2  # bf16
    config = settings(model)
    assert config.kv_bytes_per_token == per_token
    assert NATIVE.plan_memory(config)["kv_cache"] == 4 * CONTEXT * per_token
    assert NATIVE.plan_memory(settings(model, num_slots=1, capacity=99))["kv_cache"] == -(-99 * per_token // 256) * 256


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_quantised_weights_are_planned_at_their_bits(form: str) -> None:
    fmt = getattr(NATIVE.WeightFormat, form)
    plan = NATIVE.plan_memory(settings(LLAMA_8B, layer_format=fmt, head_format=fmt, group_size=64))
    head = LLAMA_8B["vocab_size"] * LLAMA_8B["hidden_size"]
    quantised = PARAMETERS["llama-8b"] - head  # all but the embedding table, which stays bf16
    bytes_per_weight = {"int8": 1 + 2 / 64, "int4": 0.5 + 2 / 64, "fp8": 1.0}[form]
    assert plan["weights"] == pytest.approx(quantised * bytes_per_weight + 2 * head, rel=2e-3)


def test_the_total_is_the_sum_of_the_purposes() -> None:
    plan = NATIVE.plan_memory(settings(QWEN3_4B))
    assert plan.pop("total") == sum(plan.values())
    assert all(size > 0 for size in plan.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": 72}, "head_dim is 72; the kernels take 64, 80, 96, 128 and 256"),
        ({"num_kv_heads": 5}, "32 heads do not divide into 5 groups"),
        ({"hidden_size": 2040}, "a layer is 2040 wide; the kernels take multiples of 16"),
        ({"hidden_size": 16400}, "hidden_size is 16400; the norms take at most 16384"),
        ({"sliding_windows": [16]}, "sliding_windows has 1 entries; it must have one for each of the 16 layers, or none"),
        ({"max_packed_tokens": -2}, "max_packed_tokens is -2; it must be -1 .by the GPU., 0 .never. or a number"),
        ({"capacity": CONTEXT + 1}, "capacity is 4097; it must be 1 to num_positions, 4096"),
        ({"num_slots": 0}, "num_slots is 0; it must be at least 1"),
        ({"max_tokens": 4}, "max_tokens is 4; it must be at least 16"),
        ({"min_gemm_tokens": 1}, "min_gemm_tokens is 1; it must be at least 2"),
        ({"layer_ropes": ["rope"]}, "layer_ropes has 1 entries; it must have one for each of the 16 layers, or none"),
        ({"layer_ropes": ["embed"] * 16}, "rope tables embed must have a name that starts with rope"),
        ({"head_rows": 1000}, "head_rows is 1000; it must be 0 to vocab_size, and 0 with a tied head"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_by_name_before_memory_is_planned(
    changed: dict[str, Any], message: str
) -> None:
    config = settings(LLAMA_1B, **changed)
    for refuse in (config.check, lambda: NATIVE.plan_memory(config)):
        with pytest.raises(ValueError, match=message):
            refuse()


def test_a_group_size_without_kernels_is_refused_by_name() -> None:
    config = settings(LLAMA_1B, layer_format=NATIVE.WeightFormat.int4, group_size=48)
    with pytest.raises(ValueError, match="groups of 48; the kernels take 16, 32, 64 and 128"):
        config.check()


@pytest.mark.parametrize("form", ["int4", "int8", "int8_offset", "fp8_blocks"])
def test_groups_that_end_within_a_row_are_refused_by_name(form: str) -> None:
    """The row behind would have lent its scales."""
    config = settings({**LLAMA_1B, "intermediate_size": 8208})
    config.formats = {"layers.2.mlp.down": (getattr(NATIVE.WeightFormat, form), 64)}
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down has 8208 columns, which groups of 64 do not divide"):
        config.check()
    if form != "fp8_blocks":  # which has blocks of 64 and 128 only
        config.formats = {"layers.2.mlp.down": (getattr(NATIVE.WeightFormat, form), 16)}
        config.check()


@pytest.mark.parametrize("group", [0, -64, 48, 128])
def test_weights_layouts_of_other_groups_are_refused_before_anything_is_divided(group: int) -> None:
    with pytest.raises(ValueError, match=f"group {group} must be 16, 32, 64 or 128 and divide cols 192"):
        NATIVE.kernels.int4_packed_scales_bytes(16, 192, group)
    assert NATIVE.kernels.int4_packed_scales_bytes(16, 192, 64) == 3 * 32


def test_a_gpu_without_multiprocessors_is_refused() -> None:
    with pytest.raises(ValueError, match="num_sms 0 is not at least 1"):
        NATIVE.kernels.choose_gemm_int4_tile(8, 4096, 0, True)


def test_each_layer_may_have_a_format_and_group_of_its_own() -> None:
    forms = NATIVE.WeightFormat
    usual = settings(LLAMA_8B, layer_format=forms.int4, group_size=64)
    mixed = settings(LLAMA_8B, layer_format=forms.int4, group_size=64)
    mixed.formats = {"layers.3.mlp.down": (forms.bf16, 0), "layers.4.mlp.down": (forms.int8, 16)}
    count = LLAMA_8B["hidden_size"] * LLAMA_8B["intermediate_size"]
    more = NATIVE.plan_memory(mixed)["weights"] - NATIVE.plan_memory(usual)["weights"]
    assert more == pytest.approx(count * (2 + 1 + 2 / 16 - 2 * (0.5 + 2 / 64)), rel=1e-4)


def test_a_prompts_second_buffer_holds_the_parts_of_every_format_that_is_dequantised() -> None:
    forms = NATIVE.WeightFormat
    model = {**LLAMA_8B, "intermediate_size": 11008}  # parts of gate_up are larger than those of down
    fp8, mixed = (settings(model, layer_format=forms.fp8) for _ in range(2))
    mixed.formats = {"layers.3.mlp.down": (forms.int8, 64)}
    fp8.copied_bytes = mixed.copied_bytes = 48 << 20
    more = NATIVE.plan_memory(mixed)["workspace"] - NATIVE.plan_memory(fp8)["workspace"]
    assert more == 2816 * 4096 * 2 + (32 << 20)


def test_the_order_and_factor_of_a_layers_input_are_planned_and_checked() -> None:
    plain, mapped = settings(LLAMA_8B), settings(LLAMA_8B)
    mapped.ordered, mapped.factored = {"layers.3.attn.qkv", "layers.3.attn.o"}, {"layers.3.attn.o"}
    more = {name: size - NATIVE.plan_memory(plain)[name] for name, size in NATIVE.plan_memory(mapped).items()}
    assert more["weights"] == 4096 * (4 + 2) + 4096 * (4 + 4), "orders, one gain in order, one factor"
    assert more["workspace"] == 512 * 14336 * 2
    mapped.factored = {"layers.3.mlp.gate_up"}
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.gate_up follows a norm"):
        mapped.check()
    mapped.factored = {"head"}
    with pytest.raises(ValueError, match="ordered or factored has head, which is no layer"):
        mapped.check()


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"layers.16.mlp.down": ("bf16", 0)}, r"formats has layers\.16\.mlp\.down, which the decoder does not"),
        ({"layers.1.attn.o": ("int8", 48)}, r"layers\.1\.attn\.o is quantised in groups of 48; the kernels take 16, "),
        ({"layers.1.attn.o": ("int8", 0)}, r"layers\.1\.attn\.o is quantised in groups of 0; the kernels take 16, "),
        ({"embed": ("fp8", 0)}, "the embedding must be bf16 or int8"),
        ({"embed": ("int8", 64)}, "a tied head has the embedding's format"),
    ],
)
def test_a_layers_format_that_the_kernels_lack_is_refused_by_name(
    formats: dict[str, tuple[str, int]], message: str
) -> None:
    config = settings(LLAMA_1B)
    config.formats = {stem: (getattr(NATIVE.WeightFormat, name), group) for stem, (name, group) in formats.items()}
    with pytest.raises(ValueError, match=message):
        config.check()


def test_norms_on_outputs_are_planned_with_the_sums_that_they_read() -> None:
    plain, normed = (NATIVE.plan_memory(settings({**GEMMA3_1B, "output_norms": on})) for on in (False, True))
    gain = -(-1152 * 2 // 256) * 256
    assert normed["weights"] - plain["weights"] == 26 * 2 * gain
    assert normed["workspace"] - plain["workspace"] == 16 * 1152 * 4  # fp32, of as many tokens as a draft may have
    off = [NATIVE.plan_memory(settings({**GEMMA3_1B, "output_norms": on}, max_verify_tokens=0)) for on in (False, True)]
    assert off[1]["workspace"] - off[0]["workspace"] == 8 * 1152 * 4


def test_what_drafts_need_is_planned_with_their_length_only() -> None:
    plans = [NATIVE.plan_memory(settings(QWEN3_4B, max_verify_tokens=count)) for count in (0, 16, 64)]
    assert plans[0]["workspace"] < plans[1]["workspace"] < plans[2]["workspace"]
    assert plans[0]["logits"] == plans[1]["logits"] < plans[2]["logits"]
    with pytest.raises(ValueError, match=r"max_verify_tokens is 65; it must be 0 \(off\) or 2 to 64"):
        NATIVE.plan_memory(settings(QWEN3_4B, max_verify_tokens=65))


# MB that an H200's driver had taken beside the arena with four slots of 4,096 tokens (docs/experiments.md).
TAKEN_BY_THE_DRIVER = {"llama-1b": 36, "llama-8b": 48}


@pytest.mark.parametrize("name", TAKEN_BY_THE_DRIVER)
def test_what_the_driver_took_for_code_and_graphs_is_planned_and_not_much_more(name: str) -> None:
    planned = NATIVE.plan_memory(settings(MODELS[name]))["graphs"] / 1e6
    assert TAKEN_BY_THE_DRIVER[name] < planned < 1.5 * TAKEN_BY_THE_DRIVER[name]


def test_graphs_are_planned_by_layers_slots_lengths_drafts_and_adapters() -> None:
    def planned(**changed: Any) -> int:
        size: int = NATIVE.plan_memory(settings(LLAMA_8B, **changed))["graphs"]
        return size

    usual = planned()
    for more in (
        {"num_layers": 64}, {"num_slots": 8}, {"capacity": 16384, "num_positions": 16384}, {"max_verify_tokens": 64},
        {"max_adapters": 1, "max_lora_rank": 16}, {"output_norms": True},
    ):  # fmt: skip
        assert planned(**more) > usual, more
    assert planned(num_slots=16) == planned(num_slots=8), "a step has eight sequences at most"
    assert planned(max_adapters=4, max_lora_rank=64) == planned(max_adapters=1, max_lora_rank=16)
    assert planned(capacity=1024, num_positions=1024) < usual


def test_a_second_rope_and_a_cut_head_are_planned() -> None:
    plan = NATIVE.plan_memory(settings(LLAMA_1B))
    ropes = ["rope", "rope.none"] * 8
    more = NATIVE.plan_memory(settings(LLAMA_1B, layer_ropes=ropes))
    assert more["weights"] - plan["weights"] == 2 * CONTEXT * 32 * 4
    whole = NATIVE.plan_memory(settings(LLAMA_8B))
    cut = NATIVE.plan_memory(settings(LLAMA_8B, head_rows=16_000))
    rows = 128_256 - 16_000
    assert whole["weights"] - cut["weights"] == rows * 4096 * 2 - 16_000 * 4, "and which token each row is"
    assert whole["logits"] - cut["logits"] >= rows * 4 * (16 + 8 + 8)


# L2 cache and width of the memory's bus.
ORIN, THOR, RTX_4090, H200 = (4 << 20, 128), (32 << 20, 256), (72 << 20, 384), (60 << 20, 6016)


@pytest.mark.parametrize(
    ("gpu", "exact", "fast"),
    [
        (ORIN, 512, 512), (((16 << 20) - 1, 128), 512, 512), ((16 << 20, 128), 0, 128), (THOR, 0, 128), (H200, 0, 128),
        ((*H200, False), 512, 512),
    ],
)  # fmt: skip
def test_where_a_prompts_products_are_with_int4_weights_as_they_are_stored(
    gpu: tuple[Any, ...], exact: int, fast: int
) -> None:
    """With a small L2 cache or no cuBLASLt always, else for few tokens, unless bits must not depend on how many."""

    def decided(row_invariant: bool, **chosen: int) -> int:
        return int(NATIVE.decide(settings(LLAMA_8B, row_invariant=row_invariant, **chosen), *gpu).max_packed_tokens)

    assert (decided(True), decided(False)) == (exact, fast)
    for wanted, all_or_none in ((0, 0), (40, 512)):
        assert decided(True, max_packed_tokens=wanted) == all_or_none
        assert decided(False, max_packed_tokens=wanted) == wanted
    with pytest.raises(ValueError, match="max_packed_tokens is -2"):
        decided(True, max_packed_tokens=-2)


@pytest.mark.parametrize(
    ("gpu", "size", "part", "scratch"),
    [(ORIN, 64, 4096, 6144 * 8192), (THOR, 32, 2048, 4096 * 8192), (RTX_4090, 72, 4096, 6144 * 8192),
     (H200, 256, 28672, 28672 * 8192)],
)  # fmt: skip
def test_copies_stay_in_the_cache_where_memory_is_slow(
    gpu: tuple[int, int], size: int, part: int, scratch: int
) -> None:
    """part: rows of gate_up, whose parts are the largest; two are there at a time, or all of it is one. scratch: bytes
    of the largest part or whole weight, or what loading takes."""
    config = NATIVE.decide(settings(LLAMA_8B), *gpu)
    assert config.copied_bytes == size << 20
    assert NATIVE.decide(config, *H200).copied_bytes == size << 20, "what is decided stays"
    eight = settings(LLAMA_8B, layer_format=NATIVE.WeightFormat.int8, group_size=64)
    copies = NATIVE.plan_memory(NATIVE.decide(eight, *gpu))["workspace"]
    none = NATIVE.plan_memory(settings(LLAMA_8B))["workspace"]
    staged, cublaslt = 32 << 20, 32 << 20
    assert copies - none == scratch - staged + (part * 8192 + cublaslt if part < 28672 else 0)
    lacks = NATIVE.plan_memory(NATIVE.decide(eight, *gpu, has_cublaslt=False))["workspace"]
    assert lacks - none == -(cublaslt + 256), "nothing of it where there is no cuBLASLt to multiply them"
    eight.copied_bytes = 1  # parts of 128 rows all the same
    small = NATIVE.plan_memory(NATIVE.decide(eight, *gpu))["workspace"]
    assert small - none == 128 * 14336 * 2 + cublaslt


@pytest.mark.parametrize(("fp8_prefill", "largest"), [(True, 48 << 20), (False, 256 << 20)])
def test_copies_that_only_prompts_with_an_adapter_make_are_small(fp8_prefill: bool, largest: int) -> None:
    """QKV as a whole, or gate_up, on HBM: weights in FP8 are multiplied as they are, x in a buffer of its own."""
    model = {**LLAMA_8B, "fp8_prefill": fp8_prefill, "intermediate_size": 16384}
    fp8 = NATIVE.plan_memory(NATIVE.decide(settings(model, layer_format=NATIVE.WeightFormat.fp8), *H200))
    x_fp8 = 512 * (16384 + 4) if fp8_prefill else 0
    assert fp8["workspace"] - NATIVE.plan_memory(settings(model))["workspace"] - x_fp8 == largest - (32 << 20)


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_is_planned_for_copies_that_no_prompt_makes(exact: bool) -> None:
    """gate_up of 8B in bf16, as with HBM, and 32 MB for cuBLASLt; what loading takes of int4 stays."""
    forms = NATIVE.WeightFormat

    def workspace(model: dict[str, Any], most: int, formats: dict[str, Any] | None = None) -> int:
        config = settings(
            model, layer_format=forms.int4, group_size=64, row_invariant=exact, max_packed_tokens=most
        )  # fmt: skip
        config.formats = formats or {}
        return int(NATIVE.plan_memory(config)["workspace"])

    gate_up = 2 * 14336 * 4096
    staged = gate_up // 2 + gate_up // 64 * 2 + 512
    copy = gate_up * 2
    cublaslt = 32 << 20
    copies = workspace(LLAMA_8B, 0)
    assert copies == workspace(LLAMA_8B, -1), "by the GPU, which is not known"
    assert (copies == workspace(LLAMA_8B, 511)) != exact
    assert copies - workspace(LLAMA_8B, 512) == copy - staged + cublaslt + 256
    # A layer in another format, and its copies, are multiplied through cuBLASLt.
    for other in ((forms.bf16, 0), (forms.int8, 64)):
        mixed = workspace(LLAMA_8B, 512, {"layers.3.attn.o": other})
        assert mixed - workspace(LLAMA_8B, 512) == cublaslt + 256
    assert workspace(LLAMA_1B, 0) - workspace(LLAMA_1B, 512) == 16384 * 2048 * 2 - (32 << 20) + cublaslt + 256


@pytest.mark.parametrize("vocab", [128_256, 32_000])
def test_a_head_is_staged_and_never_copied(vocab: int) -> None:
    """A prompt's few logits are the decode kernels'; loading has the int4 weight as the file has it."""
    forms, model = NATIVE.WeightFormat, {**LLAMA_1B, "tied_head": False, "vocab_size": vocab}
    bf16, int4 = (settings(model, head_format=form, group_size=64) for form in (forms.bf16, forms.int4))
    count = vocab * LLAMA_1B["hidden_size"]
    more = NATIVE.plan_memory(int4)["workspace"] - NATIVE.plan_memory(bf16)["workspace"]
    assert more == count // 2 + count // 64 * 2 + 512 - (32 << 20)
