"""Loads the tokenizer, the teacher and the student of a config, and checks that they fit together."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import data, models, sharding
from kd_jax.data.shared import check_same_tokenizer, fit_tokenizer
from kd_jax.settings import Settings
from kd_jax.storage import untrusted
from kd_jax.teachers import NoTeacher, Teacher, as_teacher


@dataclasses.dataclass(frozen=True)
class Writer:
    """A teacher with another tokenizer than the student, from whose text alone the student learns."""

    model: models.Model
    params: Any
    tokenizer: data.Tokenizer


@dataclasses.dataclass(frozen=True)
class Models:
    """The two models of a run.

    Attributes:
      student: the student; its config names every end token of the run, so that the exported model stops at each of
        them.
      init_student: makes the student's initial parameters from a key, placed on the mesh.
      tokenizer: the tokenizer of both models. Its `end_ids` are its own, those of the prompt template, and those that
        the folders of the two models name.
      teacher: the teacher's model, which can also write text; None if no model is loaded for the teacher.
      teacher_params: the parameters of `compared`.
      compared: the teacher with which a step compares the student: the model, a cache, or `NoTeacher`.
      writer: a teacher that only writes text, or None.
    """

    student: models.Model
    init_student: Callable[[jax.Array], Any]
    tokenizer: data.Tokenizer
    teacher: Any = None
    teacher_params: Any = None
    compared: Teacher = dataclasses.field(default_factory=NoTeacher)
    writer: Writer | None = None

    @property
    def max_positions(self) -> int:
        """The longest sequence that both models compute as transformers does."""
        return min(model.config.longest_sequence for model in self.loaded)

    @property
    def loaded(self) -> list[models.Model]:
        """The student and, if it is loaded, the teacher."""
        return [self.student] + ([self.teacher] if self.teacher else [])


def load_tokenizer(config: Settings, text_only: bool = False) -> data.Tokenizer:
    """Loads the tokenizer of tokenizer.path, or else of the teacher's cache or folder, or else of the student's folder.

    The folders of the models are checked first, so that an error in a folder is reported as such and not as an error of
    the tokenizer.

    Args:
      config: the config of the run.
      text_only: whether the student learns only from the teacher's text. A pretrained student then keeps its own
        tokenizer if that differs from the teacher's.

    Raises:
      ValueError: no key names a tokenizer; a folder does not exist, or has no model or no tokenizer; or a template of
        prompts does not fit the tokenizer.
    """
    if config.teacher.path and not config.teacher.cache:
        models.model_folder(config.teacher.path, "teacher.path")
    pretrained = bool(config.student.path) and config.student.init == "pretrained"
    if pretrained:
        models.model_folder(config.student.path, "student.path")
    paths = {
        "tokenizer.path": config.tokenizer.path,
        "teacher.cache": f"{config.teacher.cache}/tokenizer" if config.teacher.cache else "",
        "teacher.path": config.teacher.path,
        "student.path": config.student.path,
    }
    key = next((key for key, path in paths.items() if path), None)
    if key is None:
        raise ValueError("nothing names a tokenizer: set tokenizer.path, teacher.path or student.path to a folder.")
    where = models.folder(paths[key])
    untrusted.check_folder(where, key)
    tokenizer = data.Tokenizer.load(where)
    if text_only and pretrained and not config.tokenizer.path:
        own = data.Tokenizer.load(models.folder(config.student.path))
        tokenizer = tokenizer if own.vocabulary() == tokenizer.vocabulary() else own
    template = data.Template.of(config.data)
    if config.data.name != "text":  # rows of plain text have no prompts
        data.make_render(template, tokenizer)  # an error in the template is reported early
    return data.with_template_end(tokenizer, template)


def load_models(
    config: Settings, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh, needs_teacher: bool, text_only: bool = False
) -> Models:
    """Loads teacher and student as the config describes them, each array placed on the mesh as it is read.

    Args:
      config: of the run.
      tokenizer: of `load_tokenizer`.
      mesh: of the run.
      needs_teacher: whether a term of the objective compares with the teacher.
      text_only: as in `load_tokenizer`; the teacher may then have another tokenizer.

    Raises:
      ValueError: a folder, a size or a vocabulary that does not fit.
    """
    init = config.student.init
    path_of_teacher = "" if config.teacher.cache else config.teacher.path
    if (needs_teacher or init == "layers") and not (path_of_teacher or config.teacher.cache):
        raise ValueError(
            "teacher.path is empty, but the objective or student.init='layers' needs a teacher; name its folder."
        )
    teacher: Any = None
    params: Any = None
    writer = None
    if path_of_teacher:  # loaded even if no term needs the teacher, because evaluations compare with the teacher
        path = models.folder(path_of_teacher)
        template = data.Template.of(config.data)
        own = data.with_template_end(data.Tokenizer.load(path), template) if text_only else tokenizer
        writes_only = own.vocabulary() != tokenizer.vocabulary()
        if config.tokenizer.path and not writes_only:
            tokenizer = check_same_tokenizer(path, tokenizer, "teacher")
        own = fit_tokenizer(
            path_of_teacher, models.load_config(path).vocab_size, own if writes_only else tokenizer, "teacher"
        )
        teacher, params = _load_teacher(config, path, mesh)
        if writes_only:
            writer = Writer(teacher, params, own.with_ends(own.eos_id, end_ids(teacher.config)))
            teacher = params = None
        else:
            tokenizer = own
    student, init_student, tokenizer = _make_student(config, tokenizer, mesh, teacher, params)
    # A text ends wherever one of the two models' folders says that it does.
    others = [number for model in (student, teacher) if model is not None for number in end_ids(model.config)]
    tokenizer = tokenizer.with_ends(tokenizer.eos_id, others)
    ends = tokenizer.end_ids[0] if len(tokenizer.end_ids) == 1 else tokenizer.end_ids
    pad_id = tokenizer.pad_id if student.config.pad_id is None else student.config.pad_id
    named = dataclasses.replace(student.config, eos_id=ends, pad_id=pad_id)
    student = dataclasses.replace(student, config=named)
    return Models(student, init_student, tokenizer, teacher, params, as_teacher(teacher), writer)


def end_ids(config: models.ModelConfig) -> tuple[int, ...]:
    """Returns the tokens at which a model's folder says that a text ends."""
    found = config.eos_id
    return found if isinstance(found, tuple) else () if found is None else (found,)


