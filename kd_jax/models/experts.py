"""A mixture of experts: each token is sent to a few of many multilayer perceptrons.

The router computes the probability of each expert for each token. The output is the sum of the chosen experts' outputs,
weighted with these probabilities. No expert has a limit on its number of tokens, so no token is dropped, and the output
for a token depends on this token only. The gradient is exact: the choice of experts is a constant, and the
probabilities have a gradient. The auxiliary loss that balances a router in pre-training is no part of distillation, so
the losses of this project do not contain an auxiliary loss.

Two functions compute the same sum:

- `in_blocks`, for one device: the tokens are sorted by expert, and divided into blocks with one expert each. The cost is
  that of the chosen experts.
- `one_by_one`, for several devices: every expert reads all tokens. The cost is num_experts / experts_per_token times as
  high, but each token stays on its device.

`jax.lax.ragged_dot` is slower on a CPU, where XLA multiplies all tokens with all experts. For 2,048 tokens and 2 of 8
experts of width 512 with D = 256, on two cores, a forward pass takes 582 ms with `ragged_dot`, 152 ms with `one_by_one`
and 37 ms with `in_blocks`; with the gradient, 2,368, 956 and 157 ms. For 2,048 tokens and 4 of 32 experts of width 128, a
forward pass takes 1,062, 295 and 24 ms, and with the gradient 5,867, 1,316 and 136 ms.

References:
  Shazeer et al., "Outrageously Large Neural Networks", https://arxiv.org/abs/1701.06538, 2017, section 2. Jiang et al.,
  "Mixtral of Experts", https://arxiv.org/abs/2401.04088, 2024, section 2.1. Gale et al., "MegaBlocks",
  https://arxiv.org/abs/2211.15841, 2022, section 5 (blocks of tokens with one expert each).
"""

import functools

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jaxtyping import Array, Float, Int

from kd_jax.models import int8
from kd_jax.models.config import ModelConfig
from kd_jax.models.parts import ACTIVATIONS, LinearOf, residual_init

Kernel = Float[Array, "E in out"] | qwix.QArray
Kernels = tuple[Kernel, Kernel, Kernel]  # gate, up and down of all experts
BLOCK_SIZES = (4, 128)  # the smallest and the largest number of tokens in a block


class Stacked(nnx.Module):
    """The matrices of one projection of all experts."""

    def __init__(self, shape: tuple[int, int, int], linear: LinearOf, init: nnx.Initializer):
        options = linear.keywords
        self.kernel = nnx.Param(init(options["rngs"].params(), shape, options["param_dtype"]))


class Stacks(nnx.Module):
    """The three projections of all experts."""

    def __init__(self, config: ModelConfig, linear: LinearOf):
        count, width, inner = config.num_experts or 0, config.hidden_size, config.expert_size
        self.gate = Stacked((count, width, inner), linear, linear.keywords["kernel_init"])
        self.up = Stacked((count, width, inner), linear, linear.keywords["kernel_init"])
        self.down = Stacked((count, inner, width), linear, residual_init(config))


class Experts(nnx.Module):
    """A router, and experts down(act(gate x) * up x). The router and the sum over experts are in float32."""

    def __init__(self, config: ModelConfig, linear: LinearOf):
        self.activation, self.chosen = config.activation, config.experts_per_token
        self.normalise = config.normalise_experts
        self.router = linear(config.hidden_size, config.num_experts, use_bias=False, dtype=jnp.float32)
        self.experts = Stacks(config, linear)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = route(self.router(rows), self.chosen, self.normalise)
        stacks = self.experts
        kernels = (stacks.gate.kernel[...], stacks.up.kernel[...], stacks.down.kernel[...])
        # The sort of `in_blocks` would move the tokens of all devices to each device.
        compute = in_blocks if jax.device_count() == 1 else one_by_one
        return compute(rows, weights, chosen, kernels, str(self.activation)).astype(x.dtype).reshape(x.shape)


def route(logits: Float[Array, "T E"], count: int, normalise: bool) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """Returns the probabilities of the likeliest experts, and their indices.

    Args:
      logits: the router's score of each expert, in float32.
      count: K, the number of experts for each token.
      normalise: True to divide the K probabilities by their sum.

    Example:
      >>> weights, chosen = route(jnp.array([[0.0, -1.0, 0.0]]), 2, normalise=True)
      >>> weights.tolist(), chosen.tolist()
      ([[0.5, 0.5]], [[0, 2]])
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), count)
    return (weights / weights.sum(axis=-1, keepdims=True) if normalise else weights), chosen


def one_by_one(
    rows: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    chosen: Int[Array, "T K"],
    kernels: Kernels,
    activation: str,
) -> Float[Array, "T D"]:
    """Returns the weighted sum of the chosen experts' outputs. Every expert reads all tokens, one expert at a time."""
    count = jax.tree.leaves(kernels)[0].shape[0]
    of_experts = jnp.einsum("tke,tk->et", jax.nn.one_hot(chosen, count, dtype=weights.dtype), weights)

    @jax.checkpoint  # the backward pass computes an expert again, so that the values inside all experts are not stored
    def add(total: Array, expert: Int[Array, ""]) -> tuple[Array, None]:
        return total + _of_expert(rows, of_experts[expert], _taken(kernels, expert), activation), None

    start = jnp.zeros(rows.shape, jnp.promote_types(rows.dtype, jnp.float32))
    return jax.lax.scan(add, start, jnp.arange(count))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def in_blocks(
    rows: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    chosen: Int[Array, "T K"],
    kernels: Kernels,
    activation: str,
) -> Float[Array, "T D"]:
    """Returns the weighted sum of the chosen experts' outputs. Each expert reads only its own tokens.

    The number of blocks depends on the router, so the loop has no fixed length, and JAX has no gradient of such a loop.
    The gradient is a second loop over the same blocks, which computes the blocks again.
    """
    slots, experts, blocks = _blocks(chosen, jax.tree.leaves(kernels)[0].shape[0])
    flat, copies = weights.reshape(-1), chosen.shape[1]

    def add(i: Array, total: Array) -> Array:
        tokens = slots[i] // copies
        read = _rows(rows, tokens), _rows(flat, slots[i]), _taken(kernels, experts[i])
        return total.at[tokens].add(_of_expert(*read, activation), mode="drop")

    return jax.lax.fori_loop(0, blocks, add, jnp.zeros(rows.shape, jnp.promote_types(rows.dtype, jnp.float32)))


