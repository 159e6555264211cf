"""The divergence of two members' distributions at one token, computed from the members' logits.

A *member* is a model of the comparison: the teacher, the student, a further frozen model, or the assistant, which is a
distribution between two members.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from kd_jax.logspace import Weight
from kd_jax.supports import Restriction

MEMBERS = ("teacher", "student", "assistant")

# (log_p, log_q, weight) -> a value per token.
TokenLoss = Callable[..., Float[Array, "..."]]
# The logits of each member, divided by the temperature of the objective; or the sides of a cache without logits.
Logits = Mapping[str, PyTree]
Arrays = Mapping[str, Array]  # further values per token, by name


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
      >>> from kd_jax import assistants, divergences
      >>> loss = token_loss(divergences.forward_kl, assistants.arithmetic_mixture, ("teacher", "assistant"))
      >>> log_p = jnp.log(jnp.array([0.9, 0.1]))
      >>> float(loss(log_p, log_p, 0.1))
      0.0

    References:
      Ko et al., "DistiLLM", https://arxiv.org/abs/2402.03898, 2024; Shing et al., "TAID",
      https://arxiv.org/abs/2501.16937, 2025.
    """
    check_pair(pair, ("student", "teacher"), assistant is not None, stop_gradient)
    between = partial(assistant_log_probs, assistant, ("student", "teacher"), stop_gradient)

    def loss(
        log_p: Array, log_q: Array, weight: Weight | None = None, **assistant_numbers: Weight
    ) -> Float[Array, "..."]:
        members = {"teacher": log_p, "student": log_q}
        if assistant is not None:
            members["assistant"] = between(members, weight, **assistant_numbers)
        return divergence(*(members[name] for name in pair))

    return loss


def check_pair(
    pair: Sequence[str], between: Sequence[str], has_assistant: bool, stop_gradient: bool, further: Sequence[str] = ()
) -> None:  # fmt: skip
    """Checks that a pair names one member, or two different ones, and that the loss depends on the student.

    Args:
      pair: the two members that a divergence compares, or the member of a function of one distribution.
      between: the members from which the assistant is computed.
      has_assistant: True if there is an assistant.
      stop_gradient: True if the student inside the assistant is a constant.
      further: the names of further frozen members.

    Raises:
      ValueError: the pair does not fit; the message names the pair and the known members.
    """
    pair, known = tuple(pair), (*MEMBERS, *further)
    if len(pair) not in (1, 2) or len(set(pair)) != len(pair) or not set(pair) <= set(known):
        raise ValueError(
            f"pair={pair!r} must be two different names out of {', '.join(known)}; or one, for a function of one "
            f"distribution."
        )
    student_inside = "assistant" in pair and "student" in between
    if "student" not in pair and student_inside and stop_gradient:
        raise ValueError(
            f"pair={pair!r} with stop_gradient=True has no gradient, because the student occurs only in the assistant. "
            "Set stop_gradient=False."
        )
    if "student" not in pair and not student_inside:
        raise ValueError(f"pair={pair!r} has no gradient, because the student is not a part of the pair.")
    if "assistant" in pair and not has_assistant:
        raise ValueError(f"pair={pair!r} names the assistant, but no assistant is given.")
    if "assistant" not in pair and has_assistant:
        raise ValueError(f"pair={pair!r} does not name the assistant, but an assistant is given.")


