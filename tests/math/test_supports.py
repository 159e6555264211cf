"""Compares supports, transforms of logits and per-token temperatures with published code, and tests properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import divergences, logit_transforms, supports, temperatures
from kd_jax.supports import make_support
from kd_jax.supports.outcomes import NO_OUTCOME
from tests.helpers.axes import CASES as ALL_CASES
from tests.helpers.axes import arrays, closed, numbered

KEYS = numbered(
    0, 1, 53, 54, 73, closed(75, 77), closed(98, 103), closed(105, 109), closed(127, 142), closed(146, 149), 152, 153, 191,
    192,
)  # fmt: skip
CASES = [ALL_CASES[key] for key in KEYS]
TOP_K = ["teacher_top_k", "student_top_k", "union", "intersection"]
RESTS = ["tail", "renormalised", "dropped"]


def plain_kl(log_p, log_q):
    """Returns sum p (log p - log q). For sides that do not sum to 1 this is not `divergences.forward_kl`."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def of_token(values, target):
    return jnp.take_along_axis(values, target[..., None], axis=-1)[..., 0]


def spec_of(case):
    """Returns the case's vocabulary as a spec of this package. The prose of some cases has keys of its own here."""
    op, params = case["op"], case["params"]
    spec = dict(op["terms"]["forward"] if "terms" in op else op).get("vocabulary", {"support": "whole"})
    if params.get("zero_outside"):
        return {"support": "teacher_top_k", "k": params["k"], "outside": -100.0}
    if params.get("tail_sampling"):
        return spec | {"support": "teacher_top_k", "add_target": True}
    if "strategy" in params:
        name = {"only_stu": "student_top_k", "only_tch": "teacher_top_k"}.get(params["strategy"], params["strategy"])
        return {"support": name, "k": params["k"], "rest": "dropped"}
    return spec


def support_policy_gradient(log_p, log_q):
    weight = jax.nn.softmax(log_q, axis=-1)
    return jnp.sum(jax.lax.stop_gradient(weight * (log_q - log_p)) * log_q, axis=-1)


def compared(case, log_p, log_q, target):
    """Returns the value of each token."""
    op, params, spec = case["op"], case["params"], spec_of(case)
    restrict = make_support(spec)
    assert (restrict is None) == (spec["support"] == "whole")
    if restrict:
        log_p, log_q, target = restrict(log_p, log_q, target)
    if op.get("kind") == "support_policy_gradient":
        return support_policy_gradient(log_p, log_q)
    if "verl" in case["id"]:  # the code has these limits, of which the last is always on
        log_p, log_q = (jnp.maximum(x, params["log_prob_min"] or -jnp.inf) for x in (log_p, log_q))
        return jnp.clip(plain_kl(log_p, log_q), 0, params["value_max"])
    if case["id"].startswith("top_k/sharp_tail"):  # TRL limits the logarithm of the mass of the k ids to -1e-7
        least = np.log(-np.expm1(-1e-7))
        return plain_kl(*(x.at[..., -1].set(jnp.maximum(x[..., -1], least)) for x in (log_p, log_q)))
    if "teacher" in spec:
        return plain_kl(log_p, log_q)
    return getattr(divergences, op["divergence"]["name"])(log_p, log_q, **op["divergence"].get("kwargs", {}))


def eopd(case, log_p, log_q, target):
    """Returns the forward part at tokens of high teacher entropy, plus the surrogate at ratio 1."""
    gate = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1) >= case["params"]["threshold"]
    log_p_y, log_q_y = of_token(log_p, target), of_token(log_q, target)
    advantage = jax.lax.stop_gradient(log_p_y - log_q_y)
    surrogate = -advantage * jnp.exp(log_q_y - jax.lax.stop_gradient(log_q_y))
    return surrogate + gate * compared(case, log_p, log_q, target)


