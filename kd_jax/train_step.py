"""One step of distillation as a pure function: (state, teacher_params, batch) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int, PyTree
from optax.schedules import StatefulSchedule

from kd_jax.objectives import ORIGINS, Term, cross_entropy, row_means, token_coefficients
from kd_jax.policy_gradient import Scores
from kd_jax.teachers import Teacher, compare, for_terms, teacher_arrays
from kd_jax.teachers.online import HiddenModel

Batch = dict[str, Array]
# name -> (sum, count). The average is computed by the code that has all the sums.
Metrics = dict[str, tuple[Array, Array]]
States = tuple[PyTree, ...]  # the states of the schedules of a term


@struct.dataclass
class TrainState:
    """The state that a run carries from step to step. A checkpoint holds this state and the position in the data.

    Attributes:
      step: the number of steps made, skipped steps included.
      params: the student's parameters.
      opt_state: the optimiser's state.
      schedules: the states of the schedules of each term.
      key: a random key for a step function that you write; use `jax.random.fold_in(key, step)`. The step of
        `make_train_step` returns the key unchanged.
      skipped: the number of consecutive steps, up to the last one, whose loss or gradient was not finite.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    schedules: tuple[States, ...]
    key: Array
    skipped: Int[Array, ""]


def init_state(params: PyTree, tx: optax.GradientTransformation, terms: Sequence[Term], key: Array) -> TrainState:
    """Returns the state before the first step. `key` becomes `TrainState.key`."""
    schedules = _as_real(tuple(tuple(schedule.init() for schedule in term.schedules) for term in terms), params)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), schedules, key, jnp.zeros((), jnp.int32))


def make_train_step(
    student: HiddenModel,
    teacher: Teacher | HiddenModel | None,
    terms: Sequence[Term],
    tx: optax.GradientTransformation,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    microbatches: int = 1,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    max_skipped: int = 0,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]:
    """Returns the step that trains `student` towards `teacher` on a batch.

    Averages are over the whole global batch. The numbers of microbatches, devices and hosts therefore change only
    rounding. A batch without a counted token gives loss 0 and gradient 0.

    A step whose loss or gradient is not finite changes neither the parameters nor the states of optimiser and
    schedules. After more than `max_skipped` non-finite steps in a row, the state no longer changes. The caller reads
    the metrics of a step some steps later, and then still has the state from before the step that went wrong.

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
    compare_both = partial(compare, vocab_size=vocab_size, temperature=temperature, chunk=chunk, mesh=mesh)
    teacher = for_terms(teacher, terms)
    return _Step(student, teacher, tuple(terms), tx, compare_both, microbatches, max_skipped).train_step


@dataclasses.dataclass(frozen=True)
class PreparedTerm:
    """A term with the values that a step computes before the models' distributions are compared.

    Attributes:
      term: the term.
      counted: True where a token counts in the term, [B, L].
      means: the means over each row that the term's schedules read, by name.
      weight: the current weight of the assistant, a scalar or [B].
      term_coefficient: the current coefficient of the term, a scalar.
      token_coefficient: the factor of each token's loss, [B, L]: `term_coefficient` times the token's share of the
        average.
      extras: the arrays [B, L] that follow the target in the arguments of `Term.loss`: weight, assistant_numbers
        and signals.
    """

    term: Term
    counted: Array
    means: dict[str, Array]
    weight: Array
    term_coefficient: Array
    token_coefficient: Array
    extras: tuple[Array, ...]

    def next_schedules(self, states: States, step: Array, loss: Array) -> States:
        """Returns the next states of the term's schedules, from the sum and the count of the term's values."""
        return tuple(
            _next_state(schedule, state, step, loss, self.means)
            for schedule, state in zip(self.term.schedules, states, strict=True)
        )

    def metrics(self, loss: Array) -> Metrics:
        """Returns the metrics of the term, from the sum and the count of the term's values."""
        rows = self.counted.any(axis=1).astype(jnp.float32)
        return {
            f"{self.term.name}/loss": (loss[0], loss[1]),
            f"{self.term.name}/weight": ((self.weight * rows).sum(), rows.sum()),
            f"{self.term.name}/coefficient": (jnp.asarray(self.term_coefficient), jnp.ones((), jnp.float32)),
        }


