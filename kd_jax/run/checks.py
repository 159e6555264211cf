"""Checks the terms and the sampling of a config against the source of the rows."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.schedules import StatefulSchedule

from kd_jax import assistants, data, resolve
from kd_jax.objectives import Term
from kd_jax.policy_gradient import Scores
from kd_jax.prefixes import Source
from kd_jax.run.view_prompts import (
    columns_read,
    is_plain_text,
    key_of_view,
    live_views,
    make_views,
    options_of_rows,
    rows_are_turns,
)
from kd_jax.schedules import first_value
from kd_jax.settings import Settings, name_of
from kd_jax.token_weights.shapes import check_numbers

# A term needs a larger gradient, times the coefficient, in some step. A smaller one vanishes in an optimiser's epsilon.
LEAST_GRADIENT = 1e-12
MOST_OUTCOMES = 1024  # a support with a larger k is not checked for its gradient


def check_term(config: Settings, source: Source, term: Term) -> None:
    """Checks a term on its own, and that the source gives rows that the term counts, sampled as the term needs them.

    Raises:
      ValueError: a setting is wrong; the message names the key.
    """
    sampling, origins = config.sampling, (*source.origins, *(("text",) if config.text.name else ()))
    if term.rows not in ("all", *origins):
        raise ValueError(
            f"objective.terms.{term.name}.rows={term.rows!r} counts no row: prefixes.name={name_of(config.prefixes)!r} gives "
            f"rows of {', '.join(source.origins)}, and text.name={config.text.name!r}."
        )
    check_authors(config, source, term)
    weights = over_steps(term.weight, config.steps)
    extrapolates = getattr(getattr(term.loss, "assistant", None), "func", None) is assistants.extrapolation
    if weights is not None and not extrapolates and not -1e-6 <= weights.min() <= weights.max() <= 1 + 1e-6:
        raise ValueError(
            f"objective.terms.{term.name}.weight goes from {weights.min():g} to {weights.max():g} in {config.steps} steps, but "
            f"a weight must stay between 0 and 1."
        )
    check_rules(config, term)
    check_gradient(config, term)
    if term.signals is None:
        return
    if term.rows != "student" and (term.rows != "all" or source.origins != ("student",)):
        raise ValueError(
            f"objective.terms.{term.name}.rows={term.rows!r}, but a policy gradient needs tokens that the student sampled; set "
            f"rows='student'."
        )
    if sampling.temperature != config.objective.temperature:
        raise ValueError(
            f"sampling.temperature={sampling.temperature} is not objective.temperature={config.objective.temperature}, at "
            f"which objective.terms.{term.name} computes the probabilities of the sampled tokens; set both to the same value."
        )
    if sampling.top_p < 1 or sampling.top_k > 0:
        raise ValueError(
            f"objective.terms.{term.name} needs samples of the whole distribution, but sampling.top_p={sampling.top_p} and "
            f"sampling.top_k={sampling.top_k} draw from a part of it; set 1.0 and 0."
        )


def check_views(config: Settings, source: Source, terms: Sequence[Term]) -> None:
    """Checks that the views of the frozen models and the terms' `where` fit the data and the source.

    Raises:
      ValueError: a view or a `where` cannot be used; the message names the key.
    """
    options, views = config.data, make_views(config)
    wheres = [f"objective.terms.{term.name}.where" for term in terms if term.where]
    keys = {name: key_of_view(name) for name in views}
    for key in (*keys.values(), *wheres):
        if options.name == "text" or options.packing == "stream":
            raise ValueError(
                f"{key} reads the columns of a row, but with data.name={options.name!r} and data.packing={options.packing!r} a row "
                f"of tokens is not a row of the dataset. Choose a dataset with prompts, and data.packing='none' or 'rows'."
            )
    read = columns_read(config)
    known = data.columns(options.name, **options_of_rows(config)) if read else ()
    for column, key in read.items():
        if column not in known:
            raise ValueError(
                f"{key} names the column {column!r}, which the rows of data.name={options.name!r} lack"
                f"{resolve.nearest(column, known)}; the columns are {', '.join(known)}."
            )
    for term in terms:
        if term.where and term.rows == "text":
            raise ValueError(
                f"objective.terms.{term.name}.where reads columns of section data, but rows='text' counts the second stream."
            )
        if term.gate is not None and "has_view" in term.gate.inputs and not live_views(config):
            raise ValueError(
                f"objective.terms.{term.name}.row_gate: has_view needs a model that runs and sees another prompt than the student; "
                f"set teacher.view and no cache, or row_gate.name='none'."
            )
    for name, view in views.items():
        if options.loss_on == "all":
            raise ValueError(
                f"{keys[name]} changes the prompt, so that the tokens of the prompt cannot be compared, but data.loss_on='all' "
                f"counts them; set data.loss_on='response'."
            )
        section, model = keys[name].removesuffix(".view"), config.teacher if name == "teacher" else config.members[name]
        if not model.path and not model.cache:
            raise ValueError(f"{keys[name]} needs a model, but {section}.path is empty; set the folder of the model.")
        if view.needs_rollouts:
            _check_rollouts(config, source, keys[name], view.of_feedback)


def _check_rollouts(config: Settings, source: Source, key: str, of_feedback: bool) -> None:
    """Checks that the student samples rows for a view over rollouts."""
    if source.authors != ("student",):
        raise ValueError(
            f"{key} shows responses that the student sampled, but prefixes.name={name_of(config.prefixes)!r} does not sample from "
            f"the student alone; set prefixes.name='student'."
        )
    if config.sampling.rollouts_per_prompt < 2 and not of_feedback:
        raise ValueError(
            f"{key} shows another response to the same prompt, but sampling.rollouts_per_prompt="
            f"{config.sampling.rollouts_per_prompt}; set at least 2."
        )


def over_steps(schedule: StatefulSchedule, steps: int) -> np.ndarray | None:
    """Returns the values of a schedule in each step of a run; None if the schedule follows the losses."""
    if schedule.init() != ():
        return None
    return np.asarray(jax.vmap(lambda step: schedule((), step=step))(jnp.arange(steps)))


def check_rules(config: Settings, term: Term) -> None:
    """Checks the least and the greatest value of each schedule of a rule, a gate or a temperature.

    Of a schedule that follows the losses, only the first value is known.

    Raises:
      ValueError: a value is out of range for its option; the message names the key and the step.
    """
    for key, part in term.token_functions.items():
        schedules = {name: term.numbers[name] for name in part.numbers}
        values = {name: over_steps(schedule, config.steps) for name, schedule in schedules.items()}
        first = {name: first_value(schedule) for name, schedule in schedules.items()}
        known = {name: array for name, array in values.items() if array is not None}
        for step in sorted({int(find(array)) for array in known.values() for find in (np.argmin, np.argmax)}):
            # Six digits, because a schedule in float32 may exceed its own bounds by its rounding error.
            numbers = first | {name: float(f"{array[step]:.6g}") for name, array in known.items()}
            try:
                check_numbers(part, numbers)
            except ValueError as error:
                raise ValueError(f"objective.terms.{term.name}.{key} in step {step}: {error}") from error


def check_authors(config: Settings, source: Source, term: Term) -> None:
    """Checks that a mixture with a scheduled fraction gives rows of the author that a term counts."""
    fraction = getattr(source, "fraction", None)
    shares = over_steps(fraction, config.steps) if isinstance(fraction, StatefulSchedule) else None
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
            f"{name}.coefficient is 0 for the whole run of {steps} steps, so that the term has no effect. Set another "
            f"coefficient, or remove the term from objective.terms."
        )
    pair = tuple(spec["pair"])
    ends = [(end, other) for end, other in enumerate(spec["between"]) if other in pair]
    if spec["kind"] == "divergence" and "assistant" in pair and not spec["weights"] and ends and weights is not None:
        end, other = ends[0]
        if np.all(weights == end):
            raise ValueError(
                f"{name}.weight is {end} for the whole run. The assistant then equals the {other}, pair={pair} compares the {other} "
                f"with itself, and the loss is 0. Set a weight {'below 1' if end else 'above 0'}; or set pair=('teacher', "
                f"'student'), assistant.name='none' and weight=0.0."
            )
    # The cross-entropy and a comparison of spans always have a gradient. A large k would need a large made-up vocabulary.
    if spec["kind"] in ("hard_labels", "spans") or _outcomes(config, term) > MOST_OUTCOMES:
        return
    largest = 1.0 if coefficients is None else float(np.abs(coefficients).max())
    some_weights = [0.5] if weights is None else sorted({float(f(weights)) for f in (np.min, np.median, np.max)})
    gradient = _make_gradient(term, config)
    if largest * max(float(gradient(weight)) for weight in some_weights) < LEAST_GRADIENT:
        keys = f"divergence={spec['divergence']}, pair={pair}"
        if spec["kind"] == "policy_gradient":
            keys = f"policy={dict(spec['policy'])} and sampling.max_new_tokens={config.sampling.max_new_tokens}"
        raise ValueError(
            f"{name} does not depend on the student: for different distributions of teacher and student the gradient is below "
            f"{LEAST_GRADIENT:g}. Change {' '.join(keys.split())}, or objective.temperature={config.objective.temperature}."
        )


def _make_gradient(term: Term, config: Settings) -> Callable[[float], jax.Array]:
    """Returns weight -> the largest entry of the gradient of a term's loss with respect to a student's logits.

    The teacher's and the student's distributions differ. The function is compiled as one program because compiling each
    operation on its own would take several times as long.
    """
    # The made-up vocabulary has more ids than the k outcomes that the term compares.
    rows, length, vocabulary = 2, 4, max(8, _outcomes(config, term) + 1)
    names = ("student", *dict.fromkeys(("teacher", *term.members)))
    made = np.random.default_rng(0).normal(scale=2.0, size=(len(names), rows, length, vocabulary)).astype(np.float32)
    target, temperature = made[1].argmin(-1), config.objective.temperature

    def gradient(weight: jax.Array) -> jax.Array:
        logits = {name: jnp.asarray(array) / temperature for name, array in zip(names, made, strict=True)}
        counted = jnp.broadcast_to(jnp.arange(length) < config.sampling.max_new_tokens, (rows, length))
        first = lambda schedule: jnp.full((rows, length), schedule(schedule.init(), step=jnp.asarray(0)))
        arrays = {"weight": jnp.full((rows, length), weight)} | {n: first(of_n) for n, of_n in term.numbers.items()}
        picked = lambda name: jnp.take_along_axis(jax.nn.log_softmax(logits[name]), target[..., None], -1)[..., 0]
        if term.signals is not None:
            log_q = picked("student")
            log_p = sum(share * picked(member) for member, share in term.reward_members.items())
            arrays |= term.signals(Scores(jnp.asarray(log_p), log_q, log_q, counted))

        def total(student: jax.Array) -> jax.Array:
            return jnp.where(counted, term.loss(logits | {"student": student}, jnp.asarray(target), arrays), 0).sum()

        return jnp.nan_to_num(jnp.abs(jax.grad(total)(logits["student"]))).max()

    return jax.jit(gradient)


def _outcomes(config: Settings, term: Term) -> int:
    """Returns the k of a term's support; 1 for a support without k."""
    return config.objective.terms[term.name]["vocabulary"].get("k", 1)


