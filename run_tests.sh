#!/usr/bin/env bash
# Makes the test environment and runs linters and tests.
#   bash run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
source tools/environment.sh
make_environment .venv-tests requirements-dev.txt
export PATH="$PWD/.venv-tests/bin:$PATH" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    lint-imports
    mypy library networks tools bench *.py
    set -- -n 2 -m "not slow and not gpu and not kills"
fi
python -m pytest "$@"
