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
from optax.schedules import StatefulSchedule

from kd_jax import assistants, divergences, policy_gradient, resolve, schedules
from kd_jax.logspace import Weight
from kd_jax.policy_gradient import Scores
from kd_jax.settings import Config

MEMBERS = ("teacher", "student", "assistant")
AVERAGES = ("token", "sequence")
# Possible origins of a row's text; "text" is the second stream. A batch's `origin` holds indices into this tuple.
ORIGINS = ("data", "teacher", "student", "text")
ROWS = ("all", *ORIGINS)  # all: every row of the first stream
KINDS = ("divergence", "hard_labels", "policy_gradient")

# (log_p, log_q, weight) -> a value per token.
TokenLoss = Callable[..., Float[Array, "..."]]


def token_loss(
    divergence: Callable[..., Array],
    assistant: Callable[..., Array] | None = None,
    pair: Sequence[str] = ("teacher", "student"),
    stop_gradient: bool = False,
) -> TokenLoss:
    """Returns the loss D(first || second), each of the two the teacher p, the student q, or an assistant r of p and q.

    The choice of the pair makes DistiLLM, TAID and AMiD one function. Skew KL is D(p || r). TAID is D(r || q) without
    the gradient through r. AMiD is any of the four pairs with r.

    Args:
      divergence: (log_p, log_q) -> a value per token, as in `kd_jax.divergences`.
      assistant: (log_p, log_q, weight) -> log_r, as in `kd_jax.assistants`; required if `pair` names the assistant.
      pair: the first and second argument of the divergence, out of 'teacher', 'student' and 'assistant'.
      stop_gradient: True if the student inside the assistant is a constant to the gradient (TAID: True, AMiD: False).

    Returns:
      (log_p, log_q, weight=None, **assistant_numbers) -> a value per token, in nats. `weight` is the teacher's weight
      in the assistant. `assistant_numbers` are the assistant's other keywords.

    Raises:
      ValueError: the pair is not valid, or an assistant is missing, or the pair does not name the given assistant.

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
        raise ValueError(
            f"pair={pair!r} with stop_gradient=True has no gradient, because the student occurs only in the assistant. "
            "Set stop_gradient=False."
        )
    if "assistant" in pair and assistant is None:
        raise ValueError(f"pair={pair!r} names the assistant, but no assistant is given.")
    if "assistant" not in pair and assistant is not None:
        raise ValueError(f"pair={pair!r} does not name the assistant, but an assistant is given.")

    def loss(
        log_p: Array, log_q: Array, weight: Weight | None = None, **assistant_numbers: Weight
    ) -> Float[Array, "..."]:
        members = {"teacher": log_p, "student": log_q}
        if assistant is not None:
            assistant_log_q = jax.lax.stop_gradient(log_q) if stop_gradient else log_q
            members["assistant"] = assistant(log_p, assistant_log_q, weight, **assistant_numbers)
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
    # A gather would break the fusion over the vocabulary, and the gradient of a gather is a scatter.
    is_target = jnp.arange(log_q.shape[-1]) == target[..., None]
    return -jnp.sum(jnp.where(is_target, log_q, 0), axis=-1)


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of the objective.

    Attributes:
      name: the term's key in the config and in the metrics.
      loss: (log_p, log_q, target, weight, *assistant_numbers, *signals) -> a value per token. Only a loss of hard
        labels accepts None as log_p.
      needs_teacher: True if `loss` reads log_p.
      weight: the schedule of the teacher's weight in the assistant.
      coefficient: the schedule of the factor that multiplies the term.
      rows: the rows to which the term applies, named by the origin of their text.
      average: 'token' or 'sequence', see `token_coefficients`.
      signals: the tokens' scores -> arrays [B, L] without gradient, the last arguments of `loss`; None without signals.
      assistant_numbers: the schedules of the assistant's other keywords, in the order of the arguments of `loss`.
    """

    name: str
    loss: Callable[..., Array]
    needs_teacher: bool
    weight: StatefulSchedule
    coefficient: StatefulSchedule
    rows: str
    average: str
    signals: Callable[[Scores], tuple[Array, ...]] | None = None
    assistant_numbers: tuple[StatefulSchedule, ...] = ()

    @property
    def schedules(self) -> tuple[StatefulSchedule, ...]:
        """The schedules of the weight, of the coefficient, and of the assistant's other keywords."""
        return (self.weight, self.coefficient, *self.assistant_numbers)

    @property
    def needs_scores(self) -> bool:
        """True if the targets' log-probabilities are needed before the loss is computed."""
        return self.signals is not None or _needs_scores(self.weight)


