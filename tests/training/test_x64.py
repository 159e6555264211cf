"""With JAX_ENABLE_X64=1 a float32 run has the same types, draws and checkpoints, and equal numbers up to rounding."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from kd_jax import metrics, models, train_step
from kd_jax.objectives import make_terms
from tests.helpers.commands import environment
from tests.helpers.runs import last_state, smoke

RUN = """
import sys, shutil, pathlib
from kd_jax import train
from tests.helpers.runs import smoke

workdir, data_dir, resumed = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resumed"
config = smoke("gkd", data_dir, prefixes__fraction=1.0, steps=2, checkpoint_every=1, eval_every=2, eval_prompts=4)
train.train(config, str(workdir), quiet=True)
if resumed:
    shutil.copytree(workdir, workdir.with_name("resumed"))
    workdir = workdir.with_name("resumed")
    for name in ("checkpoints/2", "student"):
        shutil.rmtree(workdir / name)
    (workdir / "result.json").unlink()
    train.train(config, str(workdir), quiet=True)
"""


def run(workdir, data_dir, x64):
    kind = "resumed" if x64 else "whole"
    subprocess.run(
        [sys.executable, "-c", RUN, str(workdir), str(data_dir), kind], check=True, timeout=600,
        env=environment(1) | {"JAX_ENABLE_X64": str(int(x64))},
    )  # fmt: skip
    return {(line["split"], line["step"]): line for line in metrics.read(workdir) if line["split"] != "speed"}


@pytest.mark.slow
def test_a_run_and_a_resumed_run_are_those_without_it(tmp_path, data_dir):
    narrow, wide = (run(tmp_path / name / "run", data_dir, name == "wide") for name in ("narrow", "wide"))
    assert narrow.keys() == wide.keys() and ("samples", 2) in wide
    for key, line in narrow.items():
        for name, value in line.items():
            if isinstance(value, float):
                np.testing.assert_allclose(wide[key][name], value, rtol=1e-4, err_msg=f"{key} {name}")
    texts = [(tmp_path / name / "run" / "generations.jsonl").read_text() for name in ("narrow", "wide")]
    drawn = [[json.loads(line)["before"]["response"] for line in text.splitlines()] for text in texts]
    assert drawn[0] == drawn[1]  # the same random numbers

    (_, ours), (_, theirs), (step, resumed) = (
        last_state(tmp_path / name) for name in ("narrow/run", "wide/run", "wide/resumed")
    )
    assert step == 2 and [x.dtype for x in ours] == [x.dtype for x in theirs]
    assert all(x.dtype.itemsize <= 4 for x in theirs)
    for one, other in zip(theirs, resumed, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", ["taid", "distillm2", "minillm"])
def test_a_state_has_the_same_types(method, data_dir):
    config = smoke(method, data_dir)
    model = models.from_config(
        models.ModelConfig(family="llama", vocab_size=8, hidden_size=4, num_layers=1, num_heads=1)
    )

    def types():
        terms = make_terms(config.objective.terms, config.objective.temperature, 0.0, 8)
        make = lambda key: train_step.init_state(model.init(key), train_step.optax.adamw(1e-3), terms, key)
        return [leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(make, jax.random.key(0)))]

    narrow = types()
    with jax.enable_x64(True):
        assert types() == narrow


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_model_with_parameters_in_float64_takes_a_step(dtype, microbatches):
    """The numbers of the terms are then float64, also if the model computes in float32."""
    with jax.enable_x64(True):
        sizes = dict(vocab_size=11, hidden_size=4, num_layers=1, num_heads=1, intermediate_size=8, max_positions=8)
        model = models.from_config(models.ModelConfig(family="llama", **sizes), dtype=dtype)
        params, teacher = (
            jax.tree.map(lambda leaf: leaf.astype("float64"), model.init(jax.random.key(seed))) for seed in (0, 1)
        )
        rule = {"name": "top_fraction", "of": "student_entropy", "fraction": 0.5, "divide_by": "kept"}
        terms = make_terms({"distil": {"tokens": rule}, "labels": {"kind": "hard_labels", "coefficient": 0.5}})
        tx = train_step.optax.sgd(0.1)
        tokens = np.random.default_rng(0).integers(0, 11, (4, 7)).astype(np.int32)
        batch = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:])
        batch |= {"mask": np.ones((4, 6), bool), "loss_mask": np.ones((4, 6), bool)}
        step = train_step.make_train_step(model, model, terms, tx, vocab_size=11, microbatches=microbatches, chunk=5)
        state = train_step.init_state(params, tx, terms, jax.random.key(0))
        new, sums = jax.jit(step)(state, teacher, batch)
        assert all(leaf.dtype == "float64" for leaf in jax.tree.leaves(new.params))
        log_p, log_q = (jax.nn.log_softmax(model.logits(tree, batch["tokens"])) for tree in (teacher, params))
        entropy = -(np.exp(log_q) * log_q).sum(-1)
        kept = entropy >= np.sort(entropy.ravel())[-12]
        distance = (np.exp(log_p) * (log_p - log_q)).sum(-1)[kept].mean()
        labels = -np.take_along_axis(np.asarray(log_q), batch["targets"][..., None], -1).mean()
        np.testing.assert_allclose(sums["loss"][0], distance + 0.5 * labels, rtol=1e-5)
