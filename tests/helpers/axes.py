"""The published cases of further objectives, see golden/README.md."""

import functools
import itertools
import json

import numpy as np

from tests.helpers.paths import GOLDEN

CASES = {case["key"]: case for case in json.loads((GOLDEN / "axes.json").read_text())}


@functools.cache
def arrays():
    """Returns the arrays of all cases, by name."""
    with np.load(GOLDEN / "axes.npz") as file, np.load(GOLDEN / "spans.npz") as of_spans:
        return dict(file) | dict(of_spans)


def closed(first, last):
    """Returns the numbers from the first to the last, both included."""
    return range(first, last + 1)


def numbered(*parts):
    """Returns the keys of the cases with these numbers, or with numbers in these ranges."""
    return [f"c{n:04d}" for n in itertools.chain(*((part,) if isinstance(part, int) else part for part in parts))]
