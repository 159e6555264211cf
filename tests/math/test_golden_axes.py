"""Compares training steps with published losses and gradients of further objectives (golden/README.md).

The models are fakes, whose parameters are their logits. A *builder* turns a published case into the terms of an
objective. Each case is in exactly one of the tables `EXPRESSED`, `SCHEDULES`, `ADAPTIVE`, `FOLLOWERS`, `ORDERS`,
`SPANS` and `NOT_EXPRESSED`.
"""

import collections
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import configs.pocl
from kd_jax import resolve, schedules
from kd_jax.data import orders
from kd_jax.objectives import ORIGINS
from kd_jax.optimizer import Follow, with_followers
from tests.helpers.axes import CASES, arrays, closed, numbered
from tests.helpers.steps import step

MEMBERS = ("teacher", "reference", "second_teacher")


@dataclasses.dataclass(frozen=True)
class Expression:
    """A case in the words of this package.

    Attributes:
      terms: the terms of the objective.
      temperature: the temperature of the objective.
      batch: arrays of the batch that differ from the stored targets and mask.
      loss: the name of the published loss.
      gradient: the name of the published gradient.
      left_in: log-probabilities of p and q at the tokens -> a number by which the published loss exceeds the loss here.
        The published gradient exceeds the gradient here by the gradient of this number.
      factor: the factor of the published loss and gradient.
    """

    terms: dict
    temperature: float = 1.0
    batch: dict = dataclasses.field(default_factory=dict)
    loss: str = "loss"
    gradient: str = "grad"
    left_in: Callable | None = None
    factor: float = 1.0


def given(case, name):
    return arrays()[f"inputs/{case['inputs']}/{name}"]


def stored(case, name):
    return arrays()[f"{case['key']}/{name}"]


def drawn(case):
    """Returns the arrays of a batch whose rows the student sampled, with the given log-probabilities."""
    rows = np.full(len(given(case, "mask")), ORIGINS.index("student"))
    return {"origin": rows, "log_probs": given(case, "old_log_probs")}


def has_drawn(case):
    return case["params"].get("old_log_probs") == "given" or "old_log_probs" in case["uses"]


def mean(case, values, weights=1.0):
    weights = given(case, "mask") * weights
    return jnp.sum(values * weights) / jnp.sum(weights)


def entropy(log_p):
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def of_target(case, log_p):
    return jnp.take_along_axis(log_p, jnp.asarray(given(case, "targets"))[..., None], axis=-1)[..., 0]


def term(case, **changes):
    """Returns the term of a case whose `op` has the keys of this package, with changes."""
    op = case["op"]
    spec = {"average": "sequence" if op.get("average", "token").startswith("sequence") else "token"}
    if "divergence" in op and "divergence" not in changes:
        spec["divergence"] = {"name": op["divergence"]["name"]} | op["divergence"].get("kwargs", {})
    return spec | {key: op[key] for key in ("pair", "vocabulary", "entry_clip") if key in op} | changes


def comparison(case, **changes):
    """Builds a case with one divergence, at temperatures that are numbers."""
    op = case["op"]
    spec = {key: op[key] for key in ("temperature", "temperature_squared") if key in op}
    return Expression({"term": term(case, **spec | changes)})


def policy(clip=0.0, **options):
    """Returns the keys of a policy gradient in which each token's advantage is the token's own reward."""
    own = {"discount": 0.0, "include_current": True, "length_normalised": False, "clip": clip}
    return {"kind": "policy_gradient", "policy": own | options}


def eopd(case):
    op, params = case["op"]["terms"]["forward"], case["params"]
    forward = {key: op[key] for key in ("divergence", "pair", "vocabulary", "tokens")}
    terms = {"reverse": policy(params["clip"]), "forward": forward | {"coefficient": params["coefficient"]}}
    return Expression(terms, batch=drawn(case) if has_drawn(case) else {})


def fire(case):
    params = case["params"]
    weight = {"name": "confidence_product", "alpha": params["alpha"], "beta": params["beta"], "divide_by": "all"}
    gate = {"name": "drop_lowest", "of": "log_p", "fraction": params["traj_skip_percentile"] / 100}
    spec = policy(params["clip"]) | {"tokens": weight, "row_gate": gate}
    return Expression({"term": spec}, batch=drawn(case) if has_drawn(case) else {})


