"""`edgellm verify` reports what torch and transformers say of the same tokens, and its marks cannot be passed by luck."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from tiny import make_model, save_checkpoint, save_tokenizer

from edgellm_ros.bundle import TOKENIZER, Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import CheckpointError, ToolchainError, UnsupportedError
from edgellm_ros.executors.base import SequenceStep
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.quality import Quality
from edgellm_ros.tokenizer import Tokenizer
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.export import SCHEMES, export_bundle
from edgellm_ros.toolchain.verify import verify as verify_module
from edgellm_ros.toolchain.verify.comparison import Comparison
from edgellm_ros.toolchain.verify.marks import read_marks
from edgellm_ros.toolchain.verify.passages import Text, read_tasks, read_text
from edgellm_ros.toolchain.verify.reading import CheckpointReading
from edgellm_ros.toolchain.verify.verify import verify_bundle, verify_checkpoint

TinyCheckpoint = Callable[[str], Path]
TinyBundle = Callable[[str, str], Bundle]
WORDS = read_text(None).content.split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 700 tokens of the tiny tokenizer: two windows of the tiny models' context and a rest."""
    path = tmp_path_factory.mktemp("text") / "part.txt"
    path.write_text(" ".join(WORDS[:160]), encoding="utf-8")
    return path


@pytest.fixture
def copy(tiny_bundle: TinyBundle, tmp_path: Path) -> Callable[..., Bundle]:
    def get(kind: str = "llama", weights: str = "fp32") -> Bundle:
        return Bundle.open(shutil.copytree(tiny_bundle(kind, weights).path, tmp_path / "copy"))

    return get


