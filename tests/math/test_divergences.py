"""Compares divergences with an oracle in extended precision that follows the definitions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kd_jax import divergences
from kd_jax.divergences import weighted_kl
from tests.helpers.divergences import NOT_LEAST_AT_EQUALITY, call

KEYWORDS = {
    "forward_kl": [{}],
    "reverse_kl": [{}],
    "mixed_kl": [{"forward_weight": w} for w in (0.0, 0.3, 1.0)],
    "adaptive_kl": [{"head_mass": m, "include_crossing": c} for m in (0.5, 0.9) for c in (True, False)],
    "jensen_shannon": [{"weight": w} for w in (0.5, 0.1, 0.9, 0.02)],
    "skew_forward_kl": [{"skew": s} for s in (0.1, 0.7, 1e-4, 0.0)],
    "skew_reverse_kl": [{"skew": s} for s in (0.1, 0.7, 1e-4, 0.0)],
    "total_variation": [{}],
    "alpha_divergence": [{"alpha": a} for a in (0.5, 0.0, 1.0, 0.01, 0.99, -0.5, 1.5)],
    "alpha_beta": [
        {"alpha": a, "beta": b}
        for a, b in [(0.2, 0.7), (0.5, 0.5), (1, 0), (0, 1), (0, 0), (0.5, 0), (0, 0.5), (1, 1), (2, 1.5)]
        + [(0.5, -0.5), (1.2, -0.2), (-0.3, 0.9), (0.9, -0.3), (-0.5, 0.5), (0.04, 0.03), (0.01, -0.02), (-0.5, -0.4)]
    ],
    "chi_square": [{"of": of} for of in ("pearson", "neyman")],
    "concrete_score": [
        {},
        {"weights": ("uniform", "student"), "temperature": 2.0},
        {"weights": ("mixture", "teacher"), "teacher_share": 0.3},
    ],
    "coverage": [{"k": k} for k in (3, 1)],
    "decoupled_kl": [{"target_weight": v, "rest_weight": w} for v, w in ((1.0, 1.0), (1.0, 5.0), (0.0, 1.0))],
    "entropy_ordered_kl": [{}, {"heavy": 3.0, "light": 0.5}],
    "logit_differences": [{}, {"k": 3, "leader": "student"}],
    "logit_mse": [{"weights": "uniform"}, {"weights": "student"}, {"weights": "teacher", "standardise": True}],
    "nkd": [{}, {"gamma": 1.0, "temperature": 1.0}],
    "plackett_luce": [{}, {"k": 3}],
    "renyi": [{"alpha": a} for a in (0.5, 2.0, 0.0, 1.0, 0.999, 1.001, 3.0)],
    "surrogate_reverse_kl": [{"weights": w} for w in ("student", "teacher", "uniform")],
    "tsallis": [{"order": r} for r in (0.7, 0.0, 1.0, 1e-3, 2.0)],
}
# Every divergence in __all__ is tested with its defaults. Other keyword arguments may be added above.
KEYWORDS |= {name: [{}] for name in divergences.__all__ if name not in KEYWORDS}
CASES = [(name, keywords) for name in divergences.__all__ for keywords in KEYWORDS[name]]
every_case = pytest.mark.parametrize(
    "name, keywords", CASES, ids=[f"{n}-{'-'.join(map(str, k.values()))}" for n, k in CASES]
)


# The oracle follows the definitions, with the 64 bits of mantissa and 15 bits of exponent of a longdouble.


def rel_entr(p, q):
    with np.errstate(all="ignore"):
        return np.where(p == 0, 0, np.where(q == 0, np.inf, p * np.log(p / q)))


def oracle_alpha_beta(p, q, a, b):
    support = (p > 0) | (q > 0)
    p, q = np.where(support, p, 1), np.where(support, q, 1)  # equal values add nothing
    log_p, log_q = np.log(p), np.log(q)
    if a == b == 0:
        value = (log_p - log_q) ** 2 / 2
    elif b == 0:
        value = (np.where(p > 0, p**a * a * (log_p - log_q), 0) - p**a + q**a) / a**2
    elif a == 0:
        value = (np.where(q > 0, q**b * b * (log_q - log_p), 0) - q**b + p**b) / b**2
    elif a + b == 0:
        value = (a * (log_q - log_p) + (p / q) ** a - 1) / a**2
    else:
        value = -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)
    return value.sum(-1)


def power_sum(p, q, a):
    """Returns the sum of p^a q^(1 - a) for a positive a that is not 1."""
    with np.errstate(all="ignore"):
        of_p_alone = np.inf if a > 1 else 0
        return np.where(p == 0, 0, np.where(q == 0, of_p_alone, p**a * q ** (1 - a))).sum(-1)


def weights_of(word, p, q, temperature=1, share=0.5):
    p, q = (x ** (1 / temperature) / (x ** (1 / temperature)).sum(-1, keepdims=True) for x in (p, q))
    support = (p > 0) | (q > 0)
    uniform = support / support.sum(-1, keepdims=True)
    return {"teacher": p, "student": q, "uniform": uniform, "mixture": share * p + (1 - share) * q}[word]


def oracle(name, p, q, constant=None, target=None, **kw):
    """Returns the value by the definition. `constant` is the q of factors that are constants to the gradient."""
    kw = {k: np.longdouble(v) if isinstance(v, float) else v for k, v in kw.items()}
    fixed = q if constant is None else constant
    forward, reverse = rel_entr(p, q).sum(-1), rel_entr(q, p).sum(-1)
    with np.errstate(all="ignore"):
        log_p, log_q, log_fixed = np.log(p), np.log(q), np.log(fixed)
    match name:
        case "forward_kl":
            return forward
        case "reverse_kl":
            return reverse
        case "mixed_kl":
            w = kw["forward_weight"]
            return forward if w == 1 else reverse if w == 0 else w * forward + (1 - w) * reverse
        case "adaptive_kl":
            head = np.zeros(p.shape, bool)
            for row in np.ndindex(p.shape[:-1]):
                mass = 0
                for rank, token in enumerate(np.argsort(-p[row], kind="stable")):
                    crosses = mass + p[row][token] >= kw["head_mass"]
                    if mass >= kw["head_mass"] or (crosses and not kw["include_crossing"] and rank > 0):
                        break
                    head[row][token] = True
                    mass += p[row][token]
            gap = np.abs(p - fixed)
            share = (gap * head).sum(-1) / gap.sum(-1)
            return share * forward + (1 - share) * reverse
        case "jensen_shannon":
            w = kw["weight"]
            m = w * p + (1 - w) * q
            return w * rel_entr(p, m).sum(-1) + (1 - w) * rel_entr(q, m).sum(-1)
        case "skew_forward_kl":
            return rel_entr(p, kw["skew"] * p + (1 - kw["skew"]) * q).sum(-1)
        case "skew_reverse_kl":
            return rel_entr(q, kw["skew"] * q + (1 - kw["skew"]) * p).sum(-1)
        case "total_variation":
            return np.abs(p - q).sum(-1) / 2
        case "alpha_divergence":
            return oracle_alpha_beta(p, q, kw["alpha"], 1 - kw["alpha"])
        case "alpha_beta":
            return oracle_alpha_beta(p, q, np.longdouble(kw["alpha"]), np.longdouble(kw["beta"]))
        case "jeffreys":
            return forward + reverse
        case "squared_hellinger":
            return ((np.sqrt(p) - np.sqrt(q)) ** 2).sum(-1) / 2
        case "hellinger":
            return np.sqrt(((np.sqrt(p) - np.sqrt(q)) ** 2).sum(-1) / 2)
        case "chi_square":
            of = q if kw["of"] == "pearson" else p
            with np.errstate(all="ignore"):
                return np.where(p == q, 0, (p - q) ** 2 / of).sum(-1)
        case "renyi":
            a = kw["alpha"]
            if a == 0:
                return -np.log1p(-np.where(p == 0, q, 0).sum(-1))
            return forward if a == 1 else np.log(power_sum(p, q, a)) / (a - 1)
        case "tsallis":
            r = kw["order"]
            if r == 0:
                return np.where(p == 0, q, 0).sum(-1)
            return forward if r == 1 else (power_sum(p, q, r) - 1) / (r - 1)
        case "todi":
            gate = p / np.where(p + fixed == 0, 1, p + fixed)
            return (gate * rel_entr(p, q) + (1 - gate) * rel_entr(q, p)).sum(-1)
        case "entropy_ordered_kl":
            heavy, light = kw.get("heavy", 2), kw.get("light", 1)
            of_p, of_q = (-rel_entr(x, np.ones_like(x)).sum(-1) for x in (p, fixed))
            return np.where(of_p > of_q, heavy, light) * forward + np.where(of_q > of_p, heavy, light) * reverse
        case "concrete_score":
            number = (kw.get("temperature", 1), kw.get("teacher_share", 0.5))
            v, w = (weights_of(word, p, fixed, *number) for word in kw.get("weights", ("student", "student")))
            total = np.zeros(p.shape[:-1], np.longdouble)
            for row in np.ndindex(total.shape):  # a loop over rows, because the pairs need much memory
                used = (v[row] > 0) | (w[row] > 0)
                with np.errstate(all="ignore"):
                    d = (log_q[row] - log_p[row])[used]
                    total[row] = (v[row][used] @ (d[:, None] - d) ** 2 @ w[row][used]) / 4
            return total
        case "logit_mse":
            w = weights_of(kw["weights"], p, fixed)
            z_p, z_q = log_p, log_q
            if kw.get("standardise"):
                z_p, z_q = (
                    (z - np.mean(z, -1, where=z > -np.inf, keepdims=True))
                    / (np.std(z, -1, where=z > -np.inf, ddof=1, keepdims=True) + np.longdouble(1e-9))
                    for z in (z_p, z_q)
                )
            with np.errstate(all="ignore"):
                return np.where(w > 0, w * (z_q - z_p) ** 2, 0).sum(-1) / 4
        case "decoupled_kl":
            at = np.arange(p.shape[-1]) == np.asarray(target)[..., None]
            two_p, two_q = (np.stack([(x * at).sum(-1), (x * ~at).sum(-1)], -1) for x in (p, q))
            two_q = np.where(at.any(-1, keepdims=True), two_q, two_p)
            with np.errstate(all="ignore"):
                rest_p, rest_q = (x * ~at / (x * ~at).sum(-1, keepdims=True) for x in (p, q))
            of_rest = rel_entr(rest_p, rest_q).sum(-1)
            return kw["target_weight"] * rel_entr(two_p, two_q).sum(-1) + kw["rest_weight"] * of_rest
        case "nkd":
            at, temperature = np.arange(p.shape[-1]) == np.argmax(p, -1)[..., None], kw.get("temperature", 2)
            rest_p, rest_q = (weights_of("teacher", x * ~at, x, temperature) for x in (p, q))
            with np.errstate(all="ignore"):
                cross = lambda x, y: np.where(x > 0, -x * np.log(y), 0).sum(-1)
                return cross(p * at, q) + kw.get("gamma", np.longdouble(0.25)) * cross(rest_p, rest_q)
        case "logit_differences":
            total = np.zeros(p.shape[:-1], np.longdouble)
            for row in np.ndindex(total.shape):
                leader = fixed[row] if kw.get("leader") == "student" else p[row]
                order = np.argsort(-leader, kind="stable")[: kw.get("k", 8)]
                pairs = [pair for pair in itertools.combinations(order, 2) if (p[row] * q[row])[[*pair]].all()]
                of_p, of_q = (softmax([log[row][i] - log[row][j] for i, j in pairs]) for log in (log_p, log_q))
                total[row] = rel_entr(of_p, of_q).sum()
            return total
        case "plackett_luce":
            total = np.zeros(p.shape[:-1], np.longdouble)
            for row in np.ndindex(total.shape):
                order = [i for i in np.argsort(-p[row], kind="stable")[: kw.get("k", 8)] if p[row][i] > 0]
                with np.errstate(all="ignore"):
                    total[row] = -np.mean(
                        [log_q[row][i] - np.log(q[row][order[n:]].sum()) for n, i in enumerate(order)]
                    )
            return total
        case "coverage":
            order = np.argsort(-p, axis=-1, kind="stable")[..., : kw["k"]]
            return -np.log(np.take_along_axis(q, order, -1).sum(-1))
        case "surrogate_reverse_kl":
            w = weights_of(kw["weights"], p, fixed)
            with np.errstate(all="ignore"):
                return np.where((p > 0) & (q > 0), w * (log_fixed - log_p) * log_q, 0).sum(-1)
        case _:
            raise AssertionError(f"write the definition of {name} in `oracle` of tests/math/test_divergences.py")


def targets(shape, vocab):
    """Returns a token for each row. Every third one is outside the vocabulary."""
    return (3 * np.arange(np.prod(shape, dtype=int)).reshape(shape) + vocab - 4) % (vocab + 3)


def softmax(z):
    z = np.asarray(z, np.longdouble)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle_grad(name, teacher, student, step=1e-6, **kw):
    """Returns central differences of the oracle in the student's logits, with 0 for entries without mass."""
    p, constant, grad = softmax(teacher), softmax(student), np.zeros(student.shape)
    value = lambda logits: oracle(name, p, softmax(logits), constant, targets(p.shape[:-1], p.shape[-1]), **kw)
    for v in range(student.shape[-1]):
        if np.isfinite(student[..., v]).all():
            up, down = (np.asarray(student, np.longdouble) for _ in range(2))
            up[..., v] += np.longdouble(step)
            down[..., v] -= np.longdouble(step)
            grad[..., v] = (value(up) - value(down)) / (2 * np.longdouble(step))
    return grad


