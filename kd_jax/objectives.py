"""What is minimised: a sum of terms, each a divergence of a pair of distributions over some rows, averaged somehow."""

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
# Whose text a row is; "text" is the second stream's. A batch's `origin` holds indices into it.
ORIGINS = ("data", "teacher", "student", "text")
ROWS = ("all", *ORIGINS)  # all: of the first stream
KINDS = ("divergence", "hard_labels", "policy_gradient")

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
      (log_p, log_q, weight=None, **numbers) -> a value per token, in nats. `weight` is the assistant's, on the teacher,
      and `numbers` are what else it takes.

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

    def loss(log_p: Array | None, log_q: Array, weight: Any = None, **numbers: Any) -> Float[Array, "..."]:
        members = {"teacher": log_p, "student": log_q}
        if assistant is not None:
            its_log_q = jax.lax.stop_gradient(log_q) if stop_gradient else log_q
            members["assistant"] = assistant(log_p, its_log_q, weight, **numbers)
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
      loss: (log_p, log_q, target, weight, *numbers, *signals) -> a value per token; log_p is None where there is no teacher.
      needs_teacher: whether `loss` reads log_p.
      weight: schedule of the assistant's weight on the teacher.
      coefficient: schedule of the factor in front.
      rows: which rows it applies to, by where their text came from.
      average: 'token' or 'sequence', see `token_coefficients`.
      signals: the tokens' scores -> arrays [B, L], constants that `loss` takes last; None: there are none.
      numbers: schedules of the assistant's other keywords, where they have one, in the order that `loss` takes them in.
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
        """The weight's, the coefficient's, and the numbers'."""
        return (self.weight, self.coefficient, *self.numbers)

    @property
    def needs_scores(self) -> bool:
        """Whether the targets' log-probabilities have to be known before the loss."""
        return self.signals is not None or getattr(self.weight, "needs_scores", False)


def make_terms(
    specs: Any, temperature: float = 1.0, teacher_share: float = 0.0, max_new_tokens: int | None = None
) -> tuple[Term, ...]:  # fmt: skip
    """The terms that a config describes, checked before anything is computed.

    Args:
      specs: a dict or ConfigDict, name -> what `configs/base.py` declares as a term; a name with None in place of a spec is
        left out.
      temperature: what the logits were divided by. Hard labels undo it: they are about q at temperature 1.
      teacher_share: of the mixture that the student's rows are drawn from: 0 where the student draws alone.
      max_new_tokens: of a response that is drawn; None: as many as a row has room for.

    Returns:
      The terms, in the order of the config.

    Raises:
      ValueError: an unknown name or a number out of range, with the term and the known names.
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
    """Of each row's counted tokens the mean log-probability under both models, and whether it has any: for schedules."""
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
    """A number or a spec as a stateful schedule; one that follows rows' scores has to follow `of_rows`."""
    schedule: Any = schedules.as_stateful(spec if isinstance(spec, int | float) else resolve.build(spec, schedules))
    if getattr(schedule, "needs_scores", False) and schedule.rows != of_rows:
        there = f"where rows={of_rows!r}" if of_rows else "in this place"
        raise ValueError(
            f"distillm2_skew is for an assistant's weight, on its own rows={schedule.rows!r}, not {there}."
        )
    return schedule


def _names_one(spec: Any) -> bool:
    """Whether a spec of an assistant is one; {"name": "none"} is what a flag can change, and None what it cannot."""
    return spec is not None and spec != "none" and (isinstance(spec, str) or spec["name"] != "none")


def _check_assistant(spec: Any) -> None:
    """Nothing of an assistant where there is none."""
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
    """The loss, and the schedules of those of the assistant's keywords that have one."""
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
        # temperature * log_q is the untempered logits up to a constant, which log_softmax takes out.
        return cross_entropy(log_q if temperature == 1 else jax.nn.log_softmax(temperature * log_q), target)

    return loss


def _weighted(loss: Callable[..., Array]) -> Callable[..., Array]:
    return lambda log_p, log_q, target, weight, *rest: rest[-1] * loss(log_p, log_q, target, weight, *rest[:-1])


def _policy_gradient(
    spec: Any, teacher_share: float, max_new_tokens: int | None
) -> tuple[Callable[..., Array], Callable[[Scores], Any]]:
    """The clipped surrogate of the drawn tokens, and the constants that it needs of each."""
    signals = policy_gradient.make_signals(spec, teacher_share, max_new_tokens)
    baseline, scale, clip = spec["baseline"], spec["reward_scale"], spec["clip"]

    def loss(log_p: Array, log_q: Array, target: Array, weight: Any, *signals: Array) -> Array:
        advantage, drawn_log_q, importance = signals
        if baseline == "kl":  # the reward's exact mean is -KL(q || p): what is left varies less
            advantage = advantage + jax.lax.stop_gradient(divergences.reverse_kl(log_p, log_q)) / scale
        return policy_gradient.clipped_surrogate(
            -cross_entropy(log_q, target), drawn_log_q, advantage, importance, clip
        )

    return loss, signals