def assistant_log_probs(
    assistant: Callable[..., Array] | None, between: Sequence[str], stop_gradient: bool,
    log_probs: Mapping[str, Array], weight: Weight | None, **numbers: Weight,
) -> Array:  # fmt: skip
    """Returns the log-probabilities of the assistant between two members.

    Args:
      assistant: a function of `kd_jax.assistants`.
      between: the members at weight 0 and at weight 1.
      stop_gradient: True if the student inside the assistant is a constant to the gradient.
      log_probs: the log-probabilities of the members.
      weight: the weight of the second member.
      **numbers: the assistant's other keywords.
    """
    assert assistant is not None  # `check_pair` refuses a pair that names a missing assistant
    first, second = (
        jax.lax.stop_gradient(log_probs[name]) if stop_gradient and name == "student" else log_probs[name]
        for name in between
    )
    return assistant(second, first, weight, **numbers)


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
class Temperatures:
    """The temperatures of a comparison, and the transform of the logits before the division.

    Attributes:
      objective: the temperature by which the logits are already divided.
      student: the temperature of the student; None for that of the objective.
      others: the temperature of all other members; None for that of the student.
      rule: (teacher_logits, student_logits) -> (teacher's, student's temperature), per token, in place of the numbers.
      transform: logits -> logits, applied at temperature 1; None for logits as they are.
      squared: True to multiply the loss by the square of the teacher's temperature.
    """

    objective: float = 1.0
    student: float | None = None
    others: float | None = None
    rule: Callable[[Array, Array], tuple[Array, Array]] | None = None
    transform: Callable[[Array], Array] | None = None
    squared: bool = False

    def apply(self, logits: Logits, arrays: Arrays) -> tuple[dict[str, Array], Array | float]:
        """Returns the logits, transformed and divided by the temperatures, and the factor of the loss.

        Args:
          logits: the logits of the members.
          arrays: `temperature` and `teacher_temperature` [...], if they are schedules or rules over the batch.
        """
        student = arrays.get("temperature", self.student)
        others = arrays.get("teacher_temperature", self.others)
        others = student if others is None else others
        if student is None and others is None and self.rule is None and self.transform is None:
            return dict(logits), self.objective**2 if self.squared else 1.0
        if self.objective != 1:
            logits = {name: values * self.objective for name, values in logits.items()}
        if self.transform is not None:
            logits = {name: self.transform(values) for name, values in logits.items()}
        if self.rule is not None:
            others, student = self.rule(logits["teacher"], logits["student"])
        student = self.objective if student is None else student
        others = self.objective if others is None else others
        divide = lambda values, by: values / (by[..., None] if isinstance(by, jax.Array) else by)
        divided = {name: divide(values, student if name == "student" else others) for name, values in logits.items()}
        return divided, others**2 if self.squared else 1.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The loss D(first || second) at a token, or F(first), from the logits of the members.

    Attributes:
      divergence: the divergence, or the function of one distribution, with its keywords bound.
      pair: the members that are the arguments of the divergence.
      assistant: the assistant with its keywords bound, or None.
      between: the members at the assistant's weights 0 and 1.
      among: the members among which the assistant is computed, with their weights, in place of `between`; or empty.
      stop_gradient: True if the student inside the assistant is a constant to the gradient.
      temperatures: the temperatures, and the transform of the logits.
      support: (log_p, log_q, target) -> both distributions over the outcomes that are compared; None for all outcomes.
      takes_target: True if the divergence has the keyword `target`.
      takes_logits: True if the divergence compares logits.
      assistant_numbers: the assistant's keywords that have schedules. Their values are `assistant.KEYWORD` in `arrays`.
    """

    divergence: Callable[..., Array]
    pair: tuple[str, ...] = ("teacher", "student")
    assistant: Callable[..., Array] | None = None
    between: tuple[str, ...] = ("student", "teacher")
    among: Mapping[str, float] = dataclasses.field(default_factory=dict)
    stop_gradient: bool = False
    temperatures: Temperatures = Temperatures()
    support: Restriction | None = None
    takes_target: bool = False
    takes_logits: bool = False
    assistant_numbers: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the models whose logits the comparison reads, without the assistant."""
        inside = (tuple(self.among) or self.between) if "assistant" in self.pair else ()
        return tuple(dict.fromkeys(name for name in (*self.pair, *inside) if name != "assistant"))

    @property
    def whole_readers(self) -> tuple[str, ...]:
        """The keys of a term that need the distributions over the whole vocabulary, and not only over some outcomes."""
        temperatures = self.temperatures
        has_temperature = (temperatures.student, temperatures.others, temperatures.rule) != (None, None, None)
        needs = {
            "divergence": self.takes_target or self.takes_logits, "vocabulary": self.support is not None,
            "logits": temperatures.transform is not None, "temperature": has_temperature,
        }  # fmt: skip
        return tuple(key for key, is_needed in needs.items() if is_needed)

    @property
    def sufficient_k(self) -> int | None:
        """The k for which the teacher's k likeliest ids and the mass of all other ids are sufficient for the `support`.

        None without a support, and if no k is sufficient. An assistant is a mixture over the whole vocabulary.
        """
        is_of_teacher = set(self.pair) == {"teacher", "student"}
        return self.support.sufficient_k if self.support is not None and is_of_teacher else None

    def over_record(self) -> "Comparison":
        """Returns the comparison of distributions over the outcomes of a record of the teacher's likeliest ids."""
        if self.support is None or self.sufficient_k is None:
            return self
        return dataclasses.replace(self, support=self.support.over_record())

    def __call__(self, logits: Logits, target: Array, arrays: Arrays) -> Array:
        """Returns the loss of each token.

        Args:
          logits: the logits [..., V] of `members`.
          target: the token that follows in the row, [...].
          arrays: `weight` [...], the assistant's weight; and the values of the schedules.
        """
        divided, factor = self.temperatures.apply({name: logits[name] for name in self.members}, arrays)
        if self.takes_logits:
            value = self.divergence(*(divided[name] for name in self.pair))
            return value if isinstance(factor, float) and factor == 1 else factor * value
        log_probs = {name: jax.nn.log_softmax(values) for name, values in divided.items()}
        if "assistant" in self.pair and self.among:
            constant = lambda name: self.stop_gradient and name == "student"
            parts = [jax.lax.stop_gradient(log_probs[n]) if constant(n) else log_probs[n] for n in self.among]
            assert self.assistant is not None
            log_probs["assistant"] = self.assistant(parts, tuple(self.among.values()))
        elif "assistant" in self.pair:
            numbers = {name: arrays[f"assistant.{name}"] for name in self.assistant_numbers}
            log_probs["assistant"] = assistant_log_probs(
                self.assistant, self.between, self.stop_gradient, log_probs, arrays["weight"], **numbers
            )
        sides = [log_probs[name] for name in self.pair]
        if self.support is not None:
            # The teacher's side of a support is the first of the pair, unless the first is the student.
            flipped = self.pair[0] == "student" or self.pair[-1] == "teacher"
            first, second = sides[0], sides[-1]  # equal, if the pair is of one member
            outcomes = self.support(*((second, first) if flipped else (first, second)), target)
            ordered = (outcomes.log_q, outcomes.log_p) if flipped else (outcomes.log_p, outcomes.log_q)
            sides = ordered[: len(self.pair)]
            target = target if outcomes.target is None else outcomes.target
        value = self.divergence(*sides, **({"target": target} if self.takes_target else {}))
        return value if isinstance(factor, float) and factor == 1 else factor * value
