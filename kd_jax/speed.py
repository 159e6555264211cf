"""How fast a run is: tokens a second, and on accelerators the share of the peak that the models' products make up."""

import time

import jax

from kd_jax.models import Model

# Dense bfloat16 products, operations a second a device, by the start of jax.Device.device_kind. The makers'
# figures as commonly quoted, without sparsity; none was compared with a device here.
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
    """Operations of the products of a token's forward pass: two a weight, and attention over half the row on average.

    Embeddings are looked up and cost nothing; the output matrix costs as any other.

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
    weights = config.num_layers * (attention + mlp) + config.hidden_size * config.vocab_size
    return 2.0 * weights + config.num_layers * 2 * queries * length


class Clock:
    """Measures laps of the training loop; what is not training, such as evaluation, is left out by `restart`."""

    def __init__(self, student: Model, teacher: Model | None, length: int):
        """A step costs the student three forward passes, two of them backwards, and the teacher one."""
        self._flops = 3 * forward_flops(student, length) + (forward_flops(teacher, length) if teacher else 0.0)
        kind = jax.devices()[0].device_kind
        peaks = [peak for name, peak in PEAK.items() if kind.startswith(name)]
        self._peak = peaks[0] * len(jax.devices()) if peaks else None
        self.restart()

    def restart(self) -> None:
        """Begins a lap now."""
        self._start = time.perf_counter()

    def lap(self, tokens: float) -> dict[str, float]:
        """tokens_per_second since the lap began and, where the devices' peak is known, mfu; begins the next."""
        start = self._start
        self.restart()
        rate = tokens / (self._start - start)
        return {"tokens_per_second": rate} | ({"mfu": rate * self._flops / self._peak} if self._peak else {})
