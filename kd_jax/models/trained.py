"""The part of a model's parameters that is trained: chosen parameters, or low-rank factors beside frozen parameters.

A training step differentiates the tree of the trained arrays alone. `Part.join` makes the model's complete parameters
from this tree and the tree of the frozen parameters.
"""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, cast

import jax
import jax.numpy as jnp
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key, PyTree

from kd_jax.models.families import FAMILIES
from kd_jax.models.families.fields import Tensor
from kd_jax.models.functional import Model, Params
from kd_jax.models.int8 import is_matrix
from kd_jax.models.lora import FrozenMatrix, add_product

ALL_LINEAR = "all-linear"
EMBEDDING = "embed/embedding"
HEAD = "head/kernel"
HEAD_OF = {True: EMBEDDING, False: HEAD}  # tied or not -> the name of the output matrix


class Part(Protocol):
    """A way to divide the parameters of a model into trained arrays and frozen arrays.

    Attributes:
      dropout: the probability of dropout; 0 for a part without dropout.
    """

    @property
    def dropout(self) -> float: ...

    def is_frozen(self, name: str) -> bool:
        """Returns True if a parameter of the model is frozen. The name is a path such as 'layers/0/mlp/up/kernel'."""
        ...

    def join(self, trained: PyTree, frozen: Params, row_keys: Key[Array, " B"] | None = None) -> Params:
        """Returns the complete parameters of the model.

        Args:
          trained: the tree of the trained arrays.
          frozen: the tree of the frozen parameters.
          row_keys: a random key for each row of the batch, for dropout; None for no dropout.
        """
        ...

    def has_gradient(self, name: str) -> bool:
        """Returns True if a parameter of the complete parameters depends on a trained array."""
        ...


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The part that consists of all parameters which do not match a pattern.

    Attributes:
      frozen: the names of the frozen parameters.
    """

    frozen: frozenset[str]

    @property
    def dropout(self) -> float:
        """The probability of dropout, which this part does not have."""
        return 0.0

    @classmethod
    def of(cls, pattern: str, model: Model) -> "Chosen":
        """Returns the part of a model that is trained if the parameters that match `pattern` are frozen.

        Args:
          pattern: a pattern as in `matches`, for the paths of parameters.
          model: the model.

        Raises:
          ValueError: no parameter matches, or all do.
        """
        names = leaves_of(model.abstract_params())
        found = frozenset(name for name in names if matches(name, pattern))
        if not found or len(found) == len(names):
            fault = "matches every parameter, so that nothing would be trained" if found else "matches no parameter"
            raise ValueError(f"student.freeze={pattern!r} {fault}. The parameters are {_listed(names)}.")
        return cls(found)

    def is_frozen(self, name: str) -> bool:
        return name in self.frozen

    def has_gradient(self, name: str) -> bool:
        return name not in self.frozen

    def join(self, trained: PyTree, frozen: Params, row_keys: Key[Array, " B"] | None = None) -> Params:
        leaves = leaves_of(frozen)
        matrices = {name: FrozenMatrix(leaf) for name, leaf in leaves.items() if is_product(name, leaf.shape)}
        return unflatten_dict(leaves | matrices | leaves_of(trained), sep="/")


@dataclasses.dataclass(frozen=True)
class Lora:
    """The part that consists of low-rank factors for some matrices. All parameters of the model are frozen.

    The factors of the matrix at `PATH` are trained arrays at `PATH/lora_a` [in, rank] and `PATH/lora_b` [rank, out].

    Attributes:
      rank: the rank of each product of two factors.
      alpha: the number that `rank` or its square root divides to give the scale.
      dropout: the probability with which an entry of the input of a first factor is set to 0 during training.
      root: True for the scale alpha / sqrt(rank), and False for alpha / rank.
      owners: the path of each target -> the path of the target whose first factor it uses. Matrices that are parts of
        one tensor of a Hugging Face folder share the first factor, as in PEFT.

    References:
      Kalajdzievski, `A rank stabilization scaling factor for fine-tuning with LoRA
      <https://arxiv.org/abs/2312.03732>`_, 2023, for the square root.
    """

    rank: int
    alpha: float
    dropout: float
    root: bool
    owners: Mapping[str, str]

    @property
    def scale(self) -> float:
        """The number by which each product of two factors is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)

    def is_frozen(self, name: str) -> bool:
        return True

    def has_gradient(self, name: str) -> bool:
        return name in self.owners

    def init(self, key: Key[Array, ""], model: Model) -> PyTree:
        """Returns the first factors of PEFT: one of the two factors is random, and their product is 0.

        The random factor of a matrix [in, out] has entries from U(-1 / sqrt(in), 1 / sqrt(in)). The second factor of an
        embedding has entries from N(0, 1).
        """
        shapes = leaves_of(model.abstract_params())
        factors: dict[str, Array] = {}
        for index, path in enumerate(sorted(self.owners)):
            rows, columns = shapes[path].shape
            of_target, a_shape, b_shape = jax.random.fold_in(key, index), (rows, self.rank), (self.rank, columns)
            if path == EMBEDDING:
                factors[f"{path}/lora_a"] = jnp.zeros(a_shape, jnp.float32)
                factors[f"{path}/lora_b"] = jax.random.normal(of_target, b_shape, jnp.float32)
                continue
            if self.owners[path] == path:
                bound = rows**-0.5
                factors[f"{path}/lora_a"] = jax.random.uniform(of_target, a_shape, jnp.float32, -bound, bound)
            factors[f"{path}/lora_b"] = jnp.zeros(b_shape, jnp.float32)
        return unflatten_dict(factors, sep="/")

    def join(self, trained: PyTree, frozen: Params, row_keys: Key[Array, " B"] | None = None) -> Params:
        leaves, factors = leaves_of(frozen), leaves_of(trained)
        indices = {path: index for index, path in enumerate(sorted(self.owners))}
        for path, leaf in leaves.items():
            owner = self.owners.get(path)
            is_linear = is_product(path, leaf.shape)
            if owner is None:
                leaves[path] = FrozenMatrix(leaf) if is_linear else leaf
                continue
            lora_a, lora_b = factors[f"{owner}/lora_a"], factors[f"{path}/lora_b"]
            if is_linear:
                keys = row_keys if self.dropout else None
                leaves[path] = FrozenMatrix(leaf, lora_a, lora_b, keys, self.scale, self.dropout, indices[owner])
            else:
                # The loss and the lookup of tokens need the embedding and the output matrix as arrays. Each product is
                # made once in a step, and costs less than the logits by the factor rank / number of tokens.
                leaves[path] = add_product(leaf, lora_a, lora_b, self.scale)
        return unflatten_dict(leaves, sep="/")


