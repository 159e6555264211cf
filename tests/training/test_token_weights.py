"""The rules for tokens and rows in the training step: equal numbers however the step is divided, and constant weights."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from kd_jax import data, sharding
from kd_jax.objectives import make_terms
from kd_jax.run import cache, checks, nonfinite
from kd_jax.run.build import make_objective
from kd_jax.settings import Settings
from kd_jax.train_step import init_state, make_train_step
from tests.helpers import steps
from tests.helpers.runs import smoke
from tests.helpers.steps import B, L, Logits, V, batch

HALF = {"name": "top_fraction", "of": "teacher_entropy", "fraction": 0.5, "divide_by": "kept"}
GAP = {"name": "prefix_gap", "gamma": 0.5, "divide_by": "all"}
PRODUCT = {"name": "confidence_product", "alpha": 1.0, "beta": 1.0, "divide_by": "all"}
RULES = {
    "local": {"name": "threshold", "of": "teacher_entropy", "at_least": 1.8, "divide_by": "all"},
    "local_kept": {"name": "relative_confidence", "scale": 3.0, "divide_by": "kept"},
    "batch": HALF,
    "product": PRODUCT,
    "prefix": GAP,
    "in_row": HALF | {"within": "row"},
    "own_loss": HALF | {"of": "divergence", "divide_by": "all"},
}
ADAKD = {"temperature": {"name": "difficulty", "of": "hellinger", "scale": 0.5}, "tokens": HALF}
RAMP = {"name": "linear_schedule", "init_value": 0.4, "end_value": 1.0, "transition_steps": 3}
FOLLOWING = {"name": "adaptive_fraction", "total_steps": 6, "rate": 0.3, "tolerance": 0.0, "decay": 0.5, "warmup": 0.0}
SPECS = {name: {"tokens": rule} for name, rule in RULES.items()} | {
    "gated": {"row_gate": {"name": "drop_lowest", "of": "log_p", "fraction": 0.4}},
    "gated_rule": {"row_gate": {"name": "drop_lowest", "of": "log_p", "fraction": 0.4}, "tokens": RULES["local"]},
    "adakd": ADAKD,
    "by_rows": {"tokens": HALF, "average": "sequence"},
    "scheduled": {"tokens": HALF | {"fraction": RAMP}},
    "scheduled_local": {"tokens": RULES["local"] | {"at_least": RAMP | {"init_value": 1.7}}},
}
POLICY = {
    "kind": "policy_gradient", "rows": "student", "policy": dict(base.policy(discount=0.9)),
    "tokens": {"name": "importance_now", "at_most": 2.0, "divide_by": "all"},
}  # fmt: skip
DRAWN = SPECS | {"policy": POLICY}
ONE = {"name": "tests.training.test_token_weights:own_rule", "divide_by": "all"}


class DATA:
    """The part of a source of rows that the check of a cache reads."""

    authors, origins = (), ("data",)


class Table:
    """A model in the type of its parameters, whose hidden states are the rows of a table, which is also the head."""

    def hidden(self, params, tokens, mask=None):
        return params["embed"]["embedding"][tokens]

    def stored_head(self, params):
        return params["embed"]["embedding"], True


def own_rule(teacher_entropy, gap, counted):
    return jnp.where(gap > 0, teacher_entropy, 0) / jnp.maximum(counted.sum(), 1)


def drawn_batch():
    random = np.random.default_rng(1)
    origin = np.array([0, 2, 2, 2, 0, 2, 0, 2])
    return batch() | {"origin": origin, "log_probs": -random.uniform(2, 5, (B, L)).astype(np.float32)}


def run(specs=None, rows=None, microbatches=1, sizes=(1, 1, 1), wide=True, updates=1):
    """Returns the metrics of the last step, and the gradient of the student's parameters, summed over the steps."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    with jax.enable_x64(wide):
        kind, tx = jnp.float64 if wide else jnp.float32, optax.sgd(1.0)
        random = np.random.default_rng(0)
        table = lambda *shape: {"embed": {"embedding": jnp.asarray(random.normal(size=shape) * 0.5, kind)}}
        params, teacher = table(V, 16), table(V + 8, 32)
        terms = make_terms(DRAWN if specs is None else specs)
        state = init_state(params, tx, terms, jax.random.key(0))
        place = lambda tree: jax.device_put(tree, sharding.tree_shardings(mesh, tree))
        step = make_train_step(Table(), Table(), terms, tx, vocab_size=V, microbatches=microbatches, chunk=4, mesh=mesh)
        put = sharding.put_batch(mesh, drawn_batch() if rows is None else rows)
        new, step = place(state), jax.jit(step)
        for _ in range(updates):
            new, metrics = step(new, place(teacher), put)
        new, metrics = jax.device_get((new, metrics))
        return metrics, jax.tree.map(lambda old, new: np.asarray(old) - new, params, new.params)


