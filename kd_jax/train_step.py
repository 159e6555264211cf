"""One step of distillation as a pure function: (state, teacher_params, batch) -> (state, metrics)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from kd_jax.head_loss import token_sum
from kd_jax.objectives import Term, token_coefficients

Batch = dict[str, Array]
# name -> (sum, count): averages are taken by whoever has all the sums.
Metrics = dict[str, tuple[Array, Array]]


@struct.dataclass
class TrainState:
    """All that a run carries from step to step, and all that its checkpoint holds beside the data's position.

    Attributes:
      step: the number of updates made.
      params: the student's.
      opt_state: the optimiser's.
      schedules: for each term, the states of its weight's and of its coefficient's schedule.
      key: the source of all randomness: step i uses fold_in(key, i).
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    schedules: tuple[tuple[Any, Any], ...]
    key: Array


def init_state(params: Any, tx: optax.GradientTransformation, terms: Sequence[Term], key: Array) -> TrainState:
    """The state before the first step."""
    schedules = tuple((term.weight.init(), term.coefficient.init()) for term in terms)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), schedules, key)


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
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """The step that trains `student` towards `teacher` on a batch.

    Averages are over the whole global batch, so that the number of microbatches, of devices and of hosts changes
    nothing but rounding. A batch with nothing to count gives loss 0 and gradient 0.

    Args:
      student: with `hidden(params, tokens, mask)` and `head(params)`.
      teacher: the same, with parameters of its own; None if no term needs one.
      terms: as from `objectives.make_terms`.
      tx: the optimiser, clipping included.
      vocab_size: ids that have a meaning; the heads' padding beyond it gets no mass in either.
      temperature: divides both logits.
      microbatches: parts that a batch's rows are worked through in, one after another.
      chunk: positions whose logits are held at a time; None chooses.

    Returns:
      (state, teacher_params, batch) -> (state, metrics). batch: tokens, targets [B, L] int32; mask, loss_mask [B, L]
      bool; optionally origin [B], the index into ('data', 'teacher', 'student') of each row's text. Jit it with the
      state donated.
    """
    needs_teacher = any(term.needs_teacher for term in terms)
    if needs_teacher and teacher is None:
        names = ", ".join(term.name for term in terms if term.needs_teacher)
        raise ValueError(f"the terms {names} compare with a teacher, but teacher.path is empty; name its folder.")

    def token_loss(log_p: Array | None, log_q: Array, target: Array, *weights: Array) -> Array:
        losses = [term.loss(log_p, log_q, target, weight) for term, weight in zip(terms, weights, strict=True)]
        return jnp.stack(losses, axis=-1)

    def sums(params: Any, teacher_params: Any, part: Batch, weights: Array) -> tuple[Array, Array]:
        hidden = student.hidden(params, part["tokens"], part["mask"]) / temperature
        teacher_hidden = teacher_head = None
        if needs_teacher:
            teacher_hidden = teacher.hidden(teacher_params, part["tokens"], part["mask"]) / temperature
            teacher_head = _real_ids(teacher.head(teacher_params), vocab_size)
        head = _real_ids(student.head(params), vocab_size)
        per_token = [jnp.broadcast_to(weight, part["targets"].shape) for weight in weights]
        total, values = token_sum(
            token_loss, hidden, head, teacher_hidden, teacher_head, part["coefficients"], part["targets"], *per_token,
            chunk=chunk,
        )  # fmt: skip
        counted = (part["coefficients"] != 0).sum(axis=(0, 1))
        return total, jnp.stack([values.sum(axis=(0, 1)), counted.astype(values.dtype)])

    def train_step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        weights = jnp.stack([t.weight(s, step=state.step) for t, (s, _) in zip(terms, state.schedules, strict=True)])
        factors = [t.coefficient(s, step=state.step) for t, (_, s) in zip(terms, state.schedules, strict=True)]
        averages = [token_coefficients(t.average, _counted(t, batch)) for t in terms]
        coefficients = jnp.stack([f * a for f, a in zip(factors, averages, strict=True)], axis=-1)
        parts = {name: batch[name] for name in ("tokens", "targets", "mask")} | {"coefficients": coefficients}

        def differentiate(part: Batch) -> tuple[tuple[Array, Array], Any]:
            return jax.value_and_grad(sums, has_aux=True)(state.params, teacher_params, part, weights)

        def accumulate(carry: Any, part: Batch) -> tuple[Any, None]:
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
        means = per_term[0] / jnp.maximum(per_term[1], 1)
        schedules = tuple(
            (
                t.weight.update(w, step=state.step, loss=means[i]),
                t.coefficient.update(c, step=state.step, loss=means[i]),
            )
            for i, (t, (w, c)) in enumerate(zip(terms, state.schedules, strict=True))
        )
        one = jnp.ones(())
        metrics = {"loss": (loss, one), "gradient_norm": (optax.tree.norm(gradient), one)}
        for i, term in enumerate(terms):
            metrics[f"{term.name}/loss"] = (per_term[0, i], per_term[1, i])
            metrics[f"{term.name}/weight"] = (weights[i], one)
            metrics[f"{term.name}/coefficient"] = (jnp.asarray(factors[i]), one)
        metrics["tokens"] = (batch["mask"].sum(dtype=jnp.float32), one)
        return TrainState(state.step + 1, params, opt_state, schedules, state.key), metrics

    return train_step


def _counted(term: Term, batch: Batch) -> Array:
    if term.rows == "all" or "origin" not in batch:
        return batch["loss_mask"]
    wanted = ("data", "teacher", "student").index(term.rows)
    return batch["loss_mask"] & (batch["origin"] == wanted)[:, None]


def _split_rows(parts: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...], row i to part i mod count, so that no row leaves its device."""
    return {name: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for name, x in parts.items()}


def _real_ids(head: Float[Array, "D V"], vocab_size: int) -> Float[Array, "D v"]:
    return head if head.shape[-1] == vocab_size else head[:, :vocab_size]