def value_and_grads(name, teacher, student, dtype="float32", **kw):
    """Returns the value per token and the gradients of the sum with respect to the teacher's and student's logits."""

    target = jnp.asarray(targets(np.shape(student)[:-1], np.shape(student)[-1]))

    def total(teacher, student):
        value = call(name, jax.nn.log_softmax(teacher), jax.nn.log_softmax(student), target, **kw)
        return value.sum(), value

    with jax.enable_x64(dtype == "float64"), jax.debug_nans(True):  # no NaN even in unselected branches
        arrays = jnp.asarray(teacher, dtype), jnp.asarray(student, dtype)
        (_, value), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*arrays)
        assert value.dtype == dtype
        return np.asarray(value), *map(np.asarray, grads)


def expected_value(name, teacher, student, **kw):
    """Returns the value of the oracle in double precision."""
    p, q = softmax(teacher), softmax(student)
    with np.errstate(all="ignore"):
        value = oracle(name, p, q, target=targets(p.shape[:-1], p.shape[-1]), **kw)
        return np.asarray(value, float)


def logits(scale=2.0, shape=(3, 9), seed=0):
    teacher, student = np.random.default_rng(seed).normal(size=(2, *shape)) * scale
    return teacher, student


def no_mass(teacher, student):
    """Returns logits in which two entries have no mass under either model."""
    teacher, student = teacher.copy(), student.copy()
    teacher[..., [1, 4]] = student[..., [1, 4]] = -np.inf
    return teacher, student


