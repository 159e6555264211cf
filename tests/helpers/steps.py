"""Training steps on tiny models, and on fake models whose parameters are their logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax import models
from kd_jax.objectives import make_terms
from kd_jax.train_step import init_state, make_train_step

TERM = dict(
    kind="divergence", divergence={"name": "forward_kl"}, assistant=None, pair=("teacher", "student"),
    stop_gradient=False, weight=0.0, coefficient=1.0, rows="all", average="token", importance=False,
)  # fmt: skip
B, L, V = 8, 6, 24


def model(width, vocab=V):
    config = models.ModelConfig(family="llama", vocab_size=vocab, hidden_size=width, num_layers=1, num_heads=2)
    return models.from_config(config)


STUDENT, TEACHER = model(16), model(32, V + 8)


def batch(seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, L + 1, B)
    mask = np.arange(L) < lengths[:, None]
    tokens = random.integers(0, V, (B, L + 1)).astype(np.int32)
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], mask=mask, loss_mask=mask & (np.arange(L) > 0))


class Logits:
    """A model whose parameters are its logits."""

    def hidden(self, params, tokens, mask=None):
        return params["logits"]

    def stored_head(self, params):
        return jnp.eye(params["logits"].shape[-1], dtype=params["logits"].dtype), False


def step(specs, student, teacher, batch, *, at=0, schedules=None, temperature=1.0, teacher_share=0.0):
    """Returns the loss of a training step and the gradient of the loss with respect to the student's logits.

    Args:
      specs: the terms, by name.
      student: the student's logits [B, L, V].
      teacher: the teacher's logits; or the logits of all frozen models by name, with the teacher as "teacher".
      batch: `targets` and `loss_mask`, and any other array of a batch, such as `origin` and `log_probs`.
      at: the number of the step.
      schedules: a function from the first states of the schedules to those at the step.
      temperature: the temperature of the objective.
      teacher_share: the teacher's share of the mixture that sampled the student's rows.
    """
    frozen = teacher if isinstance(teacher, dict) else {"teacher": teacher}
    members = tuple(name for name in frozen if name != "teacher")
    terms, tx = make_terms(specs, temperature, teacher_share, members=members), optax.sgd(1.0)
    params = {"logits": jnp.asarray(student)}
    state = init_state(params, tx, terms, jax.random.key(0)).replace(step=jnp.int32(at))
    if schedules is not None:
        state = state.replace(schedules=schedules(state.schedules))
    models = {name: Logits() for name in frozen}
    train_step = make_train_step(
        Logits(), models, terms, tx, vocab_size=student.shape[-1], temperature=temperature
    )  # fmt: skip
    shape = batch["targets"].shape
    whole = {
        "tokens": np.zeros(shape, np.int32),
        "mask": np.ones(shape, bool),
        "log_probs": np.zeros(shape, np.float32),
    }
    frozen_params = {name: {"logits": jnp.asarray(logits)} for name, logits in frozen.items()}
    new, metrics = jax.jit(train_step)(state, frozen_params, whole | batch)
    return float(metrics["loss"][0]), np.asarray(params["logits"] - new.params["logits"])
