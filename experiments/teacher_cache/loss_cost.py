"""Measures the CPU time of the loss, with value and gradient, for each kind of cache.

PYTHONPATH=. python experiments/teacher_cache/loss_cost.py
"""

import json
import time

import jax
import jax.numpy as jnp

from kd_jax import divergences
from kd_jax.head_loss import token_sum
from kd_jax.teachers.cached import CACHED, sampled_forward_kl

TOKENS, VOCABULARY, WIDTH = 1024, 49152, 576


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, teacher_hidden = jax.random.normal(keys[0], (2, 1, TOKENS, WIDTH))
    head, teacher_head = 0.05 * jax.random.normal(keys[1], (2, VOCABULARY, WIDTH))
    coefficient = jnp.ones((1, TOKENS))
    cases = {"hidden": ((), (teacher_hidden, teacher_head))}
    for kind, k in (("top_k", 16), ("top_k", 64), ("top_k", 256), ("samples", 16), ("samples", 64)):
        ids = jax.random.permutation(keys[2], VOCABULARY)[: TOKENS * k % VOCABULARY or k]
        ids = jnp.resize(ids, (1, TOKENS, k))
        if kind == "top_k":
            cached = ids, jax.nn.log_softmax(jax.random.normal(keys[3], (1, TOKENS, k + 1)))
        else:
            cached = ids, jnp.full((1, TOKENS, k), 1 / k), jnp.ones((1, TOKENS))
        cases[f"{kind}, {k}"] = cached, (None, None)
    for name, (cached, teacher) in cases.items():
        align = CACHED[name.split(",")[0]]().align
        divergence = sampled_forward_kl if name.startswith("samples") else divergences.forward_kl
        loss = lambda log_p, log_q, *cached, align=align, divergence=divergence: divergence(
            *align(log_p, log_q, *cached)
        )

        def total(hidden, head, teacher, cached, loss=loss):
            return token_sum(loss, hidden, head, *teacher, coefficient, *cached, tied=(True, True))[0]

        step = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
        jax.block_until_ready(step(hidden, head, teacher, cached))
        seconds = []
        for _ in range(5):
            start = time.process_time()
            jax.block_until_ready(step(hidden, head, teacher, cached))
            seconds.append(time.process_time() - start)
        print(json.dumps({"cache": name, "cpu_seconds": round(min(seconds), 3)}), flush=True)


if __name__ == "__main__":
    main()
