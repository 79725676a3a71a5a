"""Whether an adapter belongs to a bundle, and how it gets in: `lora/NAME.safetensors` and a line in the manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.numpy import save_file

from edgellm_ros.bundle import LORA, WEIGHTS, Bundle, hash_file
from edgellm_ros.errors import ToolchainError
from edgellm_ros.executors.lora import TARGETS, LoraAdapter, read_adapter
from edgellm_ros.executors.lora_layout import LARGEST_RANK, fit, pack
from edgellm_ros.manifest import MANIFEST, LoraEntry
from edgellm_ros.toolchain.input_factors import for_folded
from edgellm_ros.toolchain.whole_output import system_errors

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What is added to a model's name for the same weights in another format.
_FORMAT = re.compile(r"[-._](gguf|i?q\d\w*|f16|f32|bf16|fp16|fp32|fp8|int4|int8|nvfp4|awq|gptq|bnb|4bit|8bit|unsloth)$")


@dataclass(frozen=True)
class ModuleRow:
    """One kind of projection in an adapter, over all its layers."""

    target: str
    layers: tuple[int, ...]
    ranks: tuple[int, ...]  # the distinct ones, ascending, as alphas and scales
    alphas: tuple[float, ...]
    scales: tuple[float, ...]
    parameters: int


def modules_of(adapter: LoraAdapter) -> list[ModuleRow]:
    """What an adapter changes, a row for each kind of projection."""
    rows = []
    for target in sorted({item.target for item in adapter.tensors}, key=TARGETS.index):
        items = [item for item in adapter.tensors if item.target == target]
        roots = [len(i.a) ** 0.5 if adapter.rslora else len(i.a) for i in items]
        rows.append(
            ModuleRow(
                target,
                tuple(sorted(i.layer for i in items)),
                tuple(sorted({len(i.a) for i in items})),
                tuple(sorted({round(i.scale * root, 6) for i, root in zip(items, roots, strict=True)})),
                tuple(sorted({i.scale for i in items})),
                sum(i.a.size + i.b.size for i in items),
            )
        )
    return rows


def check_for_bundle(adapter: LoraAdapter, bundle: Bundle, any_base: bool = False) -> LoraAdapter:
    """The adapter as it is packed for `bundle`: stacked projections taken apart.

    Raises RequestError or ToolchainError that names why it cannot be. any_base: an adapter that names another base
    model is accepted if its shapes fit.
    """
    manifest = bundle.manifest
    limit = manifest.graph.max_lora_rank
    remedy = f"; export the bundle again with a larger --max-lora-rank, up to {LARGEST_RANK}" if limit else ""
    fitted = fit(adapter, manifest.model, limit or LARGEST_RANK, remedy)
    if not any_base:
        check_base(adapter, (manifest.model.name, manifest.provenance.get("source", "")), str(bundle.path))
    return fitted if any_base and manifest.quantization.folded else for_folded(fitted, bundle)


def check_base(adapter: LoraAdapter, names: Iterable[str], where: str) -> None:
    """Raise ToolchainError when the adapter names a base model that is none of `names`."""
    known = [name for name in dict.fromkeys(names) if name]
    if adapter.base and known and _base_name(adapter.base) not in map(_base_name, known):
        raise ToolchainError(
            f"the adapter was trained on {adapter.base!r}, but {where} is {' or '.join(map(repr, known))}; if the "
            "weights are the same under another name, pass --any-base"
        )


def _base_name(name: str) -> str:
    """The repository's or directory's name, without what only says how weights are stored."""
    found = re.search(r"models--[^/]*--([^/]+)/snapshots/", f"{name}/")
    short = (found[1] if found else name.replace("\\", "/").rstrip("/").rpartition("/")[2]).lower()
    while (stem := _FORMAT.sub("", short)) != short:
        short = stem
    return short


def pack_adapter(
    path: Path, bundle: Bundle, name: str = "", any_base: bool = False, overwrite: bool = False
) -> tuple[LoraAdapter, Bundle]:
    """Put the PEFT adapter at `path` into `bundle` as `name` (default: the directory's); returns it and the new bundle.

    Raises what read_adapter and check_for_bundle do, and ToolchainError for an impossible or taken name or a disk that
    is full; the bundle is then as it was.
    """
    name = name or Path(path).resolve().name
    if not _NAME.fullmatch(name):
        raise ToolchainError(f"name is {name!r}; letters, digits, '.', '_' and '-' are allowed, 64 at most: use --name")
    if name in bundle.manifest.loras and not overwrite:
        raise ToolchainError(f"the bundle has an adapter {name!r}; choose another --name, or replace it with --force")
    adapter = read_adapter(path)
    tensors, metadata = pack(check_for_bundle(adapter, bundle, any_base), bundle.manifest.model)
    key = bundle.lora_key(name)
    final = bundle.path / key
    partial = final.with_name(f".{name}.partial-{os.getpid()}")
    entry = LoraEntry(
        adapter.rank,
        tuple(row.target for row in modules_of(adapter)),
        bundle.manifest.files[WEIGHTS].sha256,
        Path(path).resolve().name,
    )
    old = bundle.manifest
    files = {other: file for other, file in old.files.items() if other != key}
    loras = {other: found for other, found in old.loras.items() if other != name}
    before, after = (bundle.path / f".{MANIFEST}.{state}-{os.getpid()}" for state in ("before", "after"))
    try:  # all is written before anything gets its name, so that a full disk changes nothing
        (bundle.path / LORA).mkdir(exist_ok=True)
        with system_errors():
            save_file(tensors, partial, {**metadata, "name": name})
        new = replace(old, files={**files, key: hash_file(partial)}, loras={**loras, name: entry})
        after.write_text(new.to_json(), encoding="utf-8")
        if name in old.loras:  # a manifest without it comes first: the bundle is whole at every moment
            before.write_text(replace(old, files=files, loras=loras).to_json(), encoding="utf-8")
            before.replace(bundle.path / MANIFEST)
        partial.replace(final)
        after.replace(bundle.path / MANIFEST)
    except OSError as error:
        raise ToolchainError(f"cannot write {final}: {error}") from error
    finally:
        for path in (partial, before, after):
            path.unlink(missing_ok=True)
    return adapter, Bundle(bundle.path, new)
