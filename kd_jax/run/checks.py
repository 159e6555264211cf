"""Checks the terms and the sampling of a config against the source of the rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import resolve
from kd_jax.objectives import Term
from kd_jax.policy_gradient import Scores
from kd_jax.prefixes import Source
from kd_jax.settings import Settings, name_of

# largest gradient of a term's loss times its coefficient; smaller ones vanish in an optimiser's epsilon
LEAST_GRADIENT = 1e-12


def check_term(config: Settings, source: Source, term: Term) -> None:
    """Checks that the source gives rows that the term counts, sampled as the term needs them."""
    sampling, given = config.sampling, (*source.origins, *(("text",) if config.text.name else ()))
    if term.rows not in ("all", *given):
        raise ValueError(
            f"objective.terms.{term.name}.rows={term.rows!r} counts no row: prefixes.name={name_of(config.prefixes)!r} gives "
            f"rows of {', '.join(source.origins)}, and text.name={config.text.name!r}."
        )
    check_authors(config, source, term)
    weights = over_steps(term.weight, config.steps)
    if weights is not None and not -1e-6 <= weights.min() <= weights.max() <= 1 + 1e-6:
        raise ValueError(
            f"objective.terms.{term.name}.weight goes from {weights.min():g} to {weights.max():g} in {config.steps} steps; it "
            f"has to stay between 0 and 1."
        )
    check_gradient(config, term)
    if term.signals is None:
        return
    if term.rows != "student" and (term.rows != "all" or source.origins != ("student",)):
        raise ValueError(f"objective.terms.{term.name} is about tokens that the student drew; give it rows='student'.")
    if sampling.temperature != config.objective.temperature:
        raise ValueError(
            f"sampling.temperature={sampling.temperature} is not objective.temperature={config.objective.temperature}, at "
            f"which objective.terms.{term.name} weighs what was drawn."
        )
    if sampling.top_p < 1 or sampling.top_k > 0:
        raise ValueError(
            f"objective.terms.{term.name} weighs what was drawn by its probability under the whole distribution, but "
            f"sampling.top_p={sampling.top_p} and sampling.top_k={sampling.top_k} draw from a part of it; set 1.0 and 0."
        )


def over_steps(schedule: Any, steps: int) -> np.ndarray | None:
    """Returns the values of a schedule in each step of a run; None if the schedule follows the losses."""
    if schedule.init() != ():
        return None
    return np.asarray(jax.vmap(lambda step: schedule((), step=step))(jnp.arange(steps)))


def check_authors(config: Settings, source: Source, term: Term) -> None:
    """Checks that a mixture with a scheduled share gives rows of the author that a term counts."""
    fraction = getattr(source, "fraction", None)
    shares = over_steps(fraction, config.steps) if hasattr(fraction, "init") else None
    unused = {"student": 0.0, "data": 1.0}.get(term.rows)
    if shares is not None and unused is not None and np.all(shares == unused):
        raise ValueError(
            f"objective.terms.{term.name}.rows={term.rows!r} counts no row: prefixes.fraction is {unused:g} for the whole run."
        )


def check_gradient(config: Settings, term: Term) -> None:
    """Checks that the loss of a term depends on the student in some step of the run.

    Raises:
      ValueError: the term is constant; the message names the setting that causes this, if known.
    """
    name, spec, steps = f"objective.terms.{term.name}", config.objective.terms[term.name], config.steps
    coefficients, weights = over_steps(term.coefficient, steps), over_steps(term.weight, steps)
    if coefficients is not None and not np.all(np.isfinite(coefficients)):
        raise ValueError(f"{name}.coefficient is not finite in step {int(np.argmin(np.isfinite(coefficients)))}.")
    if coefficients is not None and not np.any(coefficients):
        raise ValueError(
            f"{name}.coefficient is 0 for the whole run of {steps} steps, so that the term has no effect. Give it another "
            f"coefficient, or take the term out of objective.terms."
        )
    pair = tuple(spec["pair"])
    if spec["kind"] == "divergence" and "assistant" in pair and weights is not None:
        end, other = (1, "teacher") if "teacher" in pair else (0, "student")
        if np.all(weights == end):
            raise ValueError(
                f"{name}.weight is {end} for the whole run: the assistant is then the {other} itself, and pair={pair} compares the "
                f"{other} with itself, so that the loss is 0. Choose a weight that is {'below 1' if end else 'above 0'}, or "
                f"pair=('teacher', 'student'), and assistant.name='none' and weight=0.0 with it."
            )
    if not term.needs_teacher:  # the cross-entropy always has a gradient
        return
    largest = 1.0 if coefficients is None else float(np.abs(coefficients).max())
    tried = (
        [0.5] if weights is None else sorted({float(weights.min()), float(np.median(weights)), float(weights.max())})
    )
    gradient = _make_gradient(term, config)
    if largest * max(float(gradient(weight)) for weight in tried) < LEAST_GRADIENT:
        what = (
            f"policy={dict(spec['policy'])}"
            if spec["kind"] == "policy_gradient"
            else f"divergence={spec['divergence']}, pair={pair}"
        )
        also = (
            f" and sampling.max_new_tokens={config.sampling.max_new_tokens}"
            if spec["kind"] == "policy_gradient"
            else ""
        )
        raise ValueError(
            f"{name} does not depend on the student: between distributions that differ its gradient is 0, or below "
            f"{LEAST_GRADIENT:g}. It has {' '.join(what.split())}{also}, at objective.temperature={config.objective.temperature}."
        )


def _make_gradient(term: Term, config: Settings) -> Callable[[float], jax.Array]:
    """Returns weight -> the largest entry of the gradient of a term's loss with respect to a student's logits.

    The teacher's and the student's distributions differ. The function is one compiled program: its operations, compiled one by
    one, would take several times as long.
    """
    rows, length, vocabulary = 2, 4, 8
    logits = np.random.default_rng(0).normal(scale=2.0, size=(2, rows, length, vocabulary)).astype(np.float32)
    target, temperature = logits[0].argmin(-1), config.objective.temperature

    def gradient(weight: jax.Array) -> jax.Array:
        teacher, student = jnp.asarray(logits)
        counted = jnp.broadcast_to(jnp.arange(length) < config.sampling.max_new_tokens, (rows, length))
        numbers = [schedule(schedule.init(), step=jnp.asarray(0)) for schedule in term.numbers]
        log_p, log_q = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
        picked = lambda log_probs: jnp.take_along_axis(log_probs, target[..., None], -1)[..., 0]
        signals = term.signals(Scores(picked(log_p), picked(log_q), picked(log_q), counted)) if term.signals else ()

        def total(student: jax.Array) -> jax.Array:
            log_q, weights = jax.nn.log_softmax(student / temperature), jnp.full((rows, length), weight)
            return jnp.where(
                counted, term.loss(log_p, log_q, jnp.asarray(target), weights, *numbers, *signals), 0
            ).sum()

        return jnp.nan_to_num(jnp.abs(jax.grad(total)(student))).max()

    return jax.jit(gradient)


def check_learning_rate(schedule: Any, steps: int) -> None:
    """Checks that a learning rate is finite and not negative in each step, and above 0 in at least one step.

    Raises:
      ValueError: the learning rate violates one of these conditions.
    """
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(steps)))
    if np.any(wrong := ~(np.isfinite(rates) & (rates >= 0))):
        step = int(np.argmax(wrong))
        raise ValueError(f"learning_rate is {rates[step]:g} in step {step}; it has to be finite and not negative.")
    if not np.any(rates):
        raise ValueError(
            f"learning_rate is 0 for the whole run of {steps} steps, so that nothing is trained; raise it."
        )


def check_sampling(config: Settings, source: Source) -> None:
    """Checks that the authors of the source can answer the dataset's prompts."""
    name, options, sampling = name_of(config.prefixes), config.data, config.sampling
    if options.name == "text" or (source.authors and (options.packing != "none" or options.loss_on != "response")):
        raise ValueError(
            f"prefixes.name={name!r} answers prompts: it needs a dataset with prompts (data.name={options.name!r}), "
            f"data.packing='none' (it is {options.packing!r}) and data.loss_on='response' (it is {options.loss_on!r})."
        )
    check_room(config)
    if not config.teacher.path and "teacher" in source.origins:
        raise ValueError(f"prefixes.name={name!r} has the teacher write, but teacher.path is empty; name its folder.")
    for what, number in (
        ("sampling.rollouts_per_prompt", sampling.rollouts_per_prompt),
        ("authors", len(source.authors)),
    ):
        if options.batch_size % max(1, number):
            raise ValueError(f"data.batch_size={options.batch_size} does not divide into {what}={number}.")
    if sampling.rollouts_per_prompt > 1 and sampling.temperature == 0:
        raise ValueError(
            f"sampling.rollouts_per_prompt={sampling.rollouts_per_prompt} at sampling.temperature=0 are all the same."
        )
    resolve.check_number("sampling.top_p", sampling.top_p, 1e-6, 1.0)
    share = resolve.check_fraction("sampling.teacher_share", sampling.teacher_share)
    if share and not config.teacher.path:
        raise ValueError(f"sampling.teacher_share={share}, but teacher.path is empty; name its folder.")
    if share and (share == 1 or sampling.temperature == 0):
        raise ValueError(
            f"sampling.teacher_share={share} needs a student that draws too: a share below 1 and a sampling.temperature above "
            f"0 (it is {sampling.temperature})."
        )


def check_room(config: Settings) -> None:
    """Checks that the longest prompt and the longest response fit together into a row."""
    options, new = config.data, config.sampling.max_new_tokens
    if options.max_prompt_length + new > options.max_length + 1:
        raise ValueError(
            f"data.max_prompt_length={options.max_prompt_length} and sampling.max_new_tokens={new} do not fit into "
            f"data.max_length={options.max_length} and one; lower one of them."
        )


def check_mesh(config: Settings, mesh: jax.sharding.Mesh) -> None:
    """Checks that the mesh can divide the rows that are processed at a time."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    sizes = {"data.batch_size": config.data.batch_size, "text.batch_size": config.text.batch_size}
    rows = {name: size // config.microbatches for name, size in sizes.items()}
    sizes["data.eval_batch_size"] = rows["data.eval_batch_size"] = config.data.eval_batch_size
    if not config.text.name:
        del rows["text.batch_size"]
    for name, count in rows.items():
        if count % ways:
            raise ValueError(
                f"{name}={sizes[name]} leaves {count} rows at a time (microbatches={config.microbatches}), "
                f"which the mesh cannot divide over data x fsdp = {ways} devices; choose a multiple."
            )
