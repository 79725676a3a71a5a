"""What GPUs of before compute capability 9.0 run, on the one that is here: no thread block clusters, no early launches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_case import NATIVE, NO_GPU, needs_gpu

pytestmark = needs_gpu
ROOT = Path(__file__).resolve().parents[2]
MODULE = Path(NATIVE.__file__).parent if NATIVE else ROOT
LOAD = f"""
import edgellm_ros
edgellm_ros.__path__.append({str(MODULE)!r})
from edgellm_ros import native
print(native.load().has_clusters())
"""


def python(*arguments: str, clusters: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, which is where the setting is read."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**environment, "EDGELLM_CUDA_CLUSTERS": clusters},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


def test_the_setting_leaves_them_out() -> None:
    out = {clusters: python("-c", LOAD, clusters=clusters) for clusters in ("0", "1")}
    assert out["0"].stdout.strip() == "False", out["0"].stderr
    assert out["1"].stdout.strip() == str(NATIVE.has_clusters()), out["1"].stderr


@pytest.mark.timeout(900)
@pytest.mark.skipif(not NO_GPU and not NATIVE.has_clusters(), reason="this GPU has none")
@pytest.mark.parametrize(
    "path",
    [
        *("native/test_sampling.py", "native/test_draft_acceptance.py", "native/test_attention_tree.py"),
        *("native/test_attention_decode.py", "gpu/test_device_run.py"),
    ],
)
def test_what_has_clusters_elsewhere_passes_without(path: str) -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not alone", f"test/{path}", clusters="0")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 10, done.stdout[-3000:] + done.stderr[-1000:]