def _load_teacher(config: Settings, path: Path, mesh: jax.sharding.Mesh) -> tuple[models.Model, Any]:
    teacher, params = models.load_pretrained(
        path,
        dtype=config.teacher.dtype,
        shardings=partial(sharding.tree_shardings, mesh, layout=config.teacher.sharding),
        matrices_in_int8=config.teacher.weights == "int8",
    )
    return dataclasses.replace(teacher, attention=config.attention), params


def _make_student(
    config: Settings, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh, teacher: Any, teacher_params: Any
) -> tuple[models.Model, Callable[[jax.Array], Any], data.Tokenizer]:
    """Returns the student, the function that makes its initial parameters, and the tokenizer, limited to ids that it has."""
    place = partial(sharding.tree_shardings, mesh)
    how = dict(dtype=config.student.dtype, remat=config.student.remat, attention=config.attention)
    if config.student.init == "random":
        student_options = dict(config.student.config)
        sizes: dict[str, Any] = {
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        }
        try:
            student = models.from_config(models.ModelConfig(**{**sizes, **student_options}), **how)
        except TypeError as error:  # a keyword that ModelConfig does not have
            known = ", ".join(field.name for field in dataclasses.fields(models.ModelConfig))
            raise ValueError(f"student.config={student_options}: {error}; it takes {known}.") from error
        _check_vocabulary("student.config", student.config, tokenizer, "student")
        return student, partial(student.init, shardings=place), tokenizer

    if config.student.init == "pretrained":
        if not config.student.path:
            raise ValueError("student.init='pretrained' needs student.path, the folder of the student to start from.")
        path = models.folder(config.student.path)
        tokenizer = check_same_tokenizer(path, tokenizer, "student")
        tokenizer = fit_tokenizer(config.student.path, models.load_config(path).vocab_size, tokenizer, "student")
        student = models.from_config(models.load_config(path), **how)
        # Read when the state is made, so that nothing but the state holds the initial parameters.
        return student, lambda key: models.load_pretrained(path, dtype=jnp.float32, shardings=place)[1], tokenizer

    student, params = models.take_layers(teacher, teacher_params, tuple(config.student.layers))
    student = dataclasses.replace(student, param_dtype=jnp.float32, **how)
    # The arrays are copied because the state is donated to every step, and the arrays also belong to the teacher.
    whole = lambda tree: models.dequantise(tree, jnp.float32)
    copy = jax.jit(
        lambda tree: jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), whole(tree)),
        out_shardings=place(student.abstract_params()),
    )
    return student, lambda key: copy(params), tokenizer


def _check_vocabulary(path: str, config: models.ModelConfig, tokenizer: data.Tokenizer, who: str) -> None:
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the {who} ({path}) has an output of {config.vocab_size} ids, fewer than the tokenizer's "
            f"{tokenizer.vocab_size}: teacher, student and tokenizer must share one vocabulary (padding beyond it is fine)."
        )
