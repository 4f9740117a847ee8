#!/usr/bin/env bash
# Check the kernels on a CUDA GPU against float64, then time them beside their peers; at most 8 minutes, builds nothing.
#
#   bash benchmarks/gpu.sh [check] [time] [train] [runs] [tilings]    default: the first four; writes results/bench/gpu.json
#   bash benchmarks/gpu.sh --rehearse     all of it without a GPU, on small matrices: finds what is missing
#   bash benchmarks/gpu.sh wheels         for a machine without a network: make .whl/ anew, which is then installed there
#
# Peers that are not installed are left out, by name. PYTHON is the interpreter that has torch (python3). `wheels` takes those
# for x86-64 and TARGET, the other machine's version of Python (3.12). They are the peers, what they import, and what
# Counterpoint itself needs beside PyTorch, torchvision, timm, jaxtyping, scikit-learn and transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
if [[ "${1:-}" == wheels ]]; then
  platforms=()
  for number in 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${number}_x86_64"); done
  rm -rf .whl
  exec "$PYTHON" -m pip download --quiet --dest .whl --no-deps --only-binary=:all: \
    --python-version "${TARGET:-3.12}" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
    memeff lightly lightly-utils aenum open_clip_torch ftfy wcwidth pytorch-metric-learning \
    tyro docstring-parser typeguard tensorboardX platformdirs
fi
if compgen -G ".whl/*.whl" > /dev/null; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
  export PYTHONPATH="$site:${PYTHONPATH:-}"
fi
export PYTHONPATH="src:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
"$PYTHON" benchmarks/gpu.py "$@"
