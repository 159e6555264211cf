"""The weights that the rules of a run's terms give to the tokens of new text."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from kd_jax.objectives import Term
from kd_jax.run.build import Run
from kd_jax.teachers import Student, for_terms
from kd_jax.train_step import Batch, Step, init_state


def token_weights(run: Run, params: PyTree, step: int) -> Callable[[Batch], dict[str, Array]] | None:
    """Returns a function that computes the weights which a training step would give to the tokens of a batch.

    The weights do not depend on the coefficients of the terms, nor on the rows to which a term applies.

    Args:
      run: the run.
      params: the student's complete parameters.
      step: the number of the step, which decides the values of the schedules.

    Returns:
      A function from a batch of new text, as in `make_train_step`, to the weights [B, L] by the names of the terms;
      None if there is no term whose weights can be computed.
    """
    shown, _ = with_rules(run)
    if not shown:
        return None
    terms = tuple(dataclasses.replace(term, rows="all", where={}) for term in shown)
    options = dict(
        vocab_size=run.tokenizer.vocab_size, temperature=run.config.objective.temperature,
        chunk=run.config.loss.chunk or None, mesh=run.mesh,
    )  # fmt: skip
    tx, key, frozen, frozen_params = optax.identity(), jax.random.key(0), run.models.frozen, run.models.frozen_params
    if not isinstance(frozen, Mapping):
        frozen, frozen_params = {"teacher": frozen}, {"teacher": frozen_params}
    student = Student(run.models.student, None, run.mesh)
    of_terms = Step(student, for_terms(frozen, terms), terms, tx, options, 1, 0, True, ())

    @jax.jit
    def weigh(params: PyTree, frozen_params: PyTree, batch: Batch, step: Array | int) -> dict[str, Array]:
        state = dataclasses.replace(init_state(params, tx, terms, key), step=jnp.asarray(step, jnp.int32))
        prepared, values = of_terms.measure(state, frozen_params, batch)
        is_measured = values.shape[-1] > len(prepared)
        weights = {
            term.term.name: term.rule_weights(values[..., len(prepared) + i] if is_measured else None)
            for i, term in enumerate(prepared)
        }
        return {name: weight for name, weight in weights.items() if weight is not None}

    return lambda batch: weigh(params, frozen_params, batch, step)


def with_rules(run: Run) -> tuple[list[Term], list[str]]:
    """Returns the terms whose token weights can be computed, and a sentence for each other term that has a token rule."""
    shown, sentences = [], []
    for term in run.terms:
        if term.rule is None:
            continue
        if reason := _obstacle(run, term):
            sentences.append(f"The token weights of the term {term.name} are not shown, because {reason}.")
        else:
            shown.append(term)
    return shown, sentences


def _obstacle(run: Run, term: Term) -> str:
    """Returns the reason for which a term's token weights on new text cannot be computed; "" if they can."""
    frozen = {"teacher": run.models.compared_teacher, **run.models.members}
    keys = {"teacher": run.config.teacher, **run.config.members}
    for name in term.members:
        if frozen[name].on_new_text() is not frozen[name]:
            return f"the model {name} has a cache or a view, which a new text does not have"
        if keys[name].follow:
            return f"the model {name} follows the student, and its parameters are not kept"
    inputs = {name for part in (term.rule, term.gate) if part is not None for name in part.inputs}
    if "has_view" in inputs:
        return "a rule reads whether a row has a view, which a new text does not have"
    follows_training = any(schedule.init() != () for schedule in (term.weight, *term.numbers.values()))
    if "divergence" in inputs and follows_training:
        return "the rule reads a loss whose schedule follows the training"
    return ""
