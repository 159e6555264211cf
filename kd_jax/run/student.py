"""Makes the student of a config: the model, the frozen parameters, and the start of the trained parameters."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from kd_jax import data, models, sharding
from kd_jax.data.shared import check_same_tokenizer, fit_tokenizer
from kd_jax.models import int8, peft, trained
from kd_jax.settings import Lora, Settings
from kd_jax.storage.files import Json

FACTORS = 1  # separates the key of the first factors of LoRA from the key of the model's own parameters


class Load(Protocol):
    """A function that reads or makes those parameters of the student whose names `keeps` accepts."""

    def __call__(
        self, key: jax.Array, keeps: Callable[[str], bool], dtype: DTypeLike, matrices_in_int8: bool = False
    ) -> PyTree: ...


@dataclasses.dataclass(frozen=True)
class Trainee:
    """A student and the division of its parameters.

    Attributes:
      model: the model.
      init: makes the trained arrays at the start from a key, placed on the mesh.
      abstract: the shapes of the trained arrays.
      part: the part that is trained; None for all parameters.
      frozen: the frozen parameters on the mesh; None if all are trained.
    """

    model: models.Model
    init: Callable[[jax.Array], PyTree]
    abstract: PyTree
    part: models.Part | None = None
    frozen: PyTree = None

    def complete(self, arrays: PyTree) -> PyTree:
        """Returns the model's parameters from the trained arrays."""
        return arrays if self.part is None else self.part.join(arrays, self.frozen)

    def describe(self) -> str:
        """Returns the number of the model's parameters, and of the trained parameters if some are frozen.

        If LoRA is used, the text has the rank and the number of matrices.
        """
        count = f"{_millions(trained.number_of(self.abstract if self.part is None else self.frozen))} parameters"
        if self.part is None:
            return count
        if isinstance(self.part, models.Lora):
            of_factors = f"LoRA of rank {self.part.rank} on {len(self.part.owners)} matrices"
            return f"{count}, all frozen; {of_factors}, {trained.number_of(self.abstract):,} trained parameters"
        whole = trained.number_of(self.abstract) + trained.number_of(self.frozen)
        return f"{_millions(whole)} parameters, {trained.number_of(self.abstract):,} of them trained"


def make_student(
    config: Settings, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh, teacher: models.Model | None,
    teacher_params: PyTree, key: jax.Array,
) -> tuple[Trainee, data.Tokenizer]:  # fmt: skip
    """Returns the student of a config, and the tokenizer, limited to the student's ids.

    Args:
      config: the config of the run.
      tokenizer: the tokenizer of the run.
      mesh: the mesh of the parameters.
      teacher: the teacher, whose layers the student may be; None without a teacher.
      teacher_params: the teacher's parameters.
      key: the key of the initial parameters.

    Raises:
      ValueError: a size, a vocabulary, a folder, an adapter or a pattern does not fit.
    """
    model, load, tokenizer = _source(config, tokenizer, mesh, teacher, teacher_params)
    options, everything = config.student, lambda name: True
    adapter = _adapter(config, model) if options.lora.path else None
    if (part := _part(config, model, adapter)) is None:
        return Trainee(model, lambda key: load(key, everything, jnp.float32), model.abstract_params()), tokenizer

    frozen = load(key, part.is_frozen, options.frozen_dtype, options.frozen_weights == "int8")
    if isinstance(part, models.Lora):
        make = partial(part.init, model=model)
        abstract = jax.eval_shape(make, key)
        placed = sharding.tree_shardings(mesh, abstract)
        if adapter is None:
            init = lambda key: jax.jit(make, out_shardings=placed)(jax.random.fold_in(key, FACTORS))
        else:
            init = lambda key: jax.tree.map(_place, adapter.read(), placed)
    else:
        is_trained = lambda name: not part.is_frozen(name)
        abstract = trained.select(model.abstract_params(), is_trained)
        init = lambda key: load(key, is_trained, jnp.float32)
    tables = [name for name in trained.names_of(model) if name.endswith("/embedding")]
    if all(map(part.is_frozen, tables)):
        # A lookup converts the table to `param_dtype`, and a conversion of the complete table would be wasted.
        model = dataclasses.replace(model, param_dtype=options.frozen_dtype)
    return Trainee(model, init, abstract, part, frozen), tokenizer


def _adapter(config: Settings, model: models.Model) -> peft.Adapter:
    """Opens the adapter from which the student continues."""
    options = config.student
    base = options.path if options.init == "pretrained" else ""
    return peft.open_adapter(models.folder(options.lora.path), model, base, "student.lora.path")


def _part(config: Settings, model: models.Model, adapter: peft.Adapter | None) -> models.Part | None:
    """Returns the part of the student that the config trains; None for all parameters."""
    lora, freeze = config.student.lora, config.student.freeze
    if adapter is not None:
        _check_same(config, model, adapter.lora)
        part = dataclasses.replace(adapter.lora, dropout=lora.dropout)
    elif lora.rank:
        owners = trained.find_targets(lora.targets, model)
        part = models.Lora(lora.rank, lora.alpha, lora.dropout, lora.scaling == "root", owners)
    else:
        return models.Chosen.of(freeze, model) if freeze else None
    if part.dropout and (merged := [name for name in part.owners if not int8.is_matrix(name)]):
        raise ValueError(
            f"student.lora.dropout={part.dropout} is not implemented for {', '.join(merged)}, whose products are added to the "
            f"matrix before it is used. Set student.lora.dropout=0, or choose targets in the layers only."
        )
    return part


