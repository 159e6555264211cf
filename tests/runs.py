"""Small runs for the tests: a method's config in the smoke setting, its data in a folder of the tests' own."""

import importlib

import jax
import numpy as np

from kd_jax import checkpoint

OFF_POLICY = (
    "sft", "forward_kl", "reverse_kl", "mixed_kl", "jensen_shannon", "total_variation", "alpha_divergence", "akl", "skew_kl",
    "taid", "abkd", "amid",
)  # fmt: skip
ON_POLICY = ("imitkd", "gkd", "opd", "minillm", "distillm", "distillm2")
METHODS = (*OFF_POLICY, "seqkd", *ON_POLICY)


def smoke(method, data_dir, **changes):
    """The config of a method; changes are keys with __ for a dot."""
    return configured(method, "smoke", dict(data__data_dir=str(data_dir), mesh__data=1) | changes)


def configured(method, setting, changes):
    """The config of a method in a setting, with changes in keys that have __ for a dot."""
    config = importlib.import_module(f"configs.{method}").get_config(setting)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def last_state(workdir):
    """The arrays of the newest checkpoint, as a flat list."""
    with checkpoint.open_manager(str(workdir), 2) as manager:
        step = manager.latest_step()
    folder = workdir / "checkpoints" / str(step) / "state"
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(folder)
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
