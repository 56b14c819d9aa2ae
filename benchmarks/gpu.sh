#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under nine minutes without network:
#   bash benchmarks/gpu.sh [--dry-run] [--only PART ...] [--device cpu --tiny] [--out FOLDER] [--again]
# Results go to benchmarks/results/gpu/<card>; where $OUT is set, also there as one archive. docs/benchmarks.md says more.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=$(command -v python3); fi
fi
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 CUDA_MODULE_LOADING=LAZY
exec "$python" -m benchmarks.gpu "$@"
