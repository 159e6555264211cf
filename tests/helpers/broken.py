"""A divergence that is not a number where the teacher is sure of one token, for the tests of runs that stop."""

import jax.numpy as jnp

from kd_jax.divergences import forward_kl

TOKEN = -1  # none; a test sets it before anything is traced


def fragile(log_p, log_q):
    """Forward KL, and NaN where the teacher's likeliest token is TOKEN, value and gradient."""
    return forward_kl(log_p, log_q) * jnp.where(jnp.argmax(log_p, axis=-1) == TOKEN, jnp.nan, 1.0)
