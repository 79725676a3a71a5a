"""What a built engine takes on a robot's computer: its file, its cache, and the scratch memory of its report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edgellm_ros import native
from edgellm_ros.benchmark.budget import Budget, make_budget, remedies
from edgellm_ros.benchmark.devices import Device
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ConfigError
from edgellm_ros.executors.engine_preflight import choose_planned, memory_needed
from edgellm_ros.executors.engines import Engine, cache_format
from edgellm_ros.executors.tensorrt import plan_memory

# "context" is CUDA's in a budget, and an engine's weights are in its file.
_NAMES = {"context": "scratch", "weights": "embedding", "KV cache": "kv_cache", "reserve": "all else"}


@dataclass(frozen=True)
class EnginePlan:
    """A budget, the engine that it is of, and the settings with the cache that this engine has."""

    bundle: Bundle
    budget: Budget
    engine: Engine
    config: EngineConfig

    @property
    def remedies(self) -> list[str]:
        """What would make it fit; the cache's size and format are the build's."""
        ways = remedies(self.bundle.manifest.model, self.bundle.manifest.quantization, self.config, self.budget)
        return [_remedy(way) for way in ways]


def plan_engine(bundle: Bundle, config: EngineConfig, device: Device, formula: bool = False) -> EnginePlan:
    """The budget of the engine that `device` would load; raises ConfigError where there is none.

    formula: without the native module's own plan. No engine was ever measured, so the budget has the bandwidth's bound
    and no speed.
    """
    target = "sm{}{}".format(*device.compute_capability)
    engine, reasons = choose_planned(bundle, config, target)
    if engine is None:
        why = "; ".join(reasons) or "the bundle has none"
        raise ConfigError(
            f"no engine of {bundle.path} is for {device.name} ({target}): {why}. What one takes is known when `edgellm "
            "build` has made it there; --executor cuda plans without"
        )
    exact = not formula and native.import_module()[0] is not None
    found = plan_memory(bundle, engine, config) if exact else memory_needed(engine, bundle, config)
    parts = {_NAMES.get(name, name): size for name, size in found.items() if name != "total"}
    capacity, cache = engine.options.max_context or 0, cache_format(engine.options, bundle.manifest.graph)
    built = dataclasses.replace(config, max_context=capacity, kv_cache=cache)
    budget = make_budget(bundle.manifest.model, bundle.manifest.quantization, built, device, parts)
    return EnginePlan(bundle, dataclasses.replace(budget, exact=exact, tokens_per_s={}), engine, built)


def _remedy(way: str) -> str:
    if way.startswith("--max-context"):
        return f"an engine of `edgellm build {way}`"
    return "an engine of `edgellm build --dialect plugin --kv-cache fp8`" if way.startswith("--kv-cache") else way
