"""Loads the tokenizer, the teacher and the student of a config, and checks that they fit together."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
from jaxtyping import PyTree

from kd_jax import data, models, sharding, views
from kd_jax.data.alignment import ByteReader, begins_word
from kd_jax.data.shared import check_same_tokenizer, fit_tokenizer
from kd_jax.run.student import Trainee, make_student
from kd_jax.settings import Member, Settings, Spec
from kd_jax.settings import Teacher as TeacherKeys
from kd_jax.storage import untrusted
from kd_jax.teachers import Aligned, NoTeacher, Teacher, Viewed, as_teacher

STUDENT = "student"  # a path that stands for the student before training


@dataclasses.dataclass(frozen=True)
class Writer:
    """A teacher with a tokenizer of its own, which writes text. The student learns from text, or from spans of text."""

    model: models.Model
    params: PyTree
    tokenizer: data.Tokenizer


@dataclasses.dataclass(frozen=True)
class Models:
    """The two models of a run.

    Attributes:
      student: the student. The student's config names every end token of the run, so the exported model stops at each
        end token.
      trainee: the student with the division of the parameters into trained and frozen ones.
      tokenizer: the tokenizer of both models. `end_ids` joins the end tokens that the tokenizer, the prompt template
        and the folders of the two models name.
      teacher: the teacher's model, which can also write text; None if no model is loaded for the teacher.
      teacher_params: the parameters of `compared_teacher`.
      compared_teacher: the teacher with which a step compares the student: the model, a cache, or `NoTeacher`.
      writer: a teacher with a tokenizer of its own, or None. `teacher` is then None.
      members: the further frozen models by name, without the teacher.
      member_params: the parameters of the further frozen models by name.
      member_models: the models of `members` by name.
    """

    student: models.Model
    trainee: Trainee
    tokenizer: data.Tokenizer
    teacher: models.Model | None = None
    teacher_params: PyTree = None
    compared_teacher: Teacher = dataclasses.field(default_factory=NoTeacher)
    writer: Writer | None = None
    members: dict[str, Teacher] = dataclasses.field(default_factory=dict)
    member_params: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    member_models: dict[str, models.Model] = dataclasses.field(default_factory=dict)

    @property
    def frozen(self) -> Teacher | dict[str, Teacher]:
        """The first argument but one of `make_train_step`: the teacher, or all frozen models by name."""
        return {"teacher": self.compared_teacher, **self.members} if self._by_name else self.compared_teacher

    @property
    def frozen_params(self) -> PyTree:
        """The parameters of `frozen`, which the training step takes, with the frozen parameters of the student."""
        if not self._by_name:
            return self.teacher_params
        own = {} if self.trainee.part is None else {"student": self.trainee.frozen}
        return {"teacher": self.teacher_params, **self.member_params, **own}

    @property
    def _by_name(self) -> bool:
        return bool(self.members) or self.trainee.part is not None

    def init_student(self, key: jax.Array) -> PyTree:
        """Returns the trained parameters at the start, placed on the mesh."""
        return self.trainee.init(key)

    def complete(self, trained: PyTree) -> PyTree:
        """Returns the student's complete parameters from the trained parameters of a state."""
        return self.trainee.complete(trained)

    @property
    def max_positions(self) -> int:
        """The number of positions of the model with fewer positions."""
        return min(model.config.max_positions for model in self.loaded)

    @property
    def loaded(self) -> list[models.Model]:
        """The student, and the teacher if a model is loaded for the teacher."""
        return [self.student] + ([self.teacher] if self.teacher else [])

    def require_teacher(self) -> models.Model:
        """Returns the teacher's model.

        Raises:
          ValueError: no model is loaded for the teacher.
        """
        if self.teacher is None:
            raise ValueError(
                "the teacher's model is needed, but not loaded; set teacher.path, and leave teacher.cache empty."
            )
        return self.teacher