def test_scipy_agrees():
    teacher, student = logits(shape=(5, 40))
    p, q = np.asarray(softmax(teacher), float), np.asarray(softmax(student), float)
    kl, mean = scipy.stats.entropy, np.mean([p, q], axis=0)
    expected = {
        "forward_kl": kl(p, q, axis=-1),
        "reverse_kl": kl(q, p, axis=-1),
        "mixed_kl": (kl(p, q, axis=-1) + kl(q, p, axis=-1)) / 2,
        "jensen_shannon": scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2,
        "skew_forward_kl": kl(p, 0.1 * p + 0.9 * q, axis=-1),
        "skew_reverse_kl": kl(q, 0.1 * q + 0.9 * p, axis=-1),
        "total_variation": scipy.spatial.distance.cdist(p, q, "cityblock").diagonal() / 2,
    }
    np.testing.assert_allclose(expected["jensen_shannon"], (kl(p, mean, axis=-1) + kl(q, mean, axis=-1)) / 2)
    for name, value in expected.items():
        np.testing.assert_allclose(
            value_and_grads(name, teacher, student, "float64")[0], value, rtol=1e-11, err_msg=name
        )


@every_case
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_value_and_gradient(name, keywords, masked):
    teacher, student = no_mass(*logits()) if masked else logits()
    expected = expected_value(name, teacher, student, **keywords)
    expected_grad = oracle_grad(name, teacher, student, **keywords)
    for dtype, tolerance in ("float64", 1e-11), ("float32", 3e-5):
        value, _, grad = value_and_grads(name, teacher, student, dtype, **keywords)
        np.testing.assert_allclose(value, expected, rtol=tolerance)
        tolerance = max(tolerance, 1e-8)
        np.testing.assert_allclose(grad, expected_grad, rtol=tolerance, atol=tolerance * np.abs(expected_grad).max())


