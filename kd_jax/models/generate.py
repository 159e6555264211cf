"""Drawing text from a model: one pass over the prompts, then a compiled loop over a key/value cache."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kd_jax.models.functional import Model, Params
from kd_jax.models.sampling import draw, forbid_repeats, truncate
from kd_jax.models.transformer import Cache

WIDTH_STEP = 32  # prompts are padded to a multiple of it: few shapes, few programs


class _State(NamedTuple):
    step: Int[Array, ""]  # how many tokens each row has drawn
    ended: Bool[Array, " B"]
    tokens: Int[Array, "B P+N"]  # the prompt, and what was drawn
    mask: Bool[Array, "B P+N"]
    log_probs: Float[Array, "B N"]
    caches: tuple[Cache, ...]


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
    no_repeat_ngram_size: int = 0,
    mixture: tuple[Model, Params, float] | None = None,
    vocab_size: int | None = None,
    eos_id: int | tuple[int, ...],
    pad_id: int,
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"], Float[Array, "B N"]]:
    """Continues each prompt with N = max_new_tokens draws of softmax(logits / temperature), up to its end.

    What would repeat an n-gram is left out first; top-k then keeps the k likeliest tokens, and top-p the smallest set of
    the likeliest that holds the mass p of what is left. Tokens that tie with the last one kept are kept too. Everything
    runs in one program, traced once for each set of shapes and settings; it stops when every row has ended. A row is the
    same whatever stands beside it, however it is padded, and on any mesh.

    Args:
      model: as from `load_pretrained` or `from_config`.
      params: its parameters.
      prompts: ids, padded on the left (right padding gives the same); `left_pad` makes them.
      prompt_mask: True where there is a token; each row needs one.
      max_new_tokens: N, at least 1.
      key: of `jax.random.key`; not read at temperature 0.
      temperature: at least 0; 0 takes the likeliest token.
      top_p: in (0, 1]; 1 keeps all.
      top_k: at least 0; 0 keeps all.
      no_repeat_ngram_size: no n tokens in a row occur twice in prompt and response; 0: no limit.
      mixture: another model, its parameters and its weight w: tokens are drawn from (1 - w) times this model's
        distribution plus w times the other's, each after the limits above.
      vocab_size: ids that have a meaning; those beyond it are never drawn. None: all.
      eos_id: the token, or tokens, that end a row.
      pad_id: what follows a row's end.
    Returns:
      tokens: what was drawn, pad_id after a row's end.
      mask: True up to and including the token that ends the row.
      log_probs: of each drawn token under `model` alone, softmax(logits / temperature) over the whole vocabulary
        without the limits, and at temperature 1 where it is 0; in nats, and 0 where mask is False.
    Raises:
      ValueError: a setting out of its range, shapes that differ, or more tokens than a model with learned
        positions has room for.
    References:
      Fan et al., "Hierarchical Neural Story Generation", https://arxiv.org/abs/1805.04833, 2018, section 5
      (top-k). Holtzman et al., "The Curious Case of Neural Text Degeneration", https://arxiv.org/abs/1904.09751, 2020,
      section 3.1 (top-p). Gu et al., "MiniLLM", https://arxiv.org/abs/2306.08543, 2024, section 2.2 (the mixture).
    """
    if prompts.shape != prompt_mask.shape:
        raise ValueError(f"prompts have shape {prompts.shape} and prompt_mask {prompt_mask.shape}; they must agree.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or top_k < 0 or no_repeat_ngram_size < 0:
        raise ValueError(
            f"temperature={temperature} must be at least 0, top_p={top_p} above 0 and at most 1, and "
            f"top_k={top_k} and no_repeat_ngram_size={no_repeat_ngram_size} at least 0 (0: no limit)."
        )
    weight = 0.0 if mixture is None else mixture[2]
    if not 0 <= weight <= 1:
        raise ValueError(f"the mixture's weight {weight} must lie between 0 and 1.")
    if weight and temperature == 0:
        raise ValueError("a mixture is drawn from: its temperature must be above 0.")
    writers = [(model, params)] + ([(mixture[0], mixture[1])] if mixture is not None and weight else [])
    return _generate(
        tuple(writer for writer, _ in writers),
        tuple(its_params for _, its_params in writers),
        jnp.asarray(prompts),
        jnp.asarray(prompt_mask, bool),
        key,
        jnp.float32(temperature or 1.0),
        jnp.float32(weight),
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        limits=(no_repeat_ngram_size, top_k, float(top_p)),
        vocab_size=vocab_size or min(writer.config.vocab_size for writer, _ in writers),
        eos_ids=tuple(eos_id) if isinstance(eos_id, (tuple, list)) else (eos_id,),
        pad_id=pad_id,
    )


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, most: int | None = None
) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Prompts of mixed lengths as the arrays that `generate` takes, P a multiple of 32.

    Args:
      prompts: ids, at least one of them each.
      pad_id: fills up.
      most: P is not more, where the prompts allow it: what a model with learned positions has room for.
    Returns:
      tokens, and a mask that is True where there is a token.
    """
    longest = max(map(len, prompts))
    width = -(-longest // WIDTH_STEP) * WIDTH_STEP
    width = width if most is None else max(longest, min(width, most))
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    mask = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return tokens, mask


@partial(jax.jit, static_argnames=("models", "max_new_tokens", "greedy", "limits", "vocab_size", "eos_ids", "pad_id"))
def _generate(
    models: tuple[Model, ...],
    params: tuple[Params, ...],
    prompts: Array,
    prompt_mask: Array,
    key: Array,
    temperature: Array,
    weight: Array,
    *,
    max_new_tokens: int,
    greedy: bool,
    limits: tuple[int, int, float],
    vocab_size: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> tuple[Array, Array, Array]:
    batch, length = prompts.shape
    ngram, top_k, top_p = limits
    # All padding goes to the left, so that every row's next token has the same place.
    order = jnp.argsort(prompt_mask, axis=1, stable=True)
    prompts, prompt_mask = (jnp.take_along_axis(array, order, axis=1) for array in (prompts, prompt_mask))

    def distribution(logits: Float[Array, "B V"], state: _State) -> Float[Array, "B V"]:
        """Up to a factor, what may be drawn, where it is the only one; else normalised."""
        logits = forbid_repeats(logits, state.tokens, state.mask, length + state.step, ngram)
        logits = truncate(logits, top_k, top_p)
        return jnp.exp(logits - logits.max(axis=-1, keepdims=True)) if len(models) == 1 else jax.nn.softmax(logits)

    def choose(state: _State, hidden: Sequence[Float[Array, "B D"]]) -> _State:
        scores = [m.project(p, h)[:, :vocab_size] / temperature for m, p, h in zip(models, params, hidden, strict=True)]
        if greedy:
            drawn = jnp.argmax(forbid_repeats(scores[0], state.tokens, state.mask, length + state.step, ngram), axis=-1)
        else:
            ways = [distribution(logits, state) for logits in scores]
            probs = ways[0] if len(ways) == 1 else (1 - weight) * ways[0] + weight * ways[1]
            drawn = draw(jax.random.uniform(jax.random.fold_in(key, state.step), (batch,), jnp.float32), probs)
        chosen = jnp.take_along_axis(scores[0], drawn[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(scores[0], axis=-1)
        drawn = jnp.where(state.ended, pad_id, drawn).astype(state.tokens.dtype)
        return state._replace(
            step=state.step + 1,
            ended=state.ended | jnp.isin(drawn, jnp.array(eos_ids)),
            tokens=state.tokens.at[:, length + state.step].set(drawn),
            mask=state.mask.at[:, length + state.step].set(~state.ended),
            log_probs=state.log_probs.at[:, state.step].set(jnp.where(state.ended, 0.0, chosen)),
        )

    def read(state: _State, tokens: Array, mask: Array) -> _State:
        read = [m.extend(p, tokens, mask, c) for m, p, c in zip(models, params, state.caches, strict=True)]
        return choose(state._replace(caches=tuple(cache for _, cache in read)), [hidden[:, -1] for hidden, _ in read])

    def advance(state: _State) -> _State:
        last = partial(jax.lax.dynamic_slice_in_dim, start_index=length + state.step - 1, slice_size=1, axis=1)
        return read(state, last(state.tokens), last(state.mask))

    wide = ((0, 0), (0, max_new_tokens))
    state = _State(
        step=jnp.int32(0),
        ended=jnp.zeros(batch, bool),
        tokens=jnp.pad(prompts, wide, constant_values=pad_id),
        mask=jnp.pad(prompt_mask, wide),
        log_probs=jnp.zeros((batch, max_new_tokens), jnp.float32),
        # The last token drawn is never read, so it needs no slot.
        caches=tuple(model.init_cache(batch, length + max_new_tokens - 1) for model in models),
    )
    state = read(state, prompts, prompt_mask)
    state = jax.lax.while_loop(lambda state: (state.step < max_new_tokens) & ~state.ended.all(), advance, state)
    return state.tokens[:, length:], state.mask[:, length:], state.log_probs