def load_tokenizer(config: Settings, own_tokenizer: bool = False) -> data.Tokenizer:
    """Loads the tokenizer of tokenizer.path, or else of the teacher's cache or folder, or else of the student's folder.

    The folders of the models are checked first, so that an error in a folder is not reported as an error of the
    tokenizer.

    Args:
      config: the config of the run.
      own_tokenizer: whether the teacher may have a tokenizer of its own, because the student learns from the teacher's text
        or from spans of text. The tokenizer of a pretrained student is then returned.

    Raises:
      ValueError: no key names a tokenizer; a folder does not exist, or has no model or no tokenizer; or the prompt
        template does not fit the tokenizer.
    """
    if config.teacher.path not in ("", STUDENT) and not config.teacher.cache:
        models.model_folder(config.teacher.path, "teacher.path")
    pretrained = bool(config.student.path) and config.student.init == "pretrained"
    if pretrained:
        models.model_folder(config.student.path, "student.path")
    paths = {
        "tokenizer.path": config.tokenizer.path,
        "teacher.cache": f"{config.teacher.cache}/tokenizer" if config.teacher.cache else "",
        "teacher.path": "" if config.teacher.path == STUDENT else config.teacher.path,
        "student.path": config.student.path,
    }
    key = next((key for key, path in paths.items() if path), None)
    if key is None:
        raise ValueError("no key names a tokenizer: set tokenizer.path, teacher.path or student.path to a folder.")
    folder = models.folder(paths[key], weights=False)
    untrusted.check_folder(folder, key)
    tokenizer = data.Tokenizer.load(folder)
    if own_tokenizer and pretrained and not config.tokenizer.path:
        of_student = data.Tokenizer.load(models.folder(config.student.path, weights=False))
        tokenizer = tokenizer if of_student.vocabulary() == tokenizer.vocabulary() else of_student
    template = data.Template.of(config.data)
    if config.data.name != "text":  # rows of plain text have no prompts
        data.make_render(template, tokenizer)  # an error in the template is reported early
    return data.with_template_end(tokenizer, template)


def load_models(
    config: Settings, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh, needs_teacher: bool,
    own_tokenizer: bool = False, compares_spans: bool = False,
) -> Models:  # fmt: skip
    """Loads the teacher and the student of a config. Each array is placed on the mesh when it is read.

    Args:
      config: the config of the run.
      tokenizer: the tokenizer from `load_tokenizer`.
      mesh: the mesh of the run.
      needs_teacher: whether a term of the objective compares with the teacher.
      own_tokenizer: as in `load_tokenizer`; the teacher may then have another tokenizer.
      compares_spans: whether a term compares spans of text, for which the teacher always reads tokens of its own.

    Raises:
      ValueError: a folder, a size or a vocabulary does not fit.
    """
    init = config.student.init
    is_own_teacher = config.teacher.path == STUDENT and not config.teacher.cache
    path_of_teacher = "" if config.teacher.cache or is_own_teacher else config.teacher.path
    if is_own_teacher and init == "layers":
        raise ValueError(
            "teacher.path='student', but student.init='layers' needs a teacher of its own; set its folder."
        )
    if (needs_teacher or init == "layers") and not (path_of_teacher or is_own_teacher or config.teacher.cache):
        raise ValueError(
            "teacher.path is empty, but the objective or student.init='layers' needs a teacher; set the teacher's folder."
        )
    teacher: models.Model | None = None
    params: PyTree = None
    writer = None
    if path_of_teacher:  # loaded even if no term needs the teacher, because evaluations compare with the teacher
        path = models.folder(path_of_teacher)
        template = data.Template.of(config.data)
        of_teacher = data.with_template_end(data.Tokenizer.load(path), template) if own_tokenizer else tokenizer
        writes_only = compares_spans or of_teacher.vocabulary() != tokenizer.vocabulary()
        if config.tokenizer.path and not writes_only:
            tokenizer = check_same_tokenizer(path, tokenizer, "teacher")
        of_teacher = fit_tokenizer(
            path_of_teacher, models.load_config(path).vocab_size, of_teacher if writes_only else tokenizer, "teacher"
        )
        teacher, params = _load_frozen(config.teacher, path, mesh, config.attention)
        if writes_only:
            writer = Writer(teacher, params, of_teacher.with_ends(of_teacher.eos_id, end_ids(teacher.config)))
            teacher = params = None
        else:
            tokenizer = of_teacher
    trainee, tokenizer = make_student(config, tokenizer, mesh, teacher, params, initial_key(config))
    student = trainee.model
    # A text ends at each end token that the folder of one of the two models names.
    ends = [number for model in (student, teacher) if model is not None for number in end_ids(model.config)]
    tokenizer = tokenizer.with_ends(tokenizer.eos_id, ends)
    eos_id = tokenizer.end_ids[0] if len(tokenizer.end_ids) == 1 else tokenizer.end_ids
    pad_id = tokenizer.pad_id if student.config.pad_id is None else student.config.pad_id
    student_config = dataclasses.replace(student.config, eos_id=eos_id, pad_id=pad_id)
    student = dataclasses.replace(student, config=student_config)
    if is_own_teacher:
        teacher, params = student, trainee.complete(trainee.init(initial_key(config)))
    compared_teacher = _compared(teacher, "teacher", config.teacher.view)
    if compares_spans and writer is not None:
        compared_teacher, params = _aligned(config, writer, tokenizer, mesh), writer.params
    loaded = Models(student, trainee, tokenizer, teacher, params, compared_teacher, writer)
    return _with_members(config, loaded, mesh)


