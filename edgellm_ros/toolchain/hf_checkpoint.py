"""How a Hugging Face directory is read: config.json, one or several safetensors files, and the tokenizer's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError
from edgellm_ros.manifest import TokenSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint
from edgellm_ros.toolchain.safetensors_file import SafetensorsFile
from edgellm_ros.toolchain.tokenizer_files import TOKENIZER_FILES, HfTokenizerFiles, read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODELOPT = "hf_quant_config.json"


class HfCheckpoint(Checkpoint):
    """A directory as `save_pretrained` and the Hugging Face hub lay it out."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        """Read config.json and map all weight files; raises CheckpointError for what is missing or not whole."""
        self.path = path
        self.config: dict[str, Any] = read_json_object(path / "config.json")
        self._files = _weight_files(path)
        self._home = {name: file for file in self._files for name in file.names()}
        _check_index(path, self._home)

    def name(self) -> str:
        """The directory's name; the repository's for a directory in the hub's cache."""
        whole = self.path.resolve()
        if whole.parent.name == "snapshots":
            return whole.parent.parent.name.split("--")[-1]
        return whole.name

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._file(name).shape(name)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start to stop - 1 of the first axis."""
        return self._file(name).read_rows(name, start, stop)

    def read_into(self, name: str, out: npt.NDArray[np.float32]) -> None:
        """See Checkpoint.read_into."""
        self._file(name).read_rows(name, 0, len(out), out)

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.num_bytes(name) for name, file in self._home.items())

    def source_files(self) -> list[Path]:
        """Configuration, weights and tokenizer files."""
        small = [self.path / name for name in ("config.json", MODELOPT, INDEX, *TOKENIZER_FILES)]
        return [path for path in small if path.is_file()] + [file.path for file in self._files]

    def stored_name(self, name: str) -> str:
        """What the file calls the tensor `name`."""
        return name

    def tokenizer_json(self) -> str:
        """tokenizer.json as it is."""
        return self._tokenizer().tokenizer_json()

    def chat_template(self) -> str | None:
        """chat_template.jinja, or tokenizer_config.json's."""
        return self._tokenizer().chat_template()

    def token_spec(self) -> TokenSpec:
        """From generation_config.json, config.json and tokenizer_config.json."""
        return self._tokenizer().token_spec(self.config)

    def _tokenizer(self) -> HfTokenizerFiles:
        return HfTokenizerFiles(self.path)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._home:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._home[name]


def quantization_config(path: Path, config: dict[str, Any]) -> Any:
    """What config.json says of weights that are already quantised, or None; ModelOpt also writes a file of its own."""
    found = config.get("quantization_config")
    return {"quant_method": "modelopt"} if not found and (path / MODELOPT).is_file() else found or None


def _weight_files(path: Path) -> list[SafetensorsFile]:
    if (path / SINGLE).is_file():  # first, as for transformers: saving a model anew leaves an old index there
        return [SafetensorsFile(path / SINGLE)]
    if (path / INDEX).is_file():
        shards = sorted(set(_weight_map(path).values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{path} lacks {len(missing)} of the {len(shards)} files that {INDEX} names: {', '.join(missing[:4])}; "
                "download the whole checkpoint"
            )
        return [SafetensorsFile(path / shard) for shard in shards]
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return [SafetensorsFile(found[0])]
    if found:
        raise CheckpointError(
            f"{path} has {len(found)} .safetensors files and no {INDEX} that says which are one model"
        )
    pickled = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in path.glob(suffix))
    if pickled:
        raise CheckpointError(
            f"{path} has only pickled weights ({pickled[0]}); convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise CheckpointError(f"{path} has no .safetensors file; download the model's weights")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    ):
        raise CheckpointError(f"{path / INDEX} has no weight_map from tensor names to file names in its directory")
    return weight_map


def _check_index(path: Path, home: dict[str, SafetensorsFile]) -> None:
    if (path / SINGLE).is_file() or not (path / INDEX).is_file():
        return
    for name, shard in _weight_map(path).items():
        if name not in home or home[name].path.name != shard:
            raise CheckpointError(f"{path / shard} lacks tensor {name}, which {INDEX} says it holds")