def average(case, values, counted):
    counted = counted & (np.arange(counted.shape[1]) >= case["params"].get("skipped_first_tokens", 0))
    if case["params"].get("kept_rows"):
        counted = counted & np.array(case["params"]["kept_rows"], bool)[:, None]
    if case["op"].get("average", "token").startswith("sequence"):
        return jnp.mean(jnp.sum(counted * values, axis=1) / np.maximum(counted.sum(axis=1), 1))
    return jnp.sum(counted * values) / counted.sum()


def transformed(case, teacher, student):
    """Returns both models' logits as the case's divergence takes them, and the factor of the divergence."""
    op = case["op"]
    if "normkd" in case["id"]:
        of_teacher, of_student = temperatures.own_deviation(teacher, student)
        return teacher / of_teacher[..., None], student / of_student[..., None], of_teacher**2
    if "dtkd" in case["id"]:
        of_teacher, of_student = temperatures.relative_maximum(teacher, student)
        return teacher / of_teacher[..., None], student / of_student[..., None], 1.0
    transform = logit_transforms.raw
    if op.get("logits") == "centred":
        transform = logit_transforms.centred
    elif "logits" in op:
        transform = functools.partial(logit_transforms.z_score, epsilon=1e-9 if "1e-9" in op["logits"] else 1e-7)
    temperature = op.get("temperature", 1.0)
    factor = temperature**2 if op.get("temperature_squared") is True else 1.0
    return transform(teacher) / temperature, transform(student) / temperature, factor


def loss_of(case, student):
    of = lambda name: arrays()[f"inputs/{case['inputs']}/{name}"]
    target, counted = jnp.asarray(of("targets")), of("mask")
    teacher = jnp.asarray(of("teacher_logits"))
    z_p, z_q, factor = transformed(case, teacher, student)
    if case["op"].get("divergence", {}).get("name") == "weighted_logit_mse":
        by = {"S": student, "T": teacher}[case["op"]["divergence"]["kwargs"]["weights"]]
        weight = jax.lax.stop_gradient(jax.nn.softmax(by, axis=-1))
        return average(case, jnp.sum(weight * (z_q - z_p) ** 2, axis=-1) / 4, counted)
    log_p, log_q = jax.nn.log_softmax(z_p), jax.nn.log_softmax(z_q)
    values = factor * (eopd if "terms" in case["op"] else compared)(case, log_p, log_q, target)
    tokens = case["op"].get("tokens", "none")
    if tokens != "none":
        ratio = jnp.exp(of_token(jax.lax.stop_gradient(log_q), target) - of("old_log_probs"))
        values = values * jnp.minimum(ratio, tokens["at_most"])
    return average(case, values, counted)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['key']}-{c['id']}")
def test_published_losses_and_gradients(case):
    with jax.enable_x64(True):
        student = jnp.asarray(arrays()[f"inputs/{case['inputs']}/student_logits"])
        loss, gradient = jax.jit(jax.value_and_grad(functools.partial(loss_of, case)))(student)
    expected = arrays()[f"{case['key']}/grad"]
    np.testing.assert_allclose(loss, arrays()[f"{case['key']}/loss"], rtol=1e-9)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def two(seed=0, shape=(4, 3), size=40, dtype=jnp.float32, spread=2.0):
    """Returns the log-probabilities of two random distributions for each token."""
    logits = spread * jax.random.normal(jax.random.key(seed), (2, *shape, size), dtype)
    return jax.nn.log_softmax(logits, axis=-1)


