"""A config's terms and its sampling, checked against the source of its rows."""

from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import resolve
from kd_jax.objectives import Term
from kd_jax.prefixes import Source


def check_term(config: Any, source: Source, term: Term) -> None:
    """Whether the source gives rows that the term counts, drawn as it needs them."""
    sampling, given = config.sampling, (*source.origins, *(("text",) if config.text.name else ()))
    if term.rows not in ("all", *given):
        raise ValueError(
            f"objective.terms.{term.name}.rows={term.rows!r} counts no row: prefixes.name={name_of(config.prefixes)!r} gives "
            f"rows of {', '.join(source.origins)}, and text.name={config.text.name!r}."
        )
    if term.weight.init() == ():  # or it keeps itself in range
        weights = jax.vmap(lambda step: term.weight((), step=step))(jnp.arange(config.steps))
        if not -1e-6 <= weights.min() <= weights.max() <= 1 + 1e-6:
            raise ValueError(
                f"objective.terms.{term.name}.weight goes from {weights.min():g} to {weights.max():g} in {config.steps} steps; it "
                f"has to stay between 0 and 1."
            )
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


def check_sampling(config: Any, source: Source) -> None:
    """Whether the source's authors can answer the dataset's prompts."""
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


def check_room(config: Any) -> None:
    """Whether the longest prompt and the longest response fit into a row."""
    options, new = config.data, config.sampling.max_new_tokens
    if options.max_prompt_length + new > options.max_length + 1:
        raise ValueError(
            f"data.max_prompt_length={options.max_prompt_length} and sampling.max_new_tokens={new} do not fit into "
            f"data.max_length={options.max_length} and one; lower one of them."
        )


def name_of(spec: Any) -> str:
    """What a spec names."""
    return spec if isinstance(spec, str) else spec.get("name", "")
