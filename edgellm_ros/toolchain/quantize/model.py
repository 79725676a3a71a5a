"""How a checkpoint becomes a transformers model in memory: what is refused first, and on which device it lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_ros.errors import CheckpointError, ToolchainError
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint, open_checkpoint
from edgellm_ros.toolchain.detect import check_tensors, load_spec
from edgellm_ros.toolchain.text_part import TextPartCheckpoint
from edgellm_ros.toolchain.tokenizer_files import read_json_object

DEVICES = ("auto", "cpu", "cuda")
_OVERHEAD_BYTES = 1 << 30  # torch, the libraries and the activations of one batch
_COPIES = 1.5  # of the weights: themselves, and while they are written a quantised copy


@dataclass(frozen=True)
class Source:
    """A checkpoint that may be quantised; nothing of its weights has been read."""

    checkpoint: Checkpoint
    spec: ModelSpec
    num_parameters: int


def open_source(path: Path) -> Source:
    """The checkpoint at `path`, a Hugging Face directory or a GGUF file.

    Raises CheckpointError for one that is already quantised (a GGUF file's tensors are dequantised instead), damaged,
    or of a family that export does not know.
    """
    _refuse_quantised(path)
    checkpoint = open_checkpoint(path)
    family, spec = load_spec(checkpoint)
    check_tensors(checkpoint, family, spec)
    rope = checkpoint.config.get("rope_parameters") or {}
    if checkpoint.kind == "gguf" and isinstance(rope, dict) and rope.get("rope_type") == "factors":
        raise CheckpointError(
            f"{path} stores its rope scaling as factors, which transformers does not read; quantise the original "
            "Hugging Face directory instead"
        )
    shapes = (checkpoint.shape(name) for name in checkpoint.names())
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return Source(checkpoint, spec, total)


def choose_device(device: str, source: Source) -> str:
    """`cuda` or `cpu`; raises ToolchainError when there is no GPU, or the model does not fit, with both numbers."""
    import torch

    if device not in DEVICES:
        raise ToolchainError(f"device is {device!r}; allowed are {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ToolchainError("device is 'cuda' and torch sees no GPU; take --device cpu, or install torch with CUDA")
    chosen = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    needed, free = _needed_bytes(source, chosen), _free_bytes(chosen)
    if needed > free:
        remedy = "take --device cpu" if chosen == "cuda" else "take a machine with more memory or a GPU"
        raise ToolchainError(
            f"{source.checkpoint.path} has {source.num_parameters:,} parameters, which need about "
            f"{needed / 1e9:.1f} GB on {'the GPU' if chosen == 'cuda' else 'a CPU'}; {free / 1e9:.1f} GB are free: "
            f"{remedy}"
        )
    return chosen


def load_model(source: Source, device: str) -> Any:
    """The transformers model in eval mode: fp32 on a CPU, where 16-bit products are slow, bf16 or fp16 on a GPU."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    path = source.checkpoint.path
    dtype = torch.float32 if device == "cpu" else stored_dtype(source)
    try:
        if source.checkpoint.kind == "gguf" or isinstance(source.checkpoint, TextPartCheckpoint):
            model = _model_of_tensors(source, dtype)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {path}: {error}") from error
    damaged = next((name for name, tensor in model.named_parameters() if not torch.isfinite(tensor).all()), None)
    if damaged is not None:
        raise CheckpointError(f"{path}: {damaged} has a number that is NaN or infinite; download the checkpoint again")
    model.config.architectures = [type(model).__name__]
    return model.to(device).eval()


def _model_of_tensors(source: Source, dtype: Any) -> Any:
    """The model of the tensors and settings that export reads: a GGUF file's, or the decoder's of one with images.

    transformers' own reader of GGUF takes ten times as long for the same numbers, and gives a Mistral file no window.
    """
    import torch
    import transformers

    checkpoint, tokens = source.checkpoint, source.checkpoint.token_spec()
    stop = next(iter(tokens.stop_ids), None)
    special = {"bos_token_id": tokens.bos_id, "eos_token_id": stop, "pad_token_id": tokens.pad_id}
    config = transformers.AutoConfig.for_model(**{**special, **checkpoint.config})
    weights = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.names()}
    model, report = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"]])
    if wrong:
        raise CheckpointError(f"{checkpoint.path}: {wrong[0]} is in one of the file and {type(model).__name__} only")
    return model


def stored_dtype(source: Source) -> Any:
    """The torch dtype of what stays unquantised: the checkpoint's, fp16 for a GGUF file."""
    import torch

    if source.checkpoint.kind == "gguf":
        return torch.float16
    config = source.checkpoint.config
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)


def untie_head(model: Any) -> bool:
    """Give the head weights of its own where it shares the embedding's; says whether it did."""
    import torch

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # what saving and ModelOpt go by
    return True


def _refuse_quantised(path: Path) -> None:
    if not (path / "config.json").is_file():
        return  # a GGUF file, or what open_checkpoint says about it
    config = read_json_object(path / "config.json")
    found = config.get("quantization_config")
    if not found and (path / "hf_quant_config.json").is_file():
        found = read_json_object(path / "hf_quant_config.json").get("quantization") or "hf_quant_config.json"
    if not found:
        return
    method = found.get("quant_method") or found.get("quant_algo") if isinstance(found, dict) else found
    raise CheckpointError(
        f"{path} is already quantised ({method or json.dumps(found)[:80]}); quantise the original checkpoint, or give "
        "this one to `edgellm export` as it is"
    )


def _needed_bytes(source: Source, device: str) -> int:
    width = 4 if device == "cpu" else stored_dtype(source).itemsize
    return int(source.num_parameters * width * _COPIES) + _OVERHEAD_BYTES


def _free_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)
