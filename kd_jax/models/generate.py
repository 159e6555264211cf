"""Text generation: one pass over the prompts, then a compiled loop over a key/value cache."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kd_jax.models.attention import Cache
from kd_jax.models.functional import Model, Params
from kd_jax.models.sampling import draw, forbid_repeats, truncate

# Prompts are padded to a multiple of this number, so that few shapes occur and few programs are compiled.
WIDTH_STEP = 32


class _State(NamedTuple):
    step: Int[Array, ""]  # the number of tokens that each row has drawn
    ended: Bool[Array, " B"]
    tokens: Int[Array, "B P+N"]  # the prompt and the drawn tokens
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
    """Continues each prompt with up to N = max_new_tokens draws from softmax(logits / temperature), until the row ends.

    Three limits apply in this order. First, tokens that would repeat an n-gram are excluded. Then top-k excludes all
    but the k most likely tokens. Then top-p excludes all but the smallest set of the most likely tokens that has the
    mass p of the remainder. Tokens that are exactly as likely as the last allowed token are allowed, too.

    One compiled program makes all tokens, and is traced once for each set of shapes and settings. The program stops
    when every row has ended. A row's result depends neither on the other rows, nor on the padding, nor on the mesh.

    Args:
      model: a model from `load_pretrained` or `from_config`.
      params: the model's parameters.
      prompts: the token ids, padded on the left as in `left_pad`. Right padding gives the same result.
      prompt_mask: True where there is a token; each row needs at least one.
      max_new_tokens: N, at least 1.
      key: a key from `jax.random.key`, not used at temperature 0.
      temperature: a number of at least 0; 0 takes the most likely token.
      top_p: a number in (0, 1]; 1 for no limit.
      top_k: a number of at least 0; 0 for no limit.
      no_repeat_ngram_size: the length n of a sequence that may not occur twice in prompt and response; 0 for no limit.
      mixture: a second model, the parameters and the weight w of this model. Tokens are then drawn from (1 - w) times
        the distribution of `model` plus w times the distribution of the second model, each after the limits above.
      vocab_size: the number of token ids in use; ids beyond this number are never drawn. None for all ids.
      eos_id: the token, or tokens, that end a row.
      pad_id: the token that follows a row's end.

    Returns:
      tokens: the drawn tokens, with pad_id after a row's end.
      mask: True up to and including the token that ends the row.
      log_probs: the log-probability of each drawn token under `model` alone, in nats; 0 where mask is False. The
        distribution is softmax(logits / temperature) over all ids in use, without the limits. For temperature 0, the
        distribution has temperature 1.

    Raises:
      ValueError: a setting is out of range, shapes differ, or there are more tokens than learned positions.

    References:
      Fan et al., "Hierarchical Neural Story Generation", https://arxiv.org/abs/1805.04833, 2018, section 5
      (top-k). Holtzman et al., "The Curious Case of Neural Text Degeneration", https://arxiv.org/abs/1904.09751, 2020,
      section 3.1 (top-p). Gu et al., "MiniLLM", https://arxiv.org/abs/2306.08543, 2024, section 2.2 (the mixture).
    """
    if prompts.shape != prompt_mask.shape:
        raise ValueError(
            f"prompts have shape {prompts.shape} and prompt_mask {prompt_mask.shape}; the shapes must be equal."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or top_k < 0 or no_repeat_ngram_size < 0:
        raise ValueError(
            f"temperature={temperature} must be at least 0, top_p={top_p} above 0 and at most 1, and "
            f"top_k={top_k} and no_repeat_ngram_size={no_repeat_ngram_size} at least 0 (0: no limit)."
        )
    weight = 0.0 if mixture is None else mixture[2]
    if not 0 <= weight <= 1:
        raise ValueError(f"the mixture's weight {weight} must be at least 0 and at most 1.")
    if weight and temperature == 0:
        raise ValueError("temperature=0.0 must be above 0, because the tokens of a mixture are drawn at random.")
    members = [(model, params)] + ([(mixture[0], mixture[1])] if mixture is not None and weight else [])
    return _generate(
        tuple(member for member, _ in members),
        tuple(member_params for _, member_params in members),
        jnp.asarray(prompts),
        jnp.asarray(prompt_mask, bool),
        key,
        jnp.float32(temperature or 1.0),
        jnp.float32(weight),
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        limits=(no_repeat_ngram_size, top_k, float(top_p)),
        vocab_size=vocab_size or min(member.config.vocab_size for member, _ in members),
        eos_ids=tuple(eos_id) if isinstance(eos_id, (tuple, list)) else (eos_id,),
        pad_id=pad_id,
    )


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, most: int | None = None
) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Returns prompts of mixed lengths as the arrays that `generate` takes. P is a multiple of 32.

    Args:
      prompts: lists of token ids, each with at least one id.
      pad_id: the token that fills the left side.
      most: the largest P if no prompt is longer, such as the number of learned positions; None for no limit.

    Returns:
      The tokens, and a mask that is True where there is a token.
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
    # All padding is moved to the left, so that every row's next token has the same position.
    order = jnp.argsort(prompt_mask, axis=1, stable=True)
    prompts, prompt_mask = (jnp.take_along_axis(array, order, axis=1) for array in (prompts, prompt_mask))

    def distribution(logits: Float[Array, "B V"], state: _State) -> Float[Array, "B V"]:
        """Returns the probabilities of the next token within the limits.

        With only one model the probabilities are not normalised, because `draw` does not need this.
        """
        logits = forbid_repeats(logits, state.tokens, state.mask, length + state.step, ngram)
        logits = truncate(logits, top_k, top_p)
        return jnp.exp(logits - logits.max(axis=-1, keepdims=True)) if len(models) == 1 else jax.nn.softmax(logits)

    def choose(state: _State, hidden: Sequence[Float[Array, "B D"]]) -> _State:
        scores = [m.project(p, h)[:, :vocab_size] / temperature for m, p, h in zip(models, params, hidden, strict=True)]
        if greedy:
            drawn = jnp.argmax(forbid_repeats(scores[0], state.tokens, state.mask, length + state.step, ngram), axis=-1)
        else:
            by_model = [distribution(logits, state) for logits in scores]
            probs = by_model[0] if len(by_model) == 1 else (1 - weight) * by_model[0] + weight * by_model[1]
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
        # The last drawn token is never read, so no slot is needed for this token.
        caches=tuple(model.init_cache(batch, length + max_new_tokens - 1) for model in models),
    )
    state = read(state, prompts, prompt_mask)
    state = jax.lax.while_loop(lambda state: (state.step < max_new_tokens) & ~state.ended.all(), advance, state)
    return state.tokens[:, length:], state.mask[:, length:], state.log_probs
