"""From logits to a token: which ones may be drawn, and one draw a row from a single uniform number."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128  # probabilities that are summed up as one, before the sums are searched


def draw(uniform: Float[Array, " B"], probs: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The inverse of the cumulative distribution at each row's number: one random number a row, where Gumbels take V.

    Sums of blocks are searched first, then the block that holds the number, so that the whole is read once. What has no
    probability is never drawn, whatever is rounded.

    Args:
      uniform: in [0, 1).
      probs: not below 0, not all 0; a row need not sum to 1.
    Returns:
      An id a row.
    """
    rows, vocabulary = probs.shape
    blocks = jnp.pad(probs, ((0, 0), (0, -vocabulary % BLOCK))).reshape(rows, -1, BLOCK)
    sums = blocks.sum(axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform * ends[:, -1]
    chosen = _first_above(ends, sums, target)
    before = jnp.where(chosen == 0, 0, jnp.take_along_axis(ends, jnp.maximum(chosen - 1, 0)[:, None], axis=-1)[:, 0])
    block = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    return chosen * BLOCK + _first_above(jnp.cumsum(block, axis=-1), block, target - before)


def _first_above(ends: Float[Array, "B N"], parts: Float[Array, "B N"], target: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first part that ends above the target, or the last that is not empty, where rounding leaves none."""
    last = ends.shape[-1] - 1 - jnp.argmax(parts[:, ::-1] > 0, axis=-1)
    return jnp.argmax((ends > target[:, None]) & (parts > 0) | (jnp.arange(ends.shape[-1]) == last[:, None]), axis=-1)


def truncate(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """-inf for what top-k, and then top-p among what that keeps, leave out."""
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
    """-inf for each token that would make the last `size` tokens a sequence that the row already has.

    Args:
      logits: of the token at `end`.
      tokens: what each row has so far, up to `end`, padded on the left.
      mask: True where there is a token.
      end: how many of the slots are filled.
      size: of the n-gram; 0: nothing is forbidden.
    """
    if size == 0:
        return logits
    rows, slots = tokens.shape
    known = mask & (jnp.arange(slots) < end)
    same = known  # at i: tokens[i - size + 1 : i] are the row's last size - 1
    for back in range(1, size):
        last = jax.lax.dynamic_slice_in_dim(tokens, end - back, 1, axis=1)
        earlier, is_known = (jnp.pad(array, ((0, 0), (back, 0)))[:, :slots] for array in (tokens, known))
        same &= is_known & (earlier == last)
    return logits.at[jnp.arange(rows)[:, None], tokens].min(jnp.where(same, -jnp.inf, jnp.inf), mode="drop")
