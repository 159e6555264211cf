"""The parts from which attention and the MLP are made: projections, activations and initialisers."""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array

from kd_jax.models.config import ModelConfig
from kd_jax.models.norms import Norm

LinearOf = functools.partial[nnx.Linear]  # a function from the sizes of a projection to the projection
NormOf = Callable[..., Norm]  # a function from the shape of a norm's scale to the norm

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def residual_init(config: ModelConfig) -> nnx.Initializer:
    """Returns GPT-2's initialiser of the matrices that write to the residual stream.

    There are 2 * num_layers such matrices, so the standard deviation is divided by the square root of this number.

    References:
      Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
    """
    return nnx.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
