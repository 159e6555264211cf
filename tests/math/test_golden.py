"""Compares the loss, the gradient and the loss per token with published code of each method (golden/README.md)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import assistants, divergences, objectives, resolve
from tests.helpers.paths import GOLDEN

CASES = json.loads((GOLDEN / "divergences.json").read_text())
TOLERANCE = {"float64": 1e-9, "float32": 2e-5}


@functools.cache
def arrays():
    with np.load(GOLDEN / "divergences.npz") as file:
        return dict(file)


def entropy(log_p):
    return -np.sum(np.exp(log_p) * log_p, axis=-1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_published_code(case, dtype):
    op, inputs = case["op"], case["inputs"]
    temperature = op.get("temperature", 1.0)
    with jax.enable_x64(dtype == "float64"):
        student, teacher = (
            jnp.asarray(arrays()[f"inputs/{inputs}/{name}_logits"], dtype) / temperature
            for name in ("student", "teacher")
        )
        mask = arrays()[f"inputs/{inputs}/mask"]

        assistant = op.get("assistant")
        bound = assistant and resolve.bind({"name": assistant["name"], **assistant["kwargs"]}, assistants)
        divergence = resolve.bind({"name": op["divergence"]["name"], **op["divergence"]["kwargs"]}, divergences)
        token_loss = objectives.token_loss(divergence, bound, tuple(op["pair"]), op.get("stop_gradient", False))

        def losses(student):
            log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
            per_token = token_loss(log_p, log_q, op.get("weight"))
            return jnp.sum(per_token * mask) / mask.sum(), per_token

        (loss, per_token), grad = jax.value_and_grad(losses, has_aux=True)(student)
    assert per_token.dtype == grad.dtype == dtype
    loss, per_token, grad = (np.asarray(x, np.float64) for x in (loss, per_token, grad))

    left_in = np.zeros(mask.shape)  # entropy that the published loss does not subtract
    if "entropy_of" in op:
        assert op["entropy_of"] == "teacher"
        logits = arrays()[f"inputs/{inputs}/teacher_logits"] / temperature
        left_in = op.get("entropy_weight", 1.0) * entropy(
            np.asarray(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
        )
    close = functools.partial(np.testing.assert_allclose, rtol=TOLERANCE[dtype])
    close(loss + np.sum(left_in * mask) / mask.sum(), arrays()[f"{case['key']}/loss"])
    # The published gradient is with respect to the logits before the division by the temperature.
    expected = arrays()[f"{case['key']}/grad"]
    close(grad / temperature, expected, atol=TOLERANCE[dtype] * np.abs(expected).max())
    if f"{case['key']}/per_token" in arrays():
        close((per_token + left_in)[mask], arrays()[f"{case['key']}/per_token"][mask])


def test_every_case_is_there():
    assert len(CASES) == len({case["id"] for case in CASES}) == 132