def tsdkd(case):
    """Builds the direct part. The published entropy and ranking, which also read padding, are left in."""
    params = case["params"]
    direct = {
        "divergence": {"name": "jensen_shannon", "weight": params["beta"]},
        "tokens": {"name": "relative_confidence", "divide_by": "all"},
    }

    def left_in(log_p, log_q):
        mask, chosen = given(case, "mask"), stored(case, "entropy_mask")
        uncertain = jnp.sum(chosen * entropy(log_q)) / chosen.sum()
        top_q, ids = jax.lax.top_k(log_q, 10)
        order = jnp.argsort(-jnp.take_along_axis(log_p, ids, axis=-1), axis=-1)
        ranked = jnp.take_along_axis(top_q, order, axis=-1)
        ranked = ranked - ranked.mean(axis=-1, keepdims=True)
        values = -jnp.sum(ranked - jax.lax.cumlogsumexp(ranked, axis=ranked.ndim - 1), axis=-1)
        first = mask & (np.arange(mask.shape[1]) < params["d"])
        ranking = jnp.sum(first * values) / (first.sum() + 1e-8)
        return uncertain + params["indirect_alpha"] * ranking

    return Expression({"direct": direct}, left_in=left_in)


def adakd(case):
    params = case["params"]
    score = {"hellinger": "hellinger", "entropy": "student_entropy", "ce": "cross_entropy"}[params["rule"]]
    tokens = {
        "name": "top_fraction", "of": score, "fraction": params["ratio"], "ties": "first", "divide_by": "kept"
    }  # fmt: skip
    spec = term(case, tokens=tokens)
    if params["adaptive_temperature"]:
        direction = "soften" if params["soften"] else "harden"
        spec["temperature"] = {"name": "difficulty", "of": score, "scale": params["c"], "direction": direction}
        spec["temperature_squared"] = True
    return Expression({"term": spec}, gradient="grad_constant_temperature")


def todi(case):
    return comparison(case, divergence={"name": "todi"})


def atkd(case):
    alpha = case["params"]["alpha"]
    rule = {"name": "quantile", "of": "mass_off_target", "interpolation": "lower", "divide_by": "kept"}
    pair = ("student", "teacher") if case["params"]["reverse"] else ("teacher", "student")

    def group(coefficient, target_weight, **bound):
        divergence = {"name": "decoupled_kl", "target_weight": target_weight, "rest_weight": 1.0}
        return {"divergence": divergence, "pair": pair, "coefficient": coefficient, "tokens": rule | bound}

    return Expression({"easy": group(alpha, 0.0, below=0.5), "hard": group(1 - alpha, 1.0, at_least=0.5)})


def dkd(case):
    params = case["params"]
    weights = {"target_weight": params["alpha"], "rest_weight": params["beta"]}
    logits = {"name": "z_score"} if params["standardise"] else {"name": "raw"}
    made = comparison(case, divergence={"name": "decoupled_kl"} | weights, logits=logits)
    return dataclasses.replace(made, factor=params["to_token_mean"])


def without_ratio(log_q, drawn_log_q):
    """A rule: the inverse of the ratio in the surrogate, whose gradient is then that of -A log q off policy too."""
    return jnp.exp(drawn_log_q - log_q)


def iw_opd(case):
    params = case["params"]
    rules = {"gap": {"name": "prefix_gap", "gamma": params["gamma"]}, "ratio": f"{__name__}:without_ratio"}
    spec = policy() | {"tokens": {"name": "product", "rules": rules, "divide_by": "all"}}
    batch = drawn(case) if has_drawn(case) else {}
    return Expression({"term": spec}, params["temperature"], batch, loss="surrogate_loss")


