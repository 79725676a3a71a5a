"""The bundle: a complete directory that the toolchain writes and the runtime reads; the one contract between them.

`manifest.json` describes the rest. Opening a bundle checks that every file is there, has its
size and (unless told not to) its sha256. Nothing outside the directory is ever read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from edgellm_ros.errors import BundleError, RequestError
from edgellm_ros.manifest import MANIFEST, FileEntry, Manifest
from edgellm_ros.vocab_map import VocabMap
from edgellm_ros.weight_file import WeightFile

WEIGHTS = "weights.safetensors"
DECODER = "decoder.onnx"
DECODER_ORT = "decoder.ort.onnx"
DECODER_LORA = "decoder.lora.onnx"  # the two decoders again, with adapters as inputs
DECODER_ORT_LORA = "decoder.lora.ort.onnx"
DECODER_PLUGIN = "decoder.plugin.onnx"  # for TensorRT with the project's plugins (edgellm export --dialect plugin)
DECODER_PLUGIN_LORA = "decoder.plugin.lora.onnx"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
LORA = "lora"  # holds NAME.safetensors for each packed adapter
VOCAB_MAP = "vocab_map.safetensors"  # its one tensor, `vocab_map`: (head_rows,) int32, the tokens that have a row


class Bundle:
    """An opened bundle directory."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `Bundle.open`."""
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Read and check the bundle at `path`; `verify` compares every file's sha256.

        Raises BundleError that names the file which is missing, truncated or changed, or the manifest's field that is
        not as it must be.
        """
        root = Path(path)
        if not root.is_dir():
            raise BundleError(
                f"{root} is not a directory; a bundle is what `edgellm export CHECKPOINT -o BUNDLE` "
                "writes"
            )
        try:
            text = (root / MANIFEST).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(
                f"{root} has no readable {MANIFEST}: {error}; it is not a bundle, or not a "
                "whole one"
            ) from error
        try:
            manifest = Manifest.from_json(text)
        except BundleError as error:
            raise BundleError(f"{root}: {error}") from error
        if WEIGHTS in manifest.files and not manifest.self_test.cases:  # nothing could say that they are loaded right
            raise BundleError(
                f"{root}: {MANIFEST}: self_test: cases is []; it must have one or more, which the loaded model is "
                "compared with; export the model again"
            )
        for name, entry in manifest.files.items():
            _check_file(root, name, entry)
        bundle = cls(root, manifest)
        if verify:
            bundle.verify()
        return bundle

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare the sha256 of `names` (None: every file) with the manifest's.

        Raises BundleError that names the one which was changed.
        """
        for name in self.manifest.files if names is None else names:
            path = self.path / name
            if hash_file(path).sha256 != self.manifest.files[name].sha256:
                raise BundleError(f"{path} was changed: its sha256 is not the manifest's; copy the whole bundle again")

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists; raises BundleError otherwise."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no {name}; it holds {', '.join(sorted(self.manifest.files))}")
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the manifest lists `name`."""
        return name in self.manifest.files

    def read_text(self, name: str) -> str:
        """Text of a listed file."""
        return self.file(name).read_text(encoding="utf-8")

    def weights(self) -> WeightFile:
        """The decoder's weights, memory-mapped."""
        return WeightFile(self.file(WEIGHTS))

    @staticmethod
    def lora_key(name: str) -> str:
        """The adapter's file as the manifest lists it."""
        return f"{LORA}/{name}.safetensors"

    def lora_file(self, name: str) -> Path:
        """Path of the packed adapter `name`.

        Raises RequestError that names the adapters which are there, BundleError for one packed for other weights.
        """
        loras = self.manifest.loras
        if name not in loras:
            raise RequestError(f"the bundle has no adapter {name!r}; it has {', '.join(sorted(loras)) or 'none'}")
        if loras[name].base_sha256 != self.manifest.files[WEIGHTS].sha256:
            raise BundleError(
                f"{self.path}: adapter {name!r} was packed for other weights; pack it again with `edgellm lora pack`"
            )
        return self.file(self.lora_key(name))

    def vocab_map(self) -> VocabMap | None:
        """Which tokens the head has rows for; None when it has all of them.

        Raises BundleError when the map is not one of this model, or lacks one of its stop ids.
        """
        model = self.manifest.model
        if not model.head_rows:
            return None
        path = self.file(VOCAB_MAP)
        try:
            found = VocabMap(WeightFile(path)["vocab_map"], model.vocab_size)
        except ValueError as error:
            raise BundleError(f"{path}: {error}; export the model again") from error
        lost = [token for token in self.manifest.tokens.stop_ids if token not in found]
        if len(found) != model.head_rows or lost:
            raise BundleError(
                f"{path} has {len(found)} tokens, the head {model.head_rows} rows, and stop ids without a row are "
                f"{lost}; export the model again"
            )
        return found


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileEntry(path.stat().st_size, digest.hexdigest())


def _check_file(root: Path, name: str, entry: FileEntry) -> None:
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BundleError(f"{root}/{MANIFEST} lists {name!r}, which is outside the bundle")
    if not path.is_file():
        raise BundleError(f"{path} is missing; export the model again or copy the whole bundle")
    size = path.stat().st_size
    if size != entry.size:
        what = "truncated" if size < entry.size else "changed"
        raise BundleError(f"{path} is {what}: {size} bytes instead of {entry.size}; copy the whole bundle again")
