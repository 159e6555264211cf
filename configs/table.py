"""Prints the tables of configs/README.md (methods and keys), kd_jax/README.md (functions) and kd_jax/data/README.md.

The tables are made from the configs, from the declarations of the keys, and from the docstrings of the functions.

    python -m configs.table

A method is a choice for each of these questions: whose text, which teacher and what the teacher sees, which pair of
distributions, which outcomes, which divergence, which token weights, which schedules.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from kd_jax import (
    assistants,
    data,
    divergences,
    logit_transforms,
    span_divergences,
    supports,
    temperatures,
    token_weights,
    views,
)
from kd_jax.command_help import first_sentence
from kd_jax.divergences import of_one
from kd_jax.objectives import span_terms
from kd_jax.policy_gradient import reward_shapes
from kd_jax.settings import Settings, Term, is_section, keys_of
from kd_jax.token_weights import row_gates, scores
from kd_jax.token_weights import temperatures as of_scores

METHODS = (
    "sft", "seqkd", "forward_kl", "reverse_kl", "mixed_kl", "jensen_shannon", "total_variation", "alpha_divergence",
    "akl", "skew_kl", "abkd", "todi", "csd", "dkd", "atkd", "selectkd", "adakd", "pocl", "taid", "amid", "ensemble", "imitkd", "gkd",
    "distillm", "distillm2", "minillm", "opd", "vopd", "iw_opd", "fire_opd", "gopd", "eopd", "tip", "ta_opd", "tsd_kd",
    "topk_opd", "opsd", "sdft", "sdpo", "alm", "uld",
)  # fmt: skip
TABLES = {
    "view": views, "divergence": divergences, "function of one member": of_one, "assistant": assistants, "support": supports,
    "rule of `tokens`": token_weights,
    "score of a token": scores, "row gate": row_gates, "transform of logits": logit_transforms,
    "temperature of each model": temperatures, "temperature of each token": of_scores, "reward": reward_shapes,
    "comparison of spans": span_terms, "divergence of a span's likelihoods": span_divergences,
}  # fmt: skip
SHORT = {"teacher": "p", "student": "q", "assistant": "r"}


def methods() -> str:
    """Returns a Markdown table with one row for each term of each method."""
    columns = "config, whose text, teacher, term, pair, assistant r, outcomes, token weights, schedules".split(", ")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for method in METHODS:
        config = importlib.import_module(f"configs.{method}").get_config()
        source = _spec(config.prefixes)
        if config.data.order.name != "shuffled":
            source += f", order {_spec(config.data.order)}"
        if config.sampling.teacher_share:
            source += f", sampled with {config.sampling.teacher_share:g} of the teacher"
        for i, (name, term) in enumerate(config.objective.terms.items()):
            head = (f"`{method}`", source, _teacher(config)) if i == 0 else ("", "", "")
            lines.append(f"| {' | '.join((*head, *_term(name, term)))} |")
    return "\n".join(lines)


def _term(name: str, term: ConfigDict) -> tuple[str, ...]:
    """Returns the columns of a term: value, pair, assistant, outcomes, token weights, schedules."""
    schedules = [f"{key} {_spec(term[key])}" for key in ("weight", "coefficient") if not _is_number(term[key])]
    factor = f"{term.coefficient:g} " if _is_number(term.coefficient) and term.coefficient != 1 else ""
    rows = "" if term.rows == "all" else f" on {term.rows} rows"
    weights = [_spec(term[key]) for key in ("tokens", "row_gate") if term[key]["name"] != "none"]
    end = ("; ".join(weights), "; ".join(schedules))
    if term.kind == "hard_labels":
        return f"{factor}-log q(token){rows}", "", "", "", *end
    if term.kind == "spans":
        return f"{factor}{_spec(term.spans)} of spans{rows}", "p, q", "", "", *end
    if term.kind == "policy_gradient":
        members = dict(term.policy.members)
        reward = "" if members == {"teacher": 1.0} else f", reward of {_weights(members)}"
        return f"{factor}policy gradient of KL(q \\|\\| p){reward}{rows}", "", "", "", *end
    pair = ", ".join(SHORT.get(member, member) for member in term.pair)
    assistant = ""
    if term.assistant.name != "none":
        weight = f", weight {term.weight:g}" if _is_number(term.weight) and not term["weights"] else ""
        among = f" of {_weights(term['weights'])}" if term["weights"] else ""
        assistant = _spec(term.assistant) + among + weight + (", a constant" if term.stop_gradient else "")
    return f"{factor}{_spec(term.divergence)}{_temperature(term)}{rows}", pair, assistant, _outcomes(term), *end


def _teacher(config: ConfigDict) -> str:
    """Returns the teacher of a method and its view, if they are not a model of its own and the row's prompt."""
    found = []
    if config.teacher.path == "student":
        rate = config.teacher.follow
        found.append(f"average of the student, rate {rate:g}" if rate else "the student before training")
    view = dict(config.teacher.view)
    if view["name"] == "template":
        found.append(f"sees {', '.join(views.names_in(view['text']))}")
    elif view["name"] != "none":
        found.append(f"sees a {view['name'].replace('_', ' ')}")
    return "; ".join(found)


