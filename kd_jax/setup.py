"""What a config names on disk: tokenizer, teacher and student, checked against each other and against its numbers."""

import dataclasses
import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import data, models, remote, resolve, sharding
from kd_jax.value_types import check_types

PACKAGED = "package:"
INITS = ("random", "pretrained", "layers")
PACKINGS = ("none", "rows", "stream")


@dataclasses.dataclass(frozen=True)
class Models:
    """The two models of a run; `init_student` makes the student's initial parameters, placed on the mesh.

    Where a cache is in the teacher's place, `teacher` is None, `cached` a `CachedTeacher`, and the parameters are what that has.
    """

    student: models.Model
    init_student: Callable[[jax.Array], Any]
    teacher: Any
    teacher_params: Any
    cached: Any = None

    @property
    def compared(self) -> Any:
        """What a step compares with: the teacher or its cache; None without either."""
        return self.teacher or self.cached

    @property
    def max_positions(self) -> int:
        """The longest sequence that both models take."""
        both = [self.student] + ([self.teacher] if self.teacher else [])
        return min(model.config.max_positions for model in both)


def folder(path: str) -> Path:
    """The folder that a config's path means; 'package:NAME' is one that ships with kd_jax."""
    if path.startswith(PACKAGED):
        return Path(__file__).parent / "assets" / path.removeprefix(PACKAGED)
    return remote.local_folder(path)


def check_numbers(config: Any) -> None:
    """What can be said of a config's numbers before anything is read.

    Raises:
      ValueError: one that is out of range or of the wrong type, with its key.
    """
    check_declared(config)
    least = {
        "seed": 0,
        "steps": 1,
        "eval_every": 1,
        "eval_prompts": 0,
        "checkpoint_every": 1,
        "log_every": 1,
        "keep_checkpoints": 1,
        "max_skipped": 0,
        "microbatches": 1,
    }
    least |= {"data.batch_size": 1, "data.eval_batch_size": 1, "data.eval_rows": 0, "sample_tokens": 1, "loss.chunk": 0}
    least |= {
        "sampling.max_new_tokens": 1,
        "sampling.rollouts_per_prompt": 1,
        "sampling.show_every": 0,
        "sampling.temperature": 0,
        "sampling.top_k": 0,
        "text.batch_size": 1,
    }
    for name, low in least.items():
        if not (value := operator.attrgetter(name)(config)) >= low:  # nan is not
            raise ValueError(f"{name}={value} must be at least {low}.")
    for who in ("teacher", "student"):
        if config[who].dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{who}.dtype={config[who].dtype!r} is not one of float32, bfloat16, float16.")
    for key, known in {"weights": ("float", "int8"), "sharding": tuple(sharding.LAYOUTS)}.items():
        if config.teacher[key] not in known:
            raise ValueError(f"teacher.{key}={config.teacher[key]!r} is not one of {', '.join(known)}.")
    policies = ["none", *(name for name in dir(jax.checkpoint_policies) if name.endswith("saveable"))]
    if config.student.remat not in policies:
        raise ValueError(f"student.remat={config.student.remat!r} is not one of {', '.join(policies)}.")
    if config.attention not in ("plain", "xla", "cudnn"):
        raise ValueError(f"attention={config.attention!r} is not one of plain, xla, cudnn.")
    if config.attention == "cudnn" and (
        jax.default_backend() != "gpu" or "float32" in (config.teacher.dtype, config.student.dtype)
    ):
        raise ValueError(
            "attention='cudnn' needs an NVIDIA GPU, and teacher.dtype and student.dtype bfloat16 or float16; 'plain' has no needs."
        )
    first, last = tuple(config.profile_steps) or (1, config.steps)
    if not 1 <= first <= last <= config.steps:
        raise ValueError(f"profile_steps={config.profile_steps} must be first and last of the {config.steps} steps.")
    if config.data.packing not in PACKINGS:
        raise ValueError(f"data.packing={config.data.packing!r} is not one of {', '.join(PACKINGS)}.")
    for name in ("data", "text"):
        size = config[name].batch_size
        if (name == "data" or config.text.name) and size % config.microbatches:
            raise ValueError(f"{name}.batch_size={size} does not divide into microbatches={config.microbatches}.")


def check_declared(config: Any) -> None:
    """Checks that a config has the keys that `configs/base.py` declares, and values of their types.

    Raises:
      ValueError: a key is missing, or a value has another type.
    """
    from configs import base  # here, since the rest of kd_jax needs no configs

    check_types(base.get_config(), config, base.OPEN)
    for name, term in config.objective.terms.items():
        if term is not None:
            check_types(base.term(), term, base.OPEN, f"objective.terms.{name}.")
    for key in ("student.layers", "profile_steps"):
        value = operator.attrgetter(key)(config)
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in value):
            raise ValueError(f"{key}={value!r} must be a tuple of whole numbers, such as (0, 3, 6).")


