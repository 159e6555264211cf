"""The speed of a run: tokens per second and, on accelerators, model FLOPs utilisation (mfu).

The mfu is the share of the devices' peak speed that the matrix products of the models use.
"""

import time

import jax

from kd_jax.models import Model

# The peak of dense bfloat16 products, in operations per second per device. The key is the start of
# jax.Device.device_kind. The numbers are the makers' commonly quoted figures without sparsity, and were not measured.
PEAK = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
}


def forward_flops(model: Model, length: int) -> float:
    """Returns the number of operations in the matrix products of one token's forward pass.

    A weight costs two operations. Attention covers half the row on average. Embeddings are looked up and cost nothing.
    The output matrix costs as much as any other matrix.

    Example:
      >>> from kd_jax import models
      >>> config = models.ModelConfig(family="gpt2", vocab_size=10, hidden_size=4, num_layers=1, num_heads=1)
      >>> forward_flops(models.from_config(config), length=6)
      512.0
    """
    config = model.config
    queries, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * queries + 2 * shared)
    mlp = config.hidden_size * config.intermediate_size * (3 if config.gated_mlp else 2)
    # A token reads the router and its own experts. The further cost of experts on several devices is not counted.
    experts = config.hidden_size * (3 * config.experts_per_token * config.expert_size + (config.num_experts or 0))
    with_experts = len(config.layers_with_experts)
    mlps = (config.num_layers - with_experts) * mlp + with_experts * experts
    weights = config.num_layers * attention + mlps + config.hidden_size * config.vocab_size
    return 2.0 * weights + config.num_layers * 2 * queries * length


class Clock:
    """Measures the speed between two calls. `restart` excludes time that is not training, such as an evaluation."""

    def __init__(self, student: Model, teacher: Model | None, length: int):
        """Computes the operations per token of a step: three forward passes of the student and one of the teacher.

        Two of the student's three forward passes stand for the backward pass.
        """
        self._flops = 3 * forward_flops(student, length) + (forward_flops(teacher, length) if teacher else 0.0)
        kind = jax.devices()[0].device_kind
        peaks = [peak for name, peak in PEAK.items() if kind.startswith(name)]
        self._peak = peaks[0] * len(jax.devices()) if peaks else None
        self.restart()

    def restart(self) -> None:
        """Begins a new lap."""
        self._start = time.perf_counter()

    def lap(self, tokens: float) -> dict[str, float]:
        """Returns tokens_per_second since the lap began, and mfu where the devices' peak is known. Begins a new lap."""
        start = self._start
        self.restart()
        rate = tokens / (self._start - start)
        return {"tokens_per_second": rate} | ({"mfu": rate * self._flops / self._peak} if self._peak else {})