def make_terms(
    specs: Config, temperature: float = 1.0, teacher_share: float = 0.0, max_new_tokens: int | None = None
) -> tuple[Term, ...]:  # fmt: skip
    """Returns the terms that a config describes. All terms are checked before anything is computed.

    Args:
      specs: a dict or ConfigDict from names to terms, as `kd_jax.settings.Term` declares them. A name with None in
        place of a term is skipped.
      temperature: the divisor of the logits. The loss of hard labels is defined at temperature 1, so this loss undoes
        the division.
      teacher_share: the teacher's share of the mixture from which the student's rows were sampled; 0 for rows that the
        student sampled alone.
      max_new_tokens: the largest number of tokens in a sampled response; None for all positions of a row.

    Returns:
      The terms, in the order of the config.

    Raises:
      ValueError: a name is unknown or a number is out of range. The message names the term and the known names.
    """
    if not temperature > 0:
        raise ValueError(f"objective.temperature={temperature} must be above 0.")
    make = partial(_make_term, temperature=temperature, teacher_share=teacher_share, max_new_tokens=max_new_tokens)
    terms = tuple(make(name, specs[name]) for name in specs if specs[name] is not None)
    if not terms:
        raise ValueError("objective.terms is empty: define at least one term, as configs/forward_kl.py does.")
    return terms


def token_coefficients(
    average: str, mask: Bool[Array, "B L"], segments: Int[Array, "B L"] | None = None
) -> Float[Array, "B L"]:
    """Returns weights w such that sum(w * loss) is the average that `average` names.

    The average is over the global batch. Microbatches, devices and hosts each get a part of the coefficients and add up
    their sums, so the result does not depend on the division.

    Args:
      average: 'token' for the sum over all counted tokens, divided by their number. 'sequence' for the mean over rows
        of the mean over each row's tokens; a row without a counted token is ignored.
      mask: True where a token counts.
      segments: the number of each token's row, if several rows are packed into one; None without packing.

    Returns:
      Coefficients whose sum is 1, or 0 if no token counts.
    """
    counted = jnp.asarray(mask, float)
    if average == "token":
        return counted / jnp.maximum(counted.sum(), 1)
    if segments is None:
        lengths = counted.sum(axis=-1, keepdims=True)
    else:
        same_row = segments[:, :, None] == segments[:, None, :]
        lengths = jnp.where(same_row, counted[:, None, :], 0).sum(axis=-1)
    share = counted / jnp.maximum(lengths, 1)
    return share / jnp.maximum(share.sum(), 1)


def row_means(scores: Scores) -> dict[str, Array]:
    """Returns the means of each row's counted tokens, for schedules.

    `log_p` and `log_q` are the mean log-probabilities under each model. `counted` is True if a row has a counted token.
    """
    count = scores.counted.sum(axis=1)
    mean = lambda values: jnp.where(scores.counted, values, 0).sum(axis=1) / jnp.maximum(count, 1)
    return {"log_p": mean(scores.log_p), "log_q": mean(scores.log_q), "counted": count > 0}


def _make_term(name: str, spec: Config, temperature: float, teacher_share: float, max_new_tokens: int | None) -> Term:
    try:
        for key, known in (("rows", ROWS), ("average", AVERAGES), ("kind", KINDS)):
            if spec[key] not in known:
                raise ValueError(f"{key}={spec[key]!r} is not one of {', '.join(known)}.")
        signals, assistant_numbers, kind = None, (), spec["kind"]
        if kind == "hard_labels":
            loss = _hard_labels(temperature)
        elif kind == "policy_gradient":
            loss, signals = _policy_gradient(spec["policy"], teacher_share, max_new_tokens)
        else:
            loss, assistant_numbers = _divergence_loss(spec)
        if spec["importance"]:
            if kind != "divergence":
                raise ValueError(f"importance=True goes with kind='divergence', not with kind={kind!r}.")
            loss, signals = _weighted(loss), lambda scores: (policy_gradient.importance_now(scores, teacher_share),)
        _check_assistant(spec)
        weight, coefficient = _schedule(spec["weight"], of_rows=spec["rows"]), _schedule(spec["coefficient"])
    except ValueError as error:
        raise ValueError(f"objective.terms.{name}: {error}") from error
    needs_teacher = kind != "hard_labels" or _needs_scores(weight)
    return Term(
        name, loss, needs_teacher, weight, coefficient, spec["rows"], spec["average"], signals, assistant_numbers
    )


def _needs_scores(schedule: StatefulSchedule) -> bool:
    return getattr(schedule, "needs_scores", False)


