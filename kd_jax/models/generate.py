"""Drawing text from a model: one pass over the prompts, then a compiled loop over a key/value cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_jax.models.functional import Model, Params
from kd_jax.models.transformer import Cache


class _State(NamedTuple):
    step: Int[Array, ""]  # how many tokens each row has drawn
    ended: Bool[Array, " B"]
    tokens: Int[Array, "B N"]
    mask: Bool[Array, "B N"]
    log_probs: Float[Array, "B N"]
    cache: Cache


def generate(
    model: Model,
    params: Params,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    *,
    max_new_tokens: int,
    key: Array,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_id: int | tuple[int, ...],
    pad_id: int,
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"], Float[Array, "B N"]]:
    """Continues each prompt with N = max_new_tokens draws of softmax(logits / temperature), up to its end.

    Top-k keeps the k likeliest tokens, then top-p the smallest set of the likeliest that holds the mass p of
    what top-k left; tokens that tie with the last one kept are kept too. Everything runs in one program,
    traced once for each set of shapes and settings; it stops when every row has ended.

    Args:
      model: as from `load_pretrained` or `from_config`.
      params: its parameters.
      prompts: ids, padded on the left (right padding gives the same).
      prompt_mask: True where there is a token; each row needs one.
      max_new_tokens: N, at least 1.
      key: of `jax.random.key`; not read at temperature 0.
      temperature: at least 0; 0 takes the likeliest token.
      top_p: in (0, 1]; 1 keeps all.
      top_k: at least 0; 0 keeps all.
      eos_id: the token, or tokens, that end a row.
      pad_id: what follows a row's end.
    Returns:
      tokens: what was drawn, pad_id after a row's end.
      mask: True up to and including the token that ends the row.
      log_probs: of each drawn token under softmax(logits / temperature) over the whole vocabulary, without
        top-k and top-p, and at temperature 1 where it is 0; in nats, and 0 where mask is False.
    Raises:
      ValueError: a setting out of its range, shapes that differ, or more tokens than a model with learned
        positions has room for.
    References:
      Fan et al., "Hierarchical Neural Story Generation", https://arxiv.org/abs/1805.04833, 2018, section 5
      (top-k). Holtzman et al., "The Curious Case of Neural Text Degeneration",
      https://arxiv.org/abs/1904.09751, 2020,
        section 3.1 (top-p).
    """
    if prompts.shape != prompt_mask.shape:
        raise ValueError(f"prompts have shape {prompts.shape} and prompt_mask {prompt_mask.shape}; they must agree.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"temperature={temperature} must be at least 0, top_p={top_p} above 0 and at most 1, and "
            f"top_k={top_k} at least 0 (0: no limit)."
        )
    greedy = temperature == 0
    return _generate(
        model,
        params,
        jnp.asarray(prompts),
        jnp.asarray(prompt_mask, bool),
        key,
        jnp.float32(1.0 if greedy else temperature),
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        top_p=float(top_p),
        top_k=top_k,
        eos_ids=tuple(eos_id) if isinstance(eos_id, (tuple, list)) else (eos_id,),
        pad_id=pad_id,
    )


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "greedy", "top_p", "top_k", "eos_ids", "pad_id")
)
def _generate(
    model,
    params,
    prompts,
    prompt_mask,
    key,
    temperature,
    *,
    max_new_tokens,
    greedy,
    top_p,
    top_k,
    eos_ids,
    pad_id,
):
    batch, length = prompts.shape

    def draw(state: _State, hidden: Float[Array, "B D"]) -> _State:
        logits = model.project(params, hidden) / temperature
        log_probs = jax.nn.log_softmax(logits)
        if greedy:
            drawn = jnp.argmax(logits, axis=-1)
        else:
            drawn = jax.random.categorical(jax.random.fold_in(key, state.step), _truncate(logits, top_k, top_p))
        chosen = jnp.take_along_axis(log_probs, drawn[:, None], axis=-1)[:, 0]
        drawn = jnp.where(state.ended, pad_id, drawn)
        return state._replace(
            step=state.step + 1,
            ended=state.ended | jnp.isin(drawn, jnp.array(eos_ids)),
            tokens=state.tokens.at[:, state.step].set(drawn.astype(state.tokens.dtype)),
            mask=state.mask.at[:, state.step].set(~state.ended),
            log_probs=state.log_probs.at[:, state.step].set(jnp.where(state.ended, 0.0, chosen)),
        )

    def advance(state: _State) -> _State:
        token, mask = (
            jax.lax.dynamic_slice_in_dim(array, state.step - 1, 1, axis=1) for array in (state.tokens, state.mask)
        )
        hidden, cache = model.extend(params, token, mask, state.cache)
        return draw(state._replace(cache=cache), hidden[:, 0])

    # The last token drawn is never read, so it needs no slot.
    cache = model.init_cache(batch, length + max_new_tokens - 1)
    hidden, cache = model.extend(params, prompts, prompt_mask, cache)
    last = length - 1 - jnp.argmax(prompt_mask[:, ::-1], axis=1)
    shape = (batch, max_new_tokens)
    state = _State(
        step=jnp.int32(0),
        ended=jnp.zeros(batch, bool),
        tokens=jnp.full(shape, pad_id, prompts.dtype),
        mask=jnp.zeros(shape, bool),
        log_probs=jnp.zeros(shape, jnp.float32),
        cache=cache,
    )
    state = draw(state, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    state = jax.lax.while_loop(lambda state: (state.step < max_new_tokens) & ~state.ended.all(), advance, state)
    return state.tokens, state.mask, state.log_probs


def _truncate(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """-inf for the tokens that are not to be drawn."""
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
