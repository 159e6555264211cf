"""Compares the helpers with extended precision at small differences, at the ends and for entries without mass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import logspace


def test_log_mix_at_the_ends_and_without_mass():
    log_p, log_q = jnp.array([-1.0, -jnp.inf, -200.0, -jnp.inf]), jnp.array([-3.0, -2.0, -90.0, -jnp.inf])
    for weight, end in (0.0, log_q), (1.0, log_p):
        np.testing.assert_array_equal(logspace.log_mix(log_p, log_q, weight), end)
    grads = jax.vjp(lambda p, q: logspace.log_mix(p, q, 0.25), log_p, log_q)[1](jnp.ones(4))
    np.testing.assert_allclose(grads[0] + grads[1], [1, 1, 1, 0], rtol=1e-6)
    share = 0.25 * np.exp(-1.0) / (0.25 * np.exp(-1.0) + 0.75 * np.exp(-3.0))
    np.testing.assert_allclose(grads[0], [share, 0, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1e-30, 2.0**-20, 0.125, 0.5, 1 - 2.0**-10, 1.0])
def test_log_decay_mix(weight):
    x = np.float32([0, 1e-30, 1e-6, 1e-3, 0.5, 0.999, 1.0, 1.001, 3, 20, 80, 500, 1e30])
    v, w, wide = np.longdouble(weight), np.longdouble(1 - weight), x.astype(np.longdouble)
    with np.errstate(divide="ignore"):
        expected = np.where(wide < 0.1, np.log1p(w * np.expm1(-wide)), np.log(v + w * np.exp(-wide)))
    expected = -wide if weight == 0 else expected
    weights = jnp.full(x.shape, weight), jnp.full(x.shape, 1 - weight)
    actual = logspace.log_decay_mix(jnp.asarray(x), *weights)
    np.testing.assert_allclose(actual, np.asarray(expected, float), rtol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1e-40, 1e-21, 1e-19, 1e-6, 0.3, 1.0, 30.0])
def test_decay_integral(rate):
    x = jnp.array([0.0, 1e-6, 0.1, 1.0, 40.0, 300.0])
    exact = np.asarray(x, np.longdouble)
    if rate > 0:
        exact = -np.expm1(-np.longdouble(rate) * exact) / np.longdouble(rate)
    np.testing.assert_allclose(logspace.decay_integral(x, rate), np.asarray(exact, float), rtol=1e-6)
    slope = jax.vmap(jax.grad(lambda x: logspace.decay_integral(x, rate)))(x)
    np.testing.assert_allclose(slope, np.exp(-rate * np.asarray(x, float)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 3e-7), ("float64", 1e-15)])
def test_exp_curvature(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        u, v = (x.ravel() for x in np.meshgrid([0.0, -1e-9, -1e-3, -0.3, -0.7, -1.0], [0.0, -1e-9, -0.5, -1.0]))
        actual = logspace.exp_curvature(jnp.asarray(u, dtype), jnp.asarray(v, dtype))
        # Gauss-Legendre quadrature of the Hermite-Genocchi integral of exp(a t + b s) over t, s > 0, t + s < 1.
        nodes, weights = np.polynomial.legendre.leggauss(12)
        s, t = np.meshgrid((nodes + 1) / 2, (nodes + 1) / 2)
        area = np.outer(weights, weights) / 4 * (1 - t)
        expected = [np.sum(area * np.exp(a * t + b * (1 - t) * s)) for a, b in zip(u, v, strict=True)]
        np.testing.assert_allclose(actual, expected, rtol=tolerance)


def test_weigh_has_no_gradient_where_the_weight_is_zero():
    value, grad = jax.value_and_grad(lambda x: jnp.sum(logspace.weigh(jnp.array([0.0, 2.0]), 1 / x)))(
        jnp.array([0.0, 4.0])
    )
    np.testing.assert_allclose(value, 0.5)
    np.testing.assert_allclose(grad[1], -2 / 16)