@every_case
def test_logits_a_hundred_apart(name, keywords):
    teacher, student = no_mass(*logits(30.0))
    value, grad_teacher, grad = value_and_grads(name, teacher, student, **keywords)
    expected = expected_value(name, teacher, student, **keywords)
    fits = np.abs(expected) < np.finfo(np.float32).max
    np.testing.assert_allclose(value[fits], expected[fits], rtol=3e-4)
    assert not np.isnan(value).any()
    if fits.all():
        assert np.isfinite(grad).all() and np.isfinite(grad_teacher).all()
        expected = oracle_grad(name, teacher, student, **keywords)
        np.testing.assert_allclose(grad, expected, rtol=3e-4, atol=3e-5 * np.abs(expected).max())


@every_case
@pytest.mark.parametrize("lacking", ["teacher", "student"])
def test_no_mass_in_one_alone(name, keywords, lacking):
    teacher, student = no_mass(*logits())
    (teacher if lacking == "teacher" else student)[..., 6] = -np.inf
    value, grad_teacher, grad = value_and_grads(name, teacher, student, **keywords)
    expected = expected_value(name, teacher, student, **keywords)
    expected = np.where(np.isnan(expected), np.inf, expected)  # NaN comes from inf - inf in an infinite summand
    np.testing.assert_allclose(value, expected, rtol=3e-5)
    if np.isfinite(expected).all():
        assert np.isfinite(grad).all() and np.isfinite(grad_teacher).all()


