"""The optimiser of a config: parameters with and without weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import settings
from kd_jax import models, resolve, train
from kd_jax.optimizer import _with_masks, decays, make_optimizer
from tests.helpers.runs import smoke

RATE, DECAY = 0.5, 0.1
SPARED = ("*norm*", "*bias")


def of(family):
    """Returns the parameters of a small model, all of them 1."""
    config = models.ModelConfig(family=family, vocab_size=16, hidden_size=8, num_layers=2, num_heads=2, max_positions=4)
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), models.from_config(config).abstract_params())


def changed(tx, params):
    """Returns the paths of the parameters that a step with zero gradients changes."""
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    return {jax.tree_util.keystr(keys, simple=True, separator="/") for keys, leaf in leaves if np.any(leaf)}


@pytest.mark.parametrize("name", ["adamw", "lion", "nadamw", "adamaxw", "lamb", "lars", "adafactor"])
def test_norms_and_biases_do_not_decay_and_matrices_do(name):
    params = of("gpt2")
    keyword = "weight_decay_rate" if name == "adafactor" else "weight_decay"
    spec = {"name": name, keyword: DECAY}
    every = changed(make_optimizer(spec, lambda step: RATE), params)
    spared = changed(make_optimizer(spec | {"no_decay": SPARED}, lambda step: RATE), params)
    assert any("norm" in path for path in every) and any(path.endswith("bias") for path in every)
    assert spared == {path for path in every if path.endswith(("kernel", "embedding"))}


def test_the_decay_is_the_learning_rate_times_the_decay_times_the_parameter():
    params = of("gpt2")
    tx = make_optimizer({"name": "adamw", "weight_decay": DECAY, "no_decay": SPARED}, lambda step: RATE, clip_norm=1.0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    layer = updates["layers"]["1"]
    np.testing.assert_allclose(layer["attention"]["query"]["kernel"], -RATE * DECAY, rtol=1e-6)
    assert not np.any(layer["attention"]["query"]["bias"]) and not np.any(layer["mlp_norm"]["scale"])


def test_without_patterns_the_state_is_as_it_was():
    params = of("llama")
    schedule = optax.constant_schedule(RATE)
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=DECAY))
    expected = jax.tree.structure(plain.init(params))
    for spec in ({"name": "adamw", "weight_decay": DECAY}, {"name": "adamw", "weight_decay": DECAY, "no_decay": ()}):
        assert jax.tree.structure(make_optimizer(spec, schedule, 1.0).init(params)) == expected


def test_a_pattern_without_parameters_is_refused_with_the_paths():
    with pytest.raises(
        ValueError, match=r"no_decay='\*bias' matches no parameter.*layers/0/attention_norm/scale"
    ) as error:
        decays(of("llama"), SPARED)
    assert "layers/1" not in str(error.value)
    assert decays({"a": {"bias": 1, "kernel": 2}}, ("*bias",)) == {"a": {"bias": False, "kernel": True}}


def test_an_optimiser_without_a_mask_is_refused_by_name():
    assert {"adamw", "lion", "lamb", "lars", "adafactor"} <= set(_with_masks()) and "sgd" not in _with_masks()
    with pytest.raises(
        ValueError, match=r"needs an optimiser with a mask for weight decay, which sgd lacks.*adamw.*lion"
    ):
        make_optimizer({"name": "sgd", "no_decay": SPARED}, lambda step: RATE)
    make_optimizer({"name": "sgd", "no_decay": ()}, lambda step: RATE)
    for wrong in ("*bias", (3,), None):
        with pytest.raises(ValueError, match="must be a tuple of patterns"):
            make_optimizer({"name": "adamw", "no_decay": wrong}, lambda step: RATE)
    with pytest.raises(ValueError, match="unknown keyword 'no_deacy' .*did you mean"):
        make_optimizer({"name": "adamw", "no_deacy": SPARED}, lambda step: RATE)
    with pytest.raises(ValueError, match="unknown keyword 'no_decay'"):
        resolve.build({"name": "adamw", "no_decay": (), "learning_rate": 0.1}, optax)


def test_a_call_has_its_own_patterns():
    params = of("gpt2")
    spec = {"name": "adamw(weight_decay=0.1, no_decay=('*kernel',))", "weight_decay": 0.01, "no_decay": SPARED}
    assert not any(path.endswith("kernel") for path in changed(make_optimizer(spec, lambda step: RATE), params))


def test_a_run_spares_what_its_config_names(data_dir, one_device):
    config = smoke("sft", data_dir)
    config.optimizer.no_decay = ("*norm*",)
    config.optimizer.weight_decay, config.learning_rate.init_value = 1e6, 1e-3
    run = train.build(config)
    state = run.init_state()
    before = jax.device_get(state.params)
    state, _ = run.train_step(state, run.models.teacher_params, run.batch(0, state.params))
    after = jax.device_get(state.params)
    assert np.abs(after["norm"]["scale"] - before["norm"]["scale"]).max() < 0.01  # only Adam's step, no decay
    ratio = after["embed"]["embedding"] / before["embed"]["embedding"]
    assert np.median(ratio) == pytest.approx(1 - 1e-3 * 1e6, rel=0.01)
    config.optimizer.no_decay = ("*bias",)
    with pytest.raises(ValueError, match="matches no parameter"):
        train.build(config)


def test_the_papers_setting_spares_norms_and_biases():
    config = settings.get("dolly_gpt2")
    assert config.optimizer.to_dict() == {"name": "adamw", "weight_decay": 0.01, "no_decay": SPARED}
    spared = [leaf for leaf in jax.tree.leaves(decays(of("gpt2"), config.optimizer.no_decay)) if not leaf]
    assert len(spared) == 2 * (6 + 2 * 2) + 2, "of each layer six biases and two norms, and the last norm"
    assert settings.get("docstrings").optimizer.no_decay == ()
