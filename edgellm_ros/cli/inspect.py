"""`edgellm inspect`: shows what a bundle holds, for people as a table or for programs as its manifest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from edgellm_ros.bundle import Bundle
    from edgellm_ros.manifest import LinearFormat, Manifest

HELP = "show what a bundle holds"
EXAMPLES = """\
examples:
  edgellm inspect smollm2                                   check every file and show the table
  edgellm inspect smollm2 --no-verify                       only sizes, for a large bundle on a slow disk
  edgellm inspect smollm2 --json | jq .model.max_context    for a script
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that `edgellm export` wrote")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON instead")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="compare each file's sha256 (default on)"
    )


def execute(args: argparse.Namespace) -> int:
    """Open, check and show the bundle."""
    from edgellm_ros.bundle import Bundle

    bundle = Bundle.open(args.bundle, verify=args.verify)
    if args.json:
        print(bundle.manifest.to_json(), end="")
    else:
        print_bundle(bundle, "not checked" if not args.verify else "sizes and sha256 agree")
    return 0


def print_bundle(bundle: Bundle, files_state: str) -> None:
    """Print the table of a bundle to stdout."""
    from rich.console import Console

    Console(highlight=False).print(bundle_table(bundle, files_state))


def bundle_table(bundle: Bundle, files_state: str) -> Table:
    """What people want to know of a bundle, a line each."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(str(bundle.path)), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _facts(bundle.manifest):
        table.add_row(name, escape(text))
    table.add_section()
    files = bundle.manifest.files
    table.add_row("files", f"{len(files)}, {human_bytes(sum(f.size for f in files.values()))}; {files_state}")
    for name, entry in sorted(files.items(), key=lambda item: -item[1].size):
        table.add_row(f"  {escape(name)}", f"{human_bytes(entry.size):>10}  {entry.sha256[:12]}")
    for key, text in _engines(bundle):
        table.add_row(f"  {escape(key)}", escape(text))
    return table


def human_bytes(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _engines(bundle: Bundle) -> list[tuple[str, str]]:
    """The bundle's engines: which would be loaded here with the default settings, and why another would not."""
    from edgellm_ros.config import EngineConfig
    from edgellm_ros.errors import BundleError
    from edgellm_ros.executors.engine_preflight import choose_engine, engine_faults, probe_machine
    from edgellm_ros.executors.engines import is_of, list_engines, read_engine

    paths = list_engines(bundle)
    if not paths:
        return []
    config, machine = EngineConfig(), probe_machine()
    chosen, _ = choose_engine(bundle, config, machine)
    found = [("engines", f"{len(paths)}; {machine.reason or f'for {machine.gpu} with TensorRT'}")]
    for path in paths:
        try:
            engine = read_engine(path)
        except BundleError as error:
            found.append((path.name, str(error)))
            continue
        if chosen is not None and chosen.key == engine.key:
            fits = "fits this machine"
        elif machine.reason:
            fits = f"for {engine.target}, by {engine.builder} {engine.version}"
            fits += "" if is_of(engine, bundle) else "; built from other weights or another graph"
        else:
            fits = "; ".join(engine_faults(engine, bundle, config, machine)) or "another fits better"
        found.append((path.name, f"{human_bytes(engine.size):>10}  {fits}"))
    return found


def format_text(form: LinearFormat) -> str:
    """'int4 in groups of 32 with offsets'."""
    text = form.scheme + (f" in groups of {form.group_size}" if form.group_size else "")
    named = (
        ("offsets", form.offset), ("an input factor", form.input_factor), ("inputs in another order", form.input_order),
        (f"{form.activation} inputs in engines", form.activation),
    )  # fmt: skip
    parts = [name for name, here in named if here]
    return text + (f" with {' and '.join(parts)}" if parts else "")


def _short(value: object) -> str:
    return f"({len(value)} numbers)" if isinstance(value, list) else str(value)


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    model, tokens, quant, test = manifest.model, manifest.tokens, manifest.quantization, manifest.self_test
    heads = f"{model.num_heads} heads, {model.num_kv_heads} KV heads of {model.head_dim}"
    extras = [
        name
        for name, here in (
            ("q/k norms", model.qk_norm),
            ("tied head", model.tied_head),
            ("sliding window", model.sliding_windows),
            ("norms on outputs", model.output_norms),
            (f"scores scaled by {model.score_scale:.4g}", model.attention_scale),
            (f"logits capped at {model.logit_softcap:g}", model.logit_softcap),
        )
        if here
    ]
    mlp = f"MLP {model.intermediate_size}, {model.activation}"
    rope = f"theta {model.rope_theta:g}"
    if model.rope_scaling:
        rope += ", " + ", ".join(f"{key} {_short(value)}" for key, value in model.rope_scaling.items())
    if model.rotary_dim:
        rope += f"; {model.rotary_dim} of {model.head_dim} channels are turned"
    if "local" in model.layer_ropes:
        rope += f"; theta {model.local_rope_theta:g} in {model.layer_ropes.count('local')} of the layers"
    if "none" in model.layer_ropes:
        rope += f"; none in {model.layer_ropes.count('none')} of the layers"
    weights = quant.weights + (f" in groups of {quant.group_size}" if quant.group_size else "")
    if quant.lm_head or quant.embedding:
        weights += f"; head {quant.lm_head or quant.weights}, embedding {quant.embedding or quant.weights}"
    for form in dict.fromkeys(quant.formats.values()):
        stems = [stem for stem, own in quant.formats.items() if own == form]
        more = f" and {len(stems) - 4} more" if len(stems) > 4 else ""
        weights += f"; {', '.join(stems[:4])}{more}: {format_text(form)}"
    thinking = f"{tokens.think_start} … {tokens.think_end}" if tokens.think_start else "no tags"
    checked = f"{len(test.cases)} prompts against {test.reference}" if test.cases else "none"
    return [
        ("model", f"{model.name} ({model.family})"),
        ("layers", f"{model.num_layers} of width {model.hidden_size}, {mlp}"),
        ("attention", "; ".join([heads, *extras])),
        ("rope", rope),
        ("context", f"{model.max_context} tokens"),
        ("vocabulary", f"{model.vocab_size} tokens" + (f", {model.head_rows} in the head" if model.head_rows else "")),
        ("stop ids", ", ".join(map(str, tokens.stop_ids)) or "none"),
        ("BOS", f"{tokens.bos_id} {tokens.bos_token!r}" + (", added to raw prompts" if tokens.add_bos else "")),
        ("reasoning", thinking),
        ("weights", weights),
        *([("kept from", quant.kept)] if quant.kept else []),
        *(("note", note) for note in quant.notes),
        ("self-test", checked),
        ("quality", manifest.quality.summary()),
        *(
            ("adapter", f"{name}: rank {lora.rank}, {', '.join(lora.targets)}")
            for name, lora in sorted(manifest.loras.items())
        ),
        *((f"from: {key}", value) for key, value in manifest.provenance.items()),
    ]