@every_case
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_zero_with_zero_gradient_where_equal(name, keywords, scale):
    if name in NOT_LEAST_AT_EQUALITY:
        pytest.skip("the value is not 0 at equality by definition")
    teacher, _ = no_mass(*logits(scale))
    value, grad_teacher, grad = value_and_grads(name, teacher, teacher, **keywords)
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_allclose(grad, 0, atol=1e-7)
    np.testing.assert_allclose(grad_teacher, 0, atol=1e-7)


@every_case
def test_precise_where_nearly_equal(name, keywords):
    if name == "surrogate_reverse_kl":
        pytest.skip("the value is of first order, and has no meaning")
    teacher, noise = logits(3.0, shape=(4, 1000))
    student = np.float32(np.float32(teacher) + 1e-3 * noise)
    teacher = np.float32(teacher)
    value, _, _ = value_and_grads(name, teacher, student, **keywords)
    expected = expected_value(name, teacher, student, **keywords)
    # Log-probabilities are rounded by 1e-6 and differ by 1e-3. A plain sum of p (log p - log q) would be too inexact.
    np.testing.assert_allclose(value, expected, rtol=3e-3)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("at", [(1, 0), (0.5, 0), (0, 1), (0, 0.5), (0.5, -0.5), (-1, 1), (0, 0), (1, -1)], ids=str)
def test_no_jump_at_the_limits(at, dtype, tolerance):
    teacher, student = logits()
    value, _, grad = value_and_grads("alpha_beta", teacher, student, dtype, alpha=at[0], beta=at[1])
    directions = [(0, 1), (0, -1), (-1, 0), (1, 1), (1, -1)]
    for distance, (da, db) in itertools.product((1e-4, 1e-9, 1e-30), directions):
        near = {"alpha": at[0] + da * distance, "beta": at[1] + db * distance}
        value_near, _, grad_near = value_and_grads("alpha_beta", teacher, student, dtype, **near)
        np.testing.assert_allclose(value_near, value, rtol=tolerance + 30 * distance, err_msg=str(near))
        np.testing.assert_allclose(
            grad_near, grad, atol=(tolerance + 30 * distance) * np.abs(grad).max(), err_msg=str(near)
        )


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-5, 1e-7])
def test_precise_near_the_limits(distance):
    teacher, student = logits()
    p, q = softmax(teacher), softmax(student)
    for a, b in [(1, distance), (1, -distance), (distance, 1), (-distance, 1), (0.5, distance - 0.5)]:
        value, _, _ = value_and_grads("alpha_beta", teacher, student, alpha=a, beta=b)
        expected = oracle_alpha_beta(p, q, np.longdouble(a), np.longdouble(b))
        np.testing.assert_allclose(value, np.asarray(expected, float), rtol=1e-5, err_msg=str((a, b)))


def test_known_points():
    log_p, log_q = map(jax.nn.log_softmax, map(jnp.asarray, logits()))
    value = functools.partial(divergences.alpha_beta, log_p, log_q)
    forward, reverse = divergences.forward_kl(log_p, log_q), divergences.reverse_kl(log_p, log_q)
    np.testing.assert_array_equal(value(alpha=1, beta=0), forward)
    np.testing.assert_array_equal(value(alpha=0, beta=1), reverse)
    np.testing.assert_array_equal(divergences.skew_reverse_kl(log_p, log_q), divergences.skew_forward_kl(log_q, log_p))
    hellinger = 2 * jnp.sum((jnp.exp(log_p / 2) - jnp.exp(log_q / 2)) ** 2, -1)
    np.testing.assert_allclose(value(alpha=0.5, beta=0.5), hellinger, rtol=1e-5)
    half_jeffreys = divergences.mixed_kl(log_p, log_q)
    np.testing.assert_allclose(half_jeffreys, (forward + reverse) / 2, rtol=1e-6)