def prepare(
    term: Term, states: States, scores: Scores | None, counted: Array, batch: Batch, state: TrainState
) -> PreparedTerm:
    """Evaluates a term's schedules, and makes the coefficients and the further arguments of the term's loss.

    Args:
      term: the term.
      states: the states of the term's schedules.
      scores: the scores of the counted tokens; None if the term needs none.
      counted: True where a token counts in the term, [B, L].
      batch: the batch.
      state: the state before the step.
    """
    means = {} if scores is None else row_means(scores)
    signals = term.signals(scores) if term.signals and scores else ()
    values = [
        schedule(schedule_state, step=state.step, **means)
        for schedule, schedule_state in zip(term.schedules, states, strict=True)
    ]
    weight, term_coefficient, *assistant_numbers = _as_real(values, state.params)
    segments = None if batch["mask"].dtype == bool else batch["mask"]
    token_share = _as_real(token_coefficients(term.average, counted, segments), state.params)
    per_token = lambda number: jnp.broadcast_to(number, counted.shape)
    extras = (per_token(weight[..., None] if weight.ndim else weight), *map(per_token, assistant_numbers), *signals)
    return PreparedTerm(term, counted, means, weight, term_coefficient, term_coefficient * token_share, extras)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """The step of `make_train_step`, with the same arguments. `compare` is `teachers.compare` with the options set."""

    student: HiddenModel
    teacher: Teacher
    terms: tuple[Term, ...]
    tx: optax.GradientTransformation
    compare: Callable[..., tuple[Array, Array]]
    microbatches: int
    max_skipped: int

    def train_step(self, state: TrainState, teacher_params: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        counted = [_counted(term, batch) for term in self.terms]
        scores = self._term_scores(state.params, teacher_params, batch, counted)
        prepared = [
            prepare(term, states, term_scores, mask, batch, state)
            for term, states, term_scores, mask in zip(self.terms, state.schedules, scores, counted, strict=True)
        ]
        (loss, per_term), gradient = self._gradient(state.params, teacher_params, batch, prepared)
        updates, opt_state = self.tx.update(gradient, state.opt_state, state.params)
        schedules = tuple(
            term.next_schedules(states, state.step, per_term[:, i])
            for i, (term, states) in enumerate(zip(prepared, state.schedules, strict=True))
        )
        params = optax.apply_updates(state.params, updates)
        updated = dataclasses.replace(state, params=params, opt_state=opt_state, schedules=schedules)
        one, norm = jnp.ones((), jnp.float32), optax.tree.norm(gradient)
        metrics = {"loss": (loss, one), "gradient_norm": (norm, one)}
        for i, term in enumerate(prepared):
            metrics |= term.metrics(per_term[:, i])
        metrics["tokens"] = ((batch["mask"] != 0).sum(dtype=jnp.float32), one)
        updated = self._unless_skipped(state, updated, jnp.isfinite(loss) & jnp.isfinite(norm))
        return updated, metrics | {"skipped": (updated.skipped, one)}

    def _unless_skipped(self, state: TrainState, updated: TrainState, finite: Array) -> TrainState:
        """Returns `updated` with the count of skipped steps; without the update if the step is not finite."""
        # `~finite` adds 1 for a step that is not finite. Once the count exceeds the limit, it never returns to 0.
        skipped = jnp.where(finite & (state.skipped <= self.max_skipped), 0, state.skipped + ~finite)
        stopped = skipped > self.max_skipped
        chosen = _where(finite & ~stopped, updated, state)
        return dataclasses.replace(chosen, step=state.step + ~stopped, skipped=skipped)

    def _gradient(
        self, params: PyTree, teacher_params: PyTree, batch: Batch, prepared: Sequence[PreparedTerm]
    ) -> tuple[tuple[Array, Array], PyTree]:
        """Returns (loss, [sums, counts] of each term), and the gradient with respect to the student's parameters."""
        parts: dict[str, PyTree] = {name: batch[name] for name in ("tokens", "targets", "mask")}
        parts["coefficients"] = jnp.stack([term.token_coefficient for term in prepared], axis=-1)
        parts["extras"] = tuple(term.extras for term in prepared)
        parts |= teacher_arrays(batch)

        def differentiate(part: PyTree) -> tuple[tuple[Array, Array], PyTree]:
            return jax.value_and_grad(self._loss, has_aux=True)(params, teacher_params, part)

        def accumulate(carry: PyTree, part: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, carry, differentiate(part)), None

        if self.microbatches == 1:
            return differentiate(parts)
        split = _split_rows(parts, self.microbatches)
        shapes = jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], split))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(accumulate, zero, split)[0]

    def _loss(self, params: PyTree, teacher_params: PyTree, part: PyTree) -> tuple[Array, Array]:
        """Returns the loss of a part of the rows, and the sum and the count of each term's values.

        `token_sum`, which `compare` calls, multiplies the loss of each token by the token's coefficient.
        """
        coefficient, leaves, structure = part["coefficients"], *jax.tree.flatten(part["extras"])

        def token_loss(log_p: PyTree, student_side: Array, log_q: Array, target: Array, *leaves: Array) -> Array:
            values = [
                term.loss(log_p, student_side if term.needs_teacher else log_q, target, *extras)
                for term, extras in zip(self.terms, jax.tree.unflatten(structure, leaves), strict=True)
            ]
            return jnp.stack(values, axis=-1)

        total, values = self._compare(token_loss, params, teacher_params, part, coefficient, part["targets"], *leaves)
        counted = (coefficient != 0).sum(axis=(0, 1))
        return total, jnp.stack([values.sum(axis=(0, 1)), counted.astype(values.dtype)])

    def _compare(
        self, token_loss: Callable[..., Array], params: PyTree, teacher_params: PyTree, part: Batch, coefficient: Array,
        *extras: Array,
    ) -> tuple[Array, Array]:  # fmt: skip
        return self.compare(token_loss, self.student, params, self.teacher, teacher_params, part, coefficient, *extras)

    def _term_scores(
        self, params: PyTree, teacher_params: PyTree, batch: Batch, counted: Sequence[Array]
    ) -> list[Scores | None]:
        """Returns the scores of the tokens that each term counts; None for a term that needs no scores."""
        scored = [mask for term, mask in zip(self.terms, counted, strict=True) if term.needs_scores]
        if not scored:
            return [None for _ in self.terms]
        any_counted = batch | {"loss_mask": jnp.stack(scored).any(axis=0)}
        log_p, log_q = self._target_scores(params, teacher_params, any_counted)
        drawn_log_q = log_q
        if "origin" in batch:
            by_student = batch["origin"] == ORIGINS.index("student")
            drawn_log_q = jnp.where(by_student[:, None], batch["log_probs"], log_q)
        masked = lambda values, mask: jnp.where(mask, values, 0)
        return [
            Scores(masked(log_p, mask), masked(log_q, mask), masked(drawn_log_q, mask), mask)
            if term.needs_scores
            else None
            for term, mask in zip(self.terms, counted, strict=True)
        ]

    def _target_scores(self, params: PyTree, teacher_params: PyTree, batch: Batch) -> tuple[Array, Array]:
        """Returns log p and log q of every counted target.

        The scores need a separate pass, because some weights depend on whole rows.
        """
        of_targets = lambda log_p, student_side, log_q, target: (
            -jnp.stack([cross_entropy(log_p, target), cross_entropy(log_q, target)], axis=-1)
        )

        def part_scores(part: Batch) -> Array:
            counted = jnp.repeat(part["loss_mask"][..., None].astype(jnp.float32), 2, axis=-1)
            return self._compare(of_targets, params, teacher_params, part, counted, part["targets"])[1]

        parts = {name: batch[name] for name in ("tokens", "targets", "mask", "loss_mask")} | teacher_arrays(batch)
        if self.microbatches == 1:
            values = part_scores(parts)
        else:
            values = _join_rows(jax.lax.map(part_scores, _split_rows(parts, self.microbatches)))
        return values[..., 0], values[..., 1]


