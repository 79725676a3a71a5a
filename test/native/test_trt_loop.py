"""The decode loop over an engine, run on the CPU: its own code over stand-ins of CUDA and of the engine (trt_loop/).

Random steps, runs, trees of drafts, prefixes and adapters of ten slots, two more than a batch takes, from a thread whose GPU is another than the loop's; every token is
compared with what a plain list of tokens says. It shows which slot, row, place, profile and adapter each enqueue is bound to; nothing of a GPU
or of TensorRT.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "token_loop", "token_loop_drafts", "token_loop_run", "token_loop_sampling", "trt_decoder", "trt_contexts", "trt_adapters", "trt_plan", "kv_cache", "arena", "memory", "tensor",
    "cuda_try", "decoder_check", "decoder_config",
)  # fmt: skip
FLAGS = ["-std=c++20", "-O1", "-ffunction-sections", "-Wall", "-Wextra"]
CHECKED = "-fsanitize=address,undefined"


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes += sorted(Path("/usr/local").glob("cuda*"))
    return next((home / "include" for home in homes if (home / "include" / "cuda_runtime_api.h").is_file()), None)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler, headers = shutil.which("g++"), cuda_headers()
    if compiler is None or headers is None:
        pytest.skip("g++ and CUDA's headers are needed")
    build = tmp_path_factory.mktemp("trt_loop")
    here = Path(__file__).parent / "trt_loop"
    files = [*sorted(here.glob("*.cpp")), *(ROOT / "native" / "src" / f"{name}.cpp" for name in SOURCES)]
    include = [f"-I{ROOT / 'native' / 'include'}", f"-I{ROOT / 'native' / 'src'}", f"-I{here}", f"-I{headers}"]

    def compile_one(source: Path) -> Path:
        output = build / f"{source.stem}.o"
        # Of decoder_config.cpp the linker leaves out what needs kernels, which it does not where addresses are checked.
        checked = [] if source.stem == "decoder_config" else [CHECKED]
        subprocess.run([compiler, *FLAGS, *checked, *include, "-c", source, "-o", output], check=True, timeout=280)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, files))
    subprocess.run([compiler, CHECKED, "-Wl,--gc-sections", *objects, "-o", build / "walk"], check=True, timeout=120)
    return build / "walk"


@pytest.mark.timeout(600)
def test_every_token_is_the_one_that_its_sequence_and_adapter_give(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counts = r"(\d+) of (\d+) wrong; (\d+) contexts, (\d+) graphs; (\d+) steps of 9 or 10"
    found = re.findall(rf"batched (\d) together (\d) trees (\d): {counts}", done.stdout)
    assert [tuple(map(int, kind)) for *kind, _, _, _, _, _ in found] == list(product((0, 1), repeat=3))
    for *_, wrong, compared, contexts, graphs, over_batch in found:
        assert wrong == "0" and int(compared) > 3000 and int(over_batch) > 9
        assert 0 < int(contexts) <= 64 and 0 < int(graphs) <= 128
    assert "the thread's GPU is" not in done.stdout
    assert "values refused: 6 of 6; the caller's GPU: 0\n" in done.stdout
    assert "rows outlive their buffer: 1; refused after an error: 5 of 5\n" in done.stdout
    # Of the hundreds of events, graphs and buffers that cannot be freed then, one line.
    (told,) = re.findall(r"^edgellm: .*", done.stderr, re.MULTILINE)
    assert "failed: stand-in (an error of the stand-in)" in told
