"""Builds the config of an ablation from a base config, axes of overrides that are crossed, and seeds."""

from typing import Any

from ml_collections import ConfigDict


def ablation(
    base: ConfigDict | dict[str, ConfigDict], axes: dict[str, tuple[Any, tuple[Any, ...]]], **changes: Any
) -> ConfigDict:
    """Returns a locked config for `python -m kd_jax.ablate`.

    Args:
      base: the config of every run, or a dict from names (such as methods) to configs. The names of a dict are the
        first axis.
      axes: label -> (key of the base, values). The runs are the product of all axes. A tuple of keys may stand in place
        of a key. Each value is then a tuple with one entry for each key, so that the axis is a list of combinations,
        not a grid.
      **changes: values for seeds and metrics, and `label`, the label of the axis over several bases.
    """
    values = {
        "seeds": (0, 1, 2),  # seeds of the runs at each point
        "metrics": (
            "forward_kl",
            "reverse_kl",
            "own_reverse_kl",
            "rouge_l",
        ),  # columns of the table, named as in table.md of a run
    }
    if unknown := changes.keys() - values.keys() - {"label"}:
        raise KeyError(f"an ablation has no key {sorted(unknown)}; it has {', '.join(values)}, label.")
    label = changes.pop("label", "method")
    config = ConfigDict(values | changes)
    config.axes = tuple((name, key, tuple(points)) for name, (key, points) in axes.items())
    config.base = base
    if isinstance(base, dict):  # an axis without a key selects one of the bases
        if label in axes:
            raise KeyError(f"an axis is called {label!r} as that of the bases is; give them another label.")
        config.axes = ((label, "", tuple(base)), *config.axes)
        config.base = ConfigDict(base)
    return config.lock()


def short(config: ConfigDict, steps: int = 100) -> ConfigDict:
    """Shortens a config to runs of about a minute on two CPU cores, which answer held-out prompts at the end."""
    config.steps = min(config.steps, steps)
    config.eval_every = config.checkpoint_every = max(1, config.steps // 4)
    config.eval_prompts = 64 if config.steps > 10 else 8
    return config
