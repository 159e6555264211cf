"""The objective: a sum of terms.

Each term is a divergence of a pair of distributions, averaged over the tokens of some rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_jax import assistants, divergences, policy_gradient, resolve, schedules
from kd_jax.policy_gradient import Scores

MEMBERS = ("teacher", "student", "assistant")
AVERAGES = ("token", "sequence")
# Possible origins of a row's text; "text" is the second stream. A batch's `origin` holds indices into this tuple.
ORIGINS = ("data", "teacher", "student", "text")
ROWS = ("all", *ORIGINS)  # all: every row of the first stream
KINDS = ("divergence", "hard_labels", "policy_gradient")

# (log_p, log_q, weight) -> a value per token. log_p may be None where the pair does not name the teacher.
TokenLoss = Callable[..., Float[Array, "..."]]


def token_loss(
    divergence: Callable[..., Array],
    assistant: Callable[..., Array] | None = None,
    pair: Sequence[str] = ("teacher", "student"),
    stop_gradient: bool = False,
) -> TokenLoss:
    """Returns D(first || second). Each argument is the teacher p, the student q, or an assistant r between p and q.

    The pair makes DistiLLM, TAID and AMiD one function. Skew KL is D(p || r). TAID is D(r || q) without the gradient
    through r. AMiD is any of the four pairs with r.

    Args:
      divergence: (log_p, log_q) -> a value per token, as in `kd_jax.divergences`.
      assistant: (log_p, log_q, weight) -> log_r, as in `kd_jax.assistants`; required if `pair` names the assistant.
      pair: the divergence's first and second argument, out of 'teacher', 'student' and 'assistant'.
      stop_gradient: True if the student inside the assistant is a constant to the gradient (TAID: True, AMiD: False).

    Returns:
      (log_p, log_q, weight=None, **numbers) -> a value per token, in nats. `weight` is the assistant's weight on the
      teacher. `numbers` are the assistant's other keywords.

    Raises:
      ValueError: the pair does not fit, or an assistant is given that the pair does not name.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss = token_loss(divergences.forward_kl, assistants.arithmetic_mixture, ("teacher", "assistant"))
      >>> log_p = jnp.log(jnp.array([0.9, 0.1]))
      >>> float(loss(log_p, log_p, 0.1))
      0.0

    References:
      Ko et al., "DistiLLM", https://arxiv.org/abs/2402.03898, 2024; Shing et al., "TAID",
      https://arxiv.org/abs/2501.16937, 2025.
    """
    pair = tuple(pair)
    if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(MEMBERS):
        raise ValueError(f"pair={pair!r} must be two different names out of {', '.join(MEMBERS)}.")
    if set(pair) == {"teacher", "assistant"} and stop_gradient:
        raise ValueError(f"pair={pair!r} with stop_gradient=True has no gradient at all: the student is only in r.")
    if ("assistant" in pair) != (assistant is not None):
        have = "an assistant is given that" if assistant is not None else "no assistant is given, which"
        raise ValueError(f"pair={pair!r}, but {have} the pair {'does not name' if assistant else 'names'}.")

    def loss(log_p: Array | None, log_q: Array, weight: Any = None, **numbers: Any) -> Float[Array, "..."]:
        members = {"teacher": log_p, "student": log_q}
        if assistant is not None:
            its_log_q = jax.lax.stop_gradient(log_q) if stop_gradient else log_q
            members["assistant"] = assistant(log_p, its_log_q, weight, **numbers)
        return divergence(members[pair[0]], members[pair[1]])

    return loss


def cross_entropy(log_q: Float[Array, "... V"], target: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns -log q(target), the hard-label loss, in nats.

    Args:
      log_q: log-probabilities, normalised over the last axis.
      target: token ids; an id outside the vocabulary has a loss of 0.

    Returns:
      A value per token.
    """
    # This compares with an iota. A gather would break the fusion over the vocabulary, and its gradient is a scatter.
    hit = jnp.arange(log_q.shape[-1]) == target[..., None]
    return -jnp.sum(jnp.where(hit, log_q, 0), axis=-1)


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of the objective.

    Attributes:
      name: the term's key in the config and in the metrics.
      loss: (log_p, log_q, target, weight, *numbers, *signals) -> a value per token. log_p is None without a teacher.
      needs_teacher: True if `loss` reads log_p.
      weight: the schedule of the assistant's weight on the teacher.
      coefficient: the schedule of the factor that multiplies the term.
      rows: the rows to which the term applies, named by the origin of their text.
      average: 'token' or 'sequence', see `token_coefficients`.
      signals: the tokens' scores -> arrays [B, L], the last arguments of `loss`, constants to the gradient; None for
        none.
      numbers: the schedules of the assistant's other keywords that have a schedule, in the order in which `loss` takes
        their values.
    """

    name: str
    loss: Callable[..., Array]
    needs_teacher: bool
    weight: Any
    coefficient: Any
    rows: str
    average: str
    signals: Callable[[Scores], tuple[Array, ...]] | None = None
    numbers: tuple[Any, ...] = ()

    @property
    def schedules(self) -> tuple[Any, ...]:
        """The schedules of the weight, of the coefficient, and of the numbers."""
        return (self.weight, self.coefficient, *self.numbers)

    @property
    def needs_scores(self) -> bool:
        """True if the targets' log-probabilities are needed before the loss is computed."""
        return self.signals is not None or getattr(self.weight, "needs_scores", False)


