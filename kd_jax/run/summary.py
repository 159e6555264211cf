"""The lines that a run prints first: method, models, data, devices and step."""

from collections.abc import Mapping

import jax
from jaxtyping import PyTree

from kd_jax.data.counts import sentence, warnings
from kd_jax.run.build import Run
from kd_jax.settings import Member, Settings, Spec, Teacher, name_of
from kd_jax.storage.files import Json
from kd_jax.teachers import Aligned
from kd_jax.train_step import TrainState


def of(run: Run, state: TrainState) -> str:
    """Returns the lines of a run's summary: method, models, data, devices and step."""
    config, options = run.config, run.config.data
    rows = "; ".join(sentence(split, counts) for split, counts in run.counts.items())
    devices, processes = len(jax.devices()), jax.process_count()
    order = "" if name_of(options.order) == "shuffled" else f"; order {spec_text(options.order)}"
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    lines = {
        "method": "\n         ".join([*method(config), f"rows: prefixes.{spec_text(config.prefixes)}"]),
        "models": f"{_teacher(run)} -> student, {run.models.trainee.describe()}",
        "data": "\n         ".join([f"{options.name}; {rows}{order}", *run.remarks]),
        "devices": f"{devices} {jax.devices()[0].platform} device{'s' * (devices > 1)}, {processes} "
        f"process{'es' * (processes > 1)}, mesh {mesh}",
        "step": f"{int(state.step)} of {config.steps}, {options.batch_size} rows of at most {options.max_length} tokens each",
    }
    return "\n".join(f"{name:8} {line}" for name, line in lines.items())


def method(config: Settings) -> list[str]:
    """Returns a line for each term of the objective.

    Example:
      >>> import dataclasses
      >>> term = {"kind": "divergence", "divergence": {"name": "skew_forward_kl", "skew": 0.2}, "coefficient": 0.5}
      >>> term |= {"pair": ("teacher", "student"), "assistant": "none", "rows": "data"}
      >>> objective = dataclasses.replace(Settings().objective, terms={"distil": term})
      >>> method(dataclasses.replace(Settings(), objective=objective))
      ['distil: skew_forward_kl(skew=0.2) of teacher and student on data rows, coefficient 0.5']
      >>> term["tokens"] = {"name": "accept", "k": 5, "otherwise": 0.01, "divide_by": "all"}
      >>> _options(term)
      ", token weights accept(k=5, otherwise=0.01, divide_by='all')"
    """
    return [f"{name}: {_term(term)}" for name, term in config.objective.terms.items() if term is not None]


def spec_text(spec: Spec | float) -> str:
    """Returns a spec in the form in which a flag can give it.

    Example:
      >>> spec_text({"name": "alpha_beta", "alpha": 0.2, "beta": 0.7}), spec_text({"name": "forward_kl"}), spec_text(1.0)
      ('alpha_beta(alpha=0.2, beta=0.7)', 'forward_kl', '1')
    """
    if not isinstance(spec, Mapping):
        return spec if isinstance(spec, str) else f"{spec:g}"
    keywords = ", ".join(f"{key}={_value(value)}" for key, value in spec.items() if key != "name")
    return f"{spec['name']}({keywords})" if keywords else str(spec["name"])


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_value, value))})"
    return spec_text(value) if isinstance(value, Mapping) and "name" in value else repr(value)


def _term(term: Json) -> str:
    assistant = f", assistant {spec_text(term['assistant'])}" if "assistant" in term["pair"] else ""
    loss = {
        "divergence": f"{spec_text(term['divergence'])} of {' and '.join(term['pair'])}{assistant}",
        "hard_labels": "cross-entropy of the tokens",
        "policy_gradient": "policy gradient of KL(student || teacher)",
        "spans": f"spans of text, compared by {spec_text(term.get('spans', {'name': 'likelihood'}))}",
    }[term["kind"]]
    rows = "" if term["rows"] == "all" else f" on {term['rows']} rows"
    return f"{loss}{rows}, coefficient {spec_text(term['coefficient'])}{_options(term)}"


def _options(term: Json) -> str:
    """Returns the settings of a term that most terms do not set: outcomes, temperature, token weights, gate of rows."""
    vocabulary = dict(term.get("vocabulary", {"support": "whole"}))
    support = vocabulary.pop("support")
    shown = {"outcomes": "" if support == "whole" else spec_text({"name": support, **vocabulary})}
    shown["where"] = " and ".join(f"{column}={_value(value)}" for column, value in dict(term.get("where", {})).items())
    for key, name in {"temperature": "temperature", "tokens": "token weights", "row_gate": "row gate"}.items():
        spec = term.get(key, 0.0)
        is_set = spec["name"] != "none" if isinstance(spec, Mapping) else spec not in (0.0, "none")
        shown[name] = spec_text(spec) if is_set else ""
    return "".join(f", {name} {text}" for name, text in shown.items() if text)


def _teacher(run: Run) -> str:
    """Returns the teacher and the further frozen models, with what each of them sees if it is not the row's prompt."""
    config = run.config
    members = [f"member {name} {member.path or member.cache}{_sees(member)}" for name, member in config.members.items()]
    return ", ".join([_model_of_teacher(run) + _sees(config.teacher), *members])


def _sees(model: Teacher | Member) -> str:
    """Returns the view of a frozen model, and the rate at which the model follows the student."""
    view = "" if name_of(model.view).partition("(")[0] == "none" else f", sees {spec_text(model.view)}"
    return (f", follows the student by {model.follow:g}" if model.follow else "") + view


def _model_of_teacher(run: Run) -> str:
    path = run.config.teacher.path
    if run.models.writer and not isinstance(run.models.compared_teacher, Aligned):
        count = _count(run.models.writer.model.abstract_params())
        return f"teacher {path}, {count} parameters (another tokenizer than the student's, so only the text is used)"
    return run.models.compared_teacher.described(path)


def too_long(run: Run) -> list[str]:
    """Returns a warning, with advice, for each split in which many prompts or responses are too long."""
    options = run.config.data
    other = {"drop": "cut, which truncates long prompts", "cut": "drop, which omits their rows"}[options.long_prompts]
    advice = {
        "prompts": f"Raise data.max_prompt_length={options.max_prompt_length} and data.max_length={options.max_length}; "
        f"or set data.long_prompts to {other}.",
        "responses": f"Raise data.max_length={options.max_length}, or lower data.max_prompt_length="
        f"{options.max_prompt_length}.",
    }
    return [line for split, counts in run.counts.items() for line in warnings(split, counts, **advice)]


def _count(params: PyTree) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f}M"
