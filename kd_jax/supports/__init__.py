"""Supports: the outcomes over which two next-token distributions are compared.

A support is a function ``S(log_p, log_q, *, ...)`` of the log-probabilities [..., V] of the teacher and of the student.
It returns the ids to compare, as a `Support`. `make_support` treats the other ids as ``rest`` says:

- ``tail``: one more outcome has the mass of all other ids. Both sides stay distributions, so a divergence of them is a
  divergence, and is at most the divergence of the whole distributions for every f-divergence.
- ``renormalised``: both sides are divided by their mass on the support. Mass outside the support has no effect.
- ``dropped``: the log-probabilities stay as they are. Both sides sum to less than 1, and the value may be negative.

``teacher`` and ``student`` replace ``rest`` where the two sides differ: ``renormalised``, or ``whole`` for
log-probabilities that stay as they are.

The choice of the ids is a constant to the gradient. The gradient of the log-probabilities of these ids is exact.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kd_jax.logspace import promote
from kd_jax.resolve import check_number, look_up, names, nearest
from kd_jax.supports import outcomes
from kd_jax.supports.outcomes import LogProbs, Restricted, Support, Target

__all__ = ["intersection", "student_top_k", "teacher_top_k", "union", "whole"]

SETTINGS = ("rest", "teacher", "student", "add_target", "outside", "keep")  # what a spec may name beside the keywords
RESTS = ("tail", "renormalised", "dropped")
SIDES = ("tail", "renormalised", "whole")

BLOCK = 32  # the number of ids in a block of `_top_ids`


def whole(log_p: LogProbs, log_q: LogProbs) -> Support:
    """Returns all ids of the vocabulary, in their order.

    Example:
      >>> whole(jnp.log(jnp.array([0.7, 0.3])), jnp.log(jnp.array([0.5, 0.5]))).ids.tolist()
      [0, 1]
    """
    ids = jnp.broadcast_to(jnp.arange(log_p.shape[-1], dtype=jnp.int32), log_p.shape)
    return outcomes.all_chosen(ids)


def teacher_top_k(log_p: LogProbs, log_q: LogProbs, *, k: int) -> Support:
    """Returns the teacher's k likeliest ids, the likeliest first. Of equal ids the lowest is first.

    Raises:
      ValueError: if ``k`` is not a whole number from 1 to V.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.6, 0.3, 0.1]))
      >>> teacher_top_k(log_p, log_q, k=2).ids.tolist()
      [1, 0]
    """
    return outcomes.all_chosen(_top_ids(log_p, k))


def student_top_k(log_p: LogProbs, log_q: LogProbs, *, k: int) -> Support:
    """Returns the student's k likeliest ids, the likeliest first. Of equal ids the lowest is first.

    Raises:
      ValueError: if ``k`` is not a whole number from 1 to V.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.6, 0.3, 0.1]))
      >>> student_top_k(log_p, log_q, k=2).ids.tolist()
      [0, 1]
    """
    return outcomes.all_chosen(_top_ids(log_q, k))


def union(log_p: LogProbs, log_q: LogProbs, *, k: int) -> Support:
    """Returns the ids among the k likeliest of the teacher or of the student, the teacher's ids first.

    Returns:
      2k entries, of which k to 2k are chosen.

    Raises:
      ValueError: if ``k`` is not a whole number from 1 to V.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.3, 0.6, 0.1]))
      >>> ids, chosen = union(log_p, log_q, k=1)
      >>> ids[chosen].tolist()
      [1]
    """
    of_teacher, of_student = _top_ids(log_p, k), _top_ids(log_q, k)
    chosen = jnp.concatenate([jnp.ones(of_teacher.shape, bool), ~_is_in(of_student, of_teacher)], axis=-1)
    return Support(jnp.concatenate([of_teacher, of_student], axis=-1), chosen)


def intersection(log_p: LogProbs, log_q: LogProbs, *, k: int) -> Support:
    """Returns the ids among the k likeliest of the teacher and of the student, in the teacher's order.

    Returns:
      k entries, of which 0 to k are chosen.

    Raises:
      ValueError: if ``k`` is not a whole number from 1 to V.

    Example:
      >>> log_p, log_q = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.3, 0.1, 0.6]))
      >>> ids, chosen = intersection(log_p, log_q, k=2)
      >>> ids[chosen].tolist()
      [0]
    """
    of_teacher = _top_ids(log_p, k)
    return Support(of_teacher, _is_in(of_teacher, _top_ids(log_q, k)))


@dataclasses.dataclass(frozen=True)
class Restriction:
    """The function that `make_support` returns. The attributes are the parsed keys of its spec."""

    select: Callable[[LogProbs, LogProbs], Support]
    teacher: str
    student: str
    add_target: bool
    outside: float | None
    student_mass: float | None
    is_whole_at: int | None  # the size of the vocabulary at which the support is all of it

    @property
    def is_short(self) -> bool:
        """True if the log-probabilities of a side sum to less than 1."""
        return "whole" in (self.teacher, self.student) and self.outside is None

    @property
    def sufficient_k(self) -> int | None:
        """The k for which the teacher's k likeliest ids and the mass of all other ids are sufficient; None if none is."""
        select = self.select
        if not isinstance(select, functools.partial) or select.func is not teacher_top_k:
            return None
        return None if self.add_target or self.outside is not None else select.keywords["k"]

    def over_record(self) -> "Restriction":
        """Returns the restriction of distributions over the teacher's likeliest ids, in order, and all other ids.

        The number of these ids is at least `sufficient_k`.
        """
        k = self.sufficient_k
        assert k is not None  # the caller asks before
        return dataclasses.replace(self, select=functools.partial(_first, k=k))

    def __call__(self, log_p: LogProbs, log_q: LogProbs, target: Target | None = None) -> Restricted:
        log_p, log_q = promote(log_p, log_q)
        size = log_p.shape[-1]
        if self.add_target and target is None:
            raise ValueError("vocabulary.add_target=True needs the row's token, and the caller gave none.")
        in_whole = None if target is None else outcomes.index_in_whole(target, size)
        if self.is_whole_at == size:
            return Restricted(log_p, log_q, in_whole)

        constants = jax.lax.stop_gradient((log_p, log_q))
        support = _checked(self.select(*constants), log_p)
        if self.student_mass is not None:
            support = outcomes.shortest_beginning(support, constants[1], self.student_mass)
        if self.add_target and target is not None:
            support = outcomes.with_target(support, target, size)
        if self.outside is not None:
            return Restricted(outcomes.renormalised_over(log_p, support, self.outside), log_q, in_whole)
        has_tail = self.teacher == "tail"
        members = outcomes.members(support, size) if has_tail else None
        return Restricted(
            outcomes.over_support(log_p, support, members, self.teacher),
            outcomes.over_support(log_q, support, members, self.student),
            None if target is None else outcomes.index(target, support, size, has_tail),
        )