def test_the_limits_and_identities_of_the_families():
    with jax.enable_x64(True):
        log_p, log_q = map(jax.nn.log_softmax, map(jnp.asarray, logits()))
        forward, reverse = divergences.forward_kl(log_p, log_q), divergences.reverse_kl(log_p, log_q)
        for near in (1 - 1e-9, 1 + 1e-9):
            np.testing.assert_allclose(divergences.renyi(log_p, log_q, alpha=near), forward, rtol=1e-7)
            np.testing.assert_allclose(divergences.tsallis(log_p, log_q, order=near), forward, rtol=1e-7)
        half = divergences.renyi(log_p, log_q, alpha=0.5)
        squared = divergences.squared_hellinger(log_p, log_q)
        np.testing.assert_allclose(half, -2 * jnp.log1p(-squared), rtol=1e-12)
        np.testing.assert_allclose(divergences.hellinger(log_p, log_q) ** 2, squared, rtol=1e-12)
        np.testing.assert_allclose(
            divergences.jeffreys(log_p, log_q), 2 * divergences.mixed_kl(log_p, log_q), rtol=1e-12
        )
        np.testing.assert_allclose(divergences.todi(log_p, log_q), forward + reverse, rtol=1e-12)
        token = jnp.array([0, 5, 8])
        off = 1 - jnp.exp(jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0])
        decoupled = functools.partial(divergences.decoupled_kl, log_p, log_q)
        np.testing.assert_allclose(decoupled(target=token, rest_weight=off), forward, rtol=1e-12)
        np.testing.assert_allclose(decoupled(target=jnp.array([-1, 9, -100])), forward, rtol=1e-12)
        d, q = log_q - log_p, jnp.exp(log_q)
        variance = jnp.sum(q * d**2, axis=-1) - jnp.sum(q * d, axis=-1) ** 2
        np.testing.assert_allclose(divergences.concrete_score(log_p, log_q), variance / 2, rtol=1e-12)


def test_renyi_neither_vanishes_nor_overflows():
    log_p, log_q = jnp.array([-1e-30, -300.0]), jnp.array([-300.0, -1e-30])
    np.testing.assert_allclose(divergences.renyi(log_p, log_q, alpha=2.0), 300, rtol=1e-6)
    np.testing.assert_allclose(divergences.renyi(log_p, log_q, alpha=0.5), 300 - 2 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("name", list(divergences.ENTRIES))
def test_the_contributions_of_the_entries_sum_to_the_divergence(name):
    keywords = KEYWORDS[name][0]
    with jax.enable_x64(True), jax.debug_nans(True):
        teacher, student = map(jnp.asarray, no_mass(*logits()))

        def totals(function):
            def total(teacher, student):
                return function(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)).sum()

            return jax.value_and_grad(total, argnums=(0, 1))(teacher, student)

        entries = functools.partial(divergences.ENTRIES[name], **keywords)
        found = totals(entries)
        expected = totals(functools.partial(getattr(divergences, name), **keywords))
        assert entries(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)).shape == teacher.shape
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, expected)


def test_the_contributions_are_those_of_the_formulas():
    log_p, log_q = jnp.log(jnp.array([0.75, 0.25, 0.0])), jnp.log(jnp.array([0.25, 0.75, 0.0]))
    forward = divergences.ENTRIES["forward_kl"](log_p, log_q)
    np.testing.assert_allclose(forward, [0.75 * np.log(3), -0.25 * np.log(3), 0], rtol=1e-6)
    one_sided = divergences.ENTRIES["forward_kl"](jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0])))
    np.testing.assert_allclose(one_sided, [-0.5 * np.log(2), np.inf], rtol=1e-6)


def test_logit_mse_depends_on_constants_in_the_logits():
    z = jnp.array([1.0, 2.0, -jnp.inf])
    assert divergences.logit_mse(z, z + 2) == 1
    assert divergences.logit_mse(z, z + 2, standardise=True) == 0


def test_infinite_entries_add_nothing_to_the_gradient():
    teacher, student = logits()
    student[0, 2] = -np.inf
    value, _, grad = value_and_grads("forward_kl", teacher, student)
    assert np.isposinf(value[0]) and np.isfinite(value[1:]).all()
    assert np.isfinite(grad).all()


def test_masks_that_are_finite():
    teacher, student = logits()
    for large in (-1e9, -1e30, float(np.finfo(np.float32).min)):
        teacher[:, 3] = student[:, 3] = large
        teacher[:, 4] = large
        for name in ("forward_kl", "jensen_shannon", "skew_reverse_kl", "total_variation", "adaptive_kl"):
            value, _, grad = value_and_grads(name, teacher, student)
            assert not np.isnan(value).any() and np.isfinite(grad).all(), (name, large)
        value, _, grad = value_and_grads("alpha_beta", teacher, student, alpha=0.2, beta=0.7)
        assert np.isfinite(value).all() and np.isfinite(grad).all()


@functools.cache
def compiled(name):
    def losses(teacher, student, target):
        log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
        value = call(name, log_p, log_q, target, **KEYWORDS[name][0])
        return value.sum(), value

    return jax.jit(jax.value_and_grad(losses, argnums=(0, 1), has_aux=True))


finite_logits = hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-100, 100, width=32))