def _check_same(config: Settings, model: models.Model, found: models.Lora) -> None:
    """Checks that the keys of LoRA that are not at their defaults agree with an adapter."""
    lora, scaling = config.student.lora, "root" if found.root else "rank"
    of_adapter = {"rank": found.rank, "alpha": found.alpha, "scaling": scaling}
    wrong = [name for name, value in of_adapter.items() if getattr(lora, name) not in (value, getattr(Lora(), name))]
    if wrong:
        raise ValueError(
            f"student.lora.{wrong[0]}={getattr(lora, wrong[0])!r}, but the adapter student.lora.path={lora.path!r} has "
            f"{of_adapter[wrong[0]]!r}; set this value, or leave the key at its default."
        )
    if tuple(lora.targets) != Lora().targets and trained.find_targets(lora.targets, model) != found.owners:
        raise ValueError(
            f"student.lora.targets={tuple(lora.targets)!r} are other matrices than those of the adapter student.lora.path="
            f"{lora.path!r}; leave student.lora.targets at its default."
        )


def _place(array: np.ndarray, placement: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, placement, lambda index: array[index])


def _source(
    config: Settings, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh, teacher: models.Model | None,
    teacher_params: PyTree,
) -> tuple[models.Model, Load, data.Tokenizer]:  # fmt: skip
    """Returns the student's model, the function that reads or makes its parameters, and the limited tokenizer."""
    options = dict(dtype=config.student.dtype, remat=config.student.remat, attention=config.attention)
    shardings_of = partial(sharding.tree_shardings, mesh)
    if config.student.init == "random":
        ids: Json = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
        try:
            student = models.from_config(models.ModelConfig(**(ids | dict(config.student.config))), **options)
        except TypeError as error:  # a keyword that ModelConfig does not have
            known = ", ".join(field.name for field in dataclasses.fields(models.ModelConfig))
            raise ValueError(f"student.config={dict(config.student.config)}: {error}; the keys are {known}.") from error
        _check_vocabulary(student.config, tokenizer)
        return student, partial(_make, student.init, shardings_of), tokenizer

    if config.student.init == "pretrained":
        if not config.student.path:
            raise ValueError("student.init='pretrained' needs student.path, the folder of the pretrained student.")
        path = models.folder(config.student.path)
        tokenizer = check_same_tokenizer(path, tokenizer, "student")
        tokenizer = fit_tokenizer(config.student.path, models.load_config(path).vocab_size, tokenizer, "student")
        student = models.from_config(models.load_config(path), **options)

        # The parameters are read when the state is made, so that only the state holds the initial parameters.
        def read(
            key: jax.Array, keeps: Callable[[str], bool], dtype: DTypeLike, matrices_in_int8: bool = False
        ) -> PyTree:
            found = models.load_pretrained(
                path, dtype=dtype, shardings=shardings_of, matrices_in_int8=matrices_in_int8, only=keeps
            )
            return trained.select(found[1], keeps)

        return student, read, tokenizer

    assert teacher is not None  # `open_caches` and `load_models` refuse layers of a teacher that is not loaded
    student, params = models.take_layers(teacher, teacher_params, tuple(config.student.layers))
    student = dataclasses.replace(student, param_dtype=jnp.float32, **options)
    # The arrays are copied because the state is donated to every step, and the arrays also belong to the teacher.
    as_float = lambda tree: models.dequantise(tree, jnp.float32)
    copy = lambda _, params: jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), as_float(params))
    return student, partial(_make, copy, shardings_of, params=params), tokenizer


def _make(
    make: Callable[..., PyTree], shardings_of: models.Shardings, key: jax.Array, keeps: Callable[[str], bool],
    dtype: DTypeLike, matrices_in_int8: bool = False, **arrays: PyTree,
) -> PyTree:  # fmt: skip
    """Returns those parameters of `make` whose names `keeps` accepts. The others are never in memory."""

    def chosen(key: jax.Array, arrays: PyTree) -> PyTree:
        found = trained.select(make(key, **arrays), keeps)
        # A matrix is rounded to int8 only once, from float32.
        is_rounded = lambda path: matrices_in_int8 and int8.is_matrix(sharding.path_name(path))
        return jax.tree.map_with_path(lambda path, x: x if is_rounded(path) else x.astype(dtype), found)

    placed = shardings_of(jax.eval_shape(chosen, key, arrays))
    params = jax.jit(chosen, out_shardings=placed)(key, arrays)
    return int8.quantise_all(params) if matrices_in_int8 else params


def _check_vocabulary(config: models.ModelConfig, tokenizer: data.Tokenizer) -> None:
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the student (student.config) has an output of {config.vocab_size} ids, fewer than the tokenizer's "
            f"{tokenizer.vocab_size}. Teacher, student and tokenizer must share one vocabulary; an output may have more ids."
        )


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"
