"""Calls of every divergence with the arguments that a term of an objective would give it."""

import inspect

from kd_jax import divergences

# The keywords without a default.
KEYWORDS = {
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "alpha_divergence": {"alpha": 0.4},
    "renyi": {"alpha": 0.4},
    "tsallis": {"order": 0.4},
}
PARAMETERS = {name: list(inspect.signature(getattr(divergences, name)).parameters) for name in divergences.__all__}
# These functions take two arrays of log-probabilities, and neither logits nor the target.
PLAIN = [name for name in divergences.__all__ if PARAMETERS[name][0] == "log_p" and "target" not in PARAMETERS[name]]
# These functions are not 0, or not least, where the two distributions are equal: coverage is -log of the student's mass on
# the teacher's top k; nkd keeps the cross-entropy of the target; plackett_luce is the likelihood of an order.
NOT_LEAST_AT_EQUALITY = {"coverage", "nkd", "plackett_luce"}


def call(name, log_p, log_q, target, **keywords):
    """Returns the value of a divergence, which is given the target if the divergence has such a parameter.

    A divergence of logits is given the log-probabilities as logits.
    """
    keywords = KEYWORDS.get(name, {}) | keywords
    if "target" in PARAMETERS[name]:
        keywords["target"] = target
    return getattr(divergences, name)(log_p, log_q, **keywords)
