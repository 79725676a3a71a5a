"""`edgellm plan`: does a model fit a robot's computer, and how fast could it be there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_ros.benchmark.devices import DEVICES
from edgellm_ros.benchmark.shapes import SCHEME_FIELDS, SHAPE_FIELDS
from edgellm_ros.cli.options import add_settings, settings_from
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ConfigError

if TYPE_CHECKING:
    from edgellm_ros.benchmark.budget import Budget
    from edgellm_ros.benchmark.devices import Device
    from edgellm_ros.benchmark.engine_budget import EnginePlan
    from edgellm_ros.bundle import Bundle

HELP = "compute whether a model fits a robot's computer, and about how fast it decodes there"
EXAMPLES = """\
examples:
  edgellm plan --shape llama-8b --weights int4 --device orin-nano            4 slots of 4,096 tokens, the defaults
  edgellm plan --shape llama-8b --weights int4 --device orin-nx --max-slots 1 --max-context 8192
  edgellm plan --bundle smollm2 --device orin-nano thor                      side by side
  edgellm plan --bundle smollm2 --device orin-nano --max-loras 4             with places for adapters of rank 16
  edgellm plan --model qwen3-4b --context 8192 --device agx-orin --json      for a script
  edgellm plan --bundle smollm2 --device orin-nano --executor tensorrt       the engine that was built for it

