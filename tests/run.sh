#!/usr/bin/env bash
# Creates an environment ($VENV, by default .venv-tests), installs into it, and runs the checks.
#   bash tests/run.sh            lint, types, and the fast tests
#   bash tests/run.sh all        the slow tests as well
#   bash tests/run.sh versions   the fast tests on each Python and jax that kd_jax supports
set -euo pipefail
cd "$(dirname "$0")/.."
what="${1:-fast}"
venv="${VENV:-.venv-tests}"
export JAX_PLATFORMS=cpu

# Creates an environment: its folder, the Python for it, and requirements beside those of pyproject.toml.
install() {
  "$2" -m venv "$1"
  "$1/bin/pip" install --quiet --disable-pip-version-check -e ".[dev]" "${@:3}"
}

# Runs the tests of an environment that have a mark. Tests of one file run in the same process because they share fixtures.
test_marked() {
  "$1/bin/python" -m pytest -n 2 --dist loadfile -m "$2"
}

# Prints the path of a Python of a version, from pyenv or else from the PATH.
find_python() {
  compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1.*/bin/python" | sort -V | tail -n 1 | grep . || command -v "python$1"
}

case "$what" in
fast | all)
  install "$venv" python3
  "$venv/bin/ruff" check .
  "$venv/bin/ruff" format --check .
  "$venv/bin/pyrefly" check --python-interpreter-path "$venv/bin/python"
  test_marked "$venv" "not slow"
  if [ "$what" = all ]; then test_marked "$venv" slow; fi
  ;;
versions)
  for pair in 3.11:0.10 3.12:0.11 3.13:0.12; do
    python="$(find_python "${pair%:*}")" || { echo "There is no Python ${pair%:*}, neither in the PATH nor in pyenv."; exit 1; }
    echo "Python ${pair%:*} with jax ${pair#*:}"
    install "$venv-${pair%:*}" "$python" "jax==${pair#*:}.*"
    test_marked "$venv-${pair%:*}" "not slow"
  done
  ;;
*)
  echo "bash tests/run.sh takes no argument, 'all' or 'versions', and not '$what'."
  exit 1
  ;;
esac
echo "all checks passed"
