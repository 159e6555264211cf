"""A teacher that is a model and reads each batch at the same time as the student."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax
from jaxtyping import Array, Float, PyTree

from kd_jax.teachers.protocol import Outputs, Teacher


class HiddenModel(Protocol):
    """The part of `models.Model` that a comparison needs. Only `Online.described` calls `abstract_params`.

    A model whose logits have a cap has the attribute `logit_cap`, which `outputs_of` reads.
    """

    def hidden(self, params: PyTree, tokens: Array, mask: Array | None = None) -> Float[Array, "B L D"]:
        """Returns the hidden states after the final norm."""
        ...

    def stored_head(self, params: PyTree) -> tuple[Array, bool]:
        """Returns the output matrix as it is stored, and True if the matrix is the tied embedding."""
        ...

    def abstract_params(self) -> PyTree:
        """Returns the shapes of the parameters."""
        ...


def outputs_of(model: HiddenModel, params: PyTree, hidden: Float[Array, "B L D"]) -> Outputs:
    """Returns the outputs of a model, from its hidden states: with its output matrix, and with its cap of the logits."""
    head, tied = model.stored_head(params)
    return Outputs(hidden, head, tied, logit_cap=getattr(model, "logit_cap", None))


@dataclasses.dataclass(frozen=True)
class Online(Teacher):
    """A model as a teacher.

    Attributes:
      model: the model.
    """

    model: HiddenModel

    def outputs(self, params: PyTree, batch: Mapping[str, Array]) -> Outputs:
        """Returns the model's hidden states for the batch's tokens, and its output matrix."""
        return outputs_of(self.model, params, self.model.hidden(params, batch["tokens"], batch["mask"]))

    def described(self, path: str) -> str:
        """Returns the path and the number of the model's parameters."""
        params = self.model.abstract_params()
        return f"teacher {path}, {sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f}M parameters"