def make_support(spec: Mapping[str, Any]) -> Restriction | None:
    """Returns the function that restricts two distributions to the outcomes that a spec describes.

    An entry that is no outcome has the same finite log-probability on both sides, whose exp is 0. An empty intersection
    therefore adds 0 to a sum over entries.

    Args:
      spec: a mapping with these keys. A key with the value None counts as absent.

        - ``support``: a name of this module, or ``module:function`` for a function of your own.
        - keywords of that function, such as ``k``, the number of likeliest ids.
        - ``rest``: ``tail`` (the default), ``renormalised`` or ``dropped``, as the module's docstring says.
        - ``teacher``, ``student``: ``renormalised`` or ``whole`` in place of ``rest``, for each side.
        - ``add_target``: True to add the row's token to the support.
        - ``outside``: a log-probability. The comparison is then over the whole vocabulary. The teacher is renormalised
          over the support and has this log-probability elsewhere. The student stays as it is.
        - ``keep``: ``{"name": "student_mass", "at_least": 0.9}`` keeps the first ids of the teacher's order: as many as
          are needed for this mass of the student, or all k.

    Returns:
      A function of the log-probabilities [..., V] of the teacher and the student, both normalised, and of the row's
      token [...] or None. It returns a `Restricted`. None instead of a function if the support is the whole vocabulary.

    Raises:
      ValueError: if a key or a value is unknown, missing, out of range or in conflict with another key. The function
        raises ValueError if ``k`` is above V, or if ``add_target`` has no token.

    Example:
      >>> restrict = make_support({"support": "teacher_top_k", "k": 2})
      >>> log_p, log_q = jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
      >>> coarse = restrict(log_p, log_q, jnp.array(0))
      >>> jnp.exp(coarse.log_q).round(3).tolist(), int(coarse.target)  # the ids 1 and 3, and the tail
      ([0.30000001192092896, 0.10000000149011612, 0.6000000238418579], 2)

    References:
      "Rethinking OPD", https://arxiv.org/abs/2604.13016, 2026, for the union and the intersection;
      "Revisiting OPD", https://arxiv.org/abs/2603.25562, 2026, for the added token.
    """
    options = {key: value for key, value in dict(spec).items() if value is not None}
    name = options.pop("support", None)
    module = sys.modules[__name__]
    if not isinstance(name, str):
        raise ValueError(
            f"vocabulary.support={name!r} must be one of {', '.join(names(module))}, or 'module:function'."
        )
    settings = {key: options.pop(key) for key in SETTINGS if key in options}
    try:
        function, keywords = look_up(name, module, positional=True, beside=SETTINGS, **options)
    except ValueError as error:
        raise ValueError(f"vocabulary: {error}") from error
    is_top_k = function in (teacher_top_k, student_top_k, union, intersection)
    if is_top_k:
        _check_k(keywords["k"])

    teacher, student = _sides(settings)
    add_target = settings.get("add_target", False)
    if not isinstance(add_target, bool):
        raise ValueError(f"vocabulary.add_target={add_target!r} must be True or False.")
    outside = settings.get("outside")
    if outside is not None:
        outside = check_number("vocabulary.outside", outside, high=0.0)
    at_least = _student_mass(settings["keep"]) if "keep" in settings else None
    if at_least is not None and function is not teacher_top_k:
        raise ValueError(
            f"vocabulary.keep follows the teacher's order and needs support='teacher_top_k', not {name!r}."
        )
    if function is whole:  # there are no other ids to which the other keys would apply
        return None
    is_whole_at = keywords["k"] if is_top_k and at_least is None else None
    select = functools.partial(function, **keywords)
    return Restriction(select, teacher, student, add_target, outside, at_least, is_whole_at)


