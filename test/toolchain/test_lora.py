"""Adapters that are merged, checked and packed: PEFT's own merge is the oracle, and what does not belong is refused."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
import safetensors.numpy
import torch
import transformers
from adapters import PATTERN, merged, peft_adapter, write_adapter
from safetensors.torch import load_file
from test_text_part import save_model_with_images
from tiny import make_model, save_checkpoint

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.errors import (
    BundleError,
    CheckpointError,
    EdgeLLMError,
    RequestError,
    ToolchainError,
    UnsupportedError,
)
from edgellm_ros.executors.lora import CONFIG, WEIGHTS, read_adapter
from edgellm_ros.executors.lora_layout import open_packed, pack, unpack
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.input_factors import write_input_factors
from edgellm_ros.toolchain.lora import check_for_bundle, pack_adapter
from edgellm_ros.toolchain.lora_merge import merge_adapter

TinyBundle = Callable[..., Bundle]


def edit_config(path: Path, **values: Any) -> Path:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **values}))
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "pick", make_model("llama"), {"q_proj": 4, "v_proj": 8, "down_proj": 2}, 1)


@pytest.fixture
def bundle(tiny_bundle: TinyBundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny_bundle("llama", "int4").path, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("kind", "dtype", "config"),
    [
        ("llama", torch.float32, {"rank_pattern": PATTERN, "alpha_pattern": {"v_proj": 3, "mlp.up_proj": 7}}),
        ("qwen2", torch.float32, {"use_rslora": True, "target_modules": "all-linear", "rank_pattern": PATTERN}),
        ("qwen3", torch.bfloat16, {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [0, 2]}),
        ("phi3", torch.float32, {"target_modules": "all-linear", "rank_pattern": {"qkv_proj": 7}}),
        ("mistral", torch.float16, {"target_modules": r".*\.(q|down)_proj"}),
    ],
)
def test_a_merged_checkpoint_is_pefts_merge(kind: str, dtype: torch.dtype, config: dict[str, Any], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "merged"
    before = save_checkpoint(kind, source, dtype=dtype, shard_size="100KB").state_dict()
    model = peft_adapter(tmp_path / "adapter", source, dtype=dtype, **config)
    count = merge_adapter(source, tmp_path / "adapter", out)
    expected = model.merge_and_unload().state_dict()
    got = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    changed = [name for name in got if not torch.equal(got[name], before[name])]
    assert count == len(changed) == sum(not torch.equal(expected[name], before[name]) for name in got) > 0
    # PEFT rounds B A to the stored dtype before it adds: up to one unit in the last place of W or of the sum.
    step = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    for name, tensor in got.items():
        assert tensor.dtype == dtype
        assert torch.allclose(tensor.double(), expected[name].double(), rtol=step, atol=step), name
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.config.model_type == model.config.model_type
    assert {p.name for p in out.iterdir()} == {p.name for p in source.iterdir()}


def test_merging_rounds_once_from_fp32(tmp_path: Path, adapter: Path) -> None:
    save_checkpoint("llama", tmp_path / "source", dtype=torch.bfloat16)
    merge_adapter(tmp_path / "source", adapter, tmp_path / "out")
    model = merged(make_model("llama").to(torch.bfloat16).float(), adapter)
    got = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    expected = model.model.layers[1].self_attn.q_proj.weight.to(torch.bfloat16)
    assert (got == expected).float().mean() > 0.999  # rounding twice changes some per cent of them


def test_a_merged_checkpoint_exports_and_weights_of_other_formats_are_not_copied(tmp_path: Path, adapter: Path) -> None:
    save_checkpoint("llama", tmp_path / "source")
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"the old weights")
    merge_adapter(tmp_path / "source", adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert export_bundle(tmp_path / "out", tmp_path / "bundle", weights="fp16").manifest.model.name == "out"


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    save_checkpoint("llama", source)
    small = write_adapter(tmp_path / "small", make_model("mistral"), {"q_proj": 4}, 1)
    other = edit_config(write_adapter(tmp_path / "other", make_model("llama"), {"q_proj": 4}, 1), base_model_name_or_path="org/robot-7b")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight is \[64, 64\], but .* \[192, 64\]"):
        merge_adapter(source, small, tmp_path / "out")
    with pytest.raises(ToolchainError, match="trained on 'org/robot-7b', but .* is 'source'; .*--any-base"):
        merge_adapter(source, other, tmp_path / "out")
    assert merge_adapter(source, other, tmp_path / "named", any_base=True) == 3
    with pytest.raises(ToolchainError, match="exists; .*--force"):
        merge_adapter(source, adapter, tmp_path / "named")
    with pytest.raises(ToolchainError, match="is the checkpoint itself"):
        merge_adapter(source, adapter, source, overwrite=True)
    kept = shutil.copytree(adapter, tmp_path / "named" / "adapters" / "pick")
    with pytest.raises(ToolchainError, match="named would be replaced, and .*pick, which is read, with it"):
        merge_adapter(source, kept, tmp_path / "named", overwrite=True)
    assert read_adapter(kept).rank == 8

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgellm_ros.toolchain.lora_merge._write", full)
    with pytest.raises(ToolchainError, match="cannot write .*No space left"):
        merge_adapter(source, adapter, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "small", "other", "named", "pick"}


def test_the_decoder_of_a_model_with_images_is_merged_and_the_rest_is_not(tmp_path: Path) -> None:
    save_model_with_images(tmp_path / "source")
    adapter = write_adapter(tmp_path / "adapter", make_model("gemma3"), {"q_proj": 4, "down_proj": 2}, 1)
    count = merge_adapter(tmp_path / "source", adapter, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert count == len(changed) == 14 and all("language_model" in name for name in changed)
    for item in read_adapter(adapter).tensors:
        name = next(n for n in changed if f"layers.{item.layer}." in n and item.target in n)
        expected = before[name].numpy().astype(np.float64) + item.scale * (item.b.astype(np.float64) @ item.a)
        assert np.allclose(after[name].numpy(), expected, atol=1e-5)


def test_a_disk_that_is_full_leaves_the_bundle_without_the_adapter(bundle: Bundle, adapter: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(path.name for path in bundle.path.rglob("*") if path.is_file())
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limit[1]))
    try:
        with pytest.raises(ToolchainError, match=r"cannot write .*pick.safetensors.*File too large"):
            pack_adapter(adapter, bundle)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(path.name for path in bundle.path.rglob("*") if path.is_file()) == before
    assert not Bundle.open(bundle.path).manifest.loras


def test_an_adapter_is_kept_where_the_disk_has_no_room_for_the_manifest_of_its_successor(
    bundle: Bundle, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle = pack_adapter(adapter, bundle)
    before = sorted(path for path in bundle.path.rglob("*") if path.is_file())
    edit_config(adapter, lora_alpha=3)
    write, room = Path.write_text, [0]  # manifests that there is room for

    def full(self: Path, *args: Any, **options: Any) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        room[0] -= 1
        return write(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    for room[0] in (0, 1):
        with pytest.raises(ToolchainError, match="cannot write .*No space left"):
            pack_adapter(adapter, bundle, overwrite=True)
        assert Bundle.open(bundle.path).manifest == bundle.manifest
        assert sorted(path for path in bundle.path.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize("said_in", ["config.json", "hf_quant_config.json"])
def test_a_quantised_checkpoint_is_not_merged_into(said_in: str, tmp_path: Path, adapter: Path) -> None:
    source = tmp_path / "source"
    if said_in == "config.json":
        packers.save_quantized("llama", source, packers.awq(32), packers.awq_config(32))
    else:  # ModelOpt's older exports
        packers.save_quantized("llama", source, packers.modelopt_fp8, {}, packers.modelopt_files("FP8")[1])
    with pytest.raises(CheckpointError, match="quantised; merge into the original"):
        merge_adapter(source, adapter, tmp_path / "out", any_base=True)


def test_packed_blocks_times_an_input_are_what_each_projection_adds(bundle: Bundle, adapter: Path) -> None:
    _, bundle = pack_adapter(adapter, bundle)
    packed, model = open_packed(Bundle.open(bundle.path), "pick"), make_model("llama")
    changed = merged(model, adapter)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    for layer in range(3):
        a, b = packed.matrices[layer, "attn.qkv"]
        assert a.shape == (64, 12) and b.shape == (12, 128) and packed.ranks[layer, "attn.qkv"] == (4, 0, 8)
        old, new = (m.model.layers[layer].self_attn for m in (model, changed))
        delta = [getattr(new, p).weight - getattr(old, p).weight for p in ("q_proj", "k_proj", "v_proj")]
        expected = torch.from_numpy(x) @ torch.cat(delta).T
        assert np.allclose(x @ a @ b, expected.detach().numpy(), atol=1e-4)
    assert {stem for _, stem in packed.matrices} == {"attn.qkv", "mlp.down"}
    assert packed.rank == 8
    # The native executor takes the projections one by one.
    for item in unpack(packed, bundle.manifest.model).tensors:
        original = next(t for t in read_adapter(adapter).tensors if (t.layer, t.target) == (item.layer, item.target))
        assert np.allclose(item.scale * item.b @ item.a, original.scale * original.b @ original.a, atol=1e-6)


def test_where_others_folded_factors_only_an_adapter_of_that_very_checkpoint_is_packed(
    tmp_path: Path, adapter: Path
) -> None:
    packers.save_quantized("llama", tmp_path / "awq", packers.awq(32), packers.awq_config(32))
    bundle = export_bundle(tmp_path / "awq", tmp_path / "bundle")
    with pytest.raises(ToolchainError, match="factors of AWQ or SmoothQuant .* do not fit; merge the adapter into the original"):
        pack_adapter(adapter, bundle)
    assert pack_adapter(adapter, bundle, any_base=True)[1].manifest.loras
    converted = export_bundle(tmp_path / "awq", tmp_path / "int8", weights="int8")  # its norms are the same
    with pytest.raises(ToolchainError, match="do not fit"):
        check_for_bundle(read_adapter(adapter), converted)


@pytest.mark.parametrize("step", ["SmoothQuantModifier", "AWQModifier", "GPTQModifier"])
def test_llm_compressors_recipe_says_whether_it_folded_factors(step: str, tmp_path: Path) -> None:
    config = packers.ct_config("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"})
    packers.save_quantized("llama", tmp_path / "ct", packers.ct_int8, config)
    (tmp_path / "ct" / "recipe.yaml").write_text(f"default_stage:\n  default_modifiers:\n    {step}: {{}}\n")
    assert open_checkpoint(tmp_path / "ct").folded == (step != "GPTQModifier")


def test_factors_that_are_written_down_are_taken_out_of_an_adapter_and_damaged_ones_refused(
    tmp_path: Path, adapter: Path
) -> None:
    packers.save_quantized("llama", tmp_path / "awq", packers.awq(32), packers.awq_config(32))
    factor = np.linspace(0.5, 2, 64, dtype=np.float32)
    write_input_factors(tmp_path / "awq", {"model.layers.1.self_attn.q_proj.in": factor})
    bundle = export_bundle(tmp_path / "awq", tmp_path / "bundle")
    plain = {(item.layer, item.target): item for item in read_adapter(adapter).tensors}
    for item in check_for_bundle(read_adapter(adapter), bundle).tensors:
        wanted = plain[item.layer, item.target].a / (factor if (item.layer, item.target) == (1, "q_proj") else 1)
        assert np.array_equal(item.a, wanted.astype(np.float32))
    write_input_factors(tmp_path / "awq", {"model.layers.1.self_attn.q_proj.in": factor[:5]})
    with pytest.raises(ToolchainError, match=r"of another model: layers\.1\.q_proj"):
        check_for_bundle(read_adapter(adapter), export_bundle(tmp_path / "awq", tmp_path / "bundle", overwrite=True))
    for damage in (b"", b"PK", b"numbers"):
        (tmp_path / "awq" / "input_factors.npz").write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"input_factors\.npz is damaged: .*; quantise the model again"):
            export_bundle(tmp_path / "awq", tmp_path / "other")


def test_an_adapter_of_stacked_projections_is_packed_apart(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    bundle, model = tiny_bundle("phi3", "fp16"), make_model("phi3")
    path = write_adapter(tmp_path / "a", model, {"qkv_proj": 6, "gate_up_proj": 4}, 1)
    tensors, _ = pack(check_for_bundle(read_adapter(path), bundle), bundle.manifest.model)
    x, changed = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32), merged(model, path)
    for stem, block, target in (("attn.qkv", "self_attn", "qkv_proj"), ("mlp.gate_up", "mlp", "gate_up_proj")):
        old, new = (getattr(getattr(m.model.layers[1], block), target).weight.detach().numpy() for m in (model, changed))
        product = x @ tensors[f"layers.1.{stem}.lora_A"] @ tensors[f"layers.1.{stem}.lora_B"]
        assert np.allclose(product, x @ (new - old).T, atol=1e-4)


def test_a_packed_adapter_is_in_the_manifest_and_its_hash_is_checked(bundle: Bundle, adapter: Path) -> None:
    weights = bundle.manifest.files["weights.safetensors"].sha256
    pack_adapter(adapter, bundle, "place")
    opened = Bundle.open(bundle.path)
    entry = opened.manifest.loras["place"]
    assert (entry.rank, entry.base_sha256, entry.source) == (8, weights, "pick")
    assert set(entry.targets) == {"q_proj", "v_proj", "down_proj"}
    path = bundle.path / "lora" / "place.safetensors"
    assert set(safetensors.numpy.load_file(path)) >= {"layers.0.attn.qkv.lora_A", "layers.2.mlp.down.lora_B"}
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="place.safetensors was changed"):
        Bundle.open(bundle.path)
    with pytest.raises(RequestError, match="no adapter 'pick'; it has place"):
        open_packed(opened, "pick")


def test_a_taken_name_is_replaced_only_when_told_and_a_path_is_no_name(bundle: Bundle, adapter: Path) -> None:
    _, bundle = pack_adapter(adapter, bundle)
    before = bundle.manifest.files["lora/pick.safetensors"]
    edit_config(adapter, lora_alpha=3)
    with pytest.raises(ToolchainError, match="has an adapter 'pick'; .*--force"):
        pack_adapter(adapter, bundle)
    _, bundle = pack_adapter(adapter, bundle, overwrite=True)
    assert Bundle.open(bundle.path).manifest.files["lora/pick.safetensors"] != before
    for name in ("../evil", "a/b", ".hidden", "x" * 65, "tab\t"):
        with pytest.raises(ToolchainError, match="letters, digits"):
            pack_adapter(adapter, bundle, name)


def test_a_full_disk_leaves_the_bundle_as_it_was(
    bundle: Bundle, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_adapter(adapter, bundle)
    bundle = Bundle.open(bundle.path)
    listing, text = sorted(bundle.path.rglob("*")), (bundle.path / "manifest.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgellm_ros.toolchain.lora.save_file", full)
    with pytest.raises(ToolchainError, match="cannot write .*No space left"):
        pack_adapter(adapter, bundle, overwrite=True)
    assert sorted(bundle.path.rglob("*")) == listing and (bundle.path / "manifest.json").read_bytes() == text


@pytest.mark.parametrize(
    ("kind", "ranks", "message"),
    [
        ("mistral", {"q_proj": 4}, r"layers\.0\.q_proj\.lora_B is \[192, 4\]; it must be \[64, 4\]; the adapter was made"),
        ("qwen3", {"o_proj": 4}, r"layers\.0\.o_proj\.lora_A is \[4, 128\]; it must be \[rank, 64\]"),
        ("llama", {"q_proj": 65}, r"layers\.0\.q_proj has rank 65; at most 64"),
    ],
)
def test_an_adapter_of_other_shapes_or_over_the_rank_is_refused_by_tensor(
    kind: str, ranks: dict[str, int], message: str, bundle: Bundle, tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "a", make_model(kind), ranks, 1)
    with pytest.raises(RequestError, match=message):
        pack_adapter(path, bundle)
    assert not (bundle.path / "lora").exists()


def test_an_adapter_with_more_layers_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", make_model("llama"), {"q_proj": 2}, 1)
    tensors = load_file(path / WEIGHTS)
    renamed = {name.replace("layers.2.", "layers.7."): np.asarray(t) for name, t in tensors.items()}
    safetensors.numpy.save_file(renamed, path / WEIGHTS)
    with pytest.raises(RequestError, match=r"layers\.7\.q_proj: the model has layers 0 to 2"):
        pack_adapter(path, bundle)


@pytest.mark.parametrize(
    ("base", "fits"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("/home/me/models/smollm2-135m-instruct/", True),
        ("/cache/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/0123abc", True),
        ("unsloth/SmolLM2-135M-Instruct-bnb-4bit", True),
        ("Qwen/SmolLM2-135M-Instruct-AWQ", True),
        ("", True),
        ("HuggingFaceTB/SmolLM2-135M", False),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", False),
    ],
)
def test_an_adapter_of_another_base_by_name_is_refused(base: str, fits: bool, bundle: Bundle, adapter: Path) -> None:
    import dataclasses

    model = dataclasses.replace(bundle.manifest.model, name="SmolLM2-135M-Instruct-Q4_1")
    named = Bundle(bundle.path, dataclasses.replace(bundle.manifest, model=model))
    read = read_adapter(edit_config(adapter, base_model_name_or_path=base))
    if fits:
        check_for_bundle(read, named)
        return
    with pytest.raises(ToolchainError, match=f"trained on '{base}', but .*SmolLM2-135M-Instruct-Q4_1"):
        check_for_bundle(read, named)
    check_for_bundle(read, named, any_base=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'.*convert it with PEFT"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has 'lm_head'"),
        ({"hyper_rotation": {"angle": 3}}, "hyper_rotation is {'angle': 3}, which this version does not know"),
    ],
)
def test_the_command_line_refuses_kinds_of_adapters_by_name(
    values: dict[str, Any], message: str, bundle: Bundle, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(adapter, **values)
    with pytest.raises(UnsupportedError, match=message):
        read_adapter(adapter)
    for command in (["check", str(adapter)], ["pack", str(adapter), "--bundle", str(bundle.path)]):
        assert main(["lora", *command]) == 2
        assert next(iter(values)) in capsys.readouterr().err


def test_pefts_own_defaults_are_all_known(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; make test installs it")
    save_checkpoint("llama", tmp_path / "source")
    peft_adapter(tmp_path / "a", tmp_path / "source")
    assert len(read_adapter(tmp_path / "a").tensors) == 21
    for variant in ({"use_dora": True}, {"lora_bias": True}, {"target_modules": ["q_proj", "lm_head"]}):
        peft_adapter(tmp_path / "b", tmp_path / "source", **variant)
        with pytest.raises(EdgeLLMError, match=r"use_dora|lora_bias|lm_head"):
            read_adapter(tmp_path / "b")
    assert peft.__version__


def test_the_commands_check_pack_and_merge(
    bundle: Bundle, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["lora", "check", str(adapter), "--bundle", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert "down_proj" in shown and "0 to 2" in shown and "fits" in shown
    (row,) = (line.split("│") for line in shown.splitlines() if "q_proj" in line)
    assert [cell.strip() for cell in row[1:7]] == ["q_proj", "0 to 2", "4", "8", "2", "1,536"]
    assert main(["lora", "pack", str(adapter), "--bundle", str(bundle.path), "--name", "grasp"]) == 0
    shown = capsys.readouterr().out
    assert "packed as 'grasp'" in shown and "only the cuda executor runs it" in shown
    assert main(["inspect", str(bundle.path)]) == 0
    assert "grasp: rank 8" in capsys.readouterr().out
    save_checkpoint("llama", tmp_path / "source")
    assert main(["lora", "merge", str(tmp_path / "source"), str(adapter), "-o", str(tmp_path / "out")]) == 0
    assert "9 tensors changed" in capsys.readouterr().out
    assert main(["lora", "check", str(tmp_path / "nothing")]) == 2
    assert "is no LoRA adapter" in capsys.readouterr().err
    export = ["export", str(tmp_path / "source"), "-o", str(bundle.path), "--weights", "fp16", "--force"]
    assert main(export) == 0
    assert "had the adapters grasp, which were packed for its weights; pack them again" in capsys.readouterr().err
    assert not Bundle.open(bundle.path).manifest.loras and not (bundle.path / "lora").exists()
    assert main(export) == 0
    assert "adapters" not in capsys.readouterr().err
