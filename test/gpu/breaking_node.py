"""An llm node whose GPU breaks under it: a kernel reads where nothing is as soon as the file named first exists."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np

import edgellm_ros

edgellm_ros.__path__.append(str(Path(__file__).resolve().parents[2] / "build" / "native-check"))  # test/conftest.py

from edgellm_ros import native  # noqa: E402 - it looks for the module there
from edgellm_ros.ros.llm_node import LLMNode  # noqa: E402
from edgellm_ros.ros.process import run_node  # noqa: E402


def break_the_device_when(path: Path) -> None:
    """Wait for `path`; the context that all of this process computes in is lost after it."""
    module = native.load()
    x, out = (module.Tensor("bfloat16", [1, 16]) for _ in range(2))
    order = module.Tensor("int32", [16])
    order.copy_from(np.linspace(-(2**31), 2**31 - 1, 16).astype(np.int32))
    while not path.exists():
        time.sleep(0.001)
    module.kernels.map_input(x, out, order)  # reads up to 4 GiB before and behind x


if __name__ == "__main__":
    threading.Thread(target=break_the_device_when, args=(Path(sys.argv[1]),), daemon=True).start()
    raise SystemExit(run_node(LLMNode, sys.argv[2:]))
