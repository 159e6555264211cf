"""The collectives of a compiled step: never an array of tokens x vocabulary, and each head at most once."""

import pytest

from tests.helpers.collectives import MESHES, compiled_step, read

# No size is a product of other sizes, so that each dimension of a shape can be identified.
SIZES = dict(batch=16, length=9, vocab=1208, width=40, teacher_width=56, chunk=6)


@pytest.mark.parametrize("mesh", MESHES)
def test_no_collective_has_tokens_and_vocabulary(mesh):
    found = read(compiled_step(mesh, **SIZES))
    vocab = {SIZES["vocab"] // ways for ways in (1, 2, 4, 8)}
    widths = {SIZES[name] // ways for name in ("width", "teacher_width") for ways in (1, 2, 4, 8)}
    gathered_heads = 0
    for collective in found:
        for shape in collective.shapes:
            if vocab & set(shape):
                # This is a matrix of a model, which is never sent in the loop over chunks.
                assert len(shape) == 2 and widths & set(shape) and not collective.in_loop, collective
                gathered_heads += collective.kind == "all-gather" and SIZES["width"] in shape
            elif collective.in_loop:
                assert len(shape) <= 1 or widths & set(shape), collective  # scalars of tokens, or hidden states
        assert collective.kind == "all-reduce" or not collective.in_loop
    assert found and gathered_heads <= (2 if mesh[1] > 1 else 0)  # the embedding and the output matrix
