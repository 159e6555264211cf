"""One step of distillation as a pure function: (state, teacher_params, batch) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int

from kd_jax.objectives import ORIGINS, Term, cross_entropy, row_means, token_coefficients
from kd_jax.policy_gradient import Scores
from kd_jax.teachers import compare, for_terms, teacher_arrays

Batch = dict[str, Array]
# name -> (sum, count). The average is computed by the code that has all the sums.
Metrics = dict[str, tuple[Array, Array]]


@struct.dataclass
class TrainState:
    """The state that a run carries from step to step. A checkpoint holds this state and the position in the data.

    Attributes:
      step: the number of updates made.
      params: the student's parameters.
      opt_state: the optimiser's state.
      schedules: the states of the schedules of each term.
      key: the source of all randomness; step i uses fold_in(key, i).
      skipped: the number of consecutive steps, up to the last one, whose loss or gradient was not finite.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    schedules: tuple[tuple[Any, ...], ...]
    key: Array
    skipped: Int[Array, ""]


def init_state(params: Any, tx: optax.GradientTransformation, terms: Sequence[Term], key: Array) -> TrainState:
    """Returns the state before the first step."""
    schedules = _as_real(tuple(tuple(schedule.init() for schedule in term.schedules) for term in terms), params)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), schedules, key, jnp.zeros((), jnp.int32))


