"""Weights for tokens, gates for rows, and temperatures for tokens, all constants to the gradient.

`make_rule` and `make_gate` turn specs of a config into functions; the module `specs` says what a spec may hold. The rules
are in `rules`, the gates in `row_gates`, the temperatures in `temperatures`, and their sums and quantiles in
`statistics`. The scores at which they look are in `kd_jax.token_weights.scores`. `__all__` has the names of the rules.

To add a rule, write the function in `rules`, and add its name to the `__all__` of that file.
"""

# ruff: noqa: F403  # the file of the rules says in its `__all__` which names it adds

from kd_jax.token_weights import rules
from kd_jax.token_weights.rules import *
from kd_jax.token_weights.specs import make_gate as make_gate
from kd_jax.token_weights.specs import make_rule as make_rule

__all__ = list(rules.__all__)