@pytest.mark.parametrize("key", ["c0191", "c0192"])
def test_published_sizes_of_a_budget(key):
    (case,) = (c for c in CASES if c["key"] == key)
    of = lambda name: arrays()[f"inputs/{case['inputs']}/{name}"]
    with jax.enable_x64(True):
        log_p, log_q = (jax.nn.log_softmax(of(f"{who}_logits")) for who in ("teacher", "student"))
        found = make_support(spec_of(case))(log_p, log_q, None)
    sizes = (np.asarray(found.log_p) != NO_OUTCOME).sum(axis=-1)
    np.testing.assert_array_equal(sizes[of("mask")], arrays()[f"{key}/support_size"][of("mask")])


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("rest", RESTS)
def test_all_ids_are_the_whole_vocabulary(name, rest):
    log_p, log_q = two()
    target = jnp.arange(12).reshape(4, 3)
    found = make_support({"support": name, "k": 40, "rest": rest})(log_p, log_q, target)
    for got, expected in zip(found, (log_p, log_q, target), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("k", [1, 9])
def test_outcomes_are_those_of_numpy(name, k):
    """The outcomes, their probabilities, and the index of the token, in plain NumPy for each token."""
    log_p, log_q = two(1)
    target = jax.random.randint(jax.random.key(2), (4, 3), -1, 41)
    restrict = {rest: make_support({"support": name, "k": k, "rest": rest}) for rest in RESTS}
    results = {rest: restrict[rest](log_p, log_q, target) for rest in RESTS}
    log_p, log_q, results = jax.tree.map(np.asarray, (log_p, log_q, results))
    for place in np.ndindex(4, 3):
        p, q = (np.exp(np.asarray(x[place], np.float64)) for x in (log_p, log_q))
        by_p, by_q = (set(np.argsort(-x)[:k].tolist()) for x in (p, q))
        expected = {
            "teacher_top_k": by_p, "student_top_k": by_q, "union": by_p | by_q, "intersection": by_p & by_q,
        }[name]  # fmt: skip
        for rest, result in results.items():
            real = np.asarray(result.log_p[place]) != NO_OUTCOME
            np.testing.assert_array_equal(np.asarray(result.log_q[place]) != NO_OUTCOME, real)
            size, y = len(expected), int(target[place])
            for found, whole in ((result.log_p[place], p), (result.log_q[place], q)):
                values = np.exp(np.asarray(found, np.float64))
                inside = whole[sorted(expected)]
                outcomes = {
                    "tail": [*np.sort(inside), np.delete(whole, sorted(expected)).sum()],
                    "renormalised": np.sort(inside / max(inside.sum(), 1e-30)), "dropped": np.sort(inside),
                }[rest]  # fmt: skip
                ids, tail = (values[:-1], [values[-1]]) if rest == "tail" else (values, [])
                ids = np.sort(ids[real[: len(ids)]])
                assert len(ids) == size
                np.testing.assert_allclose([*ids, *tail], outcomes, rtol=2e-5)
                if y in expected and rest != "renormalised":
                    np.testing.assert_allclose(values[int(result.target[place])], whole[y], rtol=1e-5)
            absent = len(values) - 1 if rest == "tail" and 0 <= y < 40 else -1
            assert y in expected or int(result.target[place]) == absent


@pytest.mark.parametrize(
    "spec", [{"support": name, "k": 6, "rest": rest} for name in TOP_K[2:] for rest in ("tail", "renormalised")]
)
def test_jit_and_vmap_change_nothing(spec):
    log_p, log_q = two(3)
    target = jnp.arange(12).reshape(4, 3)
    restrict = make_support(spec)
    expected = restrict(log_p, log_q, target)
    each = restrict
    for _ in range(2):
        each = jax.vmap(each)
    for found in (jax.jit(restrict)(log_p, log_q, target), each(log_p, log_q, target)):
        for got, value in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-6)


@pytest.mark.parametrize("name", TOP_K)
def test_a_tail_loses_divergence_and_never_adds(name):
    restrict = jax.jit(make_support({"support": name, "k": 4}))
    log_p, log_q = two(8, shape=(50,))
    compare = jax.jit(lambda p, q: [of(p, q) for of in (divergences.forward_kl, divergences.jensen_shannon)])
    coarse, equal = restrict(log_p, log_q), restrict(log_p, log_p)
    for part, whole in zip(compare(coarse.log_p, coarse.log_q), compare(log_p, log_q), strict=True):
        assert np.all(part <= whole + 1e-6) and np.all(part >= 0)
    for nothing in compare(equal.log_p, equal.log_q):
        np.testing.assert_allclose(nothing, 0, atol=1e-6)


