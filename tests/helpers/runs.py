"""Small runs for tests: the config of a method in the smoke setting, with the datasets in a folder of the tests."""

import importlib
import shutil

import jax
import numpy as np

from kd_jax import metrics
from kd_jax.storage import checkpoint

OFF_POLICY = (
    "sft", "forward_kl", "reverse_kl", "mixed_kl", "jensen_shannon", "total_variation", "alpha_divergence", "akl", "skew_kl",
    "taid", "abkd", "amid", "todi", "csd", "dkd", "atkd", "selectkd", "adakd", "pocl", "ensemble",
)  # fmt: skip
ON_POLICY = (
    "imitkd", "gkd", "opd", "vopd", "minillm", "distillm", "distillm2", "eopd", "tip", "tsd_kd", "fire_opd", "iw_opd",
    "ta_opd", "topk_opd", "gopd", "opsd", "sdft", "sdpo",
)  # fmt: skip
# The settings of a run with three checkpoints.
WHOLE = dict(steps=5, checkpoint_every=2, eval_every=5, log_every=2, keep_checkpoints=3)
# Changes with which a method does its work in few steps of the smoke setting: distillm samples from the first step, and
# each response of sdpo is good enough to be shown.
AT_WORK = {"distillm": dict(prefixes__threshold=0.9), "sdpo": dict(teacher__view__at_least=0.0)}
ACROSS_TOKENIZERS = ("alm", "uld")  # no distributions over tokens are compared, also at evaluations
METHODS = (*OFF_POLICY, "seqkd", *ON_POLICY, *ACROSS_TOKENIZERS)


def smoke(method, data_dir, **changes):
    """Returns the smoke config of a method. A key of `changes` has __ in place of a dot."""
    return configured(method, "smoke", dict(data__data_dir=str(data_dir), mesh__data=1) | changes)


def configured(method, setting, changes):
    """Returns the config of a method in a setting. A key of `changes` has __ in place of a dot."""
    config = importlib.import_module(f"configs.{method}").get_config(setting)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def last_state(workdir):
    """Returns the step of the newest checkpoint and the arrays of this checkpoint as a flat list."""
    with checkpoint.open_manager(str(workdir), 2) as manager:
        step = manager.latest_step()
    folder = workdir / "checkpoints" / str(step) / "state"
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(folder)
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def checkpoint_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def until(step, whole, folder):
    """Copies a run to `folder` without the checkpoints after `step`. Returns the folder."""
    shutil.copytree(whole, folder)
    for later in checkpoint_steps(folder):
        if later > step:
            shutil.rmtree(folder / "checkpoints" / str(later))
    return folder


def training(workdir):
    """Returns the metrics of a run, except the speed."""
    return [line for line in metrics.read(workdir) if line["split"] != "speed"]


def assert_same_run(one, other):
    """Checks that two runs have the same newest state, bit for bit, and the same metrics without duplicates."""
    (step, expected), (reached, found) = last_state(one), last_state(other)
    assert step == reached
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert training(one) == training(other)
    keys = [(line["step"], line["split"]) for line in metrics.read(other)]
    assert len(keys) == len(set(keys))
