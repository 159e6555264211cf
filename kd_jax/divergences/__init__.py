"""Divergences between two next-token distributions.

Each divergence is a function ``D(log_p, log_q, *, ...)`` that returns a value per token, in nats.

- ``log_p`` are the teacher's log-probabilities and ``log_q`` the student's. The functions do not depend on which model
  is which.
- Both are normalised over the last axis, the vocabulary. Each function sums over this axis.
- The value and the gradient are finite wherever the true value is finite, also where a log-probability is ``-inf`` and
  where ``p == q``.
- If the true value is infinite, the returned value is infinite. The entries that cause the infinite value add nothing
  to the gradient.
- A function with the keyword parameter ``target`` is given the index of the row's token, an integer per token. An index
  outside the vocabulary means that the token is not among the outcomes.
- A function whose parameters are called ``teacher_logits`` and ``student_logits`` is given logits, divided by the
  temperature. Its value changes with a constant that is added to the logits.
- The words ``"teacher"`` and ``"student"`` in keywords mean the first and the second distribution.

Some functions are no divergences in the strict sense, because their values are not 0, or not least, where ``p == q``.
Their docstrings say so.

``ENTRIES`` holds the contributions of the single entries of those divergences that are plain sums over the vocabulary.

The module `of_one` has the functions of one distribution, which are no divergences.

To add a divergence, write the function in one of the files of this package, and add its name to the ``__all__`` of that
file.
"""

# ruff: noqa: F403  # each file says in its `__all__` which names it adds

from kd_jax.divergences import (
    distances,
    kl,
    logit_gaps,
    mixture_kl,
    powers,
    surrogates,
    target_and_rest,
    top_tokens,
    weighted_kl,
)
from kd_jax.divergences.distances import *
from kd_jax.divergences.entries import ENTRIES as ENTRIES
from kd_jax.divergences.kl import *
from kd_jax.divergences.logit_gaps import *
from kd_jax.divergences.mixture_kl import *
from kd_jax.divergences.powers import *
from kd_jax.divergences.surrogates import *
from kd_jax.divergences.target_and_rest import *
from kd_jax.divergences.top_tokens import *
from kd_jax.divergences.weighted_kl import *

__all__ = sorted(
    distances.__all__
    + kl.__all__
    + logit_gaps.__all__
    + mixture_kl.__all__
    + powers.__all__
    + surrogates.__all__
    + target_and_rest.__all__
    + top_tokens.__all__
    + weighted_kl.__all__
)
