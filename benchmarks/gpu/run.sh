#!/usr/bin/env bash
# Everything that needs a GPU, measured in one go: README.md. The options are those of run.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
# A seed of Python's hashes or a user's site packages must not change what runs.
export PYTHONNOUSERSITE=1
exec "${PYTHON:-python3}" benchmarks/gpu/run.py "$@"