def best_fraction(case):
    """Builds the cases of TIP and TA-OPD."""
    params = case["params"]
    k, name = params["k"], params.get("score", params.get("mode"))
    scale = {"batch_quantile": "quantiles", "batch_minmax": "min_max", None: "min_max"}[params.get("scale")]
    mass = {"name": "teacher_mass_on_student_top", "k": k, "shared_only": not params.get("exact_mass")}
    d = {"name": "union_divergence", "k": k} if "score" in params else {"name": "top_k_divergence", "k": k}
    h = {"name": "student_top_entropy", "k": k} if "score" in params else "student_entropy"
    both = {"of": (d, mass), "combine": "product", "scale": "none"}
    tokens = {
        "name": "top_fraction", "fraction": params["fraction"], "round": "ceil", "scale": scale, "divide_by": "kept",
        "at_least_per_row": params.get("min_per_row", 0),
    } | {
        "soft_or": {"of": (h, d), "combine": "soft_or"},
        "entropy_only": {"of": h},
        "divergence_only": {"of": d},
        "teachability": {"of": (d, mass), "combine": "product"},
        "tip": {"of": (h, d), "combine": "soft_or"},
        "ca_softor": {"of": (h, both), "combine": "soft_or"},
    }[name]  # fmt: skip
    return Expression({"term": term(case, tokens=tokens)})


def selectkd(case):
    return Expression({"term": term(case, tokens=case["op"]["tokens"])})


def sdar(case):
    """Builds hard labels with weights g. The published value g (log p - log q) has g log p in addition."""
    tokens = {"name": "sigmoid", "of": "gap", "slope": case["params"]["beta"], "divide_by": "all"}
    average = case["op"]["average"]

    def left_in(log_p, log_q):
        of_p, of_q = of_target(case, log_p), of_target(case, log_q)
        values = jax.lax.stop_gradient(jax.nn.sigmoid(case["params"]["beta"] * (of_p - of_q)) * of_p)
        mask = given(case, "mask")
        if average == "sequence":
            return jnp.mean(jnp.sum(mask * values, axis=1) / mask.sum(axis=1))
        return mean(case, values)

    return Expression({"term": {"kind": "hard_labels", "tokens": tokens, "average": average}}, left_in=left_in)


def signal(case):
    """Builds a policy gradient with a shape of the reward."""
    name = case["id"].split("/")[1]
    reward = {
        "soft_log": "soft_log", "power_0.5": "power(exponent=0.5)", "power_1": "power(exponent=1.0)",
        "clip_1": "clip(limit=1.0)",
    }[name]  # fmt: skip
    return Expression({"term": policy(reward=reward)}, loss="surrogate_loss")


def csd(case):
    words, temperature = ("mixture", "mixture"), 1.0
    if "weights" in case["params"]:
        words = tuple(word.split()[0] for word in case["params"]["weights"])
        temperature = 2.0 if "temperature 2" in case["params"]["weights"][0] else 1.0
    divergence = {"name": "concrete_score", "weights": words, "temperature": temperature, "teacher_share": 0.3}
    return Expression({"term": term(case, divergence=divergence)}, loss="value")


def logit_mse(case):
    weights = {"S": "student", "T": "teacher", "U": "uniform"}[case["op"]["divergence"]["kwargs"]["weights"]]
    logits = case["op"]["logits"]
    divergence = {"name": "logit_mse", "weights": weights, "standardise": logits.startswith("z-scores")}
    return Expression({"term": term(case, divergence=divergence, logits="centred" if logits == "centred" else "raw")})


def jeffreys(case):
    return comparison(case, divergence={"name": "jeffreys"})


def to_mixture(case):
    """Builds a half of f-distill's Jensen-Shannon loss. The published logarithm of the mixture m is log(m + 1e-10)."""
    weight, first = case["op"]["weight"], case["op"]["pair"][0]

    def left_in(log_p, log_q):
        mixture = weight * jnp.exp(log_p) + (1 - weight) * jnp.exp(log_q)
        of_first = jnp.exp(log_p if first == "teacher" else log_q)
        return mean(case, jnp.sum(of_first * (jnp.log(mixture) - jnp.log(mixture + 1e-10)), axis=-1))

    made = comparison(case, assistant=case["op"]["assistant"], weight=weight)
    return dataclasses.replace(made, left_in=left_in)


def engine(case):
    """Builds -sum q log p: reverse KL, and the student's entropy."""
    return Expression({"term": term(case), "entropy": {"divergence": {"name": "entropy"}, "pair": ("student",)}})


