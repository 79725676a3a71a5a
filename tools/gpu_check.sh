#!/usr/bin/env bash
# Build the native module on a machine with a GPU, test it there, and measure; the table at the end is the result.
#   tools/gpu_check.sh [build|test|sanitize|bench|kernels|figures ...]     build, test and bench when nothing is named
# The double of libnvinfer, and the plugins with their test driver, are built too where NvInfer.h is: in TENSORRT_ROOT, or
# in a kernel-lens wheel that PYTHONPATH has.
# EDGELLM_CUDA_ARCHS (default native: the GPU that is here), EDGELLM_LINEINFO (ON: what the sanitizer finds has source
# lines), PYTHON, BENCH_ARGS (default --torch), PYTEST_ARGS and SANITIZE_ARGS change what runs; TOTAL_S (470) bounds all
# parts together, so that a run ends with its table before whoever lent the machine ends it.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
parts=("$@")
[ ${#parts[@]} -eq 0 ] && parts=(build test bench)
out=${OUT:-build/gpu_check}
mkdir -p "$out"
export PYTHONUNBUFFERED=1  # what was measured before a time limit is kept
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0
summary=()

run() { # NAME SECONDS COMMAND...: run it, keep its output, note how it went
  local name=$1 limit=$2 started=$SECONDS code left
  shift 2
  left=$((${TOTAL_S:-470} - SECONDS))
  [ "$limit" -lt "$left" ] || limit=$((left > 5 ? left : 5))
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n "${TAIL:-40}"
  code=${PIPESTATUS[0]}
  summary+=("$(printf '%-10s %-7s %4d s' "$name" "$([ "$code" -eq 0 ] && echo ok || echo "rc $code")" $((SECONDS - started)))")
  [ "$code" -eq 0 ] || status=1
  return "$code"
}

for part in "${parts[@]}"; do
  case $part in
    build | test | sanitize | bench | kernels | figures | build-only) ;;
    *) echo "unknown part $part; allowed are build, test, sanitize, bench, kernels, figures" >&2 && exit 2 ;;
  esac
done

if [ "${1:-}" = build-only ]; then
  cmake -S native -B build/native -G Ninja -DEDGELLM_CUDA_ARCHS="${EDGELLM_CUDA_ARCHS:-native}" \
    -DEDGELLM_NVINFER_DOUBLE=ON -DEDGELLM_TEST_DRIVERS=ON -DEDGELLM_LINEINFO="${EDGELLM_LINEINFO:-OFF}" \
    -DPython3_EXECUTABLE="$($python -c 'import sys; print(sys.executable)')" &&
    cmake --build build/native --target _native && cmake --build build/native  # the module first: the rest may fail
  exit
fi

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "nvidia-smi: no GPU"
for part in "${parts[@]}"; do
  case $part in
    build) TAIL=8 run build 300 bash tools/gpu_check.sh build-only ;;
    test)  # side by side, then those that look at the GPU's free memory
      pytest="$python -m pytest -q -rfE --tb=short -p no:cacheprovider ${PYTEST_ARGS:-test/native test/gpu}"
      TAIL=150 run test "${TEST_S:-400}" $pytest -m "not alone" -n "${WORKERS:-8}"
      TAIL=60 run alone 120 $pytest -m alone
      ;;
    sanitize)  # every path once: a line for each kind of model and tool
      TAIL=200 run sanitize 590 "$python" tools/sanitize.py ${SANITIZE_ARGS:-}
      ;;
    bench) run bench 470 "$python" bench/bench_decode.py ${BENCH_ARGS:---torch} ;;
    kernels)
      for kernel in gemv gemm_int4 attention_decode attention_prefill attention_tree small_kernels sampling draft_acceptance; do
        TAIL=120 run "$kernel" 300 "$python" "bench/bench_$kernel.py" ${KERNEL_ARGS:-}
      done
      ;;
    figures)  # those of docs/performance.md
      run decode 200 "$python" bench/bench_decode.py --shape llama-1b qwen3-4b llama-8b --weights bf16 fp8 int4-fp8 --torch
      run context 90 "$python" bench/bench_decode.py --shape llama-8b --weights bf16 --batch 1 8 --context 512 4096 16384 --prefill
      TAIL=120 run prefill 120 "$python" bench/bench_prefill.py --shape llama-8b --weights bf16 fp8 int4
      run engine 90 "$python" bench/bench_engine.py --shape llama-1b --weights bf16 int4-fp8
      run verify 90 "$python" bench/bench_verify.py --shape llama-1b llama-8b --weights bf16 int4
      run lora 90 "$python" bench/bench_lora.py --shape llama-1b llama-8b --weights bf16 int4 --rank 16 --batch 1 8
      ;;
  esac || true
done
echo "---- summary"
printf '%s\n' "${summary[@]}"
[[ " ${parts[*]} " == *" bench "* ]] && grep -E "ms/token|read-only|tiles" "$out/bench.log"
exit $status
