"""What is minimised: a sum of terms, each a divergence of a pair of distributions over some rows, averaged somehow."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_jax import assistants, divergences, resolve, schedules

MEMBERS = ("teacher", "student", "assistant")
AVERAGES = ("token", "sequence")
ROWS = ("all", "data", "teacher", "student")

# (log_p, log_q, weight) -> a value per token; log_p may be None where the pair does not name the teacher.
TokenLoss = Callable[..., Float[Array, "..."]]


def token_loss(
    divergence: Callable[..., Array],
    assistant: Callable[..., Array] | None = None,
    pair: Sequence[str] = ("teacher", "student"),
    stop_gradient: bool = False,
) -> TokenLoss:
    """D(first || second), each of the two being the teacher p, the student q, or an assistant r between them.

    This pair is what makes DistiLLM, TAID and AMiD one function: skew KL is D(p || r), TAID D(r || q) with the
    gradient through r cut, AMiD any of the four that involve r.

    Args:
      divergence: (log_p, log_q) -> a value per token, as in `kd_jax.divergences`.
      assistant: (log_p, log_q, weight) -> log_r, as in `kd_jax.assistants`; needed if `pair` names it.
      pair: the divergence's first and second argument, out of 'teacher', 'student' and 'assistant'.
      stop_gradient: the assistant's student is a constant to the gradient (TAID: yes, AMiD: no).

    Returns:
      (log_p, log_q, weight=None) -> a value per token, in nats. `weight` is the assistant's, on the teacher.

    Raises:
      ValueError: a pair that does not fit, or an assistant that nothing reads.

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

    def loss(log_p: Array | None, log_q: Array, weight: Any = None) -> Float[Array, "..."]:
        members = {"teacher": log_p, "student": log_q}
        if assistant is not None:
            members["assistant"] = assistant(log_p, jax.lax.stop_gradient(log_q) if stop_gradient else log_q, weight)
        return divergence(members[pair[0]], members[pair[1]])

    return loss


def cross_entropy(log_q: Float[Array, "... V"], target: Int[Array, "..."]) -> Float[Array, "..."]:
    """-log q(target), in nats: the hard-label loss.

    Args:
      log_q: log-probabilities, normalised over the last axis.
      target: ids; one outside the vocabulary costs 0.

    Returns:
      A value per token.
    """
    # An iota comparison: a gather here would break the fusion over the vocabulary, and its gradient is a scatter.
    hit = jnp.arange(log_q.shape[-1]) == target[..., None]
    return -jnp.sum(jnp.where(hit, log_q, 0), axis=-1)


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of the objective.

    Attributes:
      name: its key in the config and in the metrics.
      loss: (log_p, log_q, target, weight) -> a value per token; log_p is None where there is no teacher.
      needs_teacher: whether `loss` reads log_p.
      weight: schedule of the assistant's weight on the teacher.
      coefficient: schedule of the factor in front.
      rows: which rows it applies to, by where their text came from.
      average: 'token' or 'sequence', see `token_coefficients`.
    """

    name: str
    loss: Callable[..., Array]
    needs_teacher: bool
    weight: Any
    coefficient: Any
    rows: str
    average: str


def make_terms(specs: Any, temperature: float = 1.0) -> tuple[Term, ...]:
    """The terms that a config describes, checked before anything is computed.

    Args:
      specs: a dict or ConfigDict, name -> {kind, divergence, assistant, pair, stop_gradient, weight, coefficient, rows, average}, as
        `configs/base.py` declares them; a name with None in place of a spec is left out.
      temperature: what the logits were divided by. Hard labels undo it: they are about q at temperature 1.

    Returns:
      The terms, in the order of the config.

    Raises:
      ValueError: an unknown name or a number out of range, with the term and the known names.
    """
    if not temperature > 0:
        raise ValueError(f"objective.temperature={temperature} must be above 0.")
    terms = tuple(_make_term(name, spec, temperature) for name, spec in specs.items() if spec is not None)
    if not terms:
        raise ValueError("objective.terms is empty; give it at least one term, such as configs/forward_kl.py does.")
    return terms


def token_coefficients(
    average: str, mask: Bool[Array, "B L"], segments: Int[Array, "B L"] | None = None
) -> Float[Array, "B L"]:
    """What each token's loss is multiplied by, so that the sum over the batch is the wanted average.

    The average is over the whole global batch, so that it is the same number however the batch is divided over
    microbatches, devices and hosts: divide the coefficients, not the averages.

    Args:
      average: 'token': the sum over all counted tokens / their number. 'sequence': the mean over rows of the mean
        over each row's tokens; rows with nothing to count are no rows.
      mask: True where a token counts.
      segments: of rows that several are packed into, the number of each token's row; None: a row is one.

    Returns:
      Coefficients that sum to 1, or all 0 where nothing counts.
    """
    counted = mask.astype(jnp.float32)
    if average == "token":
        return counted / jnp.maximum(counted.sum(), 1)
    if segments is None:
        lengths = counted.sum(axis=-1, keepdims=True)
    else:
        same = segments[:, :, None] == segments[:, None, :]
        lengths = jnp.where(same, counted[:, None, :], 0).sum(axis=-1)
    share = counted / jnp.maximum(lengths, 1)
    return share / jnp.maximum(share.sum(), 1)


def _make_term(name: str, spec: Any, temperature: float) -> Term:
    try:
        for key, known in (("rows", ROWS), ("average", AVERAGES), ("kind", ("divergence", "hard_labels"))):
            if spec[key] not in known:
                raise ValueError(f"{key}={spec[key]!r} is not one of {', '.join(known)}.")
        if spec["kind"] == "hard_labels":
            loss, needs_teacher = _hard_labels(temperature), False
        else:
            loss, needs_teacher = _divergence_loss(spec), True
        if spec["assistant"] is not None and isinstance(spec["weight"], int | float):
            resolve.check_fraction("weight", spec["weight"])
        weight, coefficient = _schedule(spec["weight"]), _schedule(spec["coefficient"])
    except ValueError as error:
        raise ValueError(f"objective.terms.{name}: {error}") from error
    return Term(name, loss, needs_teacher, weight, coefficient, spec["rows"], spec["average"])


def _schedule(spec: Any) -> Any:
    return schedules.as_stateful(spec if isinstance(spec, int | float) else resolve.build(spec, schedules))


def _divergence_loss(spec: Any) -> Callable[..., Array]:
    assistant = None if spec["assistant"] is None else resolve.bind(spec["assistant"], assistants)
    divergence = resolve.bind(spec["divergence"], divergences)
    inner = token_loss(divergence, assistant, spec["pair"], spec["stop_gradient"])
    return lambda log_p, log_q, target, weight: inner(log_p, log_q, weight)


def _hard_labels(temperature: float) -> Callable[..., Array]:
    def loss(log_p: Any, log_q: Array, target: Array, weight: Any) -> Array:
        # temperature * log_q is the untempered logits up to a constant, which log_softmax takes out.
        return cross_entropy(log_q if temperature == 1 else jax.nn.log_softmax(temperature * log_q), target)

    return loss
