"""A real error of the device: an illegal address ends the CUDA context, so each test has a process of its own.

The kernel that fails is one of ours, told to read where nothing is, as a wrong index in a step would.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from edgellm_ros.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
_BEGIN = """
import sys
sys.path.insert(0, {root!r})
import edgellm_ros
edgellm_ros.__path__.append({check!r})
import numpy as np
from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Request, SamplingParams
from edgellm_ros.executors import SequenceStep
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.llm import LLM

module = native.load()
bundle, config = Bundle.open({bundle!r}), EngineConfig(executor="cuda", max_slots=2)

x, out = (module.Tensor("bfloat16", [1, 16]) for _ in range(2))
order = module.Tensor("int32", [16])
order.copy_from(np.linspace(-(2**31), 2**31 - 1, 16).astype(np.int32))

def break_the_device():
    module.kernels.map_input(x, out, order)  # reads up to 4 GiB before and behind x

def tell(what):
    try:
        what()
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("nothing")
"""
_BAD_ADDRESS = "cudaError(IllegalAddress|InvalidAddressSpace)"  # some of that range can be another address space's
_EXECUTOR = """
executor = CudaExecutor(bundle, config)
one = [SequenceStep(0, np.array([5], np.int32), 0)]
executor.step(one)
break_the_device()
tell(lambda: executor.step(one))
tell(lambda: executor.step(one))
tell(lambda: executor.copy_prefix(0, 1, 1))
executor.close()
tell(lambda: executor.step(one))
"""
_ENGINE = """
request = Request(prompt_ids=(7, 8, 9), sampling=SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True))
with LLM.open(bundle, config) as llm:
    print("answered", len(llm.complete(request).token_ids))
    generations = [llm.submit(request) for _ in range(8)]
    while not next(generations[0]).token_ids:
        pass
    break_the_device()
    tell(generations[-1].result)
    tell(lambda: llm.complete(request))
    tell(lambda: llm.complete(request))
"""


def run(script: str, bundle: Bundle) -> list[str]:
    """The lines that the process prints; it must end by itself, with status 0."""
    check = str(ROOT / "build" / "native-check")
    begin = _BEGIN.format(root=str(ROOT), check=check, bundle=str(bundle.path))
    done = subprocess.run([sys.executable, "-c", begin + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-3000:])
    return done.stdout.splitlines()


def test_the_executor_names_the_place_and_then_refuses_everything(gpu_bundle: Callable[..., Bundle]) -> None:
    first, second, copy, closed = run(_EXECUTOR, gpu_bundle("gpu_llama", "int4"))
    assert first.startswith("DeviceError ") and re.search(_BAD_ADDRESS, first), first
    assert first.endswith("start it again")
    place = first.removeprefix("DeviceError ")
    assert re.match(r"[a-z_]+\.[ch]pp:\d+: cuda[A-Z]", place), place  # token_loop.cpp:90: cudaStreamSynchronize failed
    for later in (second, copy):
        assert later == f"DeviceError the decoder failed earlier: {place}"
    assert closed == "DeviceError the cuda executor is closed"


def test_a_running_request_ends_with_the_error_and_later_ones_are_refused_with_it(
    gpu_bundle: Callable[..., Bundle],
) -> None:
    answered, running, second, third = run(_ENGINE, gpu_bundle("gpu_qwen3", "int4"))
    assert answered == "answered 240"
    assert running.startswith("DeviceError ") and re.search(_BAD_ADDRESS, running), running
    for later in (second, third):
        assert later.startswith("DeviceError the executor failed earlier and must be loaded again: ")
        assert running.removeprefix("DeviceError ") in later
