"""Compares the training code with published losses and gradients of DistiLLM-2 and MiniLLM, and DistiLLM's scheduler.

The models are fakes: the hidden states are the stored logits, and the output matrix is the identity.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from kd_jax import policy_gradient, prefixes
from kd_jax.objectives import ORIGINS
from tests.helpers.paths import GOLDEN
from tests.helpers.steps import step

CASES = json.loads((GOLDEN / "methods.json").read_text())


@functools.cache
def arrays():
    with np.load(GOLDEN / "methods.npz") as file:
        return dict(file)


def srkl(rows, weight=0.9, coefficient=1.0):
    return base.term(
        assistant={"name": "arithmetic_mixture"}, pair=("student", "assistant"), stop_gradient=True, rows=rows,
        weight=weight, coefficient=coefficient, average="sequence",
    )  # fmt: skip


def skl(weight=0.1, coefficient=1.0):
    return base.term(
        assistant={"name": "arithmetic_mixture"}, pair=("teacher", "assistant"), rows="teacher",
        weight=weight, coefficient=coefficient, average="sequence",
    )  # fmt: skip


def distillm2_terms(params):
    kind = params.get("loss_type", "distillm_v2")
    if kind == "distillm_v2":
        first, second = (params.get(f"base_alpha_{i}", 0.1) for i in (1, 2))
        beta = params.get("beta", 1.0)
        if params.get("gradual"):
            beta = 1 + 0.5 * min(1, 2 * params["step"] / params["max_steps"])
        weights = first, 1 - second
        if "lp" in params:
            spec = {"name": "distillm2_skew", "reference_steps": 1, "per_row": True}
            weights = spec | {"rows": "teacher"}, spec | {"rows": "student"}
        return {"chosen": skl(weights[0], 2 - beta), "rejected": srkl("student", weights[1], beta)}
    sequence = {"average": "sequence", "rows": "teacher"}
    return {
        "distillm_v1": {"chosen": srkl("teacher"), "rejected": srkl("student")},
        "gkd": {
            rows: base.term(divergence={"name": "jensen_shannon", "weight": 0.9}, rows=rows, average="sequence")
            for rows in ("teacher", "student")
        },
        "kd": {"chosen": base.term(**sequence)},
        "speculative_kd": {"chosen": base.term(**sequence)},
        "seqkd": {"chosen": base.hard_labels(**sequence)},
    }[kind]


@pytest.mark.parametrize("case", [c for c in CASES if "distillm2" in c["id"]], ids=lambda c: c["id"])
def test_distillm2(case):
    params, key = case["params"], case["arrays"]
    labels = arrays()["inputs/dv2_base/labels"][:, 1:]
    origin = np.repeat([ORIGINS.index("teacher"), ORIGINS.index("student")], 3)
    batch = {"targets": np.maximum(labels, 0), "loss_mask": labels != -100, "origin": origin}
    learned = None
    if "lp" in params:  # the means of the first window
        learned = lambda states: tuple(
            (type(weight)(jnp.asarray(mean, float), jnp.asarray(1.0, float)), coefficient)
            for (weight, coefficient), mean in zip(states, (params["lp"], params["lq"]), strict=True)
        )
    with jax.enable_x64(True):
        student, teacher = (
            arrays()[f"inputs/dv2_base/{who}_logits"][:, :-1].astype(np.float64) for who in ("student", "teacher")
        )
        loss, gradient = step(distillm2_terms(params), student, teacher, batch, at=5, schedules=learned)
    np.testing.assert_allclose(loss, arrays()[key["loss"]], rtol=1e-9)
    if "lp" not in params:  # In the published code the gradient passes through the skew. Here the skew is a constant.
        expected = arrays()[key["grad_student"]][:, :-1]
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def rollout():
    """Returns the targets, the positions and the three models' logits of the stored rollout's response."""
    stored = {name: arrays()[f"inputs/minillm/{name}"] for name in ("query_ids", "response_ids")}
    first = stored["query_ids"].shape[1] - 1
    place = slice(first, first + stored["response_ids"].shape[1])
    logits = {
        who: arrays()[f"inputs/minillm/{who}_logits"][:, place] for who in ("student_old", "student_new", "teacher")
    }
    return stored["response_ids"], place, logits


def log_prob(logits, targets):
    return jnp.take_along_axis(jax.nn.log_softmax(jnp.asarray(logits)), jnp.asarray(targets)[..., None], -1)[..., 0]


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


POLICY = [c for c in CASES if c["id"].split("/")[1].split("_")[0] in ("pg", "reg", "total")]


# The published reward uses the teacher at temperature 1 and the student at another. These cases are not reproduced.
FOLLOWED = [c for c in POLICY if c["params"]["temperature"] == 1 or "/reg" in c["id"]]


@pytest.mark.parametrize("case", POLICY, ids=lambda c: c["id"])
def test_minillms_rewards_advantages_and_weights(case):
    params, key = case["params"], case["arrays"]
    temperature, share = params["temperature"], params["teacher_mixed_alpha"] or 0.0
    targets, _, logits = rollout()
    mask, old = arrays()[key["mask"]], arrays()[key["old_logprobs"]]
    counted = jnp.asarray(mask)
    scores = policy_gradient.Scores(
        jnp.where(counted, log_prob(logits["teacher"], targets), 0), jnp.asarray(old), jnp.asarray(old), counted
    )
    rewards = policy_gradient.rewards(scores, params["reward_scaling"] or 1.0, params["cliprange_reward"])
    close(rewards, np.where(mask, arrays()[key["rewards"]], 0))
    raw = policy_gradient.returns(rewards, counted, discount=params["gamma"], include_current=True)
    close(raw, arrays()[key["advantages_raw"]] * mask)
    close(policy_gradient.whiten(raw, jnp.ones_like(counted)) * mask, arrays()[key["advantages"]] * mask)
    tempered = scores._replace(log_p=log_prob(logits["teacher"] / temperature, targets))
    close(policy_gradient.importance(tempered, share) * mask, arrays()[key["w"]] * mask)


@pytest.mark.parametrize("case", FOLLOWED, ids=lambda c: c["id"])
def test_minillm(case):
    params, key, what = case["params"], case["arrays"], case["id"].split("/")[1].split("_")[0]
    temperature, share = params["temperature"], params["teacher_mixed_alpha"] or 0.0
    targets, place, logits = rollout()
    mask, old = arrays()[key["mask"]], arrays()[key["old_logprobs"]]
    policy = base.policy(
        discount=params["gamma"], include_current=True, whiten="all", reward_scale=params["reward_scaling"] or 1.0,
        reward_limit=float(params["cliprange_reward"]), clip=params["cliprange"],
    )  # fmt: skip
    specs = {
        "pg": base.term(kind="policy_gradient", rows="student", policy=policy),
        "reg": base.term(divergence={"name": "reverse_kl"}, rows="student"),
    }
    if what != "total":
        specs = {what: specs[what]}
    origin = np.full(len(targets), ORIGINS.index("student"))
    batch = {"targets": targets.astype(np.int32), "loss_mask": mask, "origin": origin, "log_probs": old}
    loss, gradient = step(
        specs, logits["student_new"], logits["teacher"], batch, temperature=temperature, teacher_share=share
    )
    close(loss, arrays()[key["loss"]])
    close(gradient, arrays()[key["grad_student"]][:, place])


@pytest.mark.parametrize("case", [c for c in CASES if "pt_loss" in c["id"]], ids=lambda c: c["id"])
def test_minillms_second_stream(case):
    share, key = case["params"]["kd_ratio"], case["arrays"]
    labels = arrays()["inputs/minillm/pt_labels"]
    student, teacher = (arrays()[f"inputs/minillm/pt_{who}_logits"] for who in ("student", "teacher"))
    mask = labels != -100
    batch = {"targets": np.maximum(labels, 0).astype(np.int32), "loss_mask": mask}
    batch["origin"] = np.full(len(labels), ORIGINS.index("text"))
    specs = {
        "labels": base.hard_labels(rows="text", coefficient=1 - share),
        "kd": base.term(rows="text", coefficient=share),
    }
    loss, gradient = step(specs, student, teacher, batch)
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(teacher)))
    entropy = -(np.exp(log_p) * log_p).sum(-1)[mask].mean()  # part of the published loss
    close(loss + share * entropy, arrays()[key["loss"]])
    close(gradient, arrays()[key["grad_student"]])


def test_distillms_scheduler():
    golden = json.loads((GOLDEN / "distillm_scheduler.json").read_text())
    params = golden["params"]
    source = prefixes.adaptive(
        threshold=params["init_threshold"], tolerance=params["loss_eps"], capacity=params["capacity"], as_published=True
    )
    state, stored = source.observe(source.init(), params["dev_losses"][0]), 0
    names = {"data": "dataset", "fresh": "generate", "replay": "replay_sample"}
    for line in golden["trace"]:
        assert state["threshold"] == pytest.approx(line["phi"])
        choice = source.choose(
            state, step=line["it"] - 1, total=params["total_iters"], uniform=line["u"], stored=stored
        )
        assert names[choice] == line["action"], line
        if choice == "fresh":
            stored = min(stored + params["batch_size"], params["capacity"])
        assert stored == line["buffer_len"]
        if "eval_loss" in line:
            state = source.observe(state, line["eval_loss"])
            assert state["threshold"] == pytest.approx(line["phi_after_eval"])
            assert state["reference"] == line["baseline_loss_after"]
    assert len(golden["trace"]) == 60