def bdkd(case):
    """Builds ordered KLs. The published cross entropy leaves the teacher's entropy in, with the weight of forward KL."""
    heavy = np.where(stored(case, "teacher_entropy") > stored(case, "student_entropy"), 2.0, 1.0)
    return dataclasses.replace(comparison(case), left_in=lambda log_p, log_q: mean(case, heavy * entropy(log_p)))


def bild(case):
    leader = "teacher" if "teacher_led" in case["id"] else "student"
    divergence = {"name": "logit_differences", "k": case["params"]["k"], "leader": leader}
    return comparison(case, divergence=divergence, vocabulary={"support": "whole"})


def normkd(case):
    return comparison(case, temperature={"name": "own_deviation", "factor": 1.5}, temperature_squared=True)


def nkd(case):
    return comparison(case, divergence={"name": "nkd"} | case["params"])


def zscore(case):
    return comparison(case, logits={"name": "z_score"})


def dtkd(case):
    return comparison(case, temperature={"name": "relative_maximum"})


def ctkd(case):
    t = case["params"]["temperature"]
    at_t = lambda log_p: jax.nn.log_softmax(log_p / t)
    return dataclasses.replace(
        comparison(case), left_in=lambda log_p, log_q: t**2 * mean(case, entropy(at_t(log_p)))
    )  # fmt: skip


def sampled_reverse_kl(log_p, log_q, *, target):
    """A divergence: the sampled token's gap, a constant, times the token's log-probability."""
    is_target = jnp.arange(log_q.shape[-1]) == target[..., None]
    of_p, of_q = (jnp.sum(jnp.where(is_target, log, 0), axis=-1) for log in (log_p, log_q))
    return jax.lax.stop_gradient(of_q - of_p) * of_q


def self_distillation(case):
    """Builds the cases of SDFT and SDPO. TRL's sampled token is a divergence of one's own."""
    op, params = case["op"], case["params"]
    batch = drawn(case) if has_drawn(case) else {}
    skipped = params.get("skipped_first_tokens", 0)
    batch["loss_mask"] = given(case, "mask") & (np.arange(given(case, "mask").shape[1]) >= skipped)
    changes = {} if op["tokens"] == "none" else {"tokens": op["tokens"] | {"divide_by": "all"}}
    if op["kind"] == "sampled":
        changes["divergence"] = f"{__name__}:sampled_reverse_kl"
    if params.get("kept_rows"):
        kept = np.array(params["kept_rows"], bool)[:, None]
        batch["has_view"], changes["row_gate"] = np.broadcast_to(kept, given(case, "mask").shape), "has_view"
    return Expression({"term": term(case, **changes)}, op.get("temperature", 1.0), batch)


def g_opd(case):
    scale = case["params"]["lambda"]
    return Expression({"term": policy(members={"teacher": scale, "reference": 1 - scale})}, loss="surrogate_loss")


def g_opd_by_domain(case):
    """Builds a term for each domain; each token's share is the same as in one average over the whole batch."""
    scale, domains = case["params"]["lambda"], np.array(case["params"]["rows"])
    members = {
        "math": {"teacher": scale, "reference": 1 - scale},
        "code": {"second_teacher": scale, "reference": 1 - scale},
        "other": {"teacher": 1.0},
    }
    terms = {
        name: policy(members=of_domain) | {"where": {"domain": name}, "average": "batch_token"}
        for name, of_domain in members.items()
    }
    shape = given(case, "mask").shape
    batch = {f"where_{name}": np.broadcast_to((domains == name)[:, None], shape) for name in members}
    return Expression(terms, batch=batch, loss="surrogate_loss")


def aligndistil(case):
    """Builds reverse KL to an extrapolation from the reference through the teacher."""
    params = case["params"]
    weight = params["beta"] / params["beta2"] + ("contrast" in case["id"])
    return comparison(
        case, pair=("assistant", "student"), assistant="extrapolation", between=("reference", "teacher"), weight=weight,
        coefficient=params["beta2"], average="sequence" if params["length_normalised"] else "row_sum",
    )  # fmt: skip


