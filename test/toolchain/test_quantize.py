"""`edgellm quantize`: what ModelOpt's checkpoint holds, against torch's casts and transformers' logits."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import tiny
import torch
import transformers
import unified
from adapters import ALL, FUSED, merged, write_adapter
from modelopt.torch.quantization.model_calib import max_calibrate
from test_export import PROMPT, hf_logits, relative_error, run_executor
from test_lora_onnxruntime import run_portable as run_lora
from test_text_part import save_model_with_images

from edgellm_ros.cli.main import main
from edgellm_ros.errors import CheckpointError, ToolchainError
from edgellm_ros.executors.lora import read_adapter
from edgellm_ros.executors.lora_layout import fit, pack
from edgellm_ros.toolchain import load_recipe, quantize_and_save
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.lora import check_for_bundle
from edgellm_ros.toolchain.quantize import calibration as calibration_module
from edgellm_ros.toolchain.quantize import model as model_module
from edgellm_ros.toolchain.quantize import modelopt_backend as backend
from edgellm_ros.toolchain.quantize import products
from edgellm_ros.toolchain.quantize.calibration import BUILTIN, calibration_tokens
from edgellm_ros.toolchain.quantize.quantize import Quantized
from edgellm_ros.toolchain.quantize.recipe import recipe_names

SHORT = {"samples": 4, "sequence_length": 32}
ALGORITHMS = {
    "fp8": "FP8",
    "int4_awq": "W4A16_AWQ",
    "int4_gptq": "W4A16_AWQ",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "nvfp4": "W4A16_NVFP4",  # on a CPU; NVFP4 on a GPU
    "w4a8_awq": "W4A8_AWQ",
}
# mean |difference| of the logits over their standard deviation; random weights are harder than trained ones
CLOSE = {"fp8": 0.12, "int4_awq": 0.45, "int4_gptq": 0.45, "int8_sq": 0.04, "nvfp4": 0.4, "w4a8_awq": 0.45}
# what is folded differs by family: biases, grouped heads, norms that add one, fused projections
FOLDED = ("llama_tied", "llama_bias", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma3")
TOKENS = torch.arange(8, 72)[None] % tiny.VOCAB_SIZE


@pytest.fixture(scope="module")
def quantised(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Quantized]:
    """`quantised("qwen3", "fp8", kv_cache="fp8")`: that tiny checkpoint, by that recipe with those fields changed."""
    made: dict[Any, Quantized] = {}

    def get(kind: str, recipe: str, **fields: Any) -> Quantized:
        key = (kind, recipe, *sorted(fields.items()))
        if key not in made:
            output = tmp_path_factory.mktemp("quantised") / "out"
            made[key] = quantize_and_save(
                tiny_checkpoint(kind), output, load_recipe(recipe, **{**SHORT, **fields}), device="cpu"
            )
        return made[key]

    return get


@pytest.mark.parametrize("recipe", sorted(ALGORITHMS))
def test_dequantised_weights_give_the_originals_logits(quantised: Callable[..., Quantized], recipe: str) -> None:
    made = quantised("qwen3", recipe)
    assert made.algorithm == unified.quantization(made.path)["quant_algo"] == ALGORITHMS[recipe]
    with torch.no_grad():
        expected = tiny.make_model("qwen3")(TOKENS).logits
        found = unified.model_of(made.path)(TOKENS).logits
    distance = float((found - expected).abs().mean() / expected.std())
    assert 1e-5 < distance < CLOSE[recipe], distance


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [*((kind, "int4_awq") for kind in FOLDED), *((kind, "int8_sq") for kind in ("llama_bias", "phi3", "gemma3"))],
)
def test_folding_the_input_scales_away_changes_no_logit(
    kind: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_round_int4", lambda *_: None)
    model = tiny.make_model(kind)
    with torch.no_grad():
        expected = model(TOKENS).logits
    text = torch.arange(256).reshape(4, 64) % tiny.VOCAB_SIZE
    model, _ = backend.quantize_model(model, load_recipe(recipe), 32, lambda read: read(text))
    mtq.disable_quantizer(model, "*")  # what remains is the folding alone
    with torch.no_grad():
        found = model(TOKENS).logits
    assert float((found - expected).abs().max() / expected.std()) < 1e-4
    left = {name.split(".")[-2] for name, module in model.named_modules() if hasattr(module, "_pre_quant_scale")}
    assert left == ({"o_proj", "down_proj"} if kind == "phi3" else set())  # which ModelOpt's format allows


@pytest.mark.parametrize("kind", ["qwen3", "phi3"])  # phi3 keeps factors before o_proj and down_proj
def test_products_that_do_not_fit_at_once_are_taken_in_parts_with_the_same_quality(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        expected = tiny.make_model(kind)(TOKENS).logits
    text, distances, readings = torch.arange(512).reshape(8, 64) % tiny.VOCAB_SIZE, [], []

    def forward(read: Any) -> None:
        readings[-1] += 1
        read(text)

    for size in (1 << 30, 1 << 15):
        monkeypatch.setattr(products, "_PRODUCT_BYTES", size)
        readings.append(0)
        model, _ = backend.quantize_model(tiny.make_model(kind), load_recipe("int4_awq"), 32, forward)
        with torch.no_grad():
            distances.append(float((model(TOKENS).logits - expected).abs().mean() / expected.std()))
    assert readings[0] == 1 and readings[1] > 4
    assert distances[0] < CLOSE["int4_awq"] and distances[1] < 1.25 * distances[0], distances


def test_fp8_weights_are_torchs_cast_with_the_scale_of_the_largest(quantised: Callable[..., Quantized]) -> None:
    stored = unified.tensors(quantised("qwen3", "fp8").path)
    count = 0
    for name, weight in tiny.make_model("qwen3").named_parameters():
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" in stored:
            scale = weight.detach().abs().max() / 448
            torch.testing.assert_close(stored[f"{module}.weight_scale"], scale)
            expected = (weight.detach() / stored[f"{module}.weight_scale"]).to(torch.float8_e4m3fn)
            assert torch.equal(stored[name].view(torch.uint8), expected.view(torch.uint8)), name
            count += 1
        else:
            torch.testing.assert_close(stored[name], weight.detach(), rtol=0, atol=0)
    assert count == 3 * 7


def test_input_and_kv_scales_are_the_largest_values_that_the_original_computes_on_the_calibration_text(
    quantised: Callable[..., Quantized], tiny_checkpoint: Callable[[str], Path]
) -> None:
    made = quantised("qwen3", "fp8", kv_cache="fp8")
    assert unified.quantization(made.path)["kv_cache_quant_algo"] == "FP8"
    assert any(note.startswith("scales of the KV cache (k_scale, v_scale) from ") for note in made.notes)
    model, largest = tiny.make_model("qwen3"), {}

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))
            largest[f"{name}:out"] = max(largest.get(f"{name}:out", 0.0), float(output.abs().max()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(watch(name))
    source = model_module.open_source(tiny_checkpoint("qwen3"))
    sequences = calibration_tokens(BUILTIN, source.checkpoint, made.recipe)
    with torch.no_grad():
        model(torch.tensor(sequences))
    stored = unified.tensors(made.path)
    inputs = [name for name in stored if name.endswith(".input_scale")]
    assert len(inputs) == 3 * 7
    for name in inputs:
        assert float(stored[name]) * 448 == pytest.approx(largest[name.removesuffix(".input_scale")], rel=1e-4), name
    values = [name for name in stored if name.endswith(".v_scale")]
    assert len(values) == 3
    for name in values:
        assert float(stored[name]) * 448 == pytest.approx(largest[name.replace(".v_scale", ":out")], rel=1e-4), name
    assert len([name for name in stored if name.endswith(".k_scale")]) == 3


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "phi3"])  # phi3 keeps factors before o_proj and down_proj
def test_activation_scales_after_folding_are_those_of_another_reading(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_round_int4", lambda *_: None)
    text, readings = torch.arange(512).reshape(8, 64) % tiny.VOCAB_SIZE, []

    def forward(read: Any) -> None:
        readings.append(1)
        for part in text.split(3):
            read(part)

    model, _ = backend.quantize_model(tiny.make_model(kind), load_recipe("w4a8_awq"), 32, forward)
    assert len(readings) == 1
    quantisers = {name: m for name, m in model.named_modules() if name.endswith("input_quantizer") and m.is_enabled}
    found = {name: float(quantiser.amax) for name, quantiser in quantisers.items()}
    max_calibrate(model, forward)  # ModelOpt's own
    expected = {name: float(quantiser.amax) for name, quantiser in quantisers.items()}
    assert len(found) > 10 and found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in tiny.GGUF_KINDS if kind != "llama_llama3"])  # factors are refused
def test_a_gguf_file_becomes_the_transformers_model_that_it_was_made_of(kind: str, tmp_path: Path) -> None:
    expected = tiny.save_gguf(kind, tmp_path / "tiny.gguf")
    model = model_module.load_model(model_module.open_source(tmp_path / "tiny.gguf"), "cpu")
    text = torch.arange(200)[None] % tiny.VOCAB_SIZE  # longer than any window
    with torch.no_grad():
        torch.testing.assert_close(model(text).logits, expected(text).logits, rtol=1e-4, atol=1e-4)
    assert type(model) is type(expected)
    shared = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, expected)]
    assert shared[0] == shared[1]


@pytest.mark.parametrize(("lm_head", "algorithm"), [("fp8", "FP8"), ("int4", "W4A16_AWQ"), ("nvfp4", "W4A16_NVFP4")])
def test_a_tied_head_becomes_one_of_its_own_and_the_embedding_stays(
    quantised: Callable[..., Quantized], lm_head: str, algorithm: str
) -> None:
    made = quantised("llama_tied", "int4_awq", lm_head=lm_head)
    stored, original = unified.tensors(made.path), tiny.make_model("llama_tied")
    assert json.loads((made.path / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False
    assert torch.equal(stored["model.embed_tokens.weight"], original.model.embed_tokens.weight.detach())
    assert "lm_head.weight_scale" in stored
    settings = unified.quantization(made.path)
    of_head = settings.get("quantized_layers", {}).get("lm_head", settings)
    assert of_head["quant_algo"] == algorithm
    with torch.no_grad():
        expected, found = original(TOKENS).logits, unified.model_of(made.path)(TOKENS).logits
    assert float((found - expected).abs().mean() / expected.std()) < 0.45
    assert any("tied" in note for note in made.notes)


def test_int4_groups_are_the_largest_that_divide_every_layer_and_a_note_says_why(
    quantised: Callable[..., Quantized],
) -> None:
    made = quantised("qwen3", "int4_awq")  # 64, 96 and 128 input features
    assert made.group_size == unified.quantization(made.path)["group_size"] == 32
    assert any("groups of 32 instead of 128" in note for note in made.notes)
    assert unified.tensors(made.path)["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 3)


def test_excluded_modules_stay_and_the_configuration_lists_them(quantised: Callable[..., Quantized]) -> None:
    made = quantised("qwen3", "fp8", exclude=("*layers.0.*", "*down_proj"))
    stored = unified.tensors(made.path)
    kept = [n for n in stored if ("layers.0." in n or "down_proj" in n) and n.endswith("proj.weight")]
    assert len(kept) == 7 + 2 and all(stored[name].dtype == torch.float32 for name in kept)
    assert stored["model.layers.1.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert "lm_head" in unified.quantization(made.path)["exclude_modules"]


def test_tokenizer_template_and_stop_tokens_are_the_checkpoints(
    quantised: Callable[..., Quantized], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny.save_gguf("llama", tmp_path / "tiny.gguf", "F16")
    from_gguf = quantize_and_save(tmp_path / "tiny.gguf", tmp_path / "out", load_recipe("fp8", **SHORT), device="cpu")
    expected = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    for made in (quantised("llama_tied", "fp8"), from_gguf):
        found = transformers.AutoTokenizer.from_pretrained(made.path)
        for text in tiny.TEXTS:
            assert found(text).input_ids == expected(text).input_ids, text
        chat = [{"role": "user", "content": "Go."}]
        assert found.apply_chat_template(chat, tokenize=False) == expected.apply_chat_template(chat, tokenize=False)
        assert (found.bos_token_id, found.eos_token_id) == (expected.bos_token_id, expected.eos_token_id)
        # which transformers' own reading of generation settings agrees with
        assert transformers.GenerationConfig.from_pretrained(made.path).eos_token_id in (2, [2])


def test_the_recipe_that_was_carried_out_lies_beside_the_weights_and_can_be_given_again(
    quantised: Callable[..., Quantized],
) -> None:
    made = quantised("qwen3", "nvfp4")
    again = load_recipe(made.path / "recipe.yaml")
    assert again == made.recipe == load_recipe("nvfp4", **SHORT, activations="none")
    assert any("no GPU" in note for note in made.notes)
    assert made.num_sequences == 0  # nothing is measured for weights alone


def test_every_shipped_recipe_is_one_of_the_algorithms_tested_here() -> None:
    assert recipe_names() == sorted(ALGORITHMS)
    for name in recipe_names():
        assert dataclasses.replace(load_recipe(name)) == load_recipe(name)


def test_calibration_windows_are_spread_over_the_text_and_do_not_overlap(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = model_module.open_source(tiny_checkpoint("qwen3")).checkpoint
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(map(str, range(3000))), encoding="utf-8")
    whole = transformers.AutoTokenizer.from_pretrained(checkpoint.path)(text.read_text(encoding="utf-8")).input_ids
    windows = calibration_tokens(text, checkpoint, load_recipe("fp8", samples=10, sequence_length=50))
    assert len(windows) == 10
    starts = [next(at for at in range(len(whole)) if whole[at : at + 50] == window) for window in windows]
    assert all(later - earlier >= 50 for earlier, later in itertools.pairwise(starts))
    assert starts[0] == 0 and starts[-1] > len(whole) - 150


def test_of_a_large_calibration_file_only_pieces_from_all_over_it_are_read(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = model_module.open_source(tiny_checkpoint("qwen3")).checkpoint
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(f"{number}é時" for number in range(40_000)), encoding="utf-8")  # cut within characters, too
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.path)
    recipe = load_recipe("fp8", samples=7, sequence_length=30)
    monkeypatch.setattr(calibration_module, "_LARGE", 10_000)
    pieces = calibration_module._read(text, 7, 30 * 16)
    assert len(pieces) == 7 and sum(len(piece.encode()) for piece in pieces) < 7 * 30 * 16
    whole = text.read_text(encoding="utf-8")
    places = [whole.index(piece) for piece in pieces]
    assert places[0] < 10 and places == sorted(places) and places[-1] > len(whole) - 500
    windows = calibration_tokens(text, checkpoint, recipe)
    assert len(windows) == 7 and all(len(window) == 30 for window in windows)
    assert all(tokenizer.decode(window).strip("\ufffd ") in whole for window in windows)
    text.write_bytes(b"\x80" * 20_000)
    with pytest.raises(ToolchainError, match="is not UTF-8 text"):
        calibration_tokens(text, checkpoint, recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: fp8\nactivations: fp8\nmethod: max\nsmaples: 3\n", r"unknown setting 'smaples'; known are weights"),
        ("weights: fp6\n", r"weights is 'fp6'; allowed are fp8, int4, int8, nvfp4"),
        ("weights: int8\nactivations: none\n", r"weights int8 with activations none do not exist; allowed are"),
        ("weights: fp8\nactivations: fp8\nmethod: awq\n", r"method is 'awq'; .* are made with max"),
        ("weights: int4\ngroup_size: 96\n", r"group_size is 96; allowed are 128, 64, 32, 16"),
        ("weights: fp8\nactivations: fp8\nmethod: max\ngroup_size: 64\n", r"group_size is 64 with weights fp8"),
        ("weights: int4\ngroup_size: 64\nsamples: none\n", r"samples is 'none'; it must be of type int"),
        ("weights: fp8\nactivations: fp8\nmethod: max\nsamples: 3\n", r"samples is 3; allowed is 4 to"),
        ("exclude: '*down*'\n", r"exclude is '\*down\*'; it must be a list, such as \['\*layers"),
        ("- fp8\n", r"holds no keys"),
        ("weights: [\n", r"cannot be read"),
    ],
)
def test_a_wrong_recipe_is_refused_with_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ToolchainError, match=message):
        load_recipe(path)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (("*down_proj", "*dwon_proj"), r"exclude has '\*dwon_proj', which no linear layer's name fits; they are like model"),
        (("*_proj",), r"exclude \*_proj leaves no layer to quantise"),
    ],
)
def test_what_a_recipe_leaves_out_has_to_be_there_and_not_be_all(
    exclude: tuple[str, ...], message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ToolchainError, match=message):
        quantize_and_save(tiny_checkpoint("qwen3"), tmp_path / "out", load_recipe("int4_awq", exclude=exclude, **SHORT))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exclude", ["*v_proj", "*up_proj"])
def test_a_layer_that_is_left_out_still_reads_what_it_did(
    exclude: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = load_recipe("int8_sq", exclude=(exclude,), **SHORT)
    quantize_and_save(tiny_checkpoint("llama"), tmp_path / "q", recipe, device="cpu")
    bundle = export_bundle(tmp_path / "q", tmp_path / "bundle")
    # a norm that took the factor of the layers beside it gave 0.77 to 1.03
    assert relative_error(run_executor(bundle, PROMPT)[0], hf_logits(tiny.make_model("llama"), PROMPT)) < 0.09


def test_an_unknown_recipe_is_refused_with_the_shipped_ones() -> None:
    with pytest.raises(ToolchainError, match=r"recipe is 'int3'; allowed are fp8, int4_awq, int4_gptq, int8_sq, nvfp4, w4a8_awq"):
        load_recipe("int3")
    with pytest.raises(ToolchainError, match=r"recipe mine.yaml does not exist; shipped are fp8"):
        load_recipe("mine.yaml")


def test_calibration_text_that_is_missing_binary_or_too_short_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, recipe = tiny_checkpoint("qwen3"), load_recipe("fp8", **SHORT)
    with pytest.raises(ToolchainError, match=r"calibration file .*none.txt cannot be read: No such file"):
        quantize_and_save(source, tmp_path / "out", recipe, calibration=tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ToolchainError, match=r"is not UTF-8 text"):
        quantize_and_save(source, tmp_path / "out", recipe, calibration=tmp_path / "binary")
    (tmp_path / "short").write_text("Go to the kitchen.", encoding="utf-8")
    with pytest.raises(ToolchainError, match=r"holds \d+ tokens, which make 0 sequences of 32; at least 4 are needed"):
        quantize_and_save(source, tmp_path / "out", recipe, calibration=tmp_path / "short")
    with pytest.raises(ToolchainError, match=r"none.txt cannot be read"):  # also where the recipe does not need it
        quantize_and_save(source, tmp_path / "out", load_recipe("nvfp4"), calibration=tmp_path / "none.txt", device="cpu")
    assert not (tmp_path / "out").exists()
    long, other = load_recipe("fp8", samples=4, sequence_length=257), shutil.copytree(source, tmp_path / "other")
    with pytest.raises(ToolchainError, match=r"sequence_length is 257; .* reads 256 tokens at most, .* --sequence-length 256"):
        quantize_and_save(source, tmp_path / "out", long, device="cpu")
    raw = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["vocab"]["e"] = 400
    (other / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ToolchainError, match=r"gives ids up to 400 but the model has 320 embeddings; .* not of the same"):
        quantize_and_save(other, tmp_path / "out", recipe, device="cpu")
    (tmp_path / "long").write_text("Go to the kitchen. " * 500, encoding="utf-8")
    made = quantize_and_save(source, tmp_path / "out", load_recipe("nvfp4"), calibration=tmp_path / "long", device="cpu")
    assert made.num_sequences == 0 and "is not used: these scales come from the weights alone" in made.notes[-1]


@pytest.mark.parametrize("kind", ["qwen2", "phi3", "gemma3_scaled"])
def test_an_adapter_of_the_original_fits_where_factors_were_folded_into_the_layers_before(
    kind: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize_and_save(tiny_checkpoint(kind), tmp_path / "q", load_recipe("int8_sq", **SHORT), device="cpu")
    bundle = export_bundle(tmp_path / "q", tmp_path / "bundle", max_lora_rank=8)
    model = tiny.make_model(kind)
    path = write_adapter(tmp_path / "a", model, dict.fromkeys(FUSED if kind == "phi3" else ALL, 4), seed=1)
    expected = hf_logits(merged(model, path), PROMPT)
    adapter = read_adapter(path)
    got = run_lora(bundle, PROMPT, pack(check_for_bundle(adapter, bundle), bundle.manifest.model)[0])
    assert relative_error(got, expected) < 0.09
    as_it_is = pack(fit(adapter, bundle.manifest.model, 8), bundle.manifest.model)[0]
    assert relative_error(run_lora(bundle, PROMPT, as_it_is), expected) > 0.3  # what the factors are for


def test_of_a_model_with_images_the_decoder_is_quantised_and_exports(tmp_path: Path) -> None:
    save_model_with_images(tmp_path / "source")
    made = quantize_and_save(tmp_path / "source", tmp_path / "out", load_recipe("fp8", **SHORT), device="cpu")
    assert "its decoder alone is quantised" in made.notes[0]
    bundle = export_bundle(tmp_path / "out", tmp_path / "bundle")
    assert bundle.manifest.model.family == "gemma3" and bundle.manifest.quantization.weights == "fp8"
    original = export_bundle(tmp_path / "source", tmp_path / "original", weights="fp32")
    assert relative_error(run_executor(bundle, PROMPT)[0], run_executor(original, PROMPT)[0]) < 0.15


def test_a_quantised_checkpoint_is_not_quantised_again(quantised: Callable[..., Quantized], tmp_path: Path) -> None:
    made = quantised("qwen3", "fp8")
    with pytest.raises(CheckpointError, match=r"is already quantised \(modelopt\); quantise the original"):
        quantize_and_save(made.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_input_features_that_no_group_divides_are_refused_by_name(tmp_path: Path) -> None:
    config = tiny.CONFIGS["llama"]()
    config.intermediate_size = 104
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "odd")
    tiny.save_tokenizer(tmp_path / "odd")
    for name in ("int4_awq", "fp8", "int8_sq", "nvfp4"):  # export takes none of them
        with pytest.raises(ToolchainError, match=r"layers.0.mlp.down_proj has 104 input features.*groups of 16.*fp16"):
            quantize_and_save(tmp_path / "odd", tmp_path / "out", load_recipe(name, **SHORT), device="cpu")
    recipe = load_recipe("int4_awq", **SHORT, exclude=("*down_proj*",))
    assert quantize_and_save(tmp_path / "odd", tmp_path / "out", recipe, device="cpu").group_size == 64


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "_free_bytes", lambda device: 10**8)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ToolchainError, match=r"parameters, which need about 1.1 GB on a CPU; 0.1 GB are free"):
        quantize_and_save(tiny_checkpoint("qwen3"), tmp_path / "out", load_recipe("fp8", **SHORT), device="cpu")


def test_an_output_that_exists_is_kept_and_only_a_quantised_checkpoint_is_replaced(
    quantised: Callable[..., Quantized], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable", encoding="utf-8")
    recipe = load_recipe("fp8", **SHORT)
    with pytest.raises(ToolchainError, match=r"exists; choose another directory, or let it be replaced with --force"):
        quantize_and_save(tiny_checkpoint("qwen3"), tmp_path / "mine", recipe)
    with pytest.raises(ToolchainError, match=r"is not a quantised checkpoint; it is not replaced"):
        quantize_and_save(tiny_checkpoint("qwen3"), tmp_path / "mine", recipe, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    first = quantize_and_save(tiny_checkpoint("qwen3"), tmp_path / "out", recipe, device="cpu")
    text = first.path / "mine.txt"
    text.write_text("The arm lifts the red cube. " * 400, encoding="utf-8")
    with pytest.raises(ToolchainError, match=r"out would be replaced, and .*mine\.txt, which is read, with it"):
        quantize_and_save(tiny_checkpoint("qwen3"), first.path, recipe, calibration=text, device="cpu", overwrite=True)
    text.rename(first.path / "left_over")
    quantize_and_save(tiny_checkpoint("qwen3"), tmp_path / "out", recipe, device="cpu", overwrite=True)
    assert not (first.path / "left_over").exists()


@pytest.mark.parametrize("stage", ["loading", "calibrating, pass 1", "writing"])
def test_an_interrupt_leaves_nothing_behind_and_the_old_output_in_place(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, stage: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hf_quant_config.json").write_text("old", encoding="utf-8")

    def interrupt(name: str, done: int, total: int) -> None:
        if name == stage and done == (total if stage == "writing" else 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_and_save(tiny_checkpoint("qwen3"), tmp_path / "out", load_recipe("fp8", **SHORT), device="cpu",
                          overwrite=True, progress=interrupt)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "hf_quant_config.json").read_text(encoding="utf-8") == "old"


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the disk: writing fails in the same place, with EFBIG for ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(name: str, done: int, total: int) -> None:
        if name == "writing" and done == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    try:
        with pytest.raises(ToolchainError, match=rf"cannot write .*out: .*(os error {errno.EFBIG}|too large)"):
            quantize_and_save(tiny_checkpoint("qwen3"), tmp_path / "out", load_recipe("fp8", **SHORT), device="cpu",
                              progress=limit)  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_the_command_quantises_shows_what_it_did_and_writes_nothing_else_to_standard_output(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(tiny_checkpoint("qwen3")), "-o", str(tmp_path / "out"), "--recipe", "int4_awq"]
    command += ["--samples", "4", "--sequence-length", "32", "--lm-head", "fp8", "--device", "cpu"]
    assert main(command) == 0
    said = capfd.readouterr()
    assert "groups of 32" in said.out and "4 sequences of 32 tokens" in said.out and "Inserted" not in said.out
    assert "calibrating, pass 2" in said.err and "Warning" not in said.err
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (recipe.samples, recipe.lm_head, recipe.group_size) == (4, "fp8", 128)
    assert main(command) == 2
    assert "--force" in capfd.readouterr().err
    assert main([*command, "--force", "--recipe", "int5"]) == 2
    assert "recipe is 'int5'; allowed are" in capfd.readouterr().err


def test_without_modelopt_the_error_says_what_to_install(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(ToolchainError, match=r"needs modelopt; pip install 'edgellm_ros\[quantize\]'"):
        quantize_and_save(tiny_checkpoint("qwen3"), tmp_path / "out", load_recipe("fp8", **SHORT))


@pytest.mark.parametrize("recipe", sorted(ALGORITHMS))
def test_a_bundle_of_the_quantised_checkpoint_computes_what_its_dequantised_weights_compute(
    quantised: Callable[..., Quantized], recipe: str, tmp_path: Path
) -> None:
    made = quantised("qwen3", recipe)
    bundle = export_bundle(made.path, tmp_path / "bundle")
    expected = hf_logits(unified.model_of(made.path), PROMPT)
    assert relative_error(run_executor(bundle, PROMPT)[0], expected) < (0.002 if recipe == "fp8" else 0.1)
    quant = bundle.manifest.quantization
    assert made.algorithm in quant.kept
    # no layer multiplies its input at run time, so that every executor runs it
    assert not any(form.input_factor for form in quant.formats.values())