Nothing is built, loaded or measured: memory is arithmetic (from the native module's own plan where it is installed),
and speed is what the memory's bandwidth allows under the assumptions that are printed.
exit code: 0 when it fits every device named, 1 when it does not
"""
_USED = (
    "max_slots",
    "max_context",
    "prefill_chunk",
    "prefill_chunk_busy",
    "kv_cache",
    "fp8_prefill",
    "decode_batching",
    "max_loras",
    "max_lora_rank",
)
_CACHES = ("auto", "bf16", "fp16", "fp8")  # of the cuda executor
_MB = 1e6


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--bundle", type=Path, metavar="BUNDLE", help="directory that `edgellm export` wrote")
    model.add_argument(
        "--shape", "--model", choices=tuple(SHAPE_FIELDS), metavar="SHAPE",
        help=f"a published model's shape: {', '.join(SHAPE_FIELDS)}",
    )  # fmt: skip
    parser.add_argument("--weights", choices=tuple(SCHEME_FIELDS), help="weights of a --shape (default int4)")
    parser.add_argument(
        "--device", nargs="+", choices=tuple(DEVICES), required=True, metavar="DEVICE",
        help=f"one or more of {', '.join(DEVICES)}",
    )  # fmt: skip
    parser.add_argument(
        "--executor", choices=("cuda", "tensorrt"), default="cuda",
        help="whose memory: cuda (default), or tensorrt, of an engine in the bundle",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument(
        "--formula", action="store_true",
        help="memory by the formula even where the native module is built: the same numbers on every machine",
    )  # fmt: skip
    skipped = [name for name in EngineConfig.__dataclass_fields__ if name not in _USED]
    add_settings(parser, EngineConfig, "engine", skip=skipped, aliases={"max_context": "--context"})


def execute(args: argparse.Namespace) -> int:
    """Compute and show one budget a device."""
    from edgellm_ros.benchmark.budget import capacity_of, make_budget
    from edgellm_ros.executors.cuda_formats import widenings

    if args.bundle is not None and args.weights is not None:
        raise ConfigError("--weights belongs to --shape: a bundle's weights are what they are")
    if args.executor == "tensorrt" and args.bundle is None:
        raise ConfigError("--executor tensorrt plans an engine, which a --bundle has; --shape is planned for cuda")
    bundle = _open(args)
    model, quant = bundle.manifest.model, bundle.manifest.quantization
    config = settings_from(args, EngineConfig(executor=args.executor))
    capacity = capacity_of(model, config)
    if capacity > model.max_context:
        raise ConfigError(f"--max-context {capacity} exceeds the model's {model.max_context}")
    devices: list[Device] = [DEVICES[name] for name in args.device]
    plans: list[EnginePlan] = []
    if args.executor == "tensorrt":
        from edgellm_ros.benchmark.engine_budget import plan_engine

        plans = [plan_engine(bundle, config, device, args.formula) for device in devices]
        budgets = [plan.budget for plan in plans]
    else:
        if config.kv_cache not in _CACHES:
            raise ConfigError(f"--kv-cache {config.kv_cache} is not the cuda executor's; it has {', '.join(_CACHES)}")
        exact = [None if args.formula else _exact_plan(bundle, config, device) for device in devices]
        budgets = [make_budget(model, quant, config, *each) for each in zip(devices, exact, strict=True)]
    if args.json:
        widened = widenings(model, quant)
        keys = [{"engine": plan.engine.key} for plan in plans] or [{} for _ in budgets]
        more = {"executor": args.executor, "widened": widened}
        print(json.dumps([_as_dict(b) | more | key for b, key in zip(budgets, keys, strict=True)], indent=1))
    else:
        _print(bundle, config, budgets, plans)
    return 0 if all(budget.fits for budget in budgets) else 1


def _open(args: argparse.Namespace) -> Bundle:
    from edgellm_ros.benchmark.random_bundle import RandomBundle
    from edgellm_ros.bundle import Bundle

    if args.bundle is not None:
        return Bundle.open(args.bundle, verify=False)
    return RandomBundle(args.shape, args.weights or "int4")


def _exact_plan(bundle: Bundle, config: EngineConfig, device: Device) -> dict[str, int] | None:
    """The native module's own plan; None where it is not installed. A model that it refuses is refused here."""
    from edgellm_ros import native
    from edgellm_ros.executors.cuda import plan_memory

    if native.import_module()[0] is None:
        return None
    plan = plan_memory(bundle, config, device.l2_bytes)
    plan.pop("total")
    return plan


def _as_dict(budget: Budget) -> dict[str, Any]:
    return {
        "device": budget.device.name,
        "memory_bytes": int(budget.device.memory_gb * 1e9),
        "needed_bytes": budget.total,
        "fits": budget.fits,
        "tight": budget.tight,
        "parts": budget.parts,
        "exact": budget.exact,
        "tokens_per_s": budget.tokens_per_s,
        "bound_tokens_per_s": budget.bound_tokens_per_s,
    }


def _print(bundle: Bundle, config: EngineConfig, budgets: list[Budget], plans: list[EnginePlan]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from edgellm_ros.benchmark import budget as assumed
    from edgellm_ros.executors.cuda_formats import widenings

    model, quant = bundle.manifest.model, bundle.manifest.quantization
    console = Console(highlight=False)
    built = plans[0].config if plans else config
    slots = f"{built.max_slots} slots of {assumed.capacity_of(model, built)} tokens, KV cache {built.kv_cache}"
    console.print(f"[bold]{escape(model.name)}[/bold], {quant.weights} weights, head {quant.lm_head}; {slots}")
    table = Table()
    table.add_column("MB")
    for budget in budgets:
        table.add_column(escape(budget.device.name), justify="right")
    for name in dict.fromkeys(name for budget in budgets for name in budget.parts):
        table.add_row(name.replace("_", " "), *(f"{budget.parts.get(name, 0) / _MB:,.0f}" for budget in budgets))
    table.add_row("CUDA context", *(f"{assumed.CONTEXT_GB * 1e3:,.0f}" for _ in budgets))
    table.add_row("system, ROS 2", *(f"{assumed.SYSTEM_GB * 1e3:,.0f}" for _ in budgets))
    table.add_section()
    table.add_row("needed", *(f"{budget.total / _MB:,.0f}" for budget in budgets))
    table.add_row("there", *(f"{budget.device.memory_gb * 1e3:,.0f}" for budget in budgets))
    table.add_row("", *map(_verdict, budgets))
    table.add_section()
    for context in dict.fromkeys(context for budget in budgets for context in budget.bound_tokens_per_s):
        table.add_row(f"tokens/s at {context}", *(_speed(budget, context) for budget in budgets))
    console.print(table)
    for line in widenings(model, quant) if not plans else []:
        console.print(f"wider than stored, {escape(line)}")
    for plan in plans:
        lacks = "" if plan.engine.context_bytes else "; its report does not say how much scratch memory TensorRT takes"
        console.print(f"{escape(plan.budget.device.name)}: engines/{escape(plan.engine.key)}{lacks}", soft_wrap=True)
    for i, budget in enumerate(budgets):
        if budget.tight:
            spare = budget.device.memory_gb * 1e3 - budget.total / _MB
            console.print(
                f"{escape(budget.device.name)}: {spare:,.0f} MB to spare; below {assumed.TIGHT_GB * 1e3:,.0f} it may "
                "not fit, for Linux shows less than the module has, and a desktop takes more"
            )
        if not budget.fits:
            ways = plans[i].remedies if plans else assumed.remedies(model, quant, config, budget)
            text = ", or ".join(ways) if ways else "a smaller model, or weights of fewer bits"
            console.print(f"{escape(budget.device.name)}: would fit with {text}")
    console.print(f"[dim]{_assumptions(budgets, bool(plans))}[/dim]")


def _verdict(budget: Budget) -> str:
    if budget.tight:
        return "[yellow]fits, tight[/yellow]"
    return "[green]fits[/green]" if budget.fits else "[bold red]does not fit[/bold red]"


def _speed(budget: Budget, context: int) -> str:
    bound = budget.bound_tokens_per_s.get(context)
    if bound is None:
        return ""
    speed = budget.tokens_per_s.get(context)
    return f"bound {bound:,.0f}" if speed is None else f"{speed:,.0f} (bound {bound:,.0f})"


def _assumptions(budgets: list[Budget], of_engines: bool) -> str:
    """Where the numbers come from, in a sentence or two."""
    from edgellm_ros.benchmark import budget as assumed

    exact = budgets[0].exact
    modes = "; ".join(sorted({budget.device.power_mode for budget in budgets}))
    if of_engines:
        rest = "and the native module's own plan" if exact else "and 67 MB for all else, a guess"
        return (
            f"memory from the engine's report {rest}. The bound is the stated bandwidth, one sequence, in the power "
            f"mode {modes}. No engine was measured, and no Jetson."
        )
    source = "the native module's own plan" if exact else "a formula (within 5 % of the native module's plan)"
    return (
        f"memory from {source}, of the executor cuda; an engine takes its file, its cache and scratch memory: "
        f"--executor tensorrt, once it is built. Speed assumes that decoding reaches {assumed.REACHED:.0%} of the "
        f"stated bandwidth and {assumed.STAGE_US_PLAIN} us a stage ({assumed.STAGE_US} from compute capability 9.0), "
        f"one sequence, in the power mode {modes}. No Jetson was measured."
    )