def delta_kd(case):
    a = case["params"]["a"]
    # The second teacher stands for the student's start.
    weights = {"second_teacher": 1.0, "teacher": a, "reference": -a}
    return comparison(case, pair=("assistant", "student"), assistant="extrapolation", weights=weights)


def among_teachers(case):
    weights = dict(zip(("teacher", "second_teacher"), case["params"]["weights"], strict=True))
    kind = case["id"].split("/")[0]
    if kind == "teachers_sum":
        return Expression({name: {"pair": (name, "student"), "coefficient": weights[name]} for name in weights})
    assistant = "arithmetic_mixture" if kind == "teachers_probabilities" else "geometric_mixture"
    return comparison(case, pair=("assistant", "student"), assistant=assistant, weights=weights)


def limited_tail(case):
    """Builds TRL's tail. The published logarithm of the mass of the k tokens is at most -1e-7."""

    def left_in(log_p, log_q):
        _, ids = jax.lax.top_k(log_p, case["params"]["k"])
        elsewhere = jnp.put_along_axis(jnp.ones(log_p.shape, bool), ids, False, axis=-1, inplace=False)
        tails = [jnp.log(jnp.sum(jnp.where(elsewhere, jnp.exp(log), 0), axis=-1)) for log in (log_p, log_q)]
        limited = [jnp.maximum(tail, jnp.log(-jnp.expm1(-1e-7))) for tail in tails]
        kl = lambda of_p, of_q: jnp.exp(of_p) * (of_p - of_q)
        return mean(case, kl(*limited) - kl(*tails))

    return dataclasses.replace(comparison(case), left_in=left_in)


def limited_values(case):
    """Builds verl's top k. The published log-probabilities have a lower limit, and each value is in [0, limit]."""
    params = case["params"]

    def left_in(log_p, log_q):
        top_p, ids = jax.lax.top_k(log_p, params["k"])
        top = (top_p, jnp.take_along_axis(log_q, ids, axis=-1))
        limited = [jnp.maximum(log, params["log_prob_min"] or -jnp.inf) for log in top]
        kl = lambda of_p, of_q: jnp.sum(jnp.exp(of_p) * (of_p - of_q), axis=-1)
        return mean(case, jnp.clip(kl(*limited), 0, params["value_max"]) - kl(*top))

    return dataclasses.replace(comparison(case), left_in=left_in)


def outside(case):
    """Builds NeMo-RL's whole vocabulary, with a fixed log-probability outside the teacher's top k."""
    return comparison(case, vocabulary={"support": "teacher_top_k", "k": case["params"]["k"], "outside": -100.0})


def lsm(case):
    added = case["params"]["tail_sampling"]
    vocabulary = {"support": "teacher_top_k", "k": case["params"]["k"], "rest": "renormalised", "add_target": added}
    return comparison(case, vocabulary=vocabulary)


def support(case):
    params = case["params"]
    name = {"only_stu": "student_top_k", "only_tch": "teacher_top_k"}.get(params["strategy"], params["strategy"])
    weights = {"student_p": "student", "teacher_p": "teacher", "none": "uniform"}[params["weights"]]
    return comparison(
        case, divergence={"name": "surrogate_reverse_kl", "weights": weights},
        vocabulary={"support": name, "k": params["k"], "rest": "dropped"},
    )  # fmt: skip


def pocl(case):
    op = case["op"]
    labels, kd = op["terms"]
    divergence = {"name": kd["divergence"]["name"]} | kd["divergence"]["kwargs"]
    terms = {
        "labels": {"kind": "hard_labels", "coefficient": labels["weight"]},
        "kd": {key: kd[key] for key in ("temperature", "temperature_squared")}
        | {"divergence": divergence, "coefficient": kd["weight"]},
    }
    if "entropy_of" not in op:
        return Expression(terms)
    at_t = lambda log_p: jax.nn.log_softmax(log_p / op["entropy_temperature"])
    return Expression(
        terms, left_in=lambda log_p, log_q: op["entropy_weight"] * mean(case, entropy(at_t(log_p)))
    )  # fmt: skip


