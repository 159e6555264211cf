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


def inputs(case, name):
    """Returns an input array of a case."""
    return arrays()[f"inputs/{case['inputs']}/{name}"]


def span_of_positions(case, model):
    """Returns the span of the token that each position predicts. Token 0 has no prediction."""
    chunks, first = inputs(case, "chunks"), 0 if model == "teacher" else 2
    span = np.full(inputs(case, f"{model}_ids").shape, -1)
    for row, of_row in enumerate(chunks):
        for index, chunk in enumerate(of_row):
            if chunk[0] >= 0:
                span[row, chunk[first] : chunk[first + 1]] = index
    span = np.where(inputs(case, f"{model}_mask"), span, -1)
    return np.where(span[:, 1:] == 0, -1, span[:, 1:] - (span[:, 1:] > 0))  # the span of token 0 does not count