def _as_real(tree: PyTree, params: PyTree) -> PyTree:
    """Casts the floating-point numbers of a tree to float32, or to float64 if a parameter is float64.

    JAX's default type is never used. With JAX_ENABLE_X64=1 the default is float64, and the numbers of a float32 model
    must not depend on this setting.
    """
    floats = [leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    real = jnp.result_type(jnp.float32, *floats)
    return jax.tree.map(lambda x: jnp.asarray(x, real) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree)


def _where(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _counted(term: Term, batch: Batch) -> Array:
    if "origin" not in batch:  # without origin, every row is from a dataset
        return batch["loss_mask"] & (term.rows in ("all", "data"))
    origin = batch["origin"]
    rows = origin == ORIGINS.index(term.rows) if term.rows != "all" else origin != ORIGINS.index("text")
    return batch["loss_mask"] & rows[:, None]


def _next_state(schedule: StatefulSchedule, state: PyTree, step: Array, loss: Array, means: dict[str, Array]) -> PyTree:
    """Returns a schedule's next state, from the sum and the count of the term's values.

    With a count of 0 the state does not change.
    """
    total, count = loss
    new = schedule.update(state, step=step, loss=total / jnp.maximum(count, 1), **means)
    return _where(count > 0, jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), new, state), state)


def _split_rows(parts: PyTree, count: int) -> PyTree:
    """Reshapes [B, ...] to [count, B / count, ...]. Row i goes to part i mod count, so no row leaves its device."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), parts)


def _join_rows(parts: PyTree) -> PyTree:
    """Reverses `_split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
