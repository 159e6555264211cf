"""Runs the examples in the docstrings."""

import doctest
import importlib

import pytest

from tests.helpers.paths import ROOT

NAMES = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sorted((ROOT / "kd_jax").rglob("*.py"))]


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(("__init__", ".main"))])
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