def _schedule(spec: Any, of_rows: str = "") -> StatefulSchedule:
    """Returns a number or a spec as a stateful schedule, and refuses any other value.

    A schedule that reads the scores of rows must be for the rows named by `of_rows`.
    """
    schedule = schedules.as_stateful(spec if isinstance(spec, int | float) else resolve.build(spec, schedules))
    if _needs_scores(schedule) and (rows := getattr(schedule, "rows", None)) != of_rows:
        use = f"the weight of a term with rows={of_rows!r}" if of_rows else "another number"
        raise ValueError(
            f"{type(schedule).__name__}(rows={rows!r}) can only be the weight of a term with rows={rows!r}, but is {use}."
        )
    return schedule


def _has_assistant(spec: str | Config | None) -> bool:
    """Returns True if the spec names an assistant.

    Both {"name": "none"} and None name no assistant. Configs have {"name": "none"}, because a flag cannot change None.
    """
    return spec is not None and spec != "none" and (isinstance(spec, str) or spec["name"] != "none")


def _check_assistant(spec: Config) -> None:
    """Checks that the settings of an assistant are used only in a term that has an assistant."""
    if not _has_assistant(spec["assistant"]):
        if spec["weight"] != 0 or spec["stop_gradient"]:
            raise ValueError(
                f"there is no assistant for weight={spec['weight']} and stop_gradient={spec['stop_gradient']}: name an "
                "assistant, or set weight=0.0 and stop_gradient=False."
            )
    elif spec["kind"] != "divergence":
        raise ValueError(
            f"a term with kind={spec['kind']!r} has no assistant: set assistant.name='none', weight=0.0 and "
            "stop_gradient=False."
        )
    elif isinstance(spec["weight"], int | float):
        resolve.check_fraction("weight", spec["weight"])


def _divergence_loss(spec: Config) -> tuple[Callable[..., Array], tuple[StatefulSchedule, ...]]:
    """Returns the loss, and the schedules of the assistant's keywords that have a schedule."""
    assistant, scheduled = None, {}
    if _has_assistant(spec["assistant"]):
        function, keywords = resolve.look_up(spec["assistant"], assistants, positional=True)
        scheduled = {k: _schedule(v) for k, v in keywords.items() if not isinstance(v, int | float)}
        first_values = {k: float(jnp.asarray(schedule(schedule.init(), step=0))) for k, schedule in scheduled.items()}
        assistant = resolve.close(function, **keywords | first_values)
    divergence, vector = resolve.bind(spec["divergence"], divergences), jax.ShapeDtypeStruct((2,), jnp.float32)
    if (shape := jax.eval_shape(divergence, vector, vector).shape) != ():
        raise ValueError(
            f"divergence={spec['divergence']}: for two vectors the function returns an array of shape {shape}, but it "
            "must sum over the last axis and return a scalar."
        )
    inner = token_loss(divergence, assistant, spec["pair"], spec["stop_gradient"])

    def loss(log_p: Array, log_q: Array, target: Array | None, weight: Weight, *numbers: Array) -> Array:
        return inner(log_p, log_q, weight, **dict(zip(scheduled, numbers, strict=True)))

    return loss, tuple(scheduled.values())


def _hard_labels(temperature: float) -> Callable[..., Array]:
    def loss(log_p: Array | None, log_q: Array, target: Array, weight: Weight | None) -> Array:
        # temperature * log_q equals the logits at temperature 1 up to a constant, which log_softmax removes.
        return cross_entropy(log_q if temperature == 1 else jax.nn.log_softmax(temperature * log_q), target)

    return loss


def _weighted(loss: Callable[..., Array]) -> Callable[..., Array]:
    """Returns the loss times the importance weight, which is the last argument."""

    def weighted(log_p: Array, log_q: Array, target: Array | None, weight: Weight, *arguments: Array) -> Array:
        *assistant_numbers, importance = arguments
        return importance * loss(log_p, log_q, target, weight, *assistant_numbers)

    return weighted


def _policy_gradient(
    spec: Config, teacher_share: float, max_new_tokens: int | None
) -> tuple[Callable[..., Array], Callable[[Scores], tuple[Array, ...]]]:
    """Returns the clipped surrogate of the sampled tokens, and the function that computes each token's constants."""
    signals = policy_gradient.make_signals(spec, teacher_share, max_new_tokens)
    baseline, scale, clip = spec["baseline"], spec["reward_scale"], spec["clip"]

    def loss(log_p: Array, log_q: Array, target: Array, weight: Weight | None, *signals: Array) -> Array:
        advantage, drawn_log_q, importance = signals
        if baseline == "kl":  # subtracting the exact mean of the reward, which is -KL(q || p), reduces the variance
            advantage = advantage + jax.lax.stop_gradient(divergences.reverse_kl(log_p, log_q)) / scale
        return policy_gradient.clipped_surrogate(
            -cross_entropy(log_q, target), drawn_log_q, advantage, importance, clip
        )

    return loss, signals