def check_mesh(config: Any, mesh: jax.sharding.Mesh) -> None:
    """Whether the mesh can divide the rows that are worked on at a time."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    microbatch = config.data.batch_size // config.microbatches
    sizes = {"data.batch_size": microbatch, "data.eval_batch_size": config.data.eval_batch_size}
    if config.text.name:
        sizes["text.batch_size"] = config.text.batch_size // config.microbatches
    for name, rows in sizes.items():
        if rows % ways:
            raise ValueError(
                f"{name}={operator.attrgetter(name)(config)} leaves {rows} rows at a time (microbatches={config.microbatches}), "
                f"which the mesh cannot divide over data x fsdp = {ways} devices; choose a multiple."
            )


def dataset_options(config: Any, section: str = "data") -> dict[str, Any]:
    """The keywords of the dataset that a section of the config names: the setting's for that dataset, and the section's own.

    Args:
      config: of the run.
      section: data, or text, whose empty options stand for those of data, if that is the same dataset.

    Raises:
      ValueError: `data.defaults` has keywords for a dataset that does not exist.
    """
    name, own, defaults = config[section].name, config[section].options, config.data.defaults
    for known in defaults:
        if known not in data.SOURCES:
            raise ValueError(
                f"data.defaults has keywords for the dataset {known!r}{resolve.nearest(known, data.SOURCES)}; the datasets are "
                f"{', '.join(data.SOURCES)}."
            )
    if not own and name == config.data.name:
        own = config.data.options
    return dict(defaults[name] if name in defaults else {}) | dict(own)


def load_tokenizer(config: Any) -> data.Tokenizer:
    """Of tokenizer.path, or else of the teacher's cache or folder, or else of the student's."""
    cached = f"{config.teacher.cache}/tokenizer" if config.teacher.cache else ""
    path = config.tokenizer.path or cached or config.teacher.path or config.student.path
    if not path:
        raise ValueError("nothing names a tokenizer: set tokenizer.path, teacher.path or student.path to a folder.")
    return data.Tokenizer.load(folder(path))


def load_models(config: Any, tokenizer: data.Tokenizer, mesh: Any, needs_teacher: bool) -> Models:
    """Teacher and student as the config describes them, each array placed on the mesh as it is read.

    Raises:
      ValueError: a folder, a size or a vocabulary that does not fit.
    """
    place = partial(sharding.tree_shardings, mesh)
    init, student_options = config.student.init, dict(config.student.config)
    if init not in INITS:
        raise ValueError(f"student.init={init!r} is not one of {', '.join(INITS)}.")
    path_of_teacher = "" if config.teacher.cache else config.teacher.path
    if (needs_teacher or init == "layers") and not (path_of_teacher or config.teacher.cache):
        raise ValueError(
            "teacher.path is empty, but the objective or student.init='layers' needs a teacher; name its folder."
        )
    teacher: Any = None
    teacher_params: Any = None
    if path_of_teacher:  # also where no term needs it: what is measured is then measured against it too
        path = folder(config.teacher.path)
        _check_vocabulary(config.teacher.path, models.load_config(path), tokenizer, "teacher")
        if config.tokenizer.path:
            check_same_tokenizer(path, tokenizer, "teacher")
        teacher, teacher_params = models.load_pretrained(
            path,
            dtype=config.teacher.dtype,
            shardings=partial(place, layout=config.teacher.sharding),
            matrices_in_int8=config.teacher.weights == "int8",
        )
        teacher = dataclasses.replace(teacher, attention=config.attention)

    how = dict(dtype=config.student.dtype, remat=config.student.remat, attention=config.attention)
    if init == "random":
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
        return Models(student, partial(student.init, shardings=place), teacher, teacher_params)

    if init == "pretrained":
        if not config.student.path:
            raise ValueError("student.init='pretrained' needs student.path, the folder of the student to start from.")
        path = folder(config.student.path)
        _check_vocabulary(config.student.path, models.load_config(path), tokenizer, "student")
        check_same_tokenizer(path, tokenizer, "student")
        student = models.from_config(models.load_config(path), **how)
        # Read when the state is made, so that nothing but the state holds the initial parameters.
        load = lambda key: models.load_pretrained(path, dtype=jnp.float32, shardings=place)[1]
        return Models(student, load, teacher, teacher_params)

    student, params = models.take_layers(teacher, teacher_params, tuple(config.student.layers))
    student = dataclasses.replace(student, param_dtype=jnp.float32, **how)
    # A copy: the state is donated to every step, and these arrays are the teacher's too.
    whole = lambda tree: models.dequantise(tree, jnp.float32)
    copy = jax.jit(
        lambda tree: jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), whole(tree)),
        out_shardings=place(student.abstract_params()),
    )
    return Models(student, lambda key: copy(params), teacher, teacher_params)


def _check_vocabulary(path: str, config: models.ModelConfig, tokenizer: data.Tokenizer, who: str) -> None:
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the {who} ({path}) has an output of {config.vocab_size} ids, fewer than the tokenizer's "
            f"{tokenizer.vocab_size}: teacher, student and tokenizer must share one vocabulary (padding beyond it is fine)."
        )


def check_same_tokenizer(path: Path, tokenizer: data.Tokenizer, who: str) -> None:
    if not (path / "tokenizer.json").exists():
        raise ValueError(f"{path} has no tokenizer.json, so its vocabulary cannot be compared with the run's; add it.")
    own = data.Tokenizer.load(path)
    if own.vocabulary() != tokenizer.vocabulary():
        different = sum(own.vocabulary().get(token) != i for token, i in tokenizer.vocabulary().items())
        raise ValueError(
            f"the {who}'s tokenizer ({path}, {own.vocab_size} ids) is not the run's ({tokenizer.vocab_size} ids): "
            f"{different} tokens have another id or none. A divergence compares id by id; choose models that share a tokenizer."
        )