@pytest.fixture(scope="module")
def reference():
    return run()


def same(found, reference, rtol=1e-12):
    for name, pair in reference[0].items():
        np.testing.assert_allclose(found[0][name], pair, rtol=max(rtol, 2e-7), atol=1e-12, err_msg=name)
    for name in ("loss", *(name for name in reference[0] if name.endswith("/loss"))):
        np.testing.assert_allclose(found[0][name], reference[0][name], rtol=rtol, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(reference[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


def test_the_rules_keep_some_tokens_and_drop_some(reference):
    """The other tests would say little about rules that keep all tokens or none."""
    for name in ("local", "batch", "in_row", "own_loss"):
        kept, count = reference[0][f"{name}/tokens_kept"]
        assert 0 < kept < count, name
    assert reference[0]["gated_rule/tokens_kept"][1] < reference[0]["local/tokens_kept"][1]
    assert reference[0]["adakd/loss"][0] != reference[0]["batch/loss"][0]


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_same_numbers(microbatches, reference):
    same(run(microbatches=microbatches), reference)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_any_mesh_gives_the_same_numbers(sizes, reference):
    same(run(sizes=sizes), reference)


def test_single_precision_gives_the_same_numbers_in_microbatches():
    same(run(microbatches=4, wide=False), run(wide=False), 2e-5)


def test_the_order_of_rows_does_not_matter(reference):
    order = np.random.default_rng(0).permutation(B)
    same(run(rows={name: array[order] for name, array in drawn_batch().items()}), reference)


def test_packed_rows_give_the_numbers_of_single_ones():
    lengths = [4, 7, 3, 3, 2, 5, 2, 4]
    ids = np.random.default_rng(0).integers(0, V, sum(lengths)).astype(np.int32)
    first = np.array([1, 3, 1, 2, 1, 1, 1, 2])
    rows = data.Rows(ids, np.cumsum([0, *lengths]), first, first)
    options = dict(batch_size=8, max_length=L, seed=0, shuffle=False, num_epochs=1, pad_id=0)
    sources = rows, data.pack_rows(rows, max_length=L)
    alone, together = (run(SPECS, next(iter(data.batches(source, **options)))) for source in sources)
    for name in SPECS:
        np.testing.assert_allclose(together[0][f"{name}/loss"], alone[0][f"{name}/loss"], rtol=1e-12, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(together[1]), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max())


RANDOM = np.random.default_rng(0)
LOGITS = {name: RANDOM.normal(size=(3, 5, 7)) * 2 for name in ("student", "teacher")}
MASK = np.arange(5) < np.array([5, 3, 4])[:, None]
TARGETS = RANDOM.integers(0, 7, (3, 5)).astype(np.int32)


def entropy(log_p):
    return -(np.exp(log_p) * log_p).sum(-1)


def hand_written_weights(name):
    """Returns the weights of a rule on LOGITS, computed without the package."""
    log_p, log_q = (np.asarray(jax.nn.log_softmax(LOGITS[member])) for member in ("teacher", "student"))
    hp, hq = entropy(log_p), entropy(log_q)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    if name == "local":
        return MASK * (hp >= 1.0)
    if name == "local_kept":
        return MASK / (1 + np.exp(-3.0 * (hq - hp)))
    if name == "product":
        weight = (1 + 1 - hp / hp[MASK].max()) * (1 + hq / hq[MASK].max())
        return MASK * weight / weight[MASK].mean()
    if name == "prefix":
        picked = lambda log: np.take_along_axis(log, TARGETS[..., None], -1)[..., 0]
        size = MASK * np.abs(picked(log_p) - picked(log_q))
        return MASK * (1 + 0.5 * (1 - (size.cumsum(1) - size) / size.sum(1, keepdims=True)))
    if name == "in_row":
        return np.stack([m * (h >= np.sort(h[m])[-(m.sum() // 2)]) for m, h in zip(MASK, hp, strict=True)])
    score = hp if name == "batch" else kl
    return MASK * (score >= np.sort(score[MASK])[-(MASK.sum() // 2)])


@pytest.mark.parametrize("name", RULES)
def test_the_gradient_holds_the_weights_constant(name):
    rule = RULES[name] | ({"at_least": 1.0} if name == "local" else {})
    with jax.enable_x64(True):
        weights = hand_written_weights(name)
        divisor = weights.sum() if rule["divide_by"] == "kept" else MASK.sum()

        def loss(student):
            log_p, log_q = jax.nn.log_softmax(LOGITS["teacher"]), jax.nn.log_softmax(student)
            return (weights * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)).sum() / divisor

        expected, gradient = jax.value_and_grad(loss)(LOGITS["student"])
        rows = {"targets": TARGETS, "loss_mask": MASK}
        found = steps.step({"kd": {"tokens": rule}}, LOGITS["student"], LOGITS["teacher"], rows)
        np.testing.assert_allclose(found[0], expected, rtol=1e-12)
        np.testing.assert_allclose(found[1], gradient, rtol=1e-9, atol=1e-12)


NOTHING = {
    "local": RULES["local"] | {"at_least": 1e3},
    "local_kept": RULES["local"] | {"at_least": 1e3, "divide_by": "kept"},
    "batch": {"name": "quantile", "of": "teacher_entropy", "below": 0.0, "divide_by": "kept"},
}


SCHEDULED = {
    "fraction": lambda value: {"tokens": HALF | {"fraction": value}},
    "at_least": lambda value: {"tokens": RULES["local"] | {"at_least": value}},
    "count": lambda value: {"tokens": {"name": "first", "count": value, "divide_by": "kept"}},
    "factor": lambda value: {
        "tokens": {"name": "product", "rules": {"a": {"name": "prefix_gap"} | {"gamma": value}}, "divide_by": "all"}
    },
    "gate": lambda value: {"row_gate": {"name": "drop_lowest", "of": "log_p", "fraction": value}},
    "temperature": lambda value: {"temperature": {"name": "difficulty", "of": "hellinger", "scale": value}},
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_number_with_a_schedule_is_the_constant_number_of_each_step(name):
    values = {"at_least": (0.0, 1.3), "count": (1, 3)}.get(name, (0.3, 1.0))
    schedule = {"name": "by_stage", "values": values, "total_steps": 2}
    rows, found = {"targets": TARGETS, "loss_mask": MASK}, []
    with jax.enable_x64(True):
        for at, value in enumerate(values):
            one = lambda number, at=at: steps.step(
                {"kd": SCHEDULED[name](number)}, LOGITS["student"], LOGITS["teacher"], rows, at=at
            )
            found.append(one(schedule))
            for ours, constant in zip(found[-1], one(value), strict=True):
                np.testing.assert_allclose(ours, constant, rtol=1e-12, atol=1e-15)
    assert found[0][0] != found[1][0], "the values are no test of the schedule"


@pytest.mark.parametrize("divided", [{"microbatches": 4}, {"sizes": (2, 2, 2)}], ids=str)
def test_a_fraction_that_follows_the_loss_is_the_same_however_a_step_is_divided(divided):
    specs = {"kd": {"tokens": HALF | {"fraction": FOLLOWING, "of": "hellinger"}}}
    whole = run(specs, updates=5)
    kept, count = whole[0]["kd/tokens_kept"]
    assert kept < count
    same(run(specs, updates=5, **divided), whole, 1e-11)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"tokens": HALF | {"fraction": RAMP | {"end_value": 1.5}}},
            r"tokens in step 3: fraction must be between 0 and 1",
        ),
        ({"row_gate": SCHEDULED["gate"](RAMP | {"end_value": -0.8})["row_gate"]}, "row_gate in step 3: fraction"),
        (
            {"temperature": SCHEDULED["temperature"](RAMP | {"end_value": -0.8})["temperature"]},
            "temperature in step 3: scale",
        ),
        ({"tokens": HALF | {"fraction": RAMP | {"init_value": 2.0}}}, ": tokens: fraction must be .* 2.0"),
        ({"tokens": HALF | {"fraction": FOLLOWING | {"start": 1.5}}}, ": tokens: start must be .* 1.5"),
        ({"tokens": HALF | {"fraction": FOLLOWING | {"total_step": 3}}}, ": tokens: unknown keyword 'total_step'"),
    ],
)
def test_a_schedule_out_of_range_is_refused_before_training(changes, words):
    config = smoke("forward_kl", "unused", steps=10)
    for key, value in changes.items():
        setattr(config.objective.terms.distil, key, value)
    with pytest.raises(ValueError, match=rf"objective\.terms\.distil.*{words}"):
        make_objective(Settings.parse(config))


def test_weights_of_zero_give_no_loss_and_no_gradient():
    metrics, gradient = run({name: {"tokens": rule} for name, rule in NOTHING.items()})
    assert metrics["loss"][0] == 0 and metrics["gradient_norm"][0] == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    for name in NOTHING:
        assert metrics[f"{name}/tokens_kept"][0] == metrics[f"{name}/token_weight"][0] == 0
        assert metrics[f"{name}/tokens_kept"][1] > 0


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_rule_of_ones_own(microbatches):
    metrics, gradient = run({"kd": {"tokens": ONE}}, microbatches=microbatches)
    halved, half = run({"kd": {"tokens": ONE, "coefficient": 0.5}})
    kept, count = metrics["kd/tokens_kept"]
    assert 0 < kept < count and metrics["loss"][0] > 0
    np.testing.assert_allclose(metrics["loss"][0], 2 * halved["loss"][0], rtol=1e-12)
    for whole, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(half), strict=True):
        np.testing.assert_allclose(whole, 2 * other, rtol=1e-9, atol=1e-15)


def scalar_rule(teacher_entropy, counted):
    return teacher_entropy.sum()


def negative_rule(teacher_entropy):
    return teacher_entropy - 100


def negative_batch_rule(teacher_entropy, counted):
    return teacher_entropy - 100


def infinite_rule(teacher_entropy):
    return teacher_entropy / 0


OWN = "tests.training.test_token_weights"


@pytest.mark.parametrize("name", ["negative_rule", "negative_batch_rule", "infinite_rule"])
def test_wrong_weights_make_the_step_and_the_metric_not_finite(name):
    good, bad = ({"name": f"{OWN}:{rule}", "divide_by": "all"} for rule in ("own_rule", name))
    metrics, gradient = run({"good": {"tokens": good}, "bad": {"tokens": bad}})
    assert np.isnan(metrics["loss"][0]) and np.isnan(metrics["bad/token_weight"][0])
    assert np.isfinite(metrics["good/token_weight"][0]) and metrics["skipped"][0] == 1
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))  # the step changes no parameter


def test_the_message_of_a_stopped_run_names_the_term_and_its_rule():
    specs = {name: {"tokens": {"name": f"{OWN}:{name}", "divide_by": "all"}} for name in ("own_rule", "negative_rule")}
    config = types.SimpleNamespace(objective=types.SimpleNamespace(terms=specs))
    metrics, _ = run(specs)
    values = {name: float(total) / max(float(count), 1) for name, (total, count) in metrics.items()}
    found = nonfinite.wrong_weights(types.SimpleNamespace(config=config, terms=make_terms(specs)), values)
    assert found.startswith(
        "objective.terms.negative_rule.tokens={'name': 'tests.training.test_token_weights:negative_rule'"
    )
    assert found.count("objective.terms") == 1 and found.endswith("negative or not finite. ")


LOCAL = RULES["local"]
WRONG = {
    "score": ({"tokens": LOCAL | {"of": "teacher_entrpy"}}, "tokens: unknown score 'teacher_entrpy'"),
    "rule": ({"tokens": LOCAL | {"name": "treshold"}}, "tokens: unknown name 'treshold'.*did you mean 'threshold'"),
    "gate": ({"row_gate": {"name": "drop_lowst", "of": "log_p"}}, "row_gate: unknown name 'drop_lowst'"),
    "support": ({"vocabulary": {"support": "teacher_topk", "k": 3}}, "vocabulary: unknown name 'teacher_topk'"),
    "divide_by": ({"tokens": LOCAL | {"divide_by": None}}, "tokens: .*lacks divide_by"),
    "shape": ({"tokens": {"name": f"{OWN}:scalar_rule", "divide_by": "all"}}, r"tokens: .*array of shape \(\)"),
    "weights": ({"tokens": LOCAL | {"of": "weights"}}, "tokens: .*reads weights"),
    "early loss": (POLICY | {"tokens": RULES["own_loss"]}, "tokens: .*cannot read divergence"),
    "temperature": ({"kind": "hard_labels", "temperature": 2.0}, "temperature=2.0 goes with kind='divergence'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_reported_in_one_paragraph_with_its_key(case):
    spec, message = WRONG[case]
    with pytest.raises(ValueError, match=rf"^objective\.terms\.kd: {message}") as error:
        make_terms({"kd": spec})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["top_k", "samples"])
@pytest.mark.parametrize("key", ["tokens", "row_gate", "temperature"])
def test_a_cache_of_a_part_of_the_distribution_is_refused(key, kind):
    spec = {"tokens": {"tokens": LOCAL}, "row_gate": SPECS["gated"], "temperature": ADAKD}[key]
    with pytest.raises(ValueError, match=rf"objective\.terms\.kd.*whole vocabulary for its.*{key}.*'{kind}'"):
        cache.check_use(smoke("forward_kl", "unused"), make_terms({"kd": spec}), DATA, kind)


def test_a_k_above_the_vocabulary_is_refused_before_training():
    config = smoke("forward_kl", "unused")
    (name,) = config.objective.terms
    config.objective.terms[name].vocabulary = {"support": "teacher_top_k", "k": 600}
    settings = Settings.parse(config)
    terms = make_terms(settings.objective.terms)
    checks.check_vocabulary(settings, terms, 600)
    with pytest.raises(ValueError, match=rf"objective\.terms\.{name}: vocabulary\.k=600 .* 599 ids"):
        checks.check_vocabulary(settings, terms, 599)


class Counting(Logits):
    """A model that counts how often a trace calls it."""

    def __init__(self):
        self.calls = 0

    def hidden(self, params, tokens, mask=None):
        self.calls += 1
        return super().hidden(params, tokens, mask)


@pytest.mark.parametrize(
    "specs", [{"kd": {}}, SPECS, {"policy": POLICY}, DRAWN], ids=["plain", "rules", "policy", "all"]
)
def test_a_step_calls_each_model_once(specs):
    student, teacher, tx, terms = Counting(), Counting(), optax.sgd(1.0), make_terms(specs)
    logits = {"logits": jax.ShapeDtypeStruct((B, L, V), jnp.float32)}
    state = jax.eval_shape(lambda params: init_state(params, tx, terms, jax.random.key(0)), logits)
    jax.eval_shape(make_train_step(student, teacher, terms, tx, vocab_size=V), state, logits, drawn_batch())
    assert (student.calls, teacher.calls) == (1, 1)
