"""EDGELLM_CUDA_ARCHS is understood or refused before the first file compiles, whatever CUDA toolkit is there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUDA_12_6 = "50 52 53 60 61 62 70 72 75 80 86 87 89 90"
CUDA_13 = "75 80 86 87 88 89 90 100 110 103 120 121"

pytestmark = pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")


def choose(tmp_path: Path, wanted: str, known: str = CUDA_13) -> subprocess.CompletedProcess[str]:
    """Run choose_archs.cmake alone; nvcc is a stand-in that lists what the one of that CUDA does."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo compute_{arch}\n" for arch in known.split()))
    nvcc.chmod(0o755)
    script = tmp_path / "run.cmake"
    script.write_text(
        f'set(CMAKE_CUDA_COMPILER "{nvcc}")\nset(CMAKE_CUDA_COMPILER_VERSION 12.6.68)\n'
        f'set(EDGELLM_CUDA_ARCHS "{wanted}")\ninclude("{ROOT}/native/cmake/choose_archs.cmake")\n'
        'message("archs=${archs} ptx=${ptx}")\n'
    )
    return subprocess.run(["cmake", "-P", script], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("87", "archs=87 ptx=87"),
        ("8.7", "archs=87 ptx=87"),
        ("sm_87", "archs=87 ptx=87"),
        (" 87, compute_90a, ", "archs=87;90a ptx="),
        ("12.0", "archs=120 ptx=120"),
        ("all", "archs=80;87;89;90a;110;120 ptx=120"),
    ],
)
def test_an_architecture_may_be_written_as_nvcc_or_a_datasheet_does(tmp_path: Path, wanted: str, chosen: str) -> None:
    result = choose(tmp_path, wanted)
    assert result.returncode == 0 and result.stderr.strip() == chosen, result.stderr


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("orin", "of orin: it is no architecture"),
        ("native 87", "of native: it is no architecture"),
        ("75", "of 75: the kernels need 80 (compute capability 8.0) or newer"),
        ("87 110", "of 110: CUDA 12.6.68 does not know it, only 50 52 53"),
    ],
)
def test_what_cannot_be_compiled_for_is_refused_by_name_with_what_is_allowed(
    tmp_path: Path, wanted: str, words: str
) -> None:
    result = choose(tmp_path, wanted, CUDA_12_6)
    said = " ".join(result.stderr.split())
    assert result.returncode != 0 and words in said and "Allowed are names like 87 (Jetson Orin)" in said, said


def test_all_takes_ptx_along_where_the_newest_it_knows_is_hoppers(tmp_path: Path) -> None:
    """With CUDA 12.6 a newer GPU gets `all`, and only PTX runs on it; that of 90a would run on Hopper alone."""
    assert choose(tmp_path, "all", CUDA_12_6).stderr.strip() == "archs=80;87;89;90a ptx=90"