def make_train_step(
    student: Any,
    teacher: Any,
    terms: Sequence[Term],
    tx: optax.GradientTransformation,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    microbatches: int = 1,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    max_skipped: int = 0,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Returns the step that trains `student` towards `teacher` on a batch.

    Averages are over the whole global batch. The numbers of microbatches, devices and hosts therefore change only
    rounding. A batch without a counted token gives loss 0 and gradient 0.

    A step whose loss or gradient is not finite changes neither the parameters nor the states of optimiser and
    schedules. After more than `max_skipped` such steps in a row, the state no longer changes. Code that reads the
    metrics later then finds the state that produced them.

    Args:
      student: a model with `hidden(params, tokens, mask)` and `stored_head(params)`.
      teacher: a `teachers.Teacher`, a model with the same methods as the student, or None if no term needs a teacher.
      terms: the terms from `objectives.make_terms`.
      tx: the optimiser, including gradient clipping.
      vocab_size: the number of token ids in use; the padding of the heads beyond these ids gets no mass
        in either model.
      temperature: the divisor of both models' logits.
      microbatches: the number of parts of a batch's rows that are processed one after another.
      chunk: the number of tokens whose logits are held at a time, as in `token_sum`.
      mesh: the mesh that the state and the batch are on; None for one device.
      max_skipped: the largest number of consecutive steps that may be skipped because they are not finite.

    Returns:
      (state, teacher_params, batch) -> (state, metrics), to be jitted with the state donated. The batch contains:

      - tokens, targets: [B, L] int32.
      - mask: [B, L] bool, or the int32 segments of packed rows.
      - loss_mask: [B, L] bool.
      - origin, optional: [B], the index into `objectives.ORIGINS` of each row's text. Without origin every row is from
        the data.
      - log_probs, optional: [B, L], the log-probabilities of the targets under the student that drew the targets.
      - names that begin with teacher_: the arrays of a cached teacher.
    """
    teacher = for_terms(teacher, terms)

    def both(token_loss: Any, params: Any, teacher_params: Any, part: Batch, coefficient: Array, *extras: Array) -> Any:
        return compare(
            token_loss, student, params, teacher, teacher_params, part, coefficient, *extras,
            vocab_size=vocab_size, temperature=temperature, chunk=chunk, mesh=mesh,
        )  # fmt: skip

    def sums(params: Any, teacher_params: Any, part: Any) -> tuple[Array, Array]:
        coefficient, leaves, structure = part["coefficients"], *jax.tree.flatten(part["extras"])

        def token_loss(log_p: Any, seen: Array, log_q: Array, target: Array, *leaves: Array) -> Array:
            extras = zip(terms, jax.tree.unflatten(structure, leaves), strict=True)
            values = [t.loss(log_p, seen if t.needs_teacher else log_q, target, *of_t) for t, of_t in extras]
            return jnp.stack(values, axis=-1)

        total, values = both(token_loss, params, teacher_params, part, coefficient, part["targets"], *leaves)
        counted = (coefficient != 0).sum(axis=(0, 1))
        return total, jnp.stack([values.sum(axis=(0, 1)), counted.astype(values.dtype)])

    def target_scores(params: Any, teacher_params: Any, batch: Batch) -> tuple[Array, Array]:
        """Returns log p and log q of every counted target.

        The scores need a separate pass, because some weights depend on whole rows.
        """
        of_targets = lambda log_p, seen, log_q, target: (
            -jnp.stack([cross_entropy(log_p, target), cross_entropy(log_q, target)], axis=-1)
        )

        def part_scores(part: Batch) -> Array:
            counted = jnp.repeat(part["loss_mask"][..., None].astype(jnp.float32), 2, axis=-1)
            return both(of_targets, params, teacher_params, part, counted, part["targets"])[1]

        parts = {name: batch[name] for name in ("tokens", "targets", "mask", "loss_mask")} | teacher_arrays(batch)
        if microbatches == 1:
            values = part_scores(parts)
        else:
            values = _join_rows(jax.lax.map(part_scores, _split_rows(parts, microbatches)))
        return values[..., 0], values[..., 1]

    def term_scores(params: Any, teacher_params: Any, batch: Batch, counted: list[Array]) -> list[Scores | None]:
        """Returns the scores of the tokens that each term counts, and None for a term that needs no scores."""
        scored = [mask for term, mask in zip(terms, counted, strict=True) if term.needs_scores]
        if not scored:
            return [None for _ in terms]
        log_p, log_q = target_scores(params, teacher_params, batch | {"loss_mask": jnp.stack(scored).any(axis=0)})
        drawn = log_q
        if "origin" in batch:
            by_student = batch["origin"] == ORIGINS.index("student")
            drawn = jnp.where(by_student[:, None], batch["log_probs"], log_q)
        of = lambda values, mask: jnp.where(mask, values, 0)
        return [
            Scores(of(log_p, mask), of(log_q, mask), of(drawn, mask), mask) if term.needs_scores else None
            for term, mask in zip(terms, counted, strict=True)
        ]

    def train_step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        shape, counted = batch["targets"].shape, [_counted(term, batch) for term in terms]
        scores = term_scores(state.params, teacher_params, batch, counted)
        means = [{} if its_scores is None else row_means(its_scores) for its_scores in scores]
        signals = [t.signals(s) if t.signals and s else () for t, s in zip(terms, scores, strict=True)]
        now = [
            [
                schedule(its_state, step=state.step, **of_rows)
                for schedule, its_state in zip(t.schedules, s, strict=True)
            ]
            for t, s, of_rows in zip(terms, state.schedules, means, strict=True)
        ]
        now = _as_real(now, state.params)
        weights, factors, numbers = [v[0] for v in now], [v[1] for v in now], [v[2:] for v in now]
        segments = None if batch["mask"].dtype == bool else batch["mask"]
        averages = [token_coefficients(t.average, mask, segments) for t, mask in zip(terms, counted, strict=True)]
        averages = _as_real(averages, state.params)
        coefficients = jnp.stack([f * a for f, a in zip(factors, averages, strict=True)], axis=-1)
        extras = tuple(
            (
                jnp.broadcast_to(weight[..., None] if weight.ndim else weight, shape),
                *(jnp.broadcast_to(number, shape) for number in its_numbers),
                *its_signals,
            )
            for weight, its_numbers, its_signals in zip(weights, numbers, signals, strict=True)
        )
        parts: dict[str, Any] = {name: batch[name] for name in ("tokens", "targets", "mask")}
        parts |= {"coefficients": coefficients, "extras": extras} | teacher_arrays(batch)

        def differentiate(part: Any) -> tuple[tuple[Array, Array], Any]:
            return jax.value_and_grad(sums, has_aux=True)(state.params, teacher_params, part)

        def accumulate(carry: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, differentiate(part)), None

        if microbatches == 1:
            (loss, per_term), gradient = differentiate(parts)
        else:
            split = _split_rows(parts, microbatches)
            shapes = jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], split))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            ((loss, per_term), gradient), _ = jax.lax.scan(accumulate, zero, split)

        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        schedules = tuple(
            tuple(
                _follow(s, old, state.step, per_term[:, i], means[i])
                for s, old in zip(t.schedules, states, strict=True)
            )
            for i, (t, states) in enumerate(zip(terms, state.schedules, strict=True))
        )
        one, norm = jnp.ones((), jnp.float32), optax.tree.norm(gradient)
        metrics = {"loss": (loss, one), "gradient_norm": (norm, one)}
        for i, term in enumerate(terms):
            metrics[f"{term.name}/loss"] = (per_term[0, i], per_term[1, i])
            its_rows = counted[i].any(axis=1).astype(jnp.float32)
            metrics[f"{term.name}/weight"] = ((weights[i] * its_rows).sum(), its_rows.sum())
            metrics[f"{term.name}/coefficient"] = (jnp.asarray(factors[i]), one)
        metrics["tokens"] = ((batch["mask"] != 0).sum(dtype=jnp.float32), one)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        skipped = jnp.where(finite & (state.skipped <= max_skipped), 0, state.skipped + ~finite)
        metrics["skipped"] = (skipped, one)
        stays = skipped > max_skipped
        new = dataclasses.replace(state, params=params, opt_state=opt_state, schedules=schedules)
        new = _where(finite & ~stays, new, state)
        return dataclasses.replace(new, step=state.step + ~stays, skipped=skipped), metrics

    return train_step


def _as_real(tree: Any, params: Any) -> Any:
    """Casts the floating-point numbers of a tree to float32, or to float64 if a parameter is float64.

    JAX's default type is never used. With JAX_ENABLE_X64=1 the default is float64, and the numbers of a float32 model
    must not depend on this setting.
    """
    floats = [leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    real = jnp.result_type(jnp.float32, *floats)
    return jax.tree.map(lambda x: jnp.asarray(x, real) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree)


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _counted(term: Term, batch: Batch) -> Array:
    if "origin" not in batch:  # without origin, every row is from a dataset
        return batch["loss_mask"] & (term.rows in ("all", "data"))
    origin = batch["origin"]
    of_term = origin == ORIGINS.index(term.rows) if term.rows != "all" else origin != ORIGINS.index("text")
    return batch["loss_mask"] & of_term[:, None]


def _follow(schedule: Any, state: Any, step: Array, term: Array, means: dict[str, Array]) -> Any:
    """Returns a schedule's next state, from the sum and the count of the term's values.

    With a count of 0 the state does not change.
    """
    value, count = term
    new = schedule.update(state, step=step, loss=value / jnp.maximum(count, 1), **means)
    return _where(count > 0, jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), new, state), state)


def _split_rows(parts: Any, count: int) -> Any:
    """Reshapes [B, ...] to [count, B / count, ...]. Row i goes to part i mod count, so no row leaves its device."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), parts)


def _join_rows(parts: Any) -> Any:
    """Reverses `_split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
