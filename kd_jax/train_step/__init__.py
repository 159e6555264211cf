"""One step of distillation as a pure function: (state, teacher_params, batch) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from kd_jax.models import Part
from kd_jax.objectives import Term
from kd_jax.objectives.prepared import Metrics, PreparedTerm, States, as_real, counted_tokens, prepare, where
from kd_jax.objectives.terms import count_apart, counted_gradient, evaluate_score
from kd_jax.teachers import Outputs, Student, Teacher, for_terms, teacher_arrays
from kd_jax.teachers.compare import compare_outputs, frozen_outputs
from kd_jax.teachers.online import HiddenModel
from kd_jax.train_step.state import TrainState
from kd_jax.train_step.state import init_state as init_state

Batch = dict[str, Array]


def make_train_step(
    student: HiddenModel,
    teacher: Teacher | HiddenModel | Mapping[str, Teacher | HiddenModel] | None,
    terms: Sequence[Term],
    tx: optax.GradientTransformation,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    microbatches: int = 1,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    max_skipped: int = 0,
    followers: tuple[str, ...] = (),
    part: Part | None = None,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]:
    """Returns the step that trains `student` towards `teacher` on a batch.

    Averages are over the whole global batch. The numbers of microbatches, devices and hosts therefore change only
    rounding. A batch without a counted token gives loss 0 and gradient 0.

    A step whose loss or gradient is not finite changes neither the parameters nor the states of optimiser and
    schedules. After more than `max_skipped` non-finite steps in a row, the state no longer changes. The caller reads
    the metrics of a step some steps later, and then still has the state from before the step that went wrong.

    Args:
      student: a model with `hidden(params, tokens, mask)` and `stored_head(params)`.
      teacher: a `teachers.Teacher`, a model with the same methods as the student, or None if no term needs a teacher. Or
        a mapping with all frozen models by name, the teacher as "teacher"; `teacher_params` then has the same names.
      terms: the terms from `objectives.make_terms`.
      tx: the optimiser, including gradient clipping.
      vocab_size: the number of token ids in use; the padding of the heads beyond these ids gets no mass
        in either model.
      temperature: the divisor of both models' logits.
      microbatches: the number of parts of a batch's rows that are processed one after another.
      chunk: the number of tokens whose logits are held at a time, as in `token_sum`.
      mesh: the mesh that the state and the batch are on; None for one device.
      max_skipped: the largest number of consecutive steps that may be skipped because they are not finite.
      followers: the names of the frozen models that follow the student. Their parameters are in the state of `tx`, which
        `optimizer.with_followers` made, and not in `teacher_params`.
      part: the trained part of the student; if not None, `teacher_params` has the frozen parameters as "student".

    Returns:
      (state, teacher_params, batch) -> (state, metrics), to be jitted with the state donated. The batch contains:

      - tokens, targets: [B, L] int32.
      - mask: [B, L] bool, or the int32 segments of packed rows.
      - loss_mask: [B, L] bool.
      - origin, optional: [B], the index into `objectives.ORIGINS` of each row's text. Without origin every row is from
        the data.
      - log_probs, optional: [B, L], the log-probabilities of the targets under the student that drew the targets.
      - names that begin with teacher_: the arrays of a cached teacher, or of a frozen model with a view.
      - where_NAME: [B, L], for a term with `where`, True for the tokens of the rows that the term counts.
      - has_view: [B, L], True for the tokens of rows with a view, if a row gate asks for it.
    """
    options: dict[str, Any] = dict(vocab_size=vocab_size, temperature=temperature, chunk=chunk, mesh=mesh)
    options["store_blocks"] = any(getattr(term.loss, "takes_logits", False) for term in terms)
    by_name = isinstance(teacher, Mapping) or part is not None
    trained = Student(student, part, mesh)
    return Step(
        trained, for_terms(teacher, terms), tuple(terms), tx, options, microbatches, max_skipped, by_name, followers
    ).train_step


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The step of `make_train_step`, with the same arguments.

    `teachers` are the frozen models by name, `options` are the options of `head_loss.token_sum`, and `by_name` is True
    if the parameters of the frozen models are given by name.
    """

    student: Student
    teachers: dict[str, Teacher]
    terms: tuple[Term, ...]
    tx: optax.GradientTransformation
    options: dict[str, Any]
    microbatches: int
    max_skipped: int
    by_name: bool
    followers: tuple[str, ...]

    def train_step(self, state: TrainState, teacher_params: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        frozen_params = dict(teacher_params) if self.by_name else {"teacher": teacher_params}
        followed = {name: state.opt_state.followers[name] for name in self.followers}
        frozen_params |= {k: self.student.complete(v, frozen_params.get("student")) for k, v in followed.items()}
        compute = self._in_microbatches if self.microbatches > 1 else self._at_once
        prepared, loss, values, gradient = compute(state, frozen_params, batch)
        updates, opt_state = self.tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        losses = [term.mean_loss(values[..., i]) for i, term in enumerate(prepared)]
        schedules = tuple(
            term.next_schedules(states, state.step, of_term)
            for term, states, of_term in zip(prepared, state.schedules, losses, strict=True)
        )
        updated = dataclasses.replace(state, params=params, opt_state=opt_state, schedules=schedules)
        one, norm = jnp.ones((), jnp.float32), optax.tree.norm(gradient)
        metrics = {"loss": (loss, one), "gradient_norm": (norm, one)}
        for i, (term, of_term) in enumerate(zip(prepared, losses, strict=True)):
            metrics |= term.metrics(of_term, values[..., len(prepared) + i] if self._has_local_rules else None)
        metrics["tokens"] = ((batch["mask"] != 0).sum(dtype=jnp.float32), one)
        updated = self._unless_skipped(state, updated, jnp.isfinite(loss) & jnp.isfinite(norm))
        return updated, metrics | {"skipped": (updated.skipped, one)}

    def _unless_skipped(self, state: TrainState, updated: TrainState, finite: Array) -> TrainState:
        """Returns `updated` with the count of skipped steps; without the update if the step is not finite."""
        # `~finite` adds 1 for a step that is not finite. Once the count exceeds the limit, it never returns to 0.
        skipped = jnp.where(finite & (state.skipped <= self.max_skipped), 0, state.skipped + ~finite)
        stopped = skipped > self.max_skipped
        chosen = where(finite & ~stopped, updated, state)
        return dataclasses.replace(chosen, step=state.step + ~stopped, skipped=skipped)

    def _at_once(
        self, state: TrainState, frozen_params: PyTree, batch: Batch
    ) -> tuple[list[PreparedTerm], Array, Array, PyTree]:
        """Returns the prepared terms, the loss, the values of `_losses`, and the gradient, from one pass of each model."""
        part = self._parts(state, batch)
        outputs, pull_back = self.student.with_gradient(state.params, frozen_params.get("student"), part)
        frozen = frozen_outputs(self.teachers, frozen_params, batch, self.options["mesh"])
        prepared = self._prepare_at_once(state, outputs, frozen, batch)
        (loss, values), gradient = self._gradient(outputs, frozen, part | _prepared_parts(prepared))
        return prepared, loss, values, pull_back(gradient)

    def _prepare_at_once(
        self, state: TrainState, outputs: Outputs, frozen: dict[str, Outputs], batch: Batch
    ) -> list[PreparedTerm]:
        """Returns the prepared terms, from the outputs of the models for the whole batch."""
        counted = [counted_tokens(term, batch) for term in self.terms]
        early = self._early_scores(
            state, outputs, frozen, self._parts(state, batch) | {"counted": jnp.stack(counted, axis=-1)}
        )
        return self._prepare(state, early, counted, batch)

    def measure(self, state: TrainState, frozen_params: PyTree, batch: Batch) -> tuple[list[PreparedTerm], Array]:
        """Returns the prepared terms and the values of `_losses` at all tokens that count, without a gradient."""
        outputs = self.student.outputs(state.params, frozen_params.get("student"), batch)
        frozen = frozen_outputs(self.teachers, frozen_params, batch, self.options["mesh"])
        prepared = self._prepare_at_once(state, outputs, frozen, batch)
        # The values of a term whose coefficient is 0 are also computed.
        ones = jnp.stack([term.counted.astype(jnp.float32) for term in prepared], axis=-1)
        part = self._parts(state, batch) | _prepared_parts(prepared) | {"coefficients": ones}
        return prepared, self._losses(outputs, frozen, part)[1]

    def _in_microbatches(
        self, state: TrainState, frozen_params: PyTree, batch: Batch
    ) -> tuple[list[PreparedTerm], Array, Array, PyTree]:
        """Returns the same as `_at_once`, from one part of the rows at a time.

        A rule over the batch needs the scores of all parts before the first gradient. The student then runs twice. The
        hidden states of the frozen models are kept, so that each of these models runs once.
        """
        counted = [counted_tokens(term, batch) for term in self.terms]
        parts, own = self._parts(state, batch), frozen_params.get("student")
        early: list[dict[str, Array]] = [{} for _ in self.terms]
        if self._has_early_scores:

            def first_pass(part: Batch) -> tuple[list[dict[str, Array]], dict[str, Array | None]]:
                frozen = frozen_outputs(self.teachers, frozen_params, part, self.options["mesh"])
                scores = self._early_scores(state, self.student.outputs(state.params, own, part), frozen, part)
                return scores, {name: outputs.hidden for name, outputs in frozen.items()}

            split = _split_rows(parts | {"counted": jnp.stack(counted, axis=-1)}, self.microbatches)
            early, parts["frozen_hidden"] = _join_rows(jax.lax.map(first_pass, split))
        prepared = self._prepare(state, early, counted, batch)

        def differentiate(part: PyTree) -> tuple[Array, Array, PyTree]:
            outputs, pull_back = self.student.with_gradient(state.params, own, part)
            frozen = frozen_outputs(self.teachers, frozen_params, part, self.options["mesh"])
            # The stored hidden states replace the new ones, whose computation XLA then removes.
            stored = part.get("frozen_hidden", {})
            frozen = {name: models._replace(hidden=stored.get(name, models.hidden)) for name, models in frozen.items()}
            (loss, values), gradient = self._gradient(outputs, frozen, part)
            return loss, values, pull_back(gradient)

        def accumulate(carry: PyTree, part: PyTree) -> tuple[PyTree, Array]:
            loss, values, gradient = differentiate(part)
            return jax.tree.map(jnp.add, carry, (loss, gradient)), values

        split = _split_rows(parts | _prepared_parts(prepared), self.microbatches)
        loss, _, gradient = jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], split))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, gradient))
        (loss, gradient), values = jax.lax.scan(accumulate, zero, split)
        return prepared, loss, _join_rows(values), gradient

    @property
    def _has_early_scores(self) -> bool:
        return any(term.early_scores or term.needs_own_values_early for term in self.terms)

    @property
    def _has_local_rules(self) -> bool:
        return any(term.has_local_rule for term in self.terms)

    def _prepare(
        self, state: TrainState, early: list[dict[str, Array]], counted: list[Array], batch: Batch
    ) -> list[PreparedTerm]:
        return [
            prepare(term, states, of_term, mask, batch, state.step, state.params)
            for term, states, of_term, mask in zip(self.terms, state.schedules, early, counted, strict=True)
        ]

    def _compare(
        self, token_loss: Callable[..., Array], outputs: Outputs, frozen: dict[str, Outputs], coefficient: Array,
        *extras: Array, measured: int = 0,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Returns `compare_outputs` of a loss (logits of each term's models, target, *extras) -> values per token."""
        whole = all(teacher.is_whole for teacher in self.teachers.values())

        def loss(sides: dict[str, tuple[PyTree, Array]], student: Array, *arrays: Array) -> Array:
            aligned = {name: side for name, (side, _) in sides.items()}
            # A cache without whole distributions has its own outcomes, over which the student is compared with it.
            beside = student if whole or not sides else next(iter(sides.values()))[1]
            of_term = lambda term: aligned | {"student": beside} if term.members else {"student": student}
            return token_loss(list(map(of_term, self.terms)), *arrays)

        return compare_outputs(
            loss, outputs, self.teachers, frozen, coefficient, *extras, normalised=not whole,
            measured=measured, **self.options,
        )  # fmt: skip

    def _gradient(
        self, outputs: Outputs, frozen: dict[str, Outputs], part: PyTree
    ) -> tuple[tuple[Array, Array], dict[str, Array]]:
        """Returns `_losses` of a part of the rows, and the gradients of `Student.differentiated`."""
        own = lambda arrays: outputs._replace(hidden=arrays["hidden"], head=arrays.get("head", outputs.head))
        of_arrays = lambda arrays: self._losses(own(arrays), frozen, part)
        return jax.value_and_grad(of_arrays, has_aux=True)(self.student.differentiated(outputs))

    def _losses(self, outputs: Outputs, frozen: dict[str, Outputs], part: PyTree) -> tuple[Array, Array]:
        """Returns (loss, values) of a part of the rows.

        The values [B, L, K] are the losses of the K terms at each token. If a term has a local rule, the weights of the
        K terms follow. `token_sum`, which `_compare` calls, multiplies each loss by the token's coefficient.
        """
        counted = part["coefficients"] != 0 if count_apart(self.terms) else None
        leaves, structure = jax.tree.flatten((part["arrays"], counted))

        def token_loss(logits: list[dict[str, PyTree]], target: Array, *leaves: Array) -> Array:
            arrays, counted = jax.tree.unflatten(structure, leaves)
            if counted is not None:
                student = [counted_gradient(of_term["student"], counted[..., i]) for i, of_term in enumerate(logits)]
                logits = [of_term | {"student": own} for of_term, own in zip(logits, student, strict=True)]
            pairs = [
                term.weighted_loss(of_term, target, of_arrays)
                for term, of_term, of_arrays in zip(self.terms, logits, arrays, strict=True)
            ]
            losses, weights = zip(*pairs, strict=True)
            return jnp.stack([*losses, *(weights if self._has_local_rules else ())], axis=-1)

        measured = len(self.terms) if self._has_local_rules else 0
        return self._compare(
            token_loss, outputs, frozen, part["coefficients"], part["targets"], *leaves, measured=measured
        )

    def _early_scores(
        self, state: TrainState, outputs: Outputs, frozen: dict[str, Outputs], part: Batch
    ) -> list[dict[str, Array]]:
        """Returns the values of each term's early scores at the tokens that the term counts, and 0 elsewhere.

        The scores need a separate sweep over the hidden states, because some weights depend on whole rows or on the
        whole batch. The sweep runs no model.
        """
        columns = [(i, *item) for i, term in enumerate(self.terms) for item in term.early_scores.items()]
        own = [(i, "divergence") for i, term in enumerate(self.terms) if term.needs_own_values_early]
        if not columns and not own:
            return [{} for _ in self.terms]
        arrays = [
            self._plain_arrays(term, states, state) for term, states in zip(self.terms, state.schedules, strict=True)
        ]

        def token_scores(logits: list[dict[str, PyTree]], target: Array) -> Array:
            scores = [evaluate_score(found, logits[i], member, target) for i, _, (member, found) in columns]
            scores += [self.terms[i].loss(logits[i], target, arrays[i]) for i, _ in own]
            return jnp.stack([column.astype(jnp.result_type(column, jnp.float32)) for column in scores], axis=-1)

        labels = [(i, label) for i, label, *_ in columns] + own
        mask = jnp.stack([part["counted"][..., i] for i, _ in labels], axis=-1).astype(jnp.float32)
        hidden, head = jax.lax.stop_gradient((outputs.hidden, outputs.head))
        outputs = outputs._replace(hidden=hidden, head=head)
        values = self._compare(token_scores, outputs, frozen, mask, part["targets"])[1]
        early: list[dict[str, Array]] = [{} for _ in self.terms]
        for column, (i, label) in enumerate(labels):
            early[i][label] = values[..., column]
        for of_term, term in zip(early, self.terms, strict=True):
            of_term |= term.scores_of_spans(frozen)
        return early

    def _parts(self, state: TrainState, batch: Batch) -> dict[str, PyTree]:
        """Returns the arrays of a batch that the models and the loss read, and the keys of the rows for dropout."""
        arrays = {name: batch[name] for name in ("tokens", "targets", "mask")} | teacher_arrays(batch)
        return arrays | self.student.row_keys(state.key, state.step, len(batch["tokens"]))

    def _plain_arrays(self, term: Term, states: States, state: TrainState) -> dict[str, Array]:
        """Returns the numbers of a term's schedules that read no scores, for a rule that reads the term's own loss."""
        if not term.needs_own_values_early:
            return {}
        values = [schedule(of, step=state.step) for schedule, of in zip(term.schedules, states, strict=True)]
        weight, _, *numbers = as_real(values, state.params)
        return {"weight": weight} | dict(zip(term.numbers, numbers, strict=True))


def _prepared_parts(prepared: Sequence[PreparedTerm]) -> dict[str, PyTree]:
    """Returns the coefficients [B, L, K] and the arrays of the prepared terms."""
    coefficients = jnp.stack([term.token_coefficient for term in prepared], axis=-1)
    return {"coefficients": coefficients, "arrays": tuple(term.arrays for term in prepared)}


def _split_rows(parts: PyTree, count: int) -> PyTree:
    """Reshapes [B, ...] to [count, B / count, ...]. Row i goes to part i mod count, so no row leaves its device."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), parts)


def _join_rows(parts: PyTree) -> PyTree:
    """Reverses `_split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