@pytest.mark.parametrize("name", divergences.__all__)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(z=finite_logits, dead=hnp.arrays(bool, (5,), elements=st.booleans()))
def test_properties(name, z, dead):
    dead[0] = False
    if name == "chi_square":
        z = z / 10  # the value would overflow
    teacher, student = np.where(dead, -np.inf, z)
    (_, value), grads = compiled(name)(teacher, student, targets((3,), 5))
    value = np.asarray(value)
    assert name == "surrogate_reverse_kl" or (value >= -1e-6).all()
    bound = {
        "total_variation": 1.0,
        "hellinger": 1.0,
        "squared_hellinger": 1.0,
        "jensen_shannon": np.log(2),
        "skew_forward_kl": -np.log(0.1),
        "skew_reverse_kl": -np.log(0.1),
        "tsallis": 1 / 0.3,
    }
    assert (value <= bound.get(name, np.inf) + 1e-5).all()
    assert np.isfinite(value).all() and all(np.isfinite(grad).all() for grad in grads)
    # The gradient sums to 0, because a constant shift of the logits does not change the value.
    np.testing.assert_allclose(np.asarray(grads[1]).sum(-1), 0, atol=1e-4 * max(1, np.abs(grads[1]).max()))


@pytest.mark.parametrize("name", divergences.__all__)
def test_the_divergence_of_nan_is_nan(name):
    """An evaluation would otherwise report that a model with NaN parameters equals the teacher."""
    unknown, known = jnp.full(4, jnp.nan), jax.nn.log_softmax(jnp.arange(4.0))
    zeros = jnp.log(jnp.array([0.5, 0.5, 0.0, 0.0]))
    for pair in ((unknown, unknown), (unknown, known), (known, unknown), (unknown, zeros), (zeros, unknown)):
        assert jnp.isnan(call(name, *pair, target=jnp.int32(0)))


@pytest.mark.parametrize("name", divergences.__all__)
def test_one_token_a_batch_and_vmap_agree_with_jit(name):
    function = functools.partial(call, name, **KEYWORDS[name][0])
    log_p, log_q = map(jax.nn.log_softmax, map(jnp.asarray, logits(shape=(2, 3, 9))))
    arrays = log_p, log_q, jnp.asarray(targets((2, 3), 9))
    batched = function(*arrays)
    assert batched.shape == (2, 3)
    for other in (jax.jit(function), jax.vmap(function), jax.vmap(jax.vmap(function))):
        np.testing.assert_allclose(other(*arrays), batched, rtol=1e-6)
    np.testing.assert_allclose(function(*(array[1, 2] for array in arrays)), batched[1, 2], rtol=1e-6)


@pytest.mark.parametrize(
    "name, keyword", [("jensen_shannon", "weight"), ("skew_forward_kl", "skew"), ("mixed_kl", "forward_weight")]
)
def test_a_weight_per_token(name, keyword):
    teacher, student = no_mass(*logits(10.0, shape=(2, 5, 9)))
    student[..., 6] = -np.inf
    log_p, log_q = jax.nn.log_softmax(jnp.asarray(teacher)), jax.nn.log_softmax(jnp.asarray(student))
    numbers = [0.0, 0.1, 0.5, 1 - 2.0**-10, 1.0]
    function = getattr(divergences, name)
    value = function(log_p, log_q, **{keyword: jnp.broadcast_to(jnp.array(numbers), (2, 5))})
    for i, number in enumerate(numbers):
        # A Python number is an error at an end at which the divergence vanishes.
        given = number if keyword == "forward_weight" or 0 < number < 1 else jnp.array(number)
        expected = function(log_p[:, i], log_q[:, i], **{keyword: given})
        np.testing.assert_allclose(value[:, i], expected, rtol=1e-5, atol=1e-7)
        traced = jax.jit(lambda w, i=i: function(log_p[:, i], log_q[:, i], **{keyword: w}))(number)
        np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-7)


def test_adaptive_head():
    # Tokens of equal probability are all in the head or all outside. Here the head is the first three tokens.
    log_p = jnp.log(jnp.array([0.3, 0.3, 0.3, 0.1]))
    log_q = jnp.log(jnp.array([0.2, 0.4, 0.3, 0.1]))
    forward, reverse = divergences.forward_kl(log_p, log_q), divergences.reverse_kl(log_p, log_q)
    np.testing.assert_allclose(divergences.adaptive_kl(log_p, log_q, head_mass=0.5), forward, rtol=1e-6)
    permuted = [2, 3, 0, 1]
    np.testing.assert_allclose(divergences.adaptive_kl(log_p[..., permuted], log_q[..., permuted]), forward, rtol=1e-6)
    # Without the crossing token, tokens that reach the mass exactly stay in the head, and the first token always does.
    p = jnp.array([0.125, 0.5, 0.25, 0.125])
    heads = [weighted_kl._head(p, mass, include_crossing=False).tolist() for mass in (0.75, 0.7, 0.1)]
    assert heads == [[False, True, True, False], [False, True, False, False], [False, True, False, False]]
    # Only the tail differs, so the value is reverse KL. With head_mass=1 every token is in the head.
    p, q = jnp.array([0.6, 0.2, 0.1, 0.1]), jnp.array([0.6, 0.2, 0.15, 0.05])
    forward, reverse = (f(jnp.log(p), jnp.log(q)) for f in (divergences.forward_kl, divergences.reverse_kl))
    np.testing.assert_allclose(divergences.adaptive_kl(jnp.log(p), jnp.log(q)), reverse, rtol=1e-6)
    np.testing.assert_allclose(divergences.adaptive_kl(jnp.log(p), jnp.log(q), head_mass=1.0), forward, rtol=1e-6)


