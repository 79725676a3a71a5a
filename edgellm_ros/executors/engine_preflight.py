"""Decides which engine of a bundle may be loaded here, before anything is allocated, and whether it is what it claims.

Everything is a pure function of reports, settings, what `probe_machine` found, and an engine's own list of bindings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm_ros import native, trt_plugins
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.errors import BundleError, UnsupportedError
from edgellm_ros.executors.contract import VARIES, tensor_faults
from edgellm_ros.executors.engine_settings import batched_slots, usable_context
from edgellm_ros.executors.engines import (
    Engine,
    build_command,
    cache_dtype,
    cache_format,
    engine_contract,
    is_of,
    list_engines,
    read_engine,
)
from edgellm_ros.manifest import Manifest
from edgellm_ros.memory import free_device_memory

_ALIGNMENT = 256  # arena.hpp: MemoryPlan::kAlignment
_RESERVE = 64 << 20  # of the rest: embedding, workspace, graphs
_OTHER = "it was built from other weights or another graph; build it again with --force"
_LARGEST = 2**31 - 1  # size of a tensor that the native module takes
_SHOWN = 12  # differences in one message


@dataclass(frozen=True)
class Machine:
    """What an engine would run on. `reason` says why none can; then the rest may be empty."""

    reason: str = ""
    library: str = ""  # of TensorRT
    version: tuple[int, ...] = ()  # its own
    gpu: str = ""
    capability: tuple[int, int] = (0, 0)
    free_bytes: int = 0

    @property
    def target(self) -> str:
        """The GPU architecture, as `edgellm build --target` has it."""
        return f"sm{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Binding:
    """What an engine says of one of its inputs or outputs; `profiles`: smallest, best, largest shape in each."""

    name: str
    is_input: bool
    dtype: str
    dims: Sequence[int]
    on_host: bool
    is_linear: bool
    profiles: Sequence[Sequence[Sequence[int]]]


def probe_machine() -> Machine:
    """Look for the native module, TensorRT's library and a GPU with its driver. Creates nothing of TensorRT."""
    module, reason = native.import_module()
    if module is None:
        return Machine(reason)
    path, version, reason = native.find_tensorrt(module)
    if reason:
        return Machine(f"no TensorRT: {reason}", path, tuple(version))
    reason = native.unavailable_reason()
    if reason:
        return Machine(reason, path, tuple(version))
    info = module.device_info()
    free = free_device_memory(info)
    return Machine("", path, tuple(version), info["name"], tuple(info["compute_capability"]), free)


def choose_engine(bundle: Bundle, config: EngineConfig, machine: Machine) -> tuple[Engine | None, list[str]]:
    """The engine that would be loaded, or None; and why each other one is not, as sentences that name the remedy."""
    try:
        paths = list_engines(bundle)
    except BundleError as error:
        return None, [str(error)]
    if not paths:
        return None, [f"the bundle has no engine; build one on this machine with `edgellm build {bundle.path}`"]
    if machine.reason:
        return None, [machine.reason]
    return _choose(paths, config, lambda engine: engine_faults(engine, bundle, config, machine))


def choose_planned(bundle: Bundle, config: EngineConfig, target: str) -> tuple[Engine | None, list[str]]:
    """The same for a machine that is elsewhere, whose GPU architecture is all that is known of it."""

    def faults(engine: Engine) -> list[str]:
        if not is_of(engine, bundle):
            return [_OTHER]
        damaged = _profile_fault(engine, bundle.manifest)
        other = [] if engine.target == target else [f"it is for {engine.target}"]
        other += [] if engine.builder == "tensorrt" else [_builder_fault(engine)]
        return [damaged] if damaged else [*other, *_setting_faults(engine, bundle, config)]

    return _choose(list_engines(bundle), config, faults)


def _choose(
    paths: Iterable[Path], config: EngineConfig, faults_of: Callable[[Engine], list[str]]
) -> tuple[Engine | None, list[str]]:
    fitting: list[Engine] = []
    reasons: list[str] = []
    for path in paths:
        try:
            engine = read_engine(path)
        except BundleError as error:
            reasons.append(str(error))
            continue
        faults = faults_of(engine)
        if faults:
            reasons.append(f"engines/{engine.key}: {'; '.join(faults)}")
        else:
            fitting.append(engine)
    fitting.sort(key=lambda engine: _preference(engine.options, config))
    reasons += [f"engines/{engine.key}: engines/{fitting[0].key} fits better" for engine in fitting[1:]]
    return (fitting[0] if fitting else None), reasons