def initial_key(config: Settings) -> jax.Array:
    """Returns the random key of the student's initial parameters."""
    return jax.random.fold_in(jax.random.key(config.seed), 0)


def _with_members(config: Settings, loaded: Models, mesh: jax.sharding.Mesh) -> Models:
    """Returns the models with the further frozen models of a config."""
    of_members: dict[str, models.Model] = {}
    params: dict[str, PyTree] = {}
    for name, member in config.members.items():
        if member.cache:  # the cache replaces the model
            continue
        if member.path == STUDENT:
            at_start = loaded.init_student(initial_key(config))
            of_members[name], params[name] = loaded.student, loaded.complete(at_start)
            continue
        path = models.model_folder(member.path, f"members.{name}.path")
        tokenizer = check_same_tokenizer(path, loaded.tokenizer, f"member {name}")
        tokenizer = fit_tokenizer(member.path, models.load_config(path).vocab_size, tokenizer, f"member {name}")
        loaded = dataclasses.replace(loaded, tokenizer=tokenizer)
        of_members[name], params[name] = _load_frozen(member, path, mesh, config.attention)
    members = {name: _compared(model, name, config.members[name].view) for name, model in of_members.items()}
    return dataclasses.replace(loaded, members=members, member_params=params, member_models=of_members)


def _compared(model: models.Model | None, name: str, view: Spec) -> Teacher:
    """Returns a frozen model as the step compares it with the student."""
    has_view = model is not None and views.make_view(view) is not None
    return Viewed(model, name) if has_view else as_teacher(model)


def _aligned(config: Settings, writer: Writer, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh) -> Aligned:
    """Returns the teacher that reads tokens of its own."""
    return Aligned(
        writer.model, vocab_size=writer.tokenizer.vocab_size, begins_word=begins_word(ByteReader(writer.tokenizer)),
        student_begins_word=begins_word(ByteReader(tokenizer)), path=config.teacher.path,
        chunk=config.loss.chunk or None, mesh=mesh,
    )  # fmt: skip


def end_ids(config: models.ModelConfig) -> tuple[int, ...]:
    """Returns the end tokens that a model's folder names."""
    eos_id = config.eos_id
    return eos_id if isinstance(eos_id, tuple) else () if eos_id is None else (eos_id,)


def _load_frozen(
    options: TeacherKeys | Member, path: Path, mesh: jax.sharding.Mesh, attention: str
) -> tuple[models.Model, PyTree]:
    """Loads the teacher or a further frozen model."""
    model, params = models.load_pretrained(
        path,
        dtype=options.dtype,
        shardings=partial(sharding.tree_shardings, mesh, layout=options.sharding),
        matrices_in_int8=options.weights == "int8",
    )
    return dataclasses.replace(model, attention=attention), params