def annealing_kd(case):
    made = comparison(case, teacher_temperature=1 / case["op"]["teacher_logits_factor"], temperature=1.0)
    return dataclasses.replace(made, factor=0.25)  # logit_mse is a quarter of the mean square


def trust_region(case):
    weights = case["op"]["pair"][0]["weights"]
    return comparison(case, pair=("assistant", "student"), assistant="geometric_mixture", weights=weights)


def with_anchor(case):
    """Builds a loss on the teacher's likeliest tokens, plus reverse KL over these tokens."""
    k, coefficient = case["params"]["k"], case["params"]["PL_ANCHOR_COEF"]
    anchor = {
        "divergence": {"name": "reverse_kl"}, "coefficient": coefficient,
        "vocabulary": {"support": "teacher_top_k", "k": k, "rest": "renormalised"},
    }  # fmt: skip
    return Expression({"term": term(case), "anchor": anchor})


def gap_to_mixture(log_p, log_q, *, share):
    """A shape of the reward: the log-probability under a mixture of both models, less that under the student."""
    return jnp.logaddexp(jnp.log(share) + log_q, jnp.log1p(-share) + log_p) - log_q


def sampled(case):
    """Builds a policy gradient. The published value of a token is not the surrogate's, which is the gap at ratio 1."""
    name, weights = case["id"].split("/")[1], stored(case, "weights")
    share = case["params"].get("a", 0.0)
    spec = policy()
    if share:
        spec = policy(reward={"name": f"{__name__}:gap_to_mixture", "share": share})
    elif name.endswith("_tokens"):
        spec["tokens"] = {"name": name.split("_")[0], "count": case["params"]["n"], "divide_by": "kept"}

    def left_in(log_p, log_q):
        of_p, of_q = of_target(case, log_p), of_target(case, log_q)
        gap = of_q - (jnp.log(share * jnp.exp(of_q) + (1 - share) * jnp.exp(of_p)) if share else of_p)
        published = gap**2 / 2 if name == "k2" else gap * of_q
        return jax.lax.stop_gradient(mean(case, published - gap, (weights != 0) if name.endswith("_tokens") else 1.0))

    return Expression({"term": spec}, left_in=left_in)


EXPRESSED = {
    key: builder
    for builder, keys in (
        (eopd, numbered(closed(0, 2))),
        (fire, numbered(closed(3, 5))),
        (tsdkd, numbered(closed(6, 8))),
        (adakd, numbered(closed(9, 13))),
        (todi, numbered(closed(14, 16))),
        (atkd, numbered(closed(17, 19))),
        (dkd, numbered(closed(20, 22))),
        (iw_opd, numbered(closed(23, 25))),
        (best_fraction, numbered(closed(29, 35))),
        (selectkd, numbered(closed(36, 38))),
        (sdar, numbered(39, 40)),
        (signal, numbered(closed(43, 46))),
        (csd, numbered(closed(47, 52))),
        (logit_mse, numbered(closed(53, 55))),
        (jeffreys, numbered(56)),
        (to_mixture, numbered(57, 58, 61, 62)),
        (comparison, numbered(59, 63)),  # f-distill's total variation
        (engine, numbered(60, 64)),
        (bdkd, numbered(65, 67)),
        (bild, numbered(closed(69, 72))),
        (normkd, numbered(73)),
        (nkd, numbered(74)),
        (zscore, numbered(75, 76)),
        (dtkd, numbered(77)),
        (ctkd, numbered(78)),
        (comparison, numbered(closed(79, 97))),  # clipped entries, and divergences that are only formulas
        (self_distillation, numbered(closed(98, 106))),
        (comparison, numbered(closed(107, 109))),  # OPSD
        (g_opd, numbered(110, 111)),
        (g_opd_by_domain, numbered(112)),
        (aligndistil, numbered(113, 115)),
        (delta_kd, numbered(116, 117)),
        (among_teachers, numbered(closed(118, 123))),
        (comparison, numbered(closed(127, 133))),  # TRL's top k
        (limited_tail, numbered(134)),
        (limited_values, numbered(135, 136)),
        (comparison, numbered(137, 138)),  # NeMo-RL's top k
        (outside, numbered(139, 140)),
        (lsm, numbered(141, 142)),
        (support, numbered(closed(146, 151))),
        (comparison, numbered(152, 153)),  # ms-swift's top k
        (pocl, numbered(closed(171, 176))),
        (annealing_kd, numbered(185)),
        (trust_region, numbered(188)),
        (comparison, numbered(191, 192)),  # a budget of the student's mass
        (with_anchor, numbered(closed(193, 195))),
        (sampled, numbered(closed(197, 200))),
    )
    for key in keys
}


