"""Provides kd_jax through the interface of the peers' benchmark: `make(spec) -> (step, n_student, n_teacher)`.

`spec` has the sizes of student and teacher, V, B, T, lr, temperature and alpha. The loss is
alpha tau^2 KL(p || q) + (1 - alpha) cross-entropy.
"""

import jax
import numpy as np
import optax

from configs import base
from kd_jax import models
from kd_jax.objectives import make_terms
from kd_jax.train_step import init_state, make_train_step


def model(sizes: dict, vocab_size: int) -> models.Model:
    config = models.ModelConfig(
        family="llama", vocab_size=vocab_size, hidden_size=sizes["embed_dim"], num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"], num_kv_heads=sizes["num_kv_heads"], head_dim=sizes["head_dim"],
        intermediate_size=sizes["hidden_dim"], rope_theta=500_000.0, tie_embeddings=True,
    )  # fmt: skip
    return models.from_config(config)


def make(spec: dict):
    student, teacher = model(spec["student"], spec["V"]), model(spec["teacher"], spec["V"])
    params, teacher_params = student.init(jax.random.key(1)), teacher.init(jax.random.key(2))
    terms = make_terms(
        {
            "distil": base.term(coefficient=spec["alpha"] * spec["temperature"] ** 2),
            "labels": base.hard_labels(coefficient=1 - spec["alpha"]),
        },
        spec["temperature"],
    )
    tx = optax.adamw(spec["lr"])
    train_step = jax.jit(
        make_train_step(student, teacher, terms, tx, vocab_size=spec["V"], temperature=spec["temperature"]),
        donate_argnums=0,
    )
    box = [init_state(params, tx, terms, jax.random.key(0))]
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))

    def batch(tokens, mask):
        seen = np.ones(tokens[:, 1:].shape, bool)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": seen, "loss_mask": mask[:, 1:] > 0}

    def step(tokens, mask):
        box[0], metrics = train_step(box[0], teacher_params, batch(tokens, mask))
        return metrics["loss"][0]

    step.lower = lambda tokens, mask: train_step.lower(box[0], teacher_params, batch(tokens, mask))
    return step, count(params), count(teacher_params)