def windows(ids: list[int], size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each `size` tokens with those that follow them; every token but the first follows once."""
    whole = torch.tensor(ids)
    return [(whole[i : i + size][: len(ids) - 1 - i], whole[i + 1 : i + size + 1]) for i in range(0, len(ids) - 1, size)]


def hf(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0].float()


def torch_figures(bundle: torch.Tensor, original: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    loss, base = F.cross_entropy(bundle, targets, reduction="none"), F.cross_entropy(original, targets, reduction="none")
    kl = F.kl_div(F.log_softmax(bundle, -1), F.log_softmax(original, -1), log_target=True, reduction="none").sum(-1)
    difference = loss - base
    return {
        "num_tokens": len(targets),
        "perplexity": loss.mean().exp().item(),
        "original_perplexity": base.mean().exp().item(),
        "ratio_error": (difference.mean().exp() * difference.std(correction=0) / len(targets) ** 0.5).item(),
        "kl_divergence": kl.mean().item(),
        "kl_divergence_p99": torch.quantile(kl, 0.99).item(),
        "top1_agreement": (bundle.argmax(-1) == original.argmax(-1)).double().mean().item(),
        "cosine": F.cosine_similarity(bundle - bundle.mean(-1, True), original - original.mean(-1, True)).mean().item(),
    }


def test_figures_are_those_of_torch_in_fp64_however_the_positions_come() -> None:
    rng = np.random.default_rng(7)
    original = rng.normal(0, 4, (203, 989)).astype(np.float32) + 30
    bundle = original + rng.normal(0, 1, original.shape).astype(np.float32) - 5
    targets = rng.integers(0, 989, 203)
    comparison = Comparison()
    for start, stop in ((0, 1), (1, 128), (128, 203)):
        comparison.add(bundle[start:stop], targets[start:stop], original[start:stop])
    expected = torch_figures(*(torch.from_numpy(a).double() for a in (bundle, original)), torch.from_numpy(targets))
    found = comparison.figures()
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=2e-5)


def test_a_token_without_a_row_is_not_scored_for_perplexity_but_its_position_is_compared() -> None:
    rng = np.random.default_rng(8)
    logits, other = (rng.normal(size=(6, 11)).astype(np.float32) for _ in range(2))
    targets = np.array([3, -1, 10, -1, 0, 5])
    comparison = Comparison()
    comparison.add(logits, targets, other)
    scored = torch.from_numpy(targets >= 0)
    expected = F.cross_entropy(torch.from_numpy(logits)[scored], torch.from_numpy(targets)[scored]).exp().item()
    found = comparison.figures()
    assert (found.num_tokens, found.perplexity) == (4, pytest.approx(expected, rel=1e-5))
    same = np.mean(logits.argmax(-1) == other.argmax(-1))
    assert found.top1_agreement == pytest.approx(same)
    none = Comparison()
    none.add(logits, np.full(6, -1))
    with pytest.raises(ToolchainError, match="no token of the text has a row in the reduced head"):
        none.figures()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_and_no_figure(bad: float) -> None:
    logits = np.zeros((2, 5), np.float32)
    logits[1, 3] = bad
    with pytest.raises(ToolchainError, match="bundle's logits are not finite"):
        Comparison().add(logits, np.zeros(2, np.int64))


@pytest.mark.parametrize("kind", ["llama_tied", "mistral", "qwen3"])
def test_a_quantised_bundle_is_measured_against_what_transformers_says(
    kind: str, tiny_checkpoint: TinyCheckpoint, tiny_bundle: TinyBundle, text: Path
) -> None:
    bundle = tiny_bundle(kind, "int4")
    quality = verify_bundle(bundle, tiny_checkpoint(kind), text)
    ids = Tokenizer(bundle.read_text(TOKENIZER)).encode(text.read_text())
    pieces = windows(ids, bundle.manifest.model.max_context)
    assert len(pieces) == 3 and quality.num_tokens == len(ids) - 1 and quality.window == 256
    model = make_model(kind)
    executor = OnnxRuntimeExecutor(bundle, EngineConfig(max_slots=1, max_context=256))
    got, theirs = [], []
    for read, _ in pieces:
        theirs.append(hf(model, read))
        step = SequenceStep(0, read.numpy().astype(np.int32), 0, len(read))
        got.append(torch.from_numpy(executor.step([step]).copy()))
    executor.close()
    expected = torch_figures(torch.cat(got), torch.cat(theirs), torch.cat([after for _, after in pieces]))
    # Prompts are read in pieces, which rounds int8 activations differently: the tolerance is that, not the metric's.
    assert quality.original_perplexity == pytest.approx(expected["original_perplexity"], rel=1e-4)
    assert quality.perplexity == pytest.approx(expected["perplexity"], rel=2e-3)
    assert quality.kl_divergence == pytest.approx(expected["kl_divergence"], rel=2e-2)
    assert quality.cosine == pytest.approx(expected["cosine"], abs=1e-3)
    assert quality.top1_agreement == pytest.approx(expected["top1_agreement"], abs=1e-2)
    assert quality.kl_divergence > 0.001 and quality.top1_agreement < 1


def test_what_was_not_rounded_passes_and_the_verdict_is_stored_and_shown(
    copy: Callable[..., Bundle], tiny_checkpoint: TinyCheckpoint, text: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "160")
    bundle = copy("qwen2", "fp32")
    arguments = [str(bundle.path), "--against", str(tiny_checkpoint("qwen2")), "--text", str(text)]
    assert main(["verify", *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.count("pass") >= 5 and "FAIL" not in shown
    stored = Bundle.open(bundle.path).manifest.quality
    assert stored.scheme == "fp32" and len(stored.marks) >= 4 and not stored.failed and not stored.accepted
    assert main(["inspect", str(bundle.path)]) == 0
    assert "passed as fp32: perplexity ratio 1" in capsys.readouterr().out


def test_other_weights_fail_with_the_number_unless_they_are_let_through(
    copy: Callable[..., Bundle], tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "160")
    bundle, other = copy("llama", "fp32"), tmp_path / "other"
    make_model("llama", seed=1).save_pretrained(other)
    save_tokenizer(other)
    arguments = [str(bundle.path), "--against", str(other), "--text", str(text)]
    assert main(["verify", *arguments]) == 1
    stored = Bundle.open(bundle.path).manifest.quality
    assert {mark.name for mark in stored.failed} >= {"max_kl_divergence", "min_top1_agreement", "min_cosine"}
    assert f"kl divergence {stored.kl_divergence:.4g}, allowed is at most 0.0001" in capsys.readouterr().out
    (tmp_path / "another.txt").write_text(" ".join(WORDS[:100]))
    assert main(["verify", str(bundle.path), "--text", str(tmp_path / "another.txt")]) == 1  # nothing to judge, and yet
    assert f"stays: {stored.summary()}; give --against" in capsys.readouterr().out
    assert Bundle.open(bundle.path).manifest.quality == stored
    assert main(["verify", *arguments, "--force"]) == 0
    assert "FAILED (let through) as fp32" in capsys.readouterr().out
    assert Bundle.open(bundle.path).manifest.quality.accepted


def test_an_export_that_lost_too_much_is_not_written_unless_it_is_forced(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(verify_module, "read_text", lambda path: Text("part", " ".join(WORDS[:160])))
    other, output = tmp_path / "other", tmp_path / "bundle"
    make_model("llama", seed=1).save_pretrained(other)
    save_tokenizer(other)
    arguments = ["export", str(tiny_checkpoint("llama")), "-o", str(output), "--weights", "fp32", "--verify"]
    assert main([*arguments, "--against", str(other)]) == 1
    shown = capsys.readouterr()
    assert "FAIL" in shown.out and "cosine" in shown.out and "bundle is not written" in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert main([*arguments, "--against", str(other), "--force"]) == 0
    assert Bundle.open(output).manifest.quality.accepted and "FAILED (let through)" in capsys.readouterr().out
    shutil.rmtree(output)
    assert main(arguments) == 0
    quality = Bundle.open(output).manifest.quality
    assert quality.original == "checkpoint" and quality.marks and not quality.failed
    assert main([*arguments[:-1], "--against", str(other)]) == 2


def test_without_the_original_its_stored_figures_are_used_and_kept(
    copy: Callable[..., Bundle], tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bundle = copy("llama", "fp16")
    assert main(["verify", str(bundle.path), "--text", str(text)]) == 0
    alone = Bundle.open(bundle.path).manifest.quality
    assert not alone.marks and alone.kl_divergence is None and "not judged (no original)" in capsys.readouterr().out
    assert main(["verify", str(bundle.path), "--text", str(text), "--against", str(tiny_checkpoint("llama"))]) == 0
    whole = Bundle.open(bundle.path).manifest.quality
    assert whole.perplexity == pytest.approx(alone.perplexity, rel=1e-9)
    capsys.readouterr()
    again = verify_bundle(Bundle.open(bundle.path), text_file=text)
    assert again.original_perplexity == whole.original_perplexity and again.original == "checkpoint"
    assert "max_perplexity_ratio" in {mark.name for mark in again.marks}
    assert main(["verify", str(bundle.path), "--text", str(text)]) == 0
    assert "not stored" in capsys.readouterr().out and Bundle.open(bundle.path).manifest.quality == whole
    longer = tmp_path / "longer.txt"
    longer.write_text(" ".join(WORDS[:200]))
    assert verify_bundle(Bundle.open(bundle.path), text_file=longer).original_perplexity is None


def test_a_reduced_head_is_compared_over_the_tokens_that_it_has(
    tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path: Path
) -> None:
    from test_reduced_head import kept_tokens

    checkpoint = tiny_checkpoint("llama")
    kept = kept_tokens(checkpoint)
    (tmp_path / "map.json").write_text(json.dumps({"token_ids": kept}))
    bundle = export_bundle(checkpoint, tmp_path / "cut", weights="fp32", vocab_map=tmp_path / "map.json")
    quality = verify_bundle(bundle, checkpoint, text)
    model, columns = make_model("llama"), torch.tensor(kept)
    ids = Tokenizer(bundle.read_text(TOKENIZER)).encode(text.read_text())
    loss = []
    for read, after in windows(ids, 256):
        scored = torch.isin(after, columns)
        rows = torch.searchsorted(columns, after[scored])
        loss.append(F.cross_entropy(hf(model, read)[scored][:, columns], rows, reduction="none"))
    every = torch.cat(loss)
    assert quality.num_tokens == len(every) < len(ids) - 1
    assert quality.perplexity == pytest.approx(every.mean().exp().item(), rel=1e-4)
    assert quality.kl_divergence < 1e-6 and not quality.failed


def round_inputs(model: torch.nn.Module, tensors: dict[str, torch.Tensor], kind: str) -> None:
    """Every linear layer with an input_scale rounds what it reads, as torch rounds it."""

    def hook(factor: torch.Tensor, scale: float) -> Callable[..., tuple[torch.Tensor]]:
        def rounded(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            x = inputs[0] * factor
            if kind == "int8":
                return (torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127) / factor,)
            return ((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale / factor,)

        return rounded

    for name, module in model.named_modules():
        if f"{name}.input_scale" in tensors:
            factor = tensors.get(f"{name}.pre_quant_scale", torch.ones(1)).float()
            module.register_forward_pre_hook(hook(factor, float(tensors[f"{name}.input_scale"])))


@pytest.mark.parametrize(
    ("pack", "algorithm", "kind", "scheme"),
    [(packers.modelopt_int8(True), "W8A8_SQ_PER_CHANNEL", "int8", "int8_sq"), (packers.modelopt_fp8, "FP8", "fp8", "fp8")],
    ids=["int8_sq", "fp8"],
)
def test_a_quantised_checkpoint_is_measured_with_its_activations_rounded(
    pack: Any, algorithm: str, kind: str, scheme: str, tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = tmp_path / "quantised"
    model = packers.save_quantized("llama", root, pack, *packers.modelopt_files(algorithm))
    round_inputs(model, load_file(root / "model.safetensors"), kind)
    original = make_model("llama")
    ids = Tokenizer((root / "tokenizer.json").read_text()).encode(text.read_text())
    pieces = windows(ids, 256)
    got, theirs = (torch.cat([hf(m, read) for read, _ in pieces]) for m in (model, original))
    expected = torch_figures(got, theirs, torch.cat([after for _, after in pieces]))
    quality = verify_checkpoint(root, tiny_checkpoint("llama"), text)
    # A value between two steps may fall to either side, so the figures are close and not the same.
    assert quality.perplexity == pytest.approx(expected["perplexity"], rel=5e-3)
    assert quality.kl_divergence == pytest.approx(expected["kl_divergence"], rel=5e-2)
    assert quality.scheme == scheme and kind in quality.executor
    plain = verify_bundle(export_bundle(root, tmp_path / "bundle"), tiny_checkpoint("llama"), text)
    assert plain.scheme == scheme and plain.kl_divergence < 0.8 * quality.kl_divergence  # a bundle does not round them
    marks = tmp_path / "marks.yaml"
    marks.write_text(f"{scheme}: {{max_kl_divergence: {quality.kl_divergence * 0.99}}}")
    arguments = ["verify", str(root), "--against", str(tiny_checkpoint("llama")), "--text", str(text)]
    assert main([*arguments, "--marks", str(marks)]) == 1
    assert f"kl divergence {quality.kl_divergence:.4g}, allowed" in capsys.readouterr().out
    assert main([*arguments, "--marks", str(marks), "--force"]) == 0


def test_a_checkpoint_needs_an_original_and_marks(
    tiny_checkpoint: TinyCheckpoint, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_checkpoint("llama")
    assert main(["verify", str(path)]) == 2
    assert "name the original with --against" in capsys.readouterr().err
    with pytest.raises(ToolchainError, match="neither a bundle nor a quantised checkpoint; name the marks"):
        verify_checkpoint(path, path, text)
    assert not verify_checkpoint(path, path, text, "fp32").failed


def test_an_original_that_has_read_the_passages_is_not_run_again(
    tiny_bundle: TinyBundle, tiny_checkpoint: TinyCheckpoint, text: Path
) -> None:
    original, stages = CheckpointReading(tiny_checkpoint("llama")), []
    first = verify_bundle(tiny_bundle("llama", "fp16"), original, text)

    def progress(stage: str, done: int, total: int) -> None:
        stages.append(stage)

    again = verify_bundle(tiny_bundle("llama", "int8"), original, text, progress=progress)
    assert "original" not in stages and again.original_perplexity == first.original_perplexity
    assert again == dataclasses.replace(
        verify_bundle(tiny_bundle("llama", "int8"), tiny_checkpoint("llama"), text), created=again.created
    )


def test_what_the_original_gave_is_kept_for_the_next_command_and_never_out_of_date(
    copy: Callable[..., Bundle], tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bundle, kept, ran = copy("llama", "int8"), tmp_path / "kept", []
    original = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "original")
    run = CheckpointReading._run
    monkeypatch.setattr(CheckpointReading, "_run", lambda self, *args: (ran.append(1), run(self, *args))[1])

    def verify(text: Path = text) -> Quality:
        found = verify_bundle(bundle, original, text, cache=kept)
        return dataclasses.replace(found, created="")

    expected = dataclasses.replace(verify_bundle(bundle, original, text), created="")
    assert verify() == expected == verify() and len(ran) == 2  # without a cache, and the first with it
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:-100])  # cut short: computed again
    assert verify() == expected and len(ran) == 3 and verify() == expected and len(ran) == 3
    longer = tmp_path / "longer.txt"
    longer.write_text(" ".join(WORDS[:200]))
    assert verify(longer) != expected and len(ran) == 4 and len(list(kept.iterdir())) == 2
    make_model("llama", seed=1).save_pretrained(original)  # under the same name
    assert verify().original_perplexity != expected.original_perplexity and len(ran) == 5


def test_several_bundles_are_judged_in_one_command_that_reads_the_original_once(
    tiny_bundle: TinyBundle, tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    run, ran = CheckpointReading._run, []
    monkeypatch.setattr(CheckpointReading, "_run", lambda self, *args: (ran.append(1), run(self, *args))[1])
    whole, rounded = (
        str(shutil.copytree(tiny_bundle("llama", weights).path, tmp_path / weights)) for weights in ("fp32", "int4")
    )
    options = ["--against", str(tiny_checkpoint("llama")), "--text", str(text)]
    assert main(["verify", whole, rounded, *options]) == 1 and len(ran) == 1
    table = capsys.readouterr().out.partition("all of them")[2]
    line = {path: next(line for line in table.splitlines() if path in line) for path in (whole, rounded)}
    stored = {path: Bundle.open(path).manifest.quality for path in (whole, rounded)}
    assert "passed" in line[whole] and "FAILED" in line[rounded]
    assert all(f"{quality.kl_divergence:.4g}" in line[path] for path, quality in stored.items())
    assert main(["verify", whole, str(tmp_path / "nowhere"), *options]) == 2 and len(ran) == 1


def test_figures_are_shown_also_where_they_cannot_be_stored(
    copy: Callable[..., Bundle], text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy("llama", "fp16")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["verify", str(bundle.path), "--text", str(text)]) == 2
    shown = capsys.readouterr()
    assert "perplexity" in shown.out and "cannot write" in shown.err and "No space left" in shown.err


def test_a_cache_needs_an_original_and_a_place(
    tiny_bundle: TinyBundle, tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bundle, file = str(tiny_bundle("llama", "fp16").path), tmp_path / "file"
    file.write_text("no directory")
    assert main(["verify", bundle, "--cache", str(tmp_path)]) == 2
    assert "name it with --against" in capsys.readouterr().err
    opened: list[object] = []
    monkeypatch.setattr("edgellm_ros.toolchain.verify.reading.open_checkpoint", opened.append)
    for place in (file, file / "sub"):
        options = ["--against", str(tiny_checkpoint("llama")), "--text", str(text), "--cache", str(place)]
        assert main(["verify", bundle, *options]) == 2
        message = f"states in {place}: {file} is not a directory; give another --cache, or none"
        assert message in capsys.readouterr().err
    assert not opened, "the original is read for minutes"


def test_the_real_model_is_measured_as_transformers_measures_it(
    smollm2: Callable[[str], Bundle], smollm2_gguf: Path, smollm2_transformers: torch.nn.Module, tmp_path: Path
) -> None:
    text = tmp_path / "part.txt"
    text.write_text(" ".join(WORDS[:300]), encoding="utf-8")
    bundle = smollm2("fp32")
    quality = verify_bundle(bundle, smollm2_gguf, text)
    model = smollm2_transformers
    tokenizer = Tokenizer(bundle.read_text(TOKENIZER))
    pieces = windows(tokenizer.encode(text.read_text()), 512)
    loss = [F.cross_entropy(hf(model, read), after, reduction="none") for read, after in pieces]
    assert quality.original_perplexity == pytest.approx(torch.cat(loss).mean().exp().item(), rel=1e-4)
    assert quality.perplexity == pytest.approx(quality.original_perplexity, rel=1e-3) and not quality.failed
    sheets = read_tasks(tokenizer.encode, bundle.manifest.tokens, 1024)
    passed: dict[str, int] = {}
    for sheet in sheets:
        read = torch.from_numpy(sheet.passage.ids.astype(np.int64))
        best = hf(model, read).argmax(-1)[-len(sheet.passage.targets) :].tolist()
        for task in sheet.tasks:
            answer = tokenizer.decode(best[task.first : task.stop], skip_special=False)
            passed[task.kind] = passed.get(task.kind, 0) + (answer == f" {task.answer}\n")
        if sheet is not sheets[0] and sheet is not sheets[-1]:
            continue
        prompt = read[: len(read) - len(sheet.passage.targets) + 1 + sheet.tasks[0].first]  # what a user would send
        written = model.generate(prompt[None], max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        starts_right = tokenizer.decode(written, skip_special=False).startswith(f" {sheet.tasks[0].answer}\n")
        task = sheet.tasks[0]
        assert starts_right == (tokenizer.decode(best[task.first : task.stop], skip_special=False) == f" {task.answer}\n")
    assert {score.kind: score.original for score in quality.tasks} == passed
    assert quality.num_tasks == 96 and 24 < quality.original_tasks_passed < 90


def test_every_task_is_asked_once_after_the_right_answers_before_it_also_where_the_context_is_short(
    smollm2_gguf: Path,
) -> None:
    source = open_checkpoint(smollm2_gguf)
    tokenizer = Tokenizer(source.tokenizer_json())
    kinds = yaml.safe_load(files("edgellm_ros.quality").joinpath("tasks.yaml").read_text(encoding="utf-8"))
    every = [(kind, question, answer) for kind, group in kinds.items() for question, answer in group["tasks"]]
    assert len(every) == len(set(every)) == 96 and len(kinds) == 12
    for longest in (1024, 80):
        sheets = read_tasks(tokenizer.encode, source.token_spec(), longest)
        assert [(task.kind, task.question, task.answer) for sheet in sheets for task in sheet.tasks] == every
        assert len(sheets) == 12 if longest == 1024 else len(sheets) > 12
        for sheet in sheets:
            passage, group = sheet.passage, kinds[sheet.tasks[0].kind]
            assert len(passage.ids) <= longest
            asked = "".join(f"{group['question'].format(task.question)} {task.answer}\n" for task in sheet.tasks)
            whole = [*passage.ids.tolist(), int(passage.targets[-1])]
            assert tokenizer.decode(whole, skip_special=False) == group["examples"] + asked
            for task in sheet.tasks:
                answer = passage.targets[task.first : task.stop].tolist()
                assert tokenizer.decode(answer, skip_special=False) == f" {task.answer}\n"
    assert not read_tasks(tokenizer.encode, source.token_spec(), 12)


@pytest.mark.parametrize(("scheme", "changed"), [("int8", 0.05), ("fp8", 0.10), ("int8_sq", 0.10), ("int4", 0.20)])
def test_there_are_enough_tasks_that_rounding_without_loss_seldom_fails_their_mark(scheme: str, changed: float) -> None:
    """What docs/verify.md reckons: answers that change by chance go both ways, and two deviations stay within the mark."""
    limits = read_marks()[scheme]
    assert changed == pytest.approx(1 - limits["min_top1_agreement"])
    passed = np.arange(48, 97)
    assert (2 * np.sqrt(changed * 96) <= (1 - limits["min_task_share"]) * passed).all()


def test_the_text_and_the_marks_that_are_shipped_are_what_the_page_says(smollm2_gguf: Path) -> None:
    tokenizer = Tokenizer(open_checkpoint(smollm2_gguf).tokenizer_json())
    assert len(tokenizer.encode(read_text(None).content)) >= 4500
    marks = read_marks()
    assert set(SCHEMES) | {"fp8", "int4_awq", "int8_sq", "nvfp4", "w4a8_awq"} == set(marks)
    for scheme, ratio in (("int4_awq", 1.08), ("int4", 1.08), ("fp8", 1.03)):
        assert marks[scheme]["max_perplexity_ratio"] == ratio
    for limits in marks.values():
        assert len(limits) == 5


def test_a_checkpoint_that_is_not_the_original_is_refused_by_what_differs(
    tiny_bundle: TinyBundle, tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle("llama", "fp32")
    with pytest.raises(ToolchainError, match=r"another model.*head_dim 32 \(the bundle has 16\)"):
        verify_bundle(bundle, tiny_checkpoint("qwen3"), text)
    other = tmp_path / "other"
    save_checkpoint("llama", other)
    raw = json.loads((other / "tokenizer.json").read_text())
    raw["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ToolchainError, match="another tokenizer"):
        verify_bundle(bundle, other, text)
    with pytest.raises(CheckpointError, match="is a bundle; give the checkpoint that it was made from"):
        verify_bundle(bundle, tiny_bundle("llama", "int8").path, text)
    monkeypatch.setattr("edgellm_ros.executors._cuda_reason", lambda _: "no NVIDIA GPU")
    with pytest.raises(UnsupportedError, match="executor is 'cuda': no NVIDIA GPU"):  # before the original is read
        verify_bundle(bundle, tiny_checkpoint("llama"), text, executor="cuda", progress=lambda *_: pytest.fail("read"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"too short", "has 9 tokens|has [0-9] tokens"), (b"\xff\xfe" * 90, "not UTF-8"), (None, "cannot be read")],
)
def test_a_text_that_says_nothing_is_refused(
    tiny_bundle: TinyBundle, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ToolchainError, match=message):
        verify_bundle(tiny_bundle("llama", "fp32"), None, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("fp32: {max_perplexity: 2}", "unknown mark 'max_perplexity'; known are max_perplexity_ratio"),
     ("fp32: {min_cosine: high}", "min_cosine is 'high'; it must be a finite number"),
     ("fp32: {min_cosine: .nan}", "min_cosine is nan; it must be a finite number"),
     ("fp32: {}", "has none for scheme 'fp32'; give it some of max_perplexity_ratio"),
     ("fp32: [1]", "must have a mapping"), ("[", "cannot be read"), ("int4: {}", "no marks for scheme 'fp32'")],
)  # fmt: skip
def test_marks_of_ones_own_are_checked(tiny_bundle: TinyBundle, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "marks.yaml"
    path.write_text(content)
    with pytest.raises(ToolchainError, match=message):
        verify_bundle(tiny_bundle("llama", "fp32"), None, None, "", path)


def test_marks_of_ones_own_decide(
    tiny_bundle: TinyBundle, tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "marks.yaml"
    path.write_text(yaml.safe_dump({"mine": {"max_kl_divergence": -1.0}}))
    quality = verify_bundle(tiny_bundle("llama", "fp32"), tiny_checkpoint("llama"), text, "mine", path)
    assert [mark.name for mark in quality.failed] == ["max_kl_divergence"] and quality.scheme == "mine"
