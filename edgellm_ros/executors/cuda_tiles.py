"""Which tiles of the decode products are fastest on this GPU: `edgellm tune` writes them, every load reads them.

A file for each kind of GPU, BUNDLE/tiles/NAME.json, outside the manifest: it changes speed, and the order of sums, but
not what is computed. A file for other weights, another version or other kernels is left alone and said so.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import edgellm_ros
from edgellm_ros.bundle import WEIGHTS, Bundle
from edgellm_ros.errors import ConfigError

_log = logging.getLogger(__name__)

DIRECTORY = "tiles"
PRODUCTS = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down", "head")
ANY_BATCH = 0  # the entry of exact decoding, where every batch size sums in one order
MAX_BATCH = 8  # sequences that one decode step takes
_REMEDY = "run `edgellm tune` again"


class TileDecoder(Protocol):
    """What of `_native.Decoder` has to do with tiles."""

    def num_tiles(self, product: str, batch: int) -> int:
        """How many tiles `product` has at `batch`."""

    def set_tile(self, product: str, batch: int, tile: int) -> None:
        """Use one, -1 for the kernel's own choice."""


@dataclass
class Tiles:
    """The choices of one GPU, for each mode: "exact" (decode_batching, among several slots) and "fast"."""

    gpu: str
    weights: str  # sha256 of the weight file
    kernels: int = 0  # device_info()'s tiles_version: of what the numbers mean
    version: str = edgellm_ros.__version__
    # mode -> product -> batch -> (tile, number of tiles that there were to choose from)
    choices: dict[str, dict[str, dict[str, tuple[int, int]]]] = field(default_factory=dict)

    def set(self, mode: str, product: str, batch: int, tile: int, count: int) -> None:
        """Note a choice; -1 leaves it to the kernel."""
        self.choices.setdefault(mode, {}).setdefault(product, {})[str(batch)] = (tile, count)


def mode_of(batch_invariant: bool) -> str:
    """The mode of a decoder's settings."""
    return "exact" if batch_invariant else "fast"


def gpu_of(info: Mapping[str, Any]) -> str:
    """One word for a kind of GPU, of the native module's device_info(): nvidia-h200-sm90-132."""
    major, minor = info["compute_capability"]
    name = re.sub(r"[^a-z0-9]+", "-", str(info["name"]).lower()).strip("-")
    return f"{name}-sm{major}{minor}-{info['num_sms']}"


def tiles_file(bundle: Bundle, info: Mapping[str, Any]) -> Path:
    """Where the choices for this GPU are, or would be."""
    return bundle.path / DIRECTORY / f"{gpu_of(info)}.json"


def weights_hash(bundle: Bundle) -> str:
    """What the choices of a bundle belong to; empty for weights that are no file."""
    entry = bundle.manifest.files.get(WEIGHTS)
    return entry.sha256 if entry else ""


def read_tiles(bundle: Bundle, info: Mapping[str, Any]) -> Tiles | None:
    """The choices for this GPU; None, and why in the log, without a file that is for these weights and this version."""
    if not weights_hash(bundle):
        return None
    path = tiles_file(bundle, info)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tiles = Tiles(**found)
        for products in tiles.choices.values():
            for batches in products.values():
                for batch, (tile, count) in list(batches.items()):
                    if not ANY_BATCH <= int(batch) <= MAX_BATCH:
                        raise ValueError(f"batch {batch} is not {ANY_BATCH} to {MAX_BATCH}")
                    batches[batch] = (int(tile), int(count))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        _log.warning("%s is not used, because it cannot be read (%s); %s", path, error, _REMEDY)
        return None
    if tiles.version != edgellm_ros.__version__:
        _log.warning("%s is not used: edgellm_ros %s wrote it; %s", path, tiles.version, _REMEDY)
        return None
    if tiles.kernels != info["tiles_version"]:
        _log.warning("%s is not used: it is for other kernels; %s", path, _REMEDY)
        return None
    if tiles.gpu != gpu_of(info) or tiles.weights != weights_hash(bundle):
        _log.warning("%s is not used: it is for another GPU or other weights; %s", path, _REMEDY)
        return None
    return tiles


def apply_tiles(decoder: TileDecoder, bundle: Bundle, info: Mapping[str, Any], batch_invariant: bool) -> bool:
    """Give the decoder this GPU's choices, before it captures its graphs; returns whether there are any."""
    tiles = read_tiles(bundle, info)
    chosen = tiles.choices.get(mode_of(batch_invariant), {}) if tiles else {}
    entries = [(p, int(b), *choice) for p, batches in chosen.items() for b, choice in batches.items()]
    try:
        fits = all(decoder.num_tiles(p, max(b, 1)) == count and -1 <= tile < count for p, b, tile, count in entries)
    except ValueError:  # a product that there is none of
        fits = False
    if not fits:
        _log.warning("%s is not used: it is for other kernels; %s", tiles_file(bundle, info), _REMEDY)
        return False
    for product, batch, tile, _ in entries:
        decoder.set_tile(product, max(batch, 1), tile)
    if entries:
        _log.info("decode products as `edgellm tune` found them fastest (%s)", tiles_file(bundle, info))
    return bool(entries)


def check_writable(bundle: Bundle) -> None:
    """Raise ConfigError where `write_tiles` could not write, which would be known only after minutes of timing."""
    directory = bundle.path / DIRECTORY
    try:
        directory.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"the choices cannot be kept in {directory} ({error.strerror}); make it writable for this user, or tune a "
            "copy of the bundle and copy its tiles directory"
        ) from error


def write_tiles(bundle: Bundle, info: Mapping[str, Any], tiles: Tiles) -> Path:
    """Keep the choices beside the bundle; returns the file, which is there as a whole or as it was before."""
    path = tiles_file(bundle, info)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(tiles), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