@pytest.mark.parametrize("name", ["union", "intersection"])
@pytest.mark.parametrize("rest", RESTS)
def test_sides_can_be_exchanged(name, rest):
    log_p, log_q = two(4)
    restrict = make_support({"support": name, "k": 5, "rest": rest})
    one, other = restrict(log_p, log_q), restrict(log_q, log_p)
    np.testing.assert_allclose(plain_kl(one.log_p, one.log_q), plain_kl(other.log_q, other.log_p), rtol=1e-5, atol=1e-6)


DISJOINT = np.array([[9.0, 8, 0, 0, 0, 0], [0, 0, 9.0, 8, 0, 0]])


@pytest.mark.parametrize("rest", RESTS)
def test_an_empty_intersection_adds_nothing(rest):
    restrict = make_support({"support": "intersection", "k": 2, "rest": rest})
    log_p, log_q = jax.nn.log_softmax(jnp.asarray(DISJOINT, jnp.float32))
    keywords = {"forward_kl": {}, "total_variation": {}, "alpha_beta": dict(alpha=-0.2, beta=0.7), "jensen_shannon": {}}
    named = [(name, functools.partial(getattr(divergences, name), **more)) for name, more in keywords.items()]
    names, functions = zip(*named, ("plain_kl", plain_kl), strict=True)

    def values(logits):
        restricted = restrict(log_p, jax.nn.log_softmax(logits))
        return jnp.stack([of(restricted.log_p, restricted.log_q) for of in functions])

    found, gradients = jax.jit(lambda z: (values(z), jax.jacrev(values)(z)))(log_q)
    for name, value, gradient in zip(names, found, gradients, strict=True):
        assert abs(float(value)) < 1e-6, name
        np.testing.assert_allclose(gradient, 0, atol=1e-6 if rest == "tail" else 0, err_msg=name)


def test_a_union_that_is_the_vocabulary_has_no_tail():
    """A function of the user's may compute 0 times the difference of both sides at the tail."""
    restrict = make_support({"support": "union", "k": 3})
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(x)) for x in ([3.0, 2, 1, 0, 0, 0], [0.0, 0, 0, 1, 2, 3]))
    value, gradient = jax.value_and_grad(lambda q: plain_kl(*restrict(log_p, q)[:2]))(log_q)
    np.testing.assert_allclose(value, plain_kl(log_p, log_q), rtol=1e-6)
    np.testing.assert_allclose(gradient, -jnp.exp(log_p), rtol=1e-6)


@pytest.mark.parametrize(("spec", "double"), [
    ({"support": "teacher_top_k", "k": 3}, False),
    ({"support": "teacher_top_k", "k": 3}, True),
    ({"support": "student_top_k", "k": 3, "rest": "renormalised"}, False),
    ({"support": "intersection", "k": 3, "rest": "renormalised"}, True),
    ({"support": "intersection", "k": 3, "rest": "dropped"}, False),
    ({"support": "teacher_top_k", "k": 3, "outside": -50.0}, False),
    ({"support": "teacher_top_k", "k": 3, "rest": "dropped", "keep": {"name": "student_mass", "at_least": 0.5}}, False),
    ({"support": "union", "k": 3, "add_target": True}, False),
])  # fmt: skip
def test_ids_without_mass(spec, double):
    """Log-probabilities of -inf inside the support, in the tail, and in all of the tail give finite numbers."""
    logits = np.array([
        [[1, 2, 3, 4, 5, 6, -np.inf, 0], [1, 2, 3, 4, 5, 6, 7, 8]],  # one id of the tail
        [[9, 8, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf], [1, 2, 3, 4, 5, 6, 7, 8]],  # inside the support
        [[9, 8, 7, *[-np.inf] * 5], [9, 8, 5, *[-np.inf] * 5]],  # all of the tail, on both sides
        [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, *[-np.inf] * 5]],
    ])  # fmt: skip
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        log_p, log_q = (jax.nn.log_softmax(jnp.asarray(logits[:, i], dtype)) for i in range(2))
        target = jnp.array([0, 1, 6, 7])
        restrict = make_support(spec)
        of = lambda p, q: divergences.jensen_shannon(*restrict(p, q, target)[:2]).sum()
        value, gradients = jax.jit(jax.value_and_grad(of, argnums=(0, 1)))(log_p, log_q)
        assert np.isfinite(value) and all(np.all(np.isfinite(gradient)) for gradient in gradients)
        result = jax.jit(restrict)(log_p, log_q, target)
        assert not any(np.any(np.isnan(side)) for side in result) and result.log_p.dtype == dtype


