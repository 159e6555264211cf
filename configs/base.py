"""Builds the config of a run from the keys that `kd_jax.settings` declares.

The file of a method sets the objective. A setting sets the models and the data. A spec (see `kd_jax.settings.keys`)
accepts new keywords, also from the command line (--config.objective.terms.distil.divergence.skew=0.2). All other keys
are locked.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

from kd_jax.settings import Member, Policy, Settings, Term, defaults, open_names

OPEN = open_names(Settings, Term)  # the keys whose values are specs, or keywords of a builder, a template or a model


def get_config() -> ConfigDict:
    """Returns a config with all keys that `kd_jax.settings.Settings` declares, with their default values."""
    config = ConfigDict(defaults(Settings))
    config.learning_rate.decay_steps = config.get_oneway_ref("steps")
    config.text.split = config.data.get_oneway_ref("train_split")
    return lock(config)


def term(**changes: object) -> ConfigDict:
    """Returns one summand of the objective, as `kd_jax.settings.Term` declares it.

    Raises:
      KeyError: a changed key is not declared.
    """
    values = _changed(Term, "term", changes)
    values |= {key: number(values[key]) for key in ("weight", "coefficient", "temperature", "teacher_temperature")}
    values["assistant"] = {key: number(value) for key, value in dict(values["assistant"]).items()}
    return ConfigDict(values)


def number(value: object) -> object:
    """Returns a number as a field that may later hold a schedule.

    A flag may replace the number by a schedule's call, and a config may replace it by a schedule's ConfigDict. Any
    other value is returned unchanged.
    """
    return FieldReference(value, field_type=object) if isinstance(value, int | float) else value


def policy(**changes: object) -> ConfigDict:
    """Returns the settings of a policy gradient, as `kd_jax.settings.Policy` declares them.

    Raises:
      KeyError: a changed key is not declared.
    """
    return ConfigDict(_changed(Policy, "policy", changes))


def member(**changes: object) -> ConfigDict:
    """Returns a further frozen model, as `kd_jax.settings.Member` declares it.

    Raises:
      KeyError: a changed key is not declared.
    """
    return ConfigDict(_changed(Member, "member", changes))


def _changed(kind: type, name: str, changes: dict[str, object]) -> dict[str, Any]:
    """Returns the default values of a section with changes. A changed key that is not declared raises a KeyError."""
    values = defaults(kind)
    if unknown := changes.keys() - values.keys():
        raise KeyError(f"a {name} has no key {sorted(unknown)}; the keys of a {name} are {', '.join(values)}.")
    return values | changes


def hard_labels(**changes: object) -> ConfigDict:
    """Returns a term that is the cross-entropy of the tokens in the rows."""
    return term(kind="hard_labels", **changes)


def cosine(config: ConfigDict, peak: float, final: float = 1e-7) -> ConfigDict:
    """Returns a cosine schedule from `peak` to `final` over the run, as in the papers.

    The length of the schedule follows config.steps when config.steps changes.
    """
    steps = config.get_oneway_ref("steps")
    return ConfigDict(
        {"name": "cosine_decay_schedule", "init_value": peak, "decay_steps": steps, "alpha": final / peak}
    )


def set_terms(config: ConfigDict, **terms: ConfigDict) -> ConfigDict:
    """Returns the config with the given terms as the whole objective."""
    with config.unlocked():
        config.objective.terms = ConfigDict(terms)
    return lock(config)


def lock(config: ConfigDict) -> ConfigDict:
    """Returns the config with locked keys, except specs and the keywords of builders, templates and models."""
    config.lock()

    def open_specs(node: ConfigDict) -> None:
        for key in node:
            value = node[key]
            if isinstance(value, ConfigDict):
                value.unlock() if key in OPEN else open_specs(value)

    open_specs(config)
    return config