def engine_faults(engine: Engine, bundle: Bundle, config: EngineConfig, machine: Machine) -> list[str]:
    """Why `engine` cannot be loaded here with these settings; empty when it can."""
    if not is_of(engine, bundle):
        return [_OTHER]
    damaged = _profile_fault(engine, bundle.manifest)
    if damaged:
        return [damaged]
    faults = [*_build_faults(engine, machine), *_setting_faults(engine, bundle, config)]
    needed = memory_needed(engine, bundle, config)
    total = sum(needed.values())
    if not faults and machine.free_bytes < total:
        parts = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in needed.items())
        faults.append(
            f"it needs {total / 1e6:.0f} MB ({parts}) and {machine.free_bytes / 1e6:.0f} MB are free; lower max_slots, "
            "close other programs, or build it again with a smaller --max-context or --max-input"
        )
    return faults


def memory_needed(engine: Engine, bundle: Bundle, config: EngineConfig) -> dict[str, int]:
    """Bytes by purpose, by the report, for choosing; the executor plans them exactly before it loads anything."""
    model, options = bundle.manifest.model, engine.options
    element = _cache_bytes(options, bundle.manifest)
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * element
    return {
        "engine": engine.size,
        "KV cache": per_token * (options.max_context or 0) * config.max_slots,
        "context": engine.context_bytes,
        "reserve": _RESERVE,
    }


def _cache_bytes(options: BuildOptions, manifest: Manifest) -> int:
    """Of one number in the cache."""
    return {"float32": 4, "int8": 1}.get(cache_dtype(options, manifest.graph), 2)


def check_bindings(engine: Engine, manifest: Manifest, bindings: Iterable[Binding], num_profiles: int) -> None:
    """Raise BundleError that names everything in which an engine is not what manifest and report say."""
    faults = binding_faults(engine, manifest, tuple(bindings), num_profiles)
    if not faults:
        return
    more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    raise BundleError(
        f"{engine.file} is not the engine that the manifest and its report describe; build it again with --force:\n  "
        + "\n  ".join(faults[:_SHOWN]) + more
    )  # fmt: skip


def binding_faults(
    engine: Engine, manifest: Manifest, bindings: Sequence[Binding], num_profiles: int
) -> list[str]:
    """Every difference in names, directions, shapes, dtypes, places, layouts and profiles."""
    options = engine.options
    contract = engine_contract(manifest, options)
    inputs = {b.name: (tuple(b.dims), b.dtype) for b in bindings if b.is_input}
    outputs = {b.name: (tuple(b.dims), b.dtype) for b in bindings if not b.is_input}
    faults = tensor_faults(contract, inputs, outputs)
    faults += [f"{b.name} is wanted in host memory" for b in bindings if b.on_host]
    faults += [f"{b.name} is not row-major" for b in bindings if not b.is_linear]
    wanted = engine.profiles
    if num_profiles != len(wanted):
        return [*faults, f"it has {num_profiles} optimisation profiles; the report says {len(wanted)}"]
    for binding in bindings:
        for index, found in enumerate(binding.profiles):
            have = [tuple(shape) for shape in found]
            if binding.name in wanted[index] and have != wanted[index][binding.name]:
                faults.append(
                    f"{binding.name} ranges over {have} in profile {index}; the report says "
                    f"{wanted[index][binding.name]}"
                )
    return faults


def _profile_fault(engine: Engine, manifest: Manifest) -> str:
    """Where the report's profiles are no ranges of the inputs that its options make; empty when they are."""
    options = engine.options
    names = ("decode", "prefill") if options.profile == "split" else ("single",)
    if len(engine.profiles) != len(names):
        return f"its report has {len(engine.profiles)} profiles instead of {len(names)}; build it again with --force"
    for name, profile in zip(names, engine.profiles, strict=True):
        for tensor in engine_contract(manifest, options):
            shapes = profile.get(tensor.name, [])
            if not tensor.is_input or _is_range(shapes, tensor.sizes):
                continue
            return (
                f"its report gives {tensor.name} the range {shapes} in the {name} profile, which is none of "
                f"{tensor.sizes}; build it again with --force"
            )
        batch = profile[manifest.graph.embeds][2][0]
        if batch < options.max_batch:
            asked = f"its report's max_batch is {options.max_batch}"
            return f"{asked} and its {name} profile takes {batch} sequences; build it again with --force"
    return ""


