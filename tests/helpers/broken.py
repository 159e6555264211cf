"""A divergence that is NaN where one chosen token is the teacher's most probable token, for tests of runs that stop."""

import jax.numpy as jnp

from kd_jax.divergences import forward_kl

TOKEN = -1  # -1 means no token; a test sets TOKEN before anything is traced


def fragile(log_p, log_q):
    """Returns forward KL. Value and gradient are NaN where the teacher's most probable token is TOKEN."""
    return forward_kl(log_p, log_q) * jnp.where(jnp.argmax(log_p, axis=-1) == TOKEN, jnp.nan, 1.0)
