#!/usr/bin/env bash
# Check the kernels on a CUDA GPU against float64, then time them beside their peers; at most 8 minutes, builds nothing.
#
#   bash benchmarks/gpu.sh [check] [time] [train]        default: all three; writes results/bench/gpu.json
#
# Peers that are not installed are left out, by name. To bring them to a machine without a network, put wheels of memeff, lightly,
# open_clip_torch, pytorch-metric-learning and what they need into .whl/.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
if compgen -G ".whl/*.whl" > /dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
  export PYTHONPATH="/tmp/site:${PYTHONPATH:-}"
fi
export PYTHONPATH="src:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
exec "$PYTHON" benchmarks/gpu.py "$@"
