"""The fields of config.json that describe a mixture of experts, and the experts' tensors on disk.

Tensors have one of two forms. Folders of the Hugging Face hub, and those that transformers 5 saves, have three matrices
for each expert. Inside transformers 5, one tensor has the matrices `gate` and `up` of all experts, and another has
`down`. Both forms are read, and the first form is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

from kd_jax.models.families import llama
from kd_jax.models.families.fields import Fields, Layout, Stack, Tensor, refuse_unless, whole
from kd_jax.storage.files import Json

if TYPE_CHECKING:
    from kd_jax.models.config import ModelConfig

MANY_EXPERTS = 2**12  # more experts than any model has; limits the number of tensors that config.json decides
FUSED = "mlp"  # the name of the module with router and experts inside transformers 5


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """The names of a family's tensors in a layer.

    Args:
      module: the name of the module with router and experts.
      gate, up, down: the names of the projections of an expert.
    """

    module: str
    gate: str
    up: str
    down: str

    def tensors(self, layer: str, count: int) -> Layout:
        """Returns the tensors of a layer with `count` experts, for parameters whose names start with 'mlp/'."""
        module = f"{layer}.{self.module}"
        layout: Layout = {"mlp/router/kernel": Tensor(f"{module}.gate.weight", transposed=True)}
        for path, name in (("gate", self.gate), ("up", self.up), ("down", self.down)):
            parts = (Tensor(f"{module}.experts.{expert}.{name}.weight", transposed=True) for expert in range(count))
            layout[f"mlp/experts/{path}/kernel"] = Stack(tuple(parts))
        return layout


def experts_from_hf(fields: Fields, default_count: int, default_chosen: int) -> Json:
    """Returns the number of experts, and the number of experts for each token.

    transformers reads two names of the number of experts. The fields of the router's loss and of its noise in training
    are not read.

    Raises:
      ValueError: the number of experts for each token is 0 or larger than the number of experts.
    """
    name, other = "num_local_experts", "num_experts"
    if fields.get(name) is None and fields.get(other) is not None:
        name, other = other, name
    count = whole(fields, name, default_count)
    refuse_unless(1 <= count <= MANY_EXPERTS, fields, name, f"a number from 1 to {MANY_EXPERTS}")
    refuse_unless(fields.get(other) in (None, count), fields, other, f"the same number as {name} = {count}")
    chosen = whole(fields, "num_experts_per_tok", default_chosen)
    expected = f"a number from 1 to {name} = {count}, because each token is sent to this number of experts"
    refuse_unless(1 <= chosen <= count, {"num_experts_per_tok": chosen}, "num_experts_per_tok", expected)
    return {"num_experts": count, "experts_per_token": chosen}


def experts_to_hf(config: ModelConfig) -> Json:
    """Returns the number of experts, and the number of experts for each token. This is the inverse of reading."""
    return {"num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}


def check_experts(config: ModelConfig) -> None:
    """Checks that there are experts, because config.json of the family has no form without experts."""
    if not config.num_experts:
        raise ValueError(f"family {config.family!r} has experts; got num_experts={config.num_experts}.")


def tensors(config: ModelConfig, names: ExpertNames) -> Layout:
    """Returns each parameter's tensor on disk, for a family that is Llama except for the experts."""
    layout = llama.tensors(config)
    for i in config.layers_with_experts:
        for path in ("gate", "up", "down"):
            del layout[f"layers/{i}/mlp/{path}/kernel"]
        of_layer = names.tensors(f"model.layers.{i}", config.num_experts or 0)
        layout |= {f"layers/{i}/{path}": stored for path, stored in of_layer.items()}
    return layout


def as_stored(layout: Layout, names: Collection[str], config: ModelConfig) -> Layout:
    """Returns the layout for a folder with tensors of these names, which may hold all experts in one tensor."""
    count, inner, layout = config.num_experts or 0, config.expert_size, dict(layout)
    for i in config.layers_with_experts:
        ours, module = f"layers/{i}/mlp", f"model.layers.{i}.{FUSED}"
        fused = f"{module}.experts.gate_up_proj"
        if fused not in names:
            continue
        layout[f"{ours}/router/kernel"] = Tensor(f"{module}.gate.weight", transposed=True)
        both = {"gate": (fused, 0, 2 * inner), "up": (fused, inner, 2 * inner)}
        for path, (name, first, columns) in (both | {"down": (f"{module}.experts.down_proj", 0, 0)}).items():
            parts = (Tensor(name, True, first, columns, row=row, rows=count) for row in range(count))
            layout[f"{ours}/experts/{path}/kernel"] = Stack(tuple(parts))
    return layout
