"""Specs: the functions that they give, and the message of each kind of error."""

import sys
import types

import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from kd_jax import assistants, divergences, resolve, schedules
from tests.helpers.divergences import KEYWORDS, PLAIN

LOG_P, LOG_Q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))


@pytest.mark.parametrize("mapping", [dict, ml_collections.ConfigDict])
def test_bind(mapping):
    spec = mapping({"name": "alpha_beta", "alpha": 0.2, "beta": 0.7})
    bound = resolve.bind(spec, divergences)
    assert bound(LOG_P, LOG_Q) == divergences.alpha_beta(LOG_P, LOG_Q, alpha=0.2, beta=0.7)
    assert dict(spec)["name"] == "alpha_beta"  # the spec is unchanged
    assert resolve.bind("forward_kl", divergences)(LOG_P, LOG_Q) == divergences.forward_kl(LOG_P, LOG_Q)
    log_r = resolve.bind(mapping({"name": "alpha_mixture", "alpha": 0.0}), assistants)(LOG_P, LOG_Q, 0.3)
    assert (log_r == assistants.alpha_mixture(LOG_P, LOG_Q, 0.3, alpha=0.0)).all()


def test_every_name_with_defaults_binds():
    for name in PLAIN:
        resolve.bind({"name": name, **KEYWORDS.get(name, {})}, divergences)
    assert resolve.bind({"name": "skew_forward_kl"}, divergences, skew=0.3).keywords == {"skew": 0.3}
    assert resolve.bind({"name": "skew_forward_kl", "skew": 0.2}, divergences, skew=0.3).keywords == {"skew": 0.2}


def largest_gap(log_p, log_q, *, scale=1.0):
    """Returns the largest difference of two probabilities, as an example of a user's own divergence."""
    return scale * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).max(axis=-1)


def test_a_name_may_say_its_module(monkeypatch):
    here = f"{__name__}:largest_gap"
    for spec in ({"name": here, "scale": 2.0}, f"{here}(scale=2.0)", {"name": f"{here}(scale=2.0)", "skew": 0.1}):
        bound = resolve.bind(spec, divergences)
        assert bound.func is largest_gap and bound.keywords == {"scale": 2.0}
    assert resolve.bind("optax:kl_divergence", divergences).func is optax.kl_divergence
    assert (
        resolve.build(
            {"name": "optax:linear_schedule(init_value=0.0, end_value=1.0, transition_steps=2)"}, divergences
        )(1)
        == 0.5
    )
    main = types.ModuleType("__main__")
    main.mine = largest_gap
    monkeypatch.setitem(sys.modules, "__main__", main)  # as in a notebook
    assert resolve.bind("__main__:mine", divergences).func is largest_gap


def test_build():
    spec = {"name": "linear_schedule", "init_value": 0.0, "end_value": 1.0, "transition_steps": 10}
    assert resolve.build(spec, schedules)(5) == 0.5
    for name in ("adaptive_increase", "taid"):  # the second name is an alias
        assert resolve.build(ml_collections.ConfigDict({"name": name}), schedules, total_steps=7).total_steps == 7
    joined = {
        "name": "join_schedules",
        "schedules": [spec, {"name": "constant_schedule", "value": 3.0}],
        "boundaries": [4],
    }
    assert [float(resolve.build(joined, schedules)(step)) for step in (2, 6)] == [pytest.approx(0.2), 3]
    assert [float(resolve.build(ml_collections.ConfigDict(joined), schedules)(step)) for step in (2, 6)][1] == 3


def test_build_from_a_module_without_all():
    tx = resolve.build({"name": "adamw", "learning_rate": lambda step: 0.1, "weight_decay": 0.0}, optax)
    assert tx.init({"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        resolve.build({"name": "adamW", "learning_rate": 0.1}, optax)


@pytest.mark.parametrize(
    "spec, words",
    [
        ({"name": "foward_kl"}, ["'foward_kl'", "did you mean 'forward_kl'", "kd_jax.divergences", "total_variation"]),
        ("jump", ["'jump'", "forward_kl, "]),
        ({"skew": 0.1}, ["no name", "forward_kl"]),
        ({"name": "skew_forward_kl", "scew": 0.1}, ["'scew'", "did you mean 'skew'", "skew_forward_kl takes skew"]),
        ({"name": "forward_kl", "skew": 0.1}, ["'skew'", "forward_kl takes no keywords"]),
        ({"name": "forward_kl", "log_p": 0.1}, ["'log_p'", "takes no keywords"]),
        ({"name": "alpha_beta", "alpha": 0.1}, ["lacks beta", "alpha_beta"]),
        ({"name": "jensen_shannon", "weight": 1.5}, ["weight", "1.5", "between 0 and 1"]),
        ({"name": "alpha_beta", "alpha": 0.1, "beta": float("nan")}, ["beta", "nan"]),
        (
            "nowhere.at_all:mine",
            ["'nowhere.at_all'", "nowhere.at_all:mine", "cannot be imported", "No module named 'nowhere'"],
        ),
        (":mine", ["''", "cannot be imported"]),
        (".mine:mine", ["'.mine'", "cannot be imported"]),
        ("kd_jax.divergences:foward_kl", ["'foward_kl'", "did you mean 'forward_kl'", "kd_jax.divergences has"]),
        (
            {"name": f"{__name__}:largest_gap", "scal": 1.0},
            ["'scal'", "did you mean 'scale'", "largest_gap takes scale"],
        ),
        ({"name": f"{__name__}:largest_gaps"}, ["'largest_gaps'", "did you mean 'largest_gap'", __name__]),
        ({"name": "check_number"}, ["unknown name 'check_number'"]),  # imported in the module, but not in __all__
    ],
    ids=lambda x: str(x)[:50],
)
def test_errors_of_bind(spec, words):
    with pytest.raises(ValueError) as error:
        resolve.bind(spec, divergences)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name, is_advised", [("forward_kl", True), ("forward_kl(skew=0.1)", False)])
def test_a_call_is_advised_where_keywords_are_beside_the_name(name, is_advised):
    with pytest.raises(ValueError, match="forward_kl takes no keywords") as error:
        resolve.bind({"name": name, "skew": 0.1}, divergences)
    assert ("the name as a call" in str(error.value)) == is_advised


@pytest.mark.parametrize(
    "spec, words",
    [
        ({"name": "linear_schedule", "init_value": 0.0}, ["lacks end_value, transition_steps"]),
        ({"name": "constant_schedule", "valeu": 1.0}, ["'valeu'", "did you mean 'value'"]),
        ({"name": "taid", "total_steps": 10, "start": 2}, ["start", "2"]),
        ({"name": "join_schedules", "schedules": [{"name": "lenear"}], "boundaries": []}, ["'lenear'"]),
    ],
    ids=lambda x: str(x)[:50],
)
def test_errors_of_build(spec, words):
    with pytest.raises(ValueError) as error:
        resolve.build(spec, schedules)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("value", [None, "0.1", True, float("nan"), float("inf"), jnp.array(0.1), 1.1, -1])
def test_check_number(value):
    with pytest.raises(ValueError, match=r"^skew ") as error:
        resolve.check_number("skew", value, 0, 1)
    assert repr(value) in str(error.value)


def test_check_fraction_looks_at_no_array():
    assert [resolve.check_number("skew", value, 0, 1) for value in (0, 1, 0.5, np.float32(0.5))] == [0.0, 1.0, 0.5, 0.5]
    assert resolve.check_fraction("skew", np.array([3.0])).shape == (1,)
    with pytest.raises(ValueError, match=r"^skew .*3"):
        resolve.check_fraction("skew", 3)