def steps_of(values, boundaries):
    constants = [{"name": "constant_schedule", "value": value} for value in values]
    return {"name": "join_schedules", "schedules": constants, "boundaries": boundaries}


# key -> the name of an array, and the schedule that gives the array's value at each step.
SCHEDULES = {
    "c0177": {
        "temperature": {"name": "by_stage", "values": configs.pocl.TEMPERATURES, "total_steps": 4},
        "kd_ratio": {"name": "by_stage", "values": configs.pocl.SHARES, "total_steps": 4},
    },
    "c0180": {"value": {"name": "cosine_decay_schedule", "init_value": 1.0, "decay_steps": 10}},
    "c0181": {"value": {"name": "linear_schedule", "init_value": 4.0, "end_value": 1.0, "transition_steps": 20}},
    "c0182": {"value": {"name": "cosine_decay_schedule", "init_value": 4.0, "decay_steps": 20, "alpha": 0.25}},
    "c0183": {"value": {"name": "constant_schedule", "value": 4.0}},
    "c0184": {"factor": steps_of([0.2, 0.4, 0.6, 0.8, 1.0, 1.2], [4, 8, 12, 16, 20])},
}

# key -> the keywords of the schedule `adaptive_fraction`, which follows the losses.
ADAPTIVE = {
    "c0178": {"rate": 0.05, "tolerance": 0.05, "decay": 0.99, "warmup": 0.05, "smallest": 0.1},
    "c0179": {"rate": 0.1, "tolerance": 0.1, "decay": 0.9, "warmup": 0.0, "smallest": 0.1},
}

# key -> the way in which a teacher follows the student.
FOLLOWERS = {"c0186": Follow(0.05, every=3), "c0187": Follow(1 - 0.9, copy_first=True)}

ORDERS = numbered(169, 170)  # orders of the rows of a dataset
SPANS = numbered(closed(154, 165))  # two tokenizers, compared in test_alignment.py

NOT_EXPRESSED = {
    key: reason
    for reason, keys in (
        ("draws tokens at random, while a rule is a function of scores", numbered(closed(26, 28))),
        ("needs an advantage of each row, such as a verifier's reward", numbered(41, 42)),
        ("takes the larger of two means over the batch", numbered(66, 68)),
        ("needs a weight of each token from the divergence of two frozen models", numbered(114)),
        ("needs weights of the teachers from the scores of a batch", numbered(closed(124, 126))),
        ("adds the sampled token's score function to a sum over the top k", numbered(143)),
        ("limits the logarithm of each ratio", numbered(144)),
        ("has no loss, and adds 1e-10 inside each logarithm", numbered(145)),
        ("needs a map between two vocabularies", numbered(closed(166, 168))),
        ("needs a quantile over the batch that decides the size of a support", numbered(189, 190)),
        ("needs a z-score over the outcomes of a support", numbered(196)),
    )
    for key in keys
}


def test_every_case_is_in_one_table():
    tables = [*EXPRESSED, *SCHEDULES, *ADAPTIVE, *FOLLOWERS, *ORDERS, *SPANS, *NOT_EXPRESSED]
    assert sorted(tables) == sorted(CASES) and len(CASES) == 201


def with_marks():
    """Returns the keys; of cases with the same builder, divergence and support, all but the first two are slow."""
    seen = collections.Counter()
    marked = []
    for key, builder in EXPRESSED.items():
        op = CASES[key]["op"]
        kind = builder, str(op.get("divergence", {}).get("name")), str(op.get("vocabulary", {}).get("support"))
        seen[kind] += 1
        marked.append(pytest.param(key, marks=pytest.mark.slow if seen[kind] > 2 else ()))
    return marked