def test_a_tail_without_mass():
    """All of the teacher's mass is on the k ids. The gradient of forward KL in the student's logits is still q - p."""
    p, logits = jnp.array([0.5, 0.5, 0.0, 0.0]), jnp.array([1.0, 2.0, 3.0, 4.0])
    restrict = make_support({"support": "teacher_top_k", "k": 2})
    of = lambda log_p, z: divergences.forward_kl(*restrict(log_p, jax.nn.log_softmax(z))[:2])
    of_teacher, of_student = jax.jit(jax.grad(of, argnums=(0, 1)))(jnp.log(p), logits)
    assert np.all(np.isfinite(of_teacher)) and np.all(of_teacher[2:] == 0)
    np.testing.assert_allclose(of_student, jax.nn.softmax(logits) - p, atol=1e-6)


@pytest.mark.parametrize(("size", "k"), [(1600, 24), (1619, 1), (1619, 7), (130, 24)])
def test_the_ids_in_float64_are_those_of_a_sort(size, k):
    """Many ties: of equal ids the lowest is first. The sizes have whole blocks, a remainder, and few blocks."""
    random = np.random.default_rng(size)
    logits = random.integers(0, 9, size=(5, size)).astype(float)
    logits[1], logits[2, :-1], logits[3, size // 2 :] = 0, -np.inf, -np.inf
    with jax.enable_x64(True):
        found = supports.teacher_top_k(jnp.asarray(logits), jnp.asarray(logits), k=k)
    np.testing.assert_array_equal(found.ids, np.argsort(-logits, axis=-1, kind="stable")[:, :k])
    single = supports.student_top_k(jnp.zeros(size), jnp.asarray(logits, jnp.float32), k=k)
    np.testing.assert_array_equal(single.ids, found.ids)


def test_a_sort_of_the_vocabulary_does_not_occur_in_float64():
    with jax.enable_x64(True):
        made = jax.make_jaxpr(lambda x: supports.teacher_top_k(x, x, k=4).ids)(jnp.zeros((2, 1600)))
    widths = [e.invars[0].aval.shape[-1] for e in made.jaxpr.eqns if e.primitive.name in ("top_k", "sort")]
    assert widths and max(widths) < 200


def test_the_choice_is_a_constant_and_the_values_are_not():
    log_p, log_q = two(5, shape=())
    restrict = make_support({"support": "student_top_k", "k": 3, "rest": "dropped"})
    gradient = jax.grad(lambda q: restrict(log_p, q).log_q.sum())(log_q)
    assert sorted(np.flatnonzero(gradient)) == sorted(np.argsort(-log_q)[:3]) and set(np.asarray(gradient)) == {0, 1}


def my_support(log_p, log_q, *, first=2):
    """The first ids of the vocabulary."""
    return jnp.broadcast_to(jnp.arange(first), (*log_p.shape[:-1], first)), jnp.ones((*log_p.shape[:-1], first), bool)


def wrong_support(log_p, log_q):
    return jnp.arange(2), jnp.ones(2)


def test_a_support_of_ones_own():
    log_p, log_q = two(6)
    found = make_support({"support": f"{__name__}:my_support", "first": 3, "rest": "dropped"})(log_p, log_q, None)
    np.testing.assert_array_equal(found.log_p, log_p[..., :3])
    with pytest.raises(ValueError, match=r"must return ids \(4, 3, 'm'\) and booleans"):
        make_support({"support": f"{__name__}:wrong_support"})(log_p, log_q, None)


def test_two_sides_may_differ():
    log_p, log_q = two(7)
    spec = {"support": "teacher_top_k", "k": 4}
    mixed = make_support(spec | {"teacher": "renormalised", "student": "whole"})(log_p, log_q)
    np.testing.assert_array_equal(mixed.log_p, make_support(spec | {"rest": "renormalised"})(log_p, log_q).log_p)
    np.testing.assert_array_equal(mixed.log_q, make_support(spec | {"rest": "dropped"})(log_p, log_q).log_q)
    short = make_support(spec | {"teacher": "whole", "student": "whole"})(log_p, log_q)
    np.testing.assert_array_equal(short.log_p, make_support(spec | {"rest": "dropped"})(log_p, log_q).log_p)
    one = make_support(spec | {"rest": "dropped", "teacher": "renormalised"})(log_p, log_q)
    np.testing.assert_array_equal(one.log_p, mixed.log_p)


def test_the_whole_vocabulary_needs_no_function():
    for more in ({}, {"k": None}, {"rest": "dropped"}, {"add_target": True}):
        assert make_support({"support": "whole"} | more) is None
    log_p, _ = two()
    assert np.all(supports.whole(log_p, log_p).chosen) and supports.whole(log_p, log_p).ids.shape == log_p.shape


TOP = {"support": "teacher_top_k", "k": 3}


@pytest.mark.parametrize(("spec", "message"), [
    ({}, r"vocabulary\.support=None must be one of intersection, .*whole"),
    ({"support": "unoin", "k": 3}, r"vocabulary: unknown name 'unoin'.*did you mean 'union'.*teacher_top_k"),
    ({"support": "union"}, r"vocabulary: the spec 'union' lacks k"),
    ({"support": "whole", "k": 3}, r"unknown keyword 'k'.*whole takes"),
    (TOP | {"rests": "tail"}, r"vocabulary: unknown keyword 'rests'.*did you mean 'rest'.*teacher_top_k takes k, rest"),
    (TOP | {"rest": "renormalized"}, r"vocabulary\.rest='renormalized'.*did you mean 'renormalised'.*tail, renorm"),
    (TOP | {"teacher": "dropped", "student": "whole"}, r"vocabulary\.teacher='dropped'.*tail, renormalised, whole"),
    (TOP | {"teacher": "renormalised"}, "student='tail', but a tail is an outcome of both sides"),
    (TOP | {"teacher": "whole", "student": "whole", "rest": "tail"}, r"vocabulary\.rest has no effect beside"),
    (TOP | {"outside": -100.0, "student": "whole"}, r"vocabulary\.student has no effect beside vocabulary\.outside"),
    (TOP | {"outside": 2.0}, r"vocabulary\.outside must be between -inf and 0"),
    (TOP | {"add_target": 1}, r"vocabulary\.add_target=1 must be True or False"),
    (TOP | {"k": 0}, r"vocabulary\.k=0 must be a whole number from 1"),
    (TOP | {"k": 2.0}, r"vocabulary\.k=2\.0 must be a whole number"),
    (TOP | {"k": True}, r"vocabulary\.k=True must be a whole number"),
    (TOP | {"keep": {"name": "batch_quantile"}}, r"vocabulary\.keep\.name='batch_quantile' is not one of student_mass"),
    (TOP | {"keep": {"name": "student_mass", "atleast": 0.5}}, r"vocabulary\.keep\.atleast.*did you mean 'at_least'"),
    (TOP | {"keep": {"name": "student_mass", "at_least": 1.5}}, r"at_least must be between 0 and 1"),
    (TOP | {"keep": {"name": "student_mass", "at_least": 0}}, r"at_least must be above 0"),
    (TOP | {"keep": "student_mass"}, r"at_least must be a finite number, not None"),
    (TOP | {"support": "union", "keep": {"name": "student_mass", "at_least": 0.5}}, "needs support='teacher_top_k'"),
])  # fmt: skip
def test_a_wrong_spec_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        make_support(spec)


def test_errors_that_need_the_vocabulary_or_the_token():
    log_p, log_q = two()
    for name in TOP_K:
        with pytest.raises(ValueError, match=r"vocabulary\.k=41 is more than the vocabulary's V=40 ids"):
            jax.eval_shape(make_support({"support": name, "k": 41}), log_p, log_q, None)
    with pytest.raises(ValueError, match=r"vocabulary\.add_target=True needs the row's token"):
        make_support(TOP | {"add_target": True})(log_p, log_q, None)


def test_an_added_token_is_one_more_outcome_only_outside_the_support():
    log_p, log_q = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]] * 3)), jnp.log(jnp.full((3, 4), 0.25))
    found = make_support(TOP | {"k": 2, "add_target": True})(log_p, log_q, jnp.array([3, 0, -1]))
    expected = [[0.4, 0.3, 0, 0.3], [0.4, 0.3, 0.1, 0.2], [0.4, 0.3, 0, 0.3]]
    np.testing.assert_allclose(np.exp(found.log_p), expected, rtol=1e-6)
    np.testing.assert_array_equal(found.target, [0, 2, -1])


