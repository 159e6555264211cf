"""What an ablation is: a config, axes of overrides that are crossed, and seeds."""

from typing import Any

from ml_collections import ConfigDict


def ablation(
    base: ConfigDict | dict[str, ConfigDict], axes: dict[str, tuple[Any, tuple[Any, ...]]], **changes: Any
) -> ConfigDict:
    """A config of `python -m kd_jax.ablate`, locked.

    Args:
      base: of every run; or several by name, such as methods, which then are the first axis.
      axes: label -> (key of the base, values): runs are the product of all. In place of a key there may be a tuple of keys, each
        value then being a tuple of one value for each: a list of combinations instead of a grid.
      **changes: of seeds and metrics; label: of the axis of several bases.
    """
    values = {
        "seeds": (0, 1, 2),  # of each point
        "metrics": (
            "forward_kl",
            "reverse_kl",
            "own_reverse_kl",
            "rouge_l",
        ),  # columns of the table, as in table.md of a run
    }
    if unknown := changes.keys() - values.keys() - {"label"}:
        raise KeyError(f"an ablation has no key {sorted(unknown)}; it has {', '.join(values)}, label.")
    label = changes.pop("label", "method")
    config = ConfigDict(values | changes)
    config.axes = tuple((name, key, tuple(points)) for name, (key, points) in axes.items())
    config.base = base
    if isinstance(base, dict):  # an axis without a key chooses among them
        if label in axes:
            raise KeyError(f"an axis is called {label!r} as that of the bases is; give them another label.")
        config.axes = ((label, "", tuple(base)), *config.axes)
        config.base = ConfigDict(base)
    return config.lock()


def short(config: ConfigDict, steps: int = 100) -> ConfigDict:
    """A base whose runs take a minute on two CPU cores, and answer prompts at the end."""
    config.steps = min(config.steps, steps)
    config.eval_every = config.checkpoint_every = max(1, config.steps // 4)
    config.eval_prompts = 64 if config.steps > 10 else 8
    return config