def check_vocabulary(config: Settings, terms: Sequence[Term], vocab_size: int) -> None:
    """Checks that no term compares more outcomes than the vocabulary has ids.

    Raises:
      ValueError: a k is too large; the message names the key.
    """
    for term in terms:
        k = _outcomes(config, term)
        if k > vocab_size:
            raise ValueError(
                f"objective.terms.{term.name}: vocabulary.k={k} is more than the vocabulary's {vocab_size} ids; set a smaller k."
            )


def check_learning_rate(schedule: optax.Schedule, steps: int) -> None:
    """Checks that a learning rate is finite and not negative in each step, and above 0 in at least one step.

    Raises:
      ValueError: the learning rate violates one of these conditions.
    """
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(steps)))
    if np.any(wrong := ~(np.isfinite(rates) & (rates >= 0))):
        step = int(np.argmax(wrong))
        raise ValueError(f"learning_rate is {rates[step]:g} in step {step}; it must be finite and not negative.")
    if not np.any(rates):
        raise ValueError(f"learning_rate is 0 for the whole run of {steps} steps, so the student would not learn.")


def check_sampling(config: Settings, source: Source) -> None:
    """Checks that the authors of the source can answer the dataset's prompts, and the settings of their sampling."""
    name, options, sampling = name_of(config.prefixes), config.data, config.sampling
    counts_response = options.loss_on in ("response", "last") or rows_are_turns(config)
    if is_plain_text(config) or (source.authors and (options.packing != "none" or not counts_response)):
        raise ValueError(
            f"prefixes.name={name!r} needs a dataset with prompts, data.packing='none' and data.loss_on='response', but "
            f"data.name={options.name!r}, data.packing={options.packing!r} and data.loss_on={options.loss_on!r}."
        )
    check_room(config)
    if not config.teacher.path and "teacher" in source.origins:
        raise ValueError(
            f"prefixes.name={name!r} samples responses of the teacher, but teacher.path is empty; set the teacher's folder."
        )
    parts = {"sampling.rollouts_per_prompt": sampling.rollouts_per_prompt, "authors": len(source.authors)}
    for part, number in parts.items():
        if options.batch_size % max(1, number):
            raise ValueError(f"data.batch_size={options.batch_size} does not divide into {part}={number}.")
    if sampling.rollouts_per_prompt > 1 and sampling.temperature == 0:
        raise ValueError(
            f"with sampling.temperature=0, the sampling.rollouts_per_prompt={sampling.rollouts_per_prompt} responses to a prompt "
            f"are all the same; set a temperature above 0, or rollouts_per_prompt=1."
        )
    resolve.check_number("sampling.top_p", sampling.top_p, 1e-6, 1.0)
    share = resolve.check_fraction("sampling.teacher_share", sampling.teacher_share)
    if share and not config.teacher.path:
        raise ValueError(f"sampling.teacher_share={share}, but teacher.path is empty; set the teacher's folder.")
    if share and (share == 1 or sampling.temperature == 0):
        raise ValueError(
            f"sampling.teacher_share={share} and sampling.temperature={sampling.temperature}: a mixture of teacher and student "
            f"needs a share below 1 and a temperature above 0."
        )


def check_template(config: Settings) -> None:
    """Checks that rows of plain text have the template plain.

    Raises:
      ValueError: the template writes something around a prompt, and the rows have no prompt.
    """
    if config.data.template != "plain" and config.data.name != "text":
        raise ValueError(
            f"data.template={config.data.template!r} writes a prompt, but the rows of data.name={config.data.name!r} are plain "
            f"text. Set data.template='plain', or name the fields of prompt and response."
        )


def check_room(config: Settings) -> None:
    """Checks that the longest prompt and the longest response fit together into a row."""
    options, new_tokens = config.data, config.sampling.max_new_tokens
    if options.max_prompt_length + new_tokens > options.max_length + 1:
        raise ValueError(
            f"data.max_prompt_length={options.max_prompt_length} and sampling.max_new_tokens={new_tokens} do not fit into "
            f"data.max_length={options.max_length}, plus one for the last target; lower one of them."
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
                f"which the mesh cannot divide over data x fsdp = {ways} devices; choose a multiple of {ways}."
            )
