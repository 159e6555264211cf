"""Sampling of a token from logits: tokens are excluded, and one uniform number per row draws a token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128  # the number of probabilities in a block; the sums of blocks are searched first


def draw(uniform: Float[Array, " B"], probs: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Returns the inverse of the cumulative distribution at each row's number.

    One random number per row suffices; a draw with Gumbel noise would need V random numbers. The sums of blocks are
    searched first, then the block that contains the number, so that the probabilities are read once. A token with
    probability 0 is never drawn, even after rounding.

    Args:
      uniform: numbers in [0, 1).
      probs: numbers that are not negative and, in each row, not all 0. The sum of a row need not be 1.

    Returns:
      A token id per row.
    """
    rows, vocabulary = probs.shape
    blocks = jnp.pad(probs, ((0, 0), (0, -vocabulary % BLOCK))).reshape(rows, -1, BLOCK)
    sums = blocks.sum(axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform * ends[:, -1]
    chosen = first_above(sums, ends, target)
    before = jnp.where(chosen == 0, 0, jnp.take_along_axis(ends, jnp.maximum(chosen - 1, 0)[:, None], axis=-1)[:, 0])
    block = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    return chosen * BLOCK + first_above(block, jnp.cumsum(block, axis=-1), target - before)


def first_above(
    parts: Float[Array, "*#B N"], ends: Float[Array, "*#B N"], target: Float[Array, "*#B"]
) -> Int[Array, "*B"]:
    """Returns the index of the first part whose running sum is above the target: the inverse of a cumulative sum.

    A part that is 0 is never chosen. If no running sum is above the target because of rounding, the result is the last
    part that is not 0.

    Args:
      parts: numbers that are not negative.
      ends: their running sums.
      target: numbers from 0 to the last running sum.
    """
    last = ends.shape[-1] - 1 - jnp.argmax(parts[..., ::-1] > 0, axis=-1, keepdims=True)
    return jnp.argmax((ends > target[..., None]) & (parts > 0) | (jnp.arange(ends.shape[-1]) == last), axis=-1)


def truncate(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Returns the logits with -inf for the tokens that top-k excludes, and for the tokens that top-p then excludes."""
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ranked)
        before = jnp.cumsum(probs, axis=-1) - probs
        smallest = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def forbid_repeats(
    logits: Float[Array, "B V"], tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], end: Int[Array, ""], size: int
) -> Float[Array, "B V"]:
    """Returns the logits with -inf for each token that would repeat a sequence of `size` tokens of the row.

    Args:
      logits: the logits of the token at `end`.
      tokens: the tokens of each row up to `end`, padded on the left.
      mask: True where there is a token.
      end: the number of filled slots.
      size: the length of the n-gram; 0 forbids nothing.
    """
    if size == 0:
        return logits
    rows, slots = tokens.shape
    known = mask & (jnp.arange(slots) < end)
    same = known  # True at i if tokens[i - size + 1 : i] equal the row's last size - 1 tokens
    for back in range(1, size):
        last = jax.lax.dynamic_slice_in_dim(tokens, end - back, 1, axis=1)
        earlier, is_known = (jnp.pad(array, ((0, 0), (back, 0)))[:, :slots] for array in (tokens, known))
        same &= is_known & (earlier == last)
    return logits.at[jnp.arange(rows)[:, None], tokens].min(jnp.where(same, -jnp.inf, jnp.inf), mode="drop")