def _in_blocks_forward(rows, weights, chosen, kernels, activation):
    return in_blocks(rows, weights, chosen, kernels, activation), (rows, weights, chosen, kernels)


def _in_blocks_backward(activation, saved, gradient):
    rows, weights, chosen, kernels = saved
    slots, experts, blocks = _blocks(chosen, kernels[0].shape[0])
    flat, copies = weights.reshape(-1), chosen.shape[1]

    def add(i, totals):
        d_rows, d_weights, d_kernels = totals
        tokens, expert = slots[i] // copies, experts[i]
        _, pull = jax.vjp(
            lambda rows, weights, kernels: _of_expert(rows, weights, kernels, activation),
            _rows(rows, tokens), _rows(flat, slots[i]), _taken(kernels, expert),
        )  # fmt: skip
        of_rows, of_weights, of_kernels = pull(_rows(gradient, tokens))
        return (
            d_rows.at[tokens].add(of_rows.astype(d_rows.dtype), mode="drop"),
            d_weights.at[slots[i]].set(of_weights, mode="drop"),
            tuple(total.at[expert].add(part) for total, part in zip(d_kernels, of_kernels, strict=True)),
        )

    start = jnp.zeros(gradient.shape, gradient.dtype), jnp.zeros_like(flat), jax.tree.map(jnp.zeros_like, kernels)
    d_rows, d_weights, d_kernels = jax.lax.fori_loop(0, blocks, add, start)
    return d_rows.astype(rows.dtype), d_weights.reshape(weights.shape), None, d_kernels


in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _blocks(chosen: Int[Array, "T K"], count: int) -> tuple[Int[Array, "N size"], Int[Array, " N"], Int[Array, ""]]:
    """Returns blocks of slots with one expert each.

    A slot is a pair of a token and one of its K experts, counted row by row.

    Args:
      chosen: the experts of each token.
      count: the number of experts.

    Returns:
      slots: the slots of each block. The number T K stands for an empty place at the end of a block.
      experts: the expert of each block.
      blocks: the number of blocks with slots, at most N.
    """
    flat = chosen.reshape(-1)
    slots, (smallest, largest) = flat.size, BLOCK_SIZES
    # The largest power of two that is not above the mean number of slots of an expert.
    size = min(max(smallest, 1 << max(slots // count, 1).bit_length() - 1), largest)
    order = jnp.argsort(flat, stable=True)
    of_expert = jnp.bincount(flat, length=count)
    blocks = -(-of_expert // size)
    last_block = jnp.cumsum(blocks)
    sorted_experts = flat[order]
    in_expert = jnp.arange(slots) - (jnp.cumsum(of_expert) - of_expert)[sorted_experts]
    places = (last_block - blocks)[sorted_experts] * size + in_expert
    most = -(-slots // size) + min(count, slots)
    table = jnp.full(most * size, slots, flat.dtype).at[places].set(order.astype(flat.dtype), unique_indices=True)
    experts = jnp.searchsorted(last_block, jnp.arange(most), side="right")
    return table.reshape(most, size), jnp.minimum(experts, count - 1), last_block[-1]


def _of_expert(rows: Array, weights: Array, kernels: tuple[Array, Array, Array], activation: str) -> Array:
    """Returns one expert's output for some tokens, times the tokens' weights, in the type of the weights."""
    gate, up, down = (kernel.astype(rows.dtype) for kernel in kernels)
    return ((ACTIVATIONS[activation](rows @ gate) * (rows @ up)) @ down) * weights[:, None]


def _taken(kernels: Kernels, expert: Array) -> tuple[Array, Array, Array]:
    """Returns the matrices of one expert. Only these matrices are converted from int8."""
    take = lambda array: jax.lax.dynamic_index_in_dim(array, expert, keepdims=False)
    gate, up, down = (int8.dequantise(jax.tree.map(take, kernel), jnp.float32) for kernel in kernels)
    return gate, up, down


def _rows(array: Array, index: Array) -> Array:
    """Returns rows of an array, and 0 for an index beyond the last row."""
    return array.at[index].get(mode="fill", fill_value=0)
