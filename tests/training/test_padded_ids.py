"""No function of a term sees a padded id: wider heads change nothing, for every public function of the mathematics."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import assistants, divergences, logit_transforms, sharding, supports, temperatures, token_weights
from kd_jax.objectives import make_terms
from kd_jax.token_weights import row_gates, scores
from kd_jax.train_step import init_state, make_train_step
from tests.helpers.divergences import KEYWORDS
from tests.helpers.steps import Logits

B, L, V, WIDE = 8, 3, 24, 32
RANDOM = np.random.default_rng(0)
LOGITS = {name: RANDOM.normal(size=(B, L, V)).astype(np.float32) for name in ("student", "teacher")}
BATCH = dict(
    tokens=np.zeros((B, L), np.int32), targets=RANDOM.integers(0, V, (B, L)).astype(np.int32),
    mask=np.ones((B, L), bool), loss_mask=RANDOM.random((B, L)) < 0.8,
)  # fmt: skip


def plain_kl(log_p, log_q):
    """Returns KL(p || q) as a user writes it. The result is NaN if an id has no mass in either model."""
    assert log_p.shape[-1] in (2, V)  # make_terms calls a function once with two outcomes
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def sharpened(log_p, log_q, weight):
    assert log_p.shape[-1] in (2, V)  # make_terms calls a function once with two outcomes
    weight = jnp.asarray(weight)[..., None]  # one number, or one number per token
    return jax.nn.log_softmax(2 * (weight * log_p + (1 - weight) * log_q))


def needed(function, **known):
    """Returns the values of the keywords that a function needs and has no default for."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: known[p.name] for p in parameters if p.default is p.empty and p.name in known}


def specs():
    """Returns a term for each public function, by name."""
    own = f"{__name__}:"
    terms = {f"divergence {n}": {"divergence": {"name": n, **KEYWORDS.get(n, {})}} for n in divergences.__all__}
    terms["divergence of one's own"] = {"divergence": f"{own}plain_kl"}
    mix = {"pair": ("assistant", "student"), "weight": 0.4}
    terms |= {
        f"assistant {n}": mix | {"assistant": {"name": n, **needed(getattr(assistants, n), alpha=0.5)}}
        for n in assistants.__all__
    }
    terms["assistant of one's own"] = mix | {"assistant": f"{own}sharpened"}
    terms |= {
        f"support {n} {rest}": {"vocabulary": {"support": n, "k": 4, "rest": rest}}
        for n in supports.__all__ if n != "whole" for rest in ("tail", "renormalised", "dropped")
    }  # fmt: skip
    terms["support of one's own"] = {
        "vocabulary": {"support": "union", "k": 3}, "divergence": f"{__name__}:short_kl"
    }  # fmt: skip
    terms |= {f"logits {n}": {"logits": {"name": n}} for n in logit_transforms.__all__}
    terms |= {
        f"temperature {n}": {"temperature": {"name": n}, "logits": {"name": "centred"}} for n in temperatures.__all__
    }
    options = dict(fraction=0.5, k=2, otherwise=0.1, alpha=1.0, beta=1.0, gamma=0.5, at_most=2.0, count=2, slope=1.0)
    for n in token_weights.__all__:
        if n == "product":
            continue
        rule = getattr(token_weights, n)
        of = {"of": "gap"} if "score" in inspect.signature(rule).parameters else {}
        bound = {"at_least": 0.1} if n in ("threshold", "quantile") else {}
        terms[f"rule {n}"] = {"tokens": {"name": n, "divide_by": "all", **of, **bound, **needed(rule, **options)}}
    for n in scores.__all__:
        of = {"name": n, **needed(getattr(scores, n), k=4)}
        terms[f"score {n}"] = {"tokens": {"name": "top_fraction", "of": of, "fraction": 0.5, "divide_by": "kept"}}
    gate = {"name": "drop_lowest", "of": "log_p", "fraction": 0.4}
    terms |= {f"gate {n}": {"row_gate": gate} for n in row_gates.__all__ if n == "drop_lowest"}
    terms["temperature difficulty"] = {"temperature": {"name": "difficulty", "of": "hellinger", "scale": 0.5}}
    terms["hard labels"] = {"kind": "hard_labels"}
    terms["policy gradient"] = {"kind": "policy_gradient"}
    return terms


def short_kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def run(widths, mesh):
    """Returns the metrics of a step, and the gradient of the student's logits, for heads of the given widths.

    A padded logit is greater than all others, so that a padded id that is not removed would change every number.
    """
    terms, tx = make_terms(specs()), optax.sgd(1.0)
    pad = lambda name, width: np.pad(LOGITS[name], ((0, 0), (0, 0), (0, width - V)), constant_values=9.0)
    params, frozen = ({"logits": jnp.asarray(pad(n, w))} for n, w in zip(("student", "teacher"), widths, strict=True))
    step = make_train_step(Logits(), Logits(), terms, tx, vocab_size=V, mesh=mesh)
    new, metrics = jax.jit(step)(init_state(params, tx, terms, jax.random.key(0)), frozen, BATCH)
    gradient = np.asarray(params["logits"] - new.params["logits"])
    assert not np.any(gradient[..., V:])
    return {name: float(total) / max(float(count), 1) for name, (total, count) in metrics.items()}, gradient[..., :V]


@pytest.fixture(scope="module")
def expected():
    metrics, gradient = run((V, V), None)
    for name in specs():
        assert np.isfinite(metrics[f"{name}/loss"]), name
    return metrics, gradient


@pytest.mark.parametrize(
    ("widths", "tensor"),
    [
        ((WIDE, V), 0),
        ((WIDE, WIDE), 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (((V, WIDE), 0), ((WIDE, WIDE), 0), ((WIDE, V), 4), ((V, WIDE), 4))
        ),
    ],
)
def test_wider_heads_change_nothing(widths, tensor, expected):
    mesh = sharding.make_mesh(2, 1, tensor) if tensor else None
    metrics, gradient = run(widths, mesh)
    for name, value in expected[0].items():
        assert metrics[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-3, atol=1e-5)