def test_half_precision_is_computed_in_single():
    teacher, student = (jnp.asarray(z, jnp.bfloat16) for z in logits())
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    target = jnp.asarray(targets((3,), 9))
    for name in divergences.__all__:
        function = functools.partial(call, name, target=target, **KEYWORDS[name][0])
        value = function(log_p, log_q)
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, function(log_p.astype(jnp.float32), log_q.astype(jnp.float32)))
        np.testing.assert_array_equal(value, function(log_p, log_q.astype(jnp.float32)))


def test_single_stays_single_where_double_is_enabled():
    with jax.enable_x64(True):
        vector = jax.ShapeDtypeStruct((2,), jnp.float32)
        for name, keywords in CASES:
            function = functools.partial(call, name, target=jnp.array(1), **keywords)
            shapes = jax.eval_shape(jax.value_and_grad(function), vector, vector)
            assert [shape.dtype for shape in shapes] == [jnp.float32, jnp.float32], (name, keywords)


@pytest.mark.parametrize(
    "name, keyword, value",
    [
        ("mixed_kl", "forward_weight", 1.01),
        ("adaptive_kl", "head_mass", -0.1),
        ("jensen_shannon", "weight", -0.5),
        ("skew_forward_kl", "skew", 2),
        ("skew_reverse_kl", "skew", float("nan")),
        ("alpha_divergence", "alpha", float("inf")),
        ("renyi", "alpha", -0.5),
        ("tsallis", "order", float("nan")),
        ("chi_square", "of", "yates"),
        ("entropy_ordered_kl", "heavy", -1.0),
        ("concrete_score", "weights", ("student", "reference")),
        ("concrete_score", "weights", ("student",)),
        ("concrete_score", "temperature", 0.0),
        ("concrete_score", "teacher_share", 1.5),
        ("logit_mse", "weights", "mixture"),
        ("logit_differences", "k", 1),
        ("logit_differences", "leader", "reference"),
        ("plackett_luce", "k", -1),
        ("coverage", "k", 0),
        ("nkd", "gamma", -0.25),
        ("nkd", "temperature", 0.0),
        ("decoupled_kl", "rest_weight", -1.0),
        ("surrogate_reverse_kl", "weights", "none"),
    ],
)
def test_a_number_out_of_range_is_named(name, keyword, value):
    log_p = jnp.log(jnp.array([0.5, 0.5]))
    with pytest.raises(ValueError, match=keyword) as error:
        call(name, log_p, log_p, jnp.array(0), **{keyword: value})
    assert repr(value) in str(error.value) or repr(value[-1]) in str(error.value)


def test_alpha_beta_names_the_one_that_is_wrong():
    log_p = jnp.log(jnp.array([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"^beta .*nan"):
        divergences.alpha_beta(log_p, log_p, alpha=1.0, beta=float("nan"))


@pytest.mark.parametrize("loss", [divergences.forward_kl, divergences.reverse_kl], ids=["forward", "reverse"])
def test_the_second_derivative_at_equality_is_fishers(loss):
    logits = jnp.array([0.3, -1.0, 0.5])
    log_p, q = jax.nn.log_softmax(logits), jax.nn.softmax(logits)
    hessian = jax.hessian(lambda logits: loss(log_p, jax.nn.log_softmax(logits)))(logits)
    np.testing.assert_allclose(hessian, jnp.diag(q) - jnp.outer(q, q), atol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 0.5), (2.0, 2.0), (0.2, 0.7), (-0.5, 2.0)])
def test_logits_that_are_masked_by_a_huge_number_leave_the_gradient_finite(alpha, beta):
    log_p = jax.nn.log_softmax(jnp.array([1.0, 2.0, 0.5]))
    logits = jnp.array([1.0, 2.0, jnp.finfo(jnp.float32).min])
    loss = lambda logits: divergences.alpha_beta(log_p, jax.nn.log_softmax(logits), alpha=alpha, beta=beta)
    value, gradient = jax.value_and_grad(loss)(logits)
    assert np.isfinite(value) and np.all(np.isfinite(gradient)) and np.any(gradient)
