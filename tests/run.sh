#!/usr/bin/env bash
# Creates an environment ($VENV, by default .venv-tests), installs into it, and runs every check.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv-tests}"
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r tests/requirements.txt
export JAX_PLATFORMS=cpu
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/pyrefly" check --python-interpreter-path "$venv/bin/python"
# A file's tests in one process: they share fixtures.
"$venv/bin/python" -m pytest -n 2 --dist loadfile -m "not slow"
"$venv/bin/python" -m pytest -n 2 --dist loadfile -m slow
echo "all checks passed"