def _weights(members: Mapping[str, float]) -> str:
    return ", ".join(f"{weight:g} {SHORT.get(name, name)}" for name, weight in members.items())


def _temperature(term: ConfigDict) -> str:
    value = term.temperature
    shown = "" if _is_number(value) and not value else f"{value:g}" if _is_number(value) else _spec(value)
    factor = ", times T^2" if term.temperature_squared and shown else ""
    return f" at temperature {shown}{factor}" if shown else ""


def _outcomes(term: ConfigDict) -> str:
    vocabulary = dict(term.vocabulary)
    support = vocabulary.pop("support")
    options = ", ".join(f"{key} {value}" for key, value in vocabulary.items())
    return "" if support == "whole" else f"`{support}`" + (f" ({options})" if options else "")


def _spec(spec: ConfigDict | dict[str, object]) -> str:
    """Returns a spec as a call, without the keywords that only follow the number of steps."""
    shown = []
    for key, value in spec.items():
        if isinstance(value, ConfigDict | dict):
            value = _spec(value)
        if isinstance(value, list | tuple) and any(isinstance(entry, ConfigDict | dict | str) for entry in value):
            value = " and ".join(_spec(v) if isinstance(v, ConfigDict | dict) else f"`{v}`" for v in value)
        if key not in ("name", "total_steps", "transition_begin", "transition_steps"):
            shown.append(f"{key} {value:g}" if _is_number(value) and not isinstance(value, bool) else f"{key} {value}")
    return f"`{spec['name']}`" + (f" ({', '.join(shown)})" if shown else "")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def keys() -> str:
    """Returns a Markdown table of all keys of a config, with their defaults and meanings."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, default, meaning in [*_keys(Settings, ""), *_keys(Term, "objective.terms.NAME.")]:
        lines.append(f"| `{name}` | {default} | {meaning} |".replace("|  |", "| |"))
    return "\n".join(lines)


def _keys(section: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field, default in keys_of(section):
        meaning = field.metadata["meaning"].replace("|", "\\|")
        if not is_section(default):
            shown = _spec(default) if isinstance(default, dict) and "name" in default else f"`{default!r}`"
            yield f"{prefix}{name}", shown, meaning
            continue
        if meaning:
            yield f"{prefix}{name}", "", meaning
        yield from _keys(type(default), f"{prefix}{name}.")


def functions() -> str:
    """Returns a Markdown table for each module of functions that a term may name, with keywords and first sentences."""
    tables = []
    for title, module in TABLES.items():
        lines = [f"| {title} | keywords | value |", "| --- | --- | --- |"]
        for name in module.__all__:
            function = getattr(module, name)
            parameters = inspect.signature(function).parameters.values()
            is_keyword = lambda p, function=function: p.kind == p.KEYWORD_ONLY or inspect.isclass(function)
            keywords = ", ".join(f"`{p.name}`" for p in parameters if is_keyword(p))
            meaning = first_sentence(inspect.getdoc(function) or "").replace("``", "`").replace("|", "\\|")
            lines.append(f"| `{name}` | {keywords} | {meaning} |".replace("|  |", "| |"))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def datasets() -> str:
    """Returns a Markdown table of the datasets, with the first sentence of each module's docstring."""
    lines = ["| `data.name` | rows | further columns |", "| --- | --- | --- |"]
    for name, source in data.SOURCES.items():
        further = [f"`{column}`" for column in data.COLUMNS.get(name, ())]
        further += ["those in `data.options.columns`"] * ("columns" in inspect.signature(source).parameters)
        row = (f"`{name}`", first_sentence(sys.modules[source.__module__].__doc__ or ""), ", ".join(further) or "none")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{methods()}\n\n{keys()}\n\n{functions()}\n\n{datasets()}")
