"""The text on which the models are compared: the sources of the text, and the batches of each step.

The sources, their protocol `Source` and their decisions `Plan` may be imported from here. The modules are imported by
name: `rollouts` samples responses from a model, `responses` stores the responses of a teacher as a dataset,
`replay_buffer` and `pool` keep sampled rows for later steps and save them with a checkpoint, and `feed` makes the batch
of each step as the source of the run decides.
"""

from kd_jax.prefixes.sources import Plan as Plan
from kd_jax.prefixes.sources import Source as Source
from kd_jax.prefixes.sources import adaptive, data, mixture, paired, student, teacher

# The sources that a config may name.
__all__ = ["adaptive", "data", "mixture", "paired", "student", "teacher"]