@pytest.mark.parametrize("key", with_marks())
def test_published_loss_and_gradient(key):
    case = CASES[key]
    with jax.enable_x64(True):
        made = EXPRESSED[key](case)
        read = {"teacher", *(name for name in MEMBERS if f"{name}_logits" in case["uses"])}
        frozen = {name: given(case, f"{name}_logits") for name in MEMBERS if name in read}
        student = given(case, "student_logits")
        batch = {"targets": given(case, "targets"), "loss_mask": given(case, "mask")} | made.batch
        loss, gradient = step(made.terms, student, frozen, batch, temperature=made.temperature)
        if made.left_in is not None:
            log_p = jax.nn.log_softmax(frozen["teacher"])
            of_logits = lambda logits: made.left_in(log_p, jax.nn.log_softmax(logits))
            value, slope = jax.jit(jax.value_and_grad(of_logits))(jnp.asarray(student))
            loss, gradient = loss + float(value), gradient + np.asarray(slope)
    expected = made.factor * stored(case, made.gradient)
    np.testing.assert_allclose(loss, made.factor * stored(case, made.loss), rtol=1e-9)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("key", SCHEDULES)
def test_published_values_of_a_schedule(key):
    case = CASES[key]
    for name, spec in SCHEDULES[key].items():
        expected = stored(case, name)
        time = {"c0177": None, "c0180": "epoch", "c0184": "epoch"}.get(key, "step")
        at = np.arange(len(expected)) if time is None else stored(case, time)
        with jax.enable_x64(True):
            schedule = schedules.as_stateful(resolve.build(spec, schedules))
            found = [float(schedule(schedule.init(), step=jnp.int32(n))) for n in at if n >= 0]
        # optax computes with float32, because the number of a step is an int32.
        np.testing.assert_allclose(found, expected[at >= 0], rtol=5e-7, atol=1e-12)
        assert len(found) > 3


@pytest.mark.parametrize("key", ADAPTIVE)
def test_published_values_of_a_schedule_that_follows_the_loss(key):
    case = CASES[key]
    losses, used, after, reference = (
        stored(case, name) for name in ("distillation_loss", "ratio_used", "ratio_after", "reference")
    )
    with jax.enable_x64(True):
        schedule = schedules.adaptive_fraction(total_steps=len(losses), **ADAPTIVE[key])
        update, state = jax.jit(schedule.update), schedule.init()
        for step, loss in enumerate(losses):
            np.testing.assert_allclose(schedule(state, step=step), used[step], rtol=1e-12)
            state = update(state, step=step, loss=loss)
            np.testing.assert_allclose(state.value, after[step], rtol=1e-12)
            # The published reference is -1 until it is set.
            np.testing.assert_allclose(jnp.where(jnp.isinf(state.reference), -1, state.reference), reference[step])
    assert len(np.unique(after)) > 5


@pytest.mark.parametrize("key", FOLLOWERS)
def test_published_averages_of_the_student(key):
    case, follow = CASES[key], FOLLOWERS[key]
    students, teachers = stored(case, "student"), stored(case, "teacher")
    with jax.enable_x64(True):
        tx = with_followers(optax.sgd(1.0), {"teacher": follow})
        # OPSD's trace begins after the first step, so that the student before this step is unknown.
        params = jnp.zeros_like(students[0]) if follow.copy_first else jnp.asarray(students[0])
        state, found = tx.init(params), [] if follow.copy_first else [params]
        for student in students[len(found) :]:
            updates, state = tx.update(params - student, state, params)
            params = optax.apply_updates(params, updates)
            found.append(state.followers["teacher"])
    np.testing.assert_allclose(np.stack(found), teachers, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("key", ORDERS)
def test_published_orders_of_rows(key):
    case = CASES[key]
    values = {name: np.array(entries) for name, entries in case["values"].items()}
    order = orders.easy_first(values["rouge_l"], values["ce"], case["params"]["constant"])
    np.testing.assert_array_equal(order, values["order"])
    sizes = orders.stage_sizes(len(order), case["params"]["stages"])
    np.testing.assert_array_equal(sizes, values["stage_sizes"])