def test_transforms_of_logits():
    logits = jnp.array([[4.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    np.testing.assert_allclose(logit_transforms.centred(logits), [[2, -1, -1], [0, 0, 0]])
    for unbiased, deviation in ((True, 3**0.5), (False, 2**0.5)):
        z_score = functools.partial(logit_transforms.z_score, unbiased=unbiased, epsilon=0.5)
        np.testing.assert_allclose(z_score(logits)[0], np.array([2, -1, -1]) / (deviation + 0.5), rtol=1e-6)
        gradient = jax.jit(jax.grad(lambda z, of=z_score: jnp.sum(of(z) * jnp.array([1.0, 2.0, 3.0]))))(logits)
        assert np.all(np.isfinite(gradient)) and np.all(z_score(logits)[1] == 0)
    assert logit_transforms.raw(logits) is logits
    with pytest.raises(ValueError, match="epsilon must be between 0"):
        logit_transforms.z_score(logits, epsilon=-1.0)


def test_temperatures_of_a_token():
    teacher, student = (
        jnp.array([[6.0, 0.0], [6.0, 0.0], [-1.0, -2.0]]),
        jnp.array([[2.0, 1.0], [-2.0, -3.0], [-1.0, -2]]),
    )
    of_teacher, of_student = temperatures.relative_maximum(teacher, student, mean=2.0)
    np.testing.assert_allclose(of_teacher, [3, np.nan, np.nan])
    np.testing.assert_allclose(of_student, [1, np.nan, np.nan])
    of_teacher, of_student = temperatures.own_deviation(teacher, student, factor=2.0)
    np.testing.assert_allclose(of_teacher, 2 * np.std(teacher, axis=-1, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(of_student, 2 * np.std(student, axis=-1, ddof=1), rtol=1e-6)
    for rule in (temperatures.relative_maximum, temperatures.own_deviation):
        with pytest.raises(ValueError, match="must be above 0"):
            rule(teacher, student, **{"mean" if rule is temperatures.relative_maximum else "factor": 0.0})
