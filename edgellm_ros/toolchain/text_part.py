"""The decoder of a model for images and text, read as a checkpoint of its own; the tensors for images are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.hf_checkpoint import HfCheckpoint

TEXT_PARTS = {"gemma3": "Gemma3ForCausalLM"}  # config.json's model_type -> the architecture of its decoder
_PREFIXES = {  # before the decoder's tensors, on the hub and by transformers 4.52 -> what it has alone
    "language_model.": "",
    "model.language_model.": "model.",
}
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id")  # of the whole, where text_config has none


class TextPartCheckpoint(HfCheckpoint):
    """Such a directory, with the configuration and the tensor names of the decoder alone."""

    def __init__(self, path: Path) -> None:
        """Map the files; raises CheckpointError when there is no text_config or no tensor of a decoder."""
        super().__init__(path)
        whole = self.config
        text = whole.get("text_config")
        if not isinstance(text, dict):
            raise CheckpointError(f"{path}: config.json is of a {whole['model_type']} model and has no text_config")
        shared = {key: whole[key] for key in _SHARED if whole.get(key) is not None}
        architecture = TEXT_PARTS[str(whole["model_type"])]
        self.config: dict[str, Any] = {
            "model_type": f"{whole['model_type']}_text", **text, **shared, "architectures": [architecture],
        }
        self._own: dict[str, str] = {}
        for name in super().names():
            for prefix, alone in _PREFIXES.items():
                if name.startswith(prefix):
                    self._own[alone + name.removeprefix(prefix)] = name
        if "lm_head.weight" in super().names():
            self._own.setdefault("lm_head.weight", "lm_head.weight")
        if not self._own:
            raise CheckpointError(f"{path} has no tensors of a decoder (none starts with {' or '.join(_PREFIXES)})")

    def names(self) -> list[str]:
        """The decoder's tensors."""
        return list(self._own)

    def __contains__(self, name: object) -> bool:
        return name in self._own

    def stored_name(self, name: str) -> str:
        """With what stands before the decoder's tensors."""
        return self._own.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return super().shape(self.stored_name(name))

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start to stop - 1 of the first axis."""
        return super().read_rows(self.stored_name(name), start, stop)

    def read_into(self, name: str, out: npt.NDArray[np.float32]) -> None:
        """See Checkpoint.read_into."""
        super().read_into(self.stored_name(name), out)

    def num_bytes(self) -> int:
        """Bytes of the decoder's tensors."""
        return sum(self._home[name].num_bytes(name) for name in self._own.values())