def make_terms(
    specs: Any, temperature: float = 1.0, teacher_share: float = 0.0, max_new_tokens: int | None = None
) -> tuple[Term, ...]:  # fmt: skip
    """Returns the terms that a config describes. All terms are checked before anything is computed.

    Args:
      specs: a dict or ConfigDict from names to terms as `configs/base.py` declares them. A name with None in place of a
        term is skipped.
      temperature: the number by which the logits were divided. Hard labels undo the division, because their loss is
        defined with q at temperature 1.
      teacher_share: the teacher's share of the mixture that the student's rows are drawn from; 0 where the student
        draws alone.
      max_new_tokens: the largest number of tokens in a drawn response; None for the room that a row has.

    Returns:
      The terms, in the order of the config.

    Raises:
      ValueError: a name is unknown or a number is out of range. The message names the term and the known names.
    """
    if not temperature > 0:
        raise ValueError(f"objective.temperature={temperature} must be above 0.")
    make = partial(_make_term, temperature=temperature, teacher_share=teacher_share, max_new_tokens=max_new_tokens)
    terms = tuple(make(name, spec) for name, spec in specs.items() if spec is not None)
    if not terms:
        raise ValueError("objective.terms is empty; give it at least one term, such as configs/forward_kl.py does.")
    return terms


def token_coefficients(
    average: str, mask: Bool[Array, "B L"], segments: Int[Array, "B L"] | None = None
) -> Float[Array, "B L"]:
    """Returns the factor of each token's loss, so that the sum over the batch is the average that the config asks for.

    The average is over the whole global batch. Splitting the coefficients, not the averages, over microbatches, devices
    and hosts leaves the result unchanged.

    Args:
      average: 'token' for the sum over all counted tokens, divided by their number. 'sequence' for the mean over rows
        of the mean over each row's tokens; a row without a counted token is ignored.
      mask: True where a token counts.
      segments: the number of each token's row, where several rows are packed into one; None where nothing is packed.

    Returns:
      Coefficients that sum to 1, or that are all 0 where no token counts.
    """
    counted = jnp.asarray(mask, float)
    if average == "token":
        return counted / jnp.maximum(counted.sum(), 1)
    if segments is None:
        lengths = counted.sum(axis=-1, keepdims=True)
    else:
        same = segments[:, :, None] == segments[:, None, :]
        lengths = jnp.where(same, counted[:, None, :], 0).sum(axis=-1)
    share = counted / jnp.maximum(lengths, 1)
    return share / jnp.maximum(share.sum(), 1)


def row_means(scores: Scores) -> dict[str, Array]:
    """Returns the means of each row's counted tokens, for schedules.

    The entries are the mean log-probability under each model, and `counted`, which is True if the row has a counted
    token.
    """
    count = scores.counted.sum(axis=1)
    mean = lambda values: jnp.where(scores.counted, values, 0).sum(axis=1) / jnp.maximum(count, 1)
    return {"log_p": mean(scores.log_p), "log_q": mean(scores.log_q), "counted": count > 0}


def _make_term(name: str, spec: Any, temperature: float, teacher_share: float, max_new_tokens: int | None) -> Term:
    try:
        for key, known in (("rows", ROWS), ("average", AVERAGES), ("kind", KINDS)):
            if spec[key] not in known:
                raise ValueError(f"{key}={spec[key]!r} is not one of {', '.join(known)}.")
        signals, numbers, kind = None, (), spec["kind"]
        if kind == "hard_labels":
            loss = _hard_labels(temperature)
        elif kind == "policy_gradient":
            loss, signals = _policy_gradient(spec["policy"], teacher_share, max_new_tokens)
        else:
            loss, numbers = _divergence_loss(spec)
        if spec["importance"]:
            if kind != "divergence":
                raise ValueError(f"importance=True goes with kind='divergence'; kind={kind!r} has none or its own.")
            loss, signals = _weighted(loss), lambda scores: (policy_gradient.importance_now(scores, teacher_share),)
        _check_assistant(spec)
        weight, coefficient = _schedule(spec["weight"], of_rows=spec["rows"]), _schedule(spec["coefficient"])
    except ValueError as error:
        raise ValueError(f"objective.terms.{name}: {error}") from error
    needs_teacher = kind != "hard_labels" or getattr(weight, "needs_scores", False)
    return Term(name, loss, needs_teacher, weight, coefficient, spec["rows"], spec["average"], signals, numbers)


