"""Compares assistants with an oracle in extended precision that follows the definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kd_jax import assistants

ALPHAS = [-40.0, -5.0, -1.0, 0.0, 0.5, 0.74, 0.76, 0.9, 0.999, 1 - 1e-6, 1 - 1e-12, 1.0, 1 + 1e-6, 1.2, 1.3, 3.0, 50.0]
CASES = [("arithmetic_mixture", {}), ("geometric_mixture", {}), ("extrapolation", {})] + [
    ("alpha_mixture", {"alpha": a}) for a in ALPHAS
]
every_case = pytest.mark.parametrize("name, keywords", CASES, ids=[f"{n}-{k.get('alpha', '')}" for n, k in CASES])


def oracle(name, log_p, log_q, w, alpha=None):
    """Returns log r with the 64 bits of mantissa of a longdouble, for 0 < w < 1."""
    w, log_p, log_q = np.longdouble(w), np.asarray(log_p, np.longdouble), np.asarray(log_q, np.longdouble)
    c = (1 - np.longdouble({"arithmetic_mixture": -1, "geometric_mixture": 1, "extrapolation": 1}.get(name, alpha))) / 2
    with np.errstate(all="ignore"):
        if c == 0:
            log_r = w * log_p + (1 - w) * log_q
        elif abs(c) < 1e-3:
            log_r = log_q + np.log1p(w * np.expm1(c * (log_p - log_q))) / c
        else:
            high = np.maximum(c * log_p, c * log_q)
            high = np.where(np.isfinite(high), high, 0)
            log_r = (high + np.log(w * np.exp(c * log_p - high) + (1 - w) * np.exp(c * log_q - high))) / c
        lacking = ~np.isfinite(log_p), ~np.isfinite(log_q)
        log_r = np.where(lacking[0] & lacking[1] if c > 0 else lacking[0] | lacking[1], -np.inf, log_r)
        high = log_r.max(-1, keepdims=True)
        return log_r - high - np.log(np.exp(log_r - high).sum(-1, keepdims=True))


def log_softmax(z):
    z = np.asarray(z, np.longdouble)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def logits(scale=2.0, shape=(3, 9), seed=1):
    teacher, student = np.random.default_rng(seed).normal(size=(2, *shape)) * scale
    teacher[..., [1, 4]] = student[..., [1, 4]] = -np.inf  # no mass in either distribution
    return teacher, student


def mixture(name, teacher, student, weight, dtype="float32", **keywords):
    with jax.enable_x64(dtype == "float64"):
        log_p, log_q = (jax.nn.log_softmax(jnp.asarray(z, dtype)) for z in (teacher, student))
        log_r = getattr(assistants, name)(log_p, log_q, weight, **keywords)
        assert log_r.dtype == dtype
        return np.asarray(log_r)


def cost(name, coefficient, weight, keywords):
    """Returns a smooth function of the mixture with gradients of order 1, to which entries without mass add nothing."""

    def of_logits(teacher, student):
        log_r = getattr(assistants, name)(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student), weight, **keywords)
        return jnp.sum(coefficient * jnp.exp(log_r))

    return of_logits


def test_every_assistant_is_tested():
    assert {name for name, _ in CASES} == set(assistants.__all__)


@every_case
@pytest.mark.parametrize("weight", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_value(name, keywords, weight):
    for scale in (2.0, 30.0):
        teacher, student = logits(scale)
        expected = oracle(name, log_softmax(teacher), log_softmax(student), weight, **keywords)
        # The tolerance is in nats. In float32 the logarithms reach about 300.
        for dtype, tolerance in ("float64", 1e-12), ("float32", 3e-6):
            weight_ = np.float32(weight) if dtype == "float32" else weight  # so that 1 - w has the same rounding
            expected = oracle(name, log_softmax(teacher), log_softmax(student), weight_, **keywords)
            actual = mixture(name, teacher, student, weight, dtype, **keywords)
            np.testing.assert_allclose(actual, np.asarray(expected, float), rtol=tolerance, atol=tolerance * scale)
            np.testing.assert_allclose(np.exp(actual).sum(-1), 1, rtol=1e-5)


@every_case
def test_gradient(name, keywords):
    teacher, student = logits()
    coefficient, step = np.random.default_rng(2).normal(size=student.shape), np.longdouble(1e-6)

    def oracle_cost(teacher, student):
        return (coefficient * np.exp(oracle(name, log_softmax(teacher), log_softmax(student), 0.3, **keywords))).sum()

    expected = np.zeros((2, *student.shape))
    for index in np.ndindex(expected.shape):
        if np.isfinite(student[index[1:]]):
            shift = np.zeros(expected.shape, np.longdouble)
            shift[index] = step
            up, down = (
                oracle_cost(teacher + shift[0], student + shift[1]),
                oracle_cost(teacher - shift[0], student - shift[1]),
            )
            expected[index] = (up - down) / (2 * step)
    for dtype, tolerance in ("float64", 1e-9), ("float32", 2e-6):
        with jax.enable_x64(dtype == "float64"):
            function = cost(name, jnp.asarray(coefficient, dtype), 0.3, keywords)
            grads = jax.grad(function, argnums=(0, 1))(jnp.asarray(teacher, dtype), jnp.asarray(student, dtype))
            np.testing.assert_allclose(np.asarray(grads), expected, atol=tolerance * np.abs(expected).max())


@every_case
@pytest.mark.parametrize(
    "as_array", [float, jnp.array, lambda w: jnp.full((3,), w)], ids=["number", "scalar", "per token"]
)
def test_exact_at_the_ends(name, keywords, as_array):
    teacher, student = (jnp.asarray(z) for z in logits())
    student, teacher = student.at[:, 2].set(-jnp.inf), teacher.at[:, 6].set(-jnp.inf)  # mass in one model only
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    coefficient = jnp.asarray(np.random.default_rng(2).normal(size=log_q.shape), jnp.float32)
    for weight, end in (0.0, log_q), (1.0, log_p):
        function = functools.partial(getattr(assistants, name), weight=as_array(weight), **keywords)
        with jax.debug_nans(True):  # no NaN even in unselected branches
            np.testing.assert_array_equal(function(log_p, log_q), end)
        grads = jax.grad(cost(name, coefficient, as_array(weight), keywords), argnums=(0, 1))(teacher, student)
        of_softmax = jax.grad(lambda z: jnp.sum(coefficient * jax.nn.softmax(z)))
        np.testing.assert_array_equal(grads[int(weight)], 0)
        np.testing.assert_allclose(grads[1 - int(weight)], of_softmax(student if weight == 0 else teacher), atol=1e-6)
        disjoint = jnp.array([[0.0, -jnp.inf]] * 3), jnp.array([[-jnp.inf, 0.0]] * 3)
        np.testing.assert_array_equal(function(*disjoint), disjoint[1 - int(weight)])
        grads = jax.grad(cost(name, jnp.ones((3, 2)), as_array(weight), keywords), argnums=(0, 1))(*disjoint)
        assert all(np.isfinite(grad).all() for grad in grads)


@every_case
def test_no_mass(name, keywords):
    teacher, student = logits()
    teacher[..., 6], student[..., 2] = -np.inf, -np.inf
    log_r = mixture(name, teacher, student, 0.4, **keywords)
    in_one = {"arithmetic_mixture": True, "geometric_mixture": False, "extrapolation": False}.get(
        name, keywords.get("alpha", 0) < 1
    )
    expected = np.isfinite(teacher) | np.isfinite(student) if in_one else np.isfinite(teacher) & np.isfinite(student)
    np.testing.assert_array_equal(np.isfinite(log_r), expected)
    function = cost(name, jnp.ones(student.shape).at[:, 3].set(2.0), 0.4, keywords)
    grads = jax.grad(function, argnums=(0, 1))(jnp.asarray(teacher), jnp.asarray(student))
    assert all(np.isfinite(grad).all() for grad in grads)
    disjoint = np.array([[0.0, -np.inf]]), np.array([[-np.inf, 0.0]])
    assert np.isfinite(mixture(name, *disjoint, 0.4, **keywords)).all() == in_one


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-13), ("float32", 1e-6)])
def test_no_jump_at_the_geometric_mixture(dtype, tolerance):
    teacher, student = logits()
    geometric = mixture("geometric_mixture", teacher, student, 0.3, dtype)
    for distance in (1e-4, 1e-6, 1e-9, 1e-13):
        for alpha in (1 - distance, 1 + distance):
            actual = mixture("alpha_mixture", teacher, student, 0.3, dtype, alpha=alpha)
            np.testing.assert_allclose(actual, geometric, atol=tolerance * 10 + 10 * distance, err_msg=str(alpha))


def test_known_points():
    teacher, student = logits()
    alpha_mixture = functools.partial(mixture, "alpha_mixture", teacher, student, 0.3)
    np.testing.assert_allclose(
        alpha_mixture(alpha=-1.0), mixture("arithmetic_mixture", teacher, student, 0.3), atol=1e-6
    )
    np.testing.assert_array_equal(alpha_mixture(alpha=1.0), mixture("geometric_mixture", teacher, student, 0.3))
    p, q = np.exp(log_softmax(teacher)), np.exp(log_softmax(student))
    with np.errstate(all="ignore"):
        harmonic = 1 / (0.3 / p + 0.7 / q)
    for alpha, mean in (3.0, harmonic), (-1e4, np.maximum(p, q)), (1e4, np.minimum(p, q)):
        expected = np.asarray(mean / mean.sum(-1, keepdims=True), float)
        np.testing.assert_allclose(np.exp(alpha_mixture(alpha=alpha)), expected, rtol=1e-5 if alpha == 3 else 1e-3)


def test_a_weight_per_token_traced_batched_and_vmapped():
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(z)) for z in logits(shape=(2, 3, 9)))
    weights = jnp.array([[0.0, 0.1, 1.0], [0.9, 0.5, 0.2]])
    for name, keywords in [(name, {"alpha": 0.5} if name == "alpha_mixture" else {}) for name in assistants.__all__]:
        function = functools.partial(getattr(assistants, name), **keywords)
        batched = function(log_p, log_q, weights)
        for other in jax.jit(function)(log_p, log_q, weights), jax.vmap(jax.vmap(function))(log_p, log_q, weights):
            np.testing.assert_allclose(other, batched, atol=1e-5)
        for index in np.ndindex(weights.shape):
            alone = function(log_p[index], log_q[index], float(weights[index]))
            np.testing.assert_allclose(alone, batched[index], atol=1e-5)


@functools.cache
def compiled(name):
    keywords = {"alpha": 2.0} if name == "alpha_mixture" else {}

    def total(teacher, student, weight):
        log_r = getattr(assistants, name)(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student), weight, **keywords)
        return jnp.sum(jnp.exp(log_r) ** 2), log_r

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("name", assistants.__all__)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    z=hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-100, 100, width=32)),
    dead=hnp.arrays(bool, (5,), elements=st.booleans()),
    weight=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32)),
)
def test_properties(name, z, dead, weight):
    dead[0] = False
    teacher, student = np.where(dead, -np.inf, z)
    (_, log_r), grads = compiled(name)(teacher, student, weight)
    np.testing.assert_allclose(np.exp(log_r).sum(-1), 1, rtol=1e-4)
    np.testing.assert_array_equal(np.isneginf(log_r), np.broadcast_to(dead, log_r.shape))
    assert all(np.isfinite(grad).all() for grad in grads)


def test_half_precision_and_numbers_out_of_range():
    log_p = jax.nn.log_softmax(jnp.asarray([1.0, 2.0], jnp.bfloat16))
    for name in assistants.__all__:
        keywords = {"alpha": 0.5} if name == "alpha_mixture" else {}
        assert getattr(assistants, name)(log_p, log_p, 0.5, **keywords).dtype == jnp.float32
        for weight in (float("nan"),) if name == "extrapolation" else (-0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match=f"weight .*{weight!r}"):
                getattr(assistants, name)(log_p, log_p, weight, **keywords)
    with pytest.raises(ValueError, match=r"alpha .*inf"):
        assistants.alpha_mixture(log_p, log_p, 0.5, alpha=float("inf"))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_traced_alpha_gives_what_the_number_gives(alpha, dtype):
    teacher, student = logits()
    fixed = mixture("alpha_mixture", teacher, student, 0.3, dtype, alpha=alpha)
    with jax.enable_x64(dtype == "float64"):
        array = jnp.full(len(teacher), alpha, dtype)
        traced = mixture("alpha_mixture", teacher, student, 0.3, dtype, alpha=array)
    near_one = 1e-6 * abs(alpha - 1) ** -1 if 0 < abs(alpha - 1) < 1e-5 else 0  # because alpha is rounded
    tolerance = 3e-6 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(traced, fixed, rtol=tolerance, atol=tolerance + near_one * 1e-7)
    alone = mixture("alpha_mixture", teacher, student, 0.3, dtype, alpha=array[0])
    np.testing.assert_array_equal(alone, traced)


@pytest.mark.parametrize("weight", [-0.5, 1.25, 3.0])
def test_an_extrapolation_goes_beyond_both(weight):
    """Entries without mass in one model have none in the assistant, although the formula divides by their probability."""
    teacher, student = logits()
    teacher[..., 2] = student[..., 3] = -np.inf
    expected = oracle("extrapolation", log_softmax(teacher), log_softmax(student), weight)
    np.testing.assert_allclose(mixture("extrapolation", teacher, student, weight), expected, rtol=2e-5, atol=1e-5)
    coefficient = np.random.default_rng(2).normal(size=teacher.shape).astype(np.float32)
    gradients = jax.grad(cost("extrapolation", coefficient, weight, {}), argnums=(0, 1))(teacher, student)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


@pytest.mark.parametrize("name", ["arithmetic_mixture", "geometric_mixture", "extrapolation"])
def test_an_assistant_among_two_is_the_assistant_between_them(name):
    function = getattr(assistants, name)
    teacher, student = logits()
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(z, jnp.float32)) for z in (teacher, student))
    among = assistants.AMONG[function]((log_p, log_q), (0.3, 0.7))
    np.testing.assert_allclose(among, function(log_p, log_q, 0.3), rtol=2e-5, atol=1e-5)
    cost = lambda z: jnp.exp(assistants.AMONG[function]((log_p, jax.nn.log_softmax(z)), (0.3, 0.7)))[..., 0].sum()
    assert np.all(np.isfinite(jax.grad(cost)(jnp.asarray(student, jnp.float32))))


def test_a_mixture_among_three_is_their_mean():
    log_probs = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(3).normal(size=(3, 5)), jnp.float32))
    weights = (0.5, 0.3, 0.2)
    found = jnp.exp(assistants.AMONG[assistants.arithmetic_mixture](list(log_probs), weights))
    np.testing.assert_allclose(found, np.asarray(weights) @ np.exp(log_probs), rtol=1e-5)