def _first(log_p: LogProbs, log_q: LogProbs, *, k: int) -> Support:
    """Returns the first k outcomes. The last outcome of a record may be likelier, but stands for many ids."""
    return outcomes.all_chosen(jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (*log_p.shape[:-1], k)))


def _sides(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Returns one of `SIDES` for the teacher and one for the student.

    Raises:
      ValueError: a value is unknown, a key has no effect, or only one side has a tail.
    """
    named = [side for side in ("teacher", "student") if side in settings]
    unread = [key for key in ("rest", *named) if key in settings] if "outside" in settings else []
    if len(named) == 2 and "rest" in settings:
        unread = ["rest"]
    if unread:
        because = "outside" if "outside" in settings else "teacher and vocabulary.student"
        raise ValueError(f"vocabulary.{unread[0]} has no effect beside vocabulary.{because}; remove one of the keys.")
    rest = _one_of("rest", settings.get("rest", "tail"), RESTS)
    both = "whole" if rest == "dropped" else rest
    teacher, student = (_one_of(side, settings.get(side, both), SIDES) for side in ("teacher", "student"))
    if (teacher == "tail") != (student == "tail"):
        raise ValueError(
            f"vocabulary has teacher={teacher!r} and student={student!r}, but a tail is an outcome of both sides or of "
            "neither. Name teacher and student, each 'renormalised' or 'whole', or set rest."
        )
    return teacher, student


def _student_mass(keep: str | Mapping[str, Any]) -> float:
    """Returns the mass that ``keep`` asks for. An unknown key, name or number raises ValueError."""
    given = {"name": keep} if isinstance(keep, str) else dict(keep)
    name, mass = _one_of("keep.name", given.pop("name", None), ("student_mass",)), given.pop("at_least", None)
    for key in given:
        raise ValueError(f"unknown key vocabulary.keep.{key}{nearest(key, ['at_least'])}; {name} takes name, at_least.")
    mass = check_number("vocabulary.keep.at_least", mass, 0.0, 1.0)
    if mass == 0:
        raise ValueError("vocabulary.keep.at_least must be above 0, because no id is needed for a mass of 0.")
    return mass


def _one_of(key: str, value: object, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"vocabulary.{key}={value!r}{nearest(value, known)} is not one of {', '.join(known)}.")
    return value


def _check_k(k: object, size: int | None = None) -> None:
    """Refuses a k that is not a whole number from 1 to the size of the vocabulary."""
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise ValueError(f"vocabulary.k={k!r} must be a whole number from 1 to the size of the vocabulary.")
    if size is not None and k > size:
        raise ValueError(f"vocabulary.k={k!r} is more than the vocabulary's V={size} ids.")


def _top_ids(log_p: LogProbs, k: int) -> Int[Array, "*batch k"]:
    """Returns the k likeliest ids, the likeliest first, and the lowest first among equals.

    In float64 `jax.lax.top_k` sorts the whole vocabulary. There, the k blocks with the highest maxima are chosen first.
    An id of another block has k ids before it, because each of the k blocks holds one.
    """
    size = log_p.shape[-1]
    _check_k(k, size)
    log_p = jax.lax.stop_gradient(log_p)
    blocks = size // BLOCK
    if log_p.dtype != jnp.float64 or 2 * k >= blocks:
        return jax.lax.top_k(log_p, k)[1]
    maxima = log_p[..., : blocks * BLOCK].reshape(*log_p.shape[:-1], blocks, BLOCK).max(axis=-1)
    block = jnp.sort(jax.lax.top_k(maxima, k)[1], axis=-1)  # ascending ids, so that the lowest of equal ids is first
    inside = (block[..., None] * BLOCK + jnp.arange(BLOCK)).reshape(*block.shape[:-1], k * BLOCK)
    beyond = jnp.broadcast_to(jnp.arange(blocks * BLOCK, size), (*block.shape[:-1], size % BLOCK))
    candidates = jnp.concatenate([inside, beyond], axis=-1)
    best = jax.lax.top_k(jnp.take_along_axis(log_p, candidates, axis=-1, mode="clip"), k)[1]
    return jnp.take_along_axis(candidates, best, axis=-1, mode="clip").astype(jnp.int32)


def _is_in(ids: Int[Array, "*batch k"], others: Int[Array, "*batch n"]) -> Bool[Array, "*batch k"]:
    return jnp.any(ids[..., :, None] == others[..., None, :], axis=-1)


def _checked(support: Support, log_p: LogProbs) -> Support:
    """Returns the support, after a check of the shapes that a function of the user's returns."""
    ids, chosen = support
    if ids.shape != chosen.shape or ids.shape[:-1] != log_p.shape[:-1] or chosen.dtype != bool:
        raise ValueError(
            f"the function of vocabulary.support must return ids {(*log_p.shape[:-1], 'm')} and booleans of that "
            f"shape, but returned ids {ids.shape} and an array {chosen.shape} of type {chosen.dtype}."
        )
    return Support(ids, chosen)
