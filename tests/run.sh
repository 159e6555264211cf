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
"$venv/bin/python" -m pytest -m "not slow"
"$venv/bin/python" -m pytest -m slow
echo "all checks passed"