def leaves_of(tree: PyTree) -> dict[str, PyTree]:
    """Returns the leaves of nested dicts by path, such as 'layers/0/mlp/up/kernel'."""
    return cast(dict[str, PyTree], flatten_dict(tree, sep="/"))


def is_product(name: str, shape: tuple[int, ...]) -> bool:
    """Returns True if a parameter is the matrix of an `nnx.Linear` in a layer, and not a stack of experts' matrices."""
    return is_matrix(name) and len(shape) == 2


def matches(name: str, pattern: str) -> bool:
    """Returns True if a name matches a pattern: as in `fnmatch`, or as a regular expression for the complete name.

    Example:
      >>> matches("layers/0/mlp/up/kernel", "layers/[0-3]/*"), matches("embed/embedding", "embed.*|norm.*")
      (True, True)
    """
    try:
        is_expression = re.fullmatch(pattern, name) is not None
    except re.error:
        is_expression = False
    return is_expression or fnmatch.fnmatchcase(name, pattern)


def modules(model: Model) -> dict[str, str]:
    """Returns the parameters to which factors can be added, with the names of their modules in transformers.

    These are the matrices of the layers, without those of experts, and the embedding and the output matrix if the two are
    not tied. The parts of one tensor are neighbours, in their order.
    """
    tensors, shapes = (
        FAMILIES[model.config.family].tensors(model.config),
        leaves_of(model.abstract_params()),
    )
    further = () if model.config.tie_embeddings else (EMBEDDING, HEAD)
    return {
        path: tensor.name.removesuffix(".weight")
        for path, tensor in tensors.items()
        if isinstance(tensor, Tensor) and (path in further or is_product(path, shapes[path].shape))
    }


def find_targets(patterns: Iterable[str], model: Model, key: str = "student.lora.targets") -> dict[str, str]:
    """Returns `Lora.owners` for patterns of targets.

    Args:
      patterns: each is 'all-linear', for all matrices of the layers; or the name of a module in transformers, or the end
        of such a name, as in PEFT; or the end of a path of this project, such as 'attention/query'; or a pattern as in
        `matches`, for the complete name or path.
      model: the model.
      key: the key that has the patterns, for the message.

    Raises:
      ValueError: a pattern matches nothing; the message has the names.
    """
    names = modules(model)
    found: set[str] = set()
    for pattern in patterns:
        matching = {path for path, name in names.items() if _is_target(path, name, pattern)}
        if not matching:
            tied = " The embedding and the output matrix are tied, and cannot be targets." * model.config.tie_embeddings
            listed = ", ".join(dict.fromkeys(_short(name) for name in names.values()))
            raise ValueError(
                f"{key} has {pattern!r}, which matches no matrix of the model. The names of the modules are {listed}; the "
                f"paths are {_listed(names)}.{tied}"
            )
        found |= matching
    return owners(found, names)


def owners(targets: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Returns `Lora.owners` for the paths of targets, with the names of `modules`."""
    chosen, first = sorted(targets, key=list(names).index), {}
    for path in chosen:
        first.setdefault(names[path], path)
    return {path: first[names[path]] for path in chosen}


def names_of(model: Model) -> list[str]:
    """Returns the names of a model's parameters."""
    return list(leaves_of(model.abstract_params()))


def select(params: Params, keeps: Callable[[str], bool]) -> Params:
    """Returns the parameters whose names `keeps` accepts, as a nested dict."""
    return unflatten_dict({name: leaf for name, leaf in leaves_of(params).items() if keeps(name)}, sep="/")


def number_of(params: PyTree) -> int:
    """Returns the number of entries of all parameters, without the scales of int8 matrices."""
    is_leaf = lambda leaf: isinstance(leaf, qwix.QArray)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params, is_leaf=is_leaf))


def _is_target(path: str, name: str, pattern: str) -> bool:
    if pattern == ALL_LINEAR:
        return is_matrix(path)
    short = path.rpartition("/")[0]
    ends = f".{name}".endswith(f".{pattern}") or f"/{short}".endswith(f"/{pattern}")
    return ends or any(matches(text, pattern) for text in (name, path, short))


def _short(name: str) -> str:
    """Returns the name of a module inside its layer."""
    return re.sub(r"^.*\.\d+\.", "", name)


def _listed(names: Iterable[str]) -> str:
    """Returns the names of the first layer, and the names outside the layers."""
    return ", ".join(name for name in names if not name.startswith("layers/") or name.startswith("layers/0/"))
