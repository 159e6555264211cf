"""The objective: a sum of terms. Each term is an average, over the tokens of some rows, of a value per token.

A config describes the terms, and `make_terms` turns the description into `Term`s. `comparison` computes a divergence of
two members' distributions at one token, and `token_arrays` computes the arrays [B, L] that need a whole batch.
"""

from kd_jax.objectives.comparison import MEMBERS, Comparison, cross_entropy, token_loss
from kd_jax.objectives.make import make_terms
from kd_jax.objectives.terms import ORIGINS, Term
from kd_jax.objectives.token_arrays import row_means, token_coefficients

__all__ = [
    "MEMBERS",
    "ORIGINS",
    "Comparison",
    "Term",
    "cross_entropy",
    "make_terms",
    "row_means",
    "token_coefficients",
    "token_loss",
]