def _is_range(shapes: Sequence[Sequence[object]], sizes: Sequence[int]) -> bool:
    """Smallest, best and largest, none smaller than the one before; VARIES is any size."""
    if len(shapes) != 3 or any(len(shape) != len(sizes) for shape in shapes):
        return False
    for fixed, *found in zip(sizes, *shapes, strict=True):
        counts = [count for count in found if type(count) is int]
        if len(counts) != 3 or counts != sorted(counts) or counts[0] < 0 or counts[2] > _LARGEST:
            return False
        if fixed != VARIES and {*counts} != {fixed}:
            return False
    return True


def _build_faults(engine: Engine, machine: Machine) -> list[str]:
    again = f"build it again on this machine with `edgellm build {engine.path.parent.parent}`"
    faults = []
    if engine.builder != "tensorrt":
        faults.append(f"{_builder_fault(engine)}; {again}")
    if engine.target != machine.target:
        faults.append(f"it is for {engine.target}, and {machine.gpu} is {machine.target}; {again}")
    built = tuple(int(part) for part in engine.version.split(".") if part.isdigit())
    both = min(len(built), len(machine.version))
    if engine.builder == "tensorrt" and (both < 3 or built[:both] != machine.version[:both]):
        have = ".".join(map(str, machine.version))
        faults.append(f"it was built by TensorRT {engine.version}, and {machine.library} is {have}; {again}")
    if engine.options.dialect == "plugin":
        try:
            trt_plugins.find_library()
        except UnsupportedError as error:
            faults.append(f"it needs the project's plugins, and {error}")
    return faults


def _builder_fault(engine: Engine) -> str:
    return f"it was built by {engine.builder}, and only TensorRT's own engines are loaded"


def _setting_faults(engine: Engine, bundle: Bundle, config: EngineConfig) -> list[str]:
    options, graph = engine.options, bundle.manifest.graph
    capacity = usable_context(options, config)
    faults = []
    if config.max_context > capacity:
        kept = (options.max_context or 0) - capacity
        idle = f", with {kept} kept for idle slots while others decode together" if kept else ""
        command = build_command(bundle, options, max_context=config.max_context + kept)
        asked = f"max_context {config.max_context}"
        faults.append(f"{asked} exceeds the engine's {capacity}{idle}; rebuild with `{command}`")
    model, element = bundle.manifest.model, _cache_bytes(options, bundle.manifest)
    keys = model.num_kv_heads * model.head_dim * element * (options.max_context or 0)
    if config.max_slots > 1 and keys % _ALIGNMENT:
        least = (options.max_context or 0) // 64 * 64
        command = build_command(bundle, options, max_context=least + (64 if least + 64 <= model.max_context else 0))
        faults.append(
            f"a slot of {options.max_context} tokens has {keys} bytes of keys in a layer, and TensorRT wants addresses "
            f"in multiples of {_ALIGNMENT}; set max_slots to 1, or build one with `{command}`"
        )
    cache = cache_format(options, graph)
    if config.kv_cache == "fp8" and cache != "fp8":
        command = build_command(bundle, options, kv_cache="fp8", dialect="plugin")
        faults.append(f"kv_cache is 'fp8' and the engine's is {cache}; build one with `{command}`, or set it to auto")
    elif config.kv_cache not in ("auto", cache):
        faults.append(f"kv_cache is {config.kv_cache!r} and the engine's is {cache}; set it to auto")
    if config.max_loras and not options.lora:
        command = build_command(bundle, options, lora=True)
        faults.append(f"max_loras is {config.max_loras} and the engine takes no adapters; build one with `{command}`")
    if config.max_loras and config.max_lora_rank > graph.max_lora_rank:
        faults.append(
            f"max_lora_rank {config.max_lora_rank} exceeds the bundle's {graph.max_lora_rank}; export it with "
            f"--max-lora-rank {config.max_lora_rank} and build again, or lower it"
        )
    return faults


def _preference(options: BuildOptions, config: EngineConfig) -> tuple[int, ...]:
    """Smaller is better: no needless adapter inputs or fp8 cache, the context asked for, decoding together, trees."""
    context = options.max_context or 0
    batched = batched_slots(options, config)
    needless = int(options.lora and not config.max_loras)
    coarse = int(options.kv_cache == "fp8" and config.kv_cache != "fp8")
    return (needless, coarse, context if config.max_context else -context, -batched, -int(options.trees))
