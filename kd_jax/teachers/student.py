"""The student as a training step runs it: outputs on a batch, and the gradients of the trained arrays.

A frozen output matrix gets no gradient, so the product of hidden states and gradients of logits is not computed for it.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from kd_jax.models import HEAD_OF, Part
from kd_jax.teachers.compare import student_outputs
from kd_jax.teachers.online import HiddenModel, outputs_of
from kd_jax.teachers.protocol import Outputs

ROW_KEYS = "row_keys"  # the name in a batch of the random keys of the rows, for dropout
DROPOUT = 0x64726F70  # separates the keys of dropout from other keys of a run


@dataclasses.dataclass(frozen=True)
class Student:
    """A student of which all parameters are trained, or a part.

    Attributes:
      model: the model.
      part: the part that is trained; None for all parameters.
      mesh: the mesh of the parameters and the batch; None for one device.
    """

    model: HiddenModel
    part: Part | None
    mesh: jax.sharding.Mesh | None

    def complete(self, trained: PyTree, frozen: PyTree, batch: Mapping[str, Array] | None = None) -> PyTree:
        """Returns the model's parameters from the trained arrays and the frozen ones, with dropout if `batch` has keys."""
        return trained if self.part is None else self.part.join(trained, frozen, (batch or {}).get(ROW_KEYS))

    def outputs(self, trained: PyTree, frozen: PyTree, batch: Mapping[str, Array]) -> Outputs:
        """Returns the student's outputs on a batch."""
        return student_outputs(self.model, self.complete(trained, frozen, batch), batch, self.mesh)

    def with_gradient(
        self, trained: PyTree, frozen: PyTree, batch: Mapping[str, Array]
    ) -> tuple[Outputs, Callable[[dict[str, Array]], PyTree]]:
        """Returns `outputs`, and the function from the gradients of `differentiated` to those of the trained arrays."""
        params = self.complete(trained, frozen, batch)
        found, pull_back = jax.vjp(lambda trained: self.differentiated(self.outputs(trained, frozen, batch)), trained)
        outputs = outputs_of(self.model, params, found["hidden"])
        outputs = outputs._replace(head=found.get("head", outputs.head))
        return outputs, lambda gradients: pull_back(gradients)[0]

    def differentiated(self, outputs: Outputs) -> dict[str, Array]:
        """Returns the outputs that depend on trained arrays: the hidden states, and the output matrix unless it is frozen."""
        assert outputs.hidden is not None and outputs.head is not None
        arrays = {"hidden": outputs.hidden}
        has_head = self.part is None or self.part.has_gradient(HEAD_OF[outputs.tied])
        return arrays | {"head": outputs.head} if has_head else arrays

    def row_keys(self, key: Array, step: Int[Array, ""], count: int) -> dict[str, Array]:
        """Returns the entry of a batch with the keys of the rows; {} without dropout.

        A key depends on the step and on the index of the row in the global batch.
        """
        if self.part is None or not self.part.dropout:
            return {}
        of_step = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), step)
        return {ROW_KEYS: jax.vmap(jax.random.fold_in, (None, 0))(of_step, jnp.arange(count))}