def _schedule(spec: Any, of_rows: str = "") -> Any:
    """Returns a number or a spec as a stateful schedule.

    A schedule that reads the scores of rows must be for the rows named by `of_rows`.
    """
    schedule: Any = schedules.as_stateful(spec if isinstance(spec, int | float) else resolve.build(spec, schedules))
    if getattr(schedule, "needs_scores", False) and schedule.rows != of_rows:
        there = f"where rows={of_rows!r}" if of_rows else "in this place"
        raise ValueError(
            f"distillm2_skew is for an assistant's weight, on its own rows={schedule.rows!r}, not {there}."
        )
    return schedule


def _names_one(spec: Any) -> bool:
    """Returns True if the spec names an assistant.

    Both {"name": "none"} and None name no assistant. A flag can change the former, but not None.
    """
    return spec is not None and spec != "none" and (isinstance(spec, str) or spec["name"] != "none")


def _check_assistant(spec: Any) -> None:
    """Checks that the settings of an assistant are used only where the term has an assistant."""
    if not _names_one(spec["assistant"]):
        if spec["weight"] != 0 or spec["stop_gradient"]:
            raise ValueError("there is no assistant: set weight=0.0 and stop_gradient=False, which are about it.")
    elif spec["kind"] != "divergence":
        raise ValueError(
            f"kind={spec['kind']!r} has no use for an assistant: set assistant.name='none', weight=0.0, stop_gradient=False."
        )
    elif isinstance(spec["weight"], int | float):
        resolve.check_fraction("weight", spec["weight"])


def _divergence_loss(spec: Any) -> tuple[Callable[..., Array], tuple[Any, ...]]:
    """Returns the loss, and the schedules of the assistant's keywords that have a schedule."""
    assistant, scheduled = None, {}
    if _names_one(spec["assistant"]):
        function, keywords = resolve.look_up(spec["assistant"], assistants, positional=True)
        scheduled = {k: _schedule(v) for k, v in keywords.items() if not isinstance(v, int | float)}
        first = {k: float(schedule(schedule.init(), step=0)) for k, schedule in scheduled.items()}
        assistant = resolve.close(function, **keywords | first)
    divergence, vector = resolve.bind(spec["divergence"], divergences), jax.ShapeDtypeStruct((2,), jnp.float32)
    if (shape := jax.eval_shape(divergence, vector, vector).shape) != ():
        raise ValueError(
            f"divergence: of two vectors it gives a value of shape {shape}; it has to reduce the last axis."
        )
    inner = token_loss(divergence, assistant, spec["pair"], spec["stop_gradient"])

    def loss(log_p: Any, log_q: Array, target: Any, weight: Any, *numbers: Array) -> Array:
        return inner(log_p, log_q, weight, **dict(zip(scheduled, numbers, strict=True)))

    return loss, tuple(scheduled.values())


def _hard_labels(temperature: float) -> Callable[..., Array]:
    def loss(log_p: Any, log_q: Array, target: Array, weight: Any) -> Array:
        # temperature * log_q equals the logits at temperature 1 up to a constant, which log_softmax removes.
        return cross_entropy(log_q if temperature == 1 else jax.nn.log_softmax(temperature * log_q), target)

    return loss


def _weighted(loss: Callable[..., Array]) -> Callable[..., Array]:
    return lambda log_p, log_q, target, weight, *rest: rest[-1] * loss(log_p, log_q, target, weight, *rest[:-1])


def _policy_gradient(
    spec: Any, teacher_share: float, max_new_tokens: int | None
) -> tuple[Callable[..., Array], Callable[[Scores], Any]]:
    """Returns the clipped surrogate of the drawn tokens, and the function that computes each token's constants."""
    signals = policy_gradient.make_signals(spec, teacher_share, max_new_tokens)
    baseline, scale, clip = spec["baseline"], spec["reward_scale"], spec["clip"]

    def loss(log_p: Array, log_q: Array, target: Array, weight: Any, *signals: Array) -> Array:
        advantage, drawn_log_q, importance = signals
        if baseline == "kl":  # the exact mean of the reward is -KL(q || p); subtracting this mean reduces the variance
            advantage = advantage + jax.lax.stop_gradient(divergences.reverse_kl(log_p, log_q)) / scale
        return policy_gradient.clipped_surrogate(
            -cross_entropy(log_q, target), drawn_log_q, advantage, importance, clip
        )

    return loss, signals
