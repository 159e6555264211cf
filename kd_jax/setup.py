"""What a config names on disk: tokenizer, teacher and student, checked against each other and against its numbers."""

import dataclasses
import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import data, models, remote, sharding, untrusted
from kd_jax.data.tokenizer import differing_tokens

PACKAGED = "package:"
INITS = ("random", "pretrained", "layers")
PACKINGS = ("none", "rows", "stream")
SHOWN_TOKENS = 5  # of those that two tokenizers number differently


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
        """The longest sequence that both models compute as transformers does."""
        return min(model.config.longest_sequence for model in self.loaded)

    @property
    def loaded(self) -> list[models.Model]:
        """The student and, where it is here, the teacher."""
        return [self.student] + ([self.teacher] if self.teacher else [])


def folder(path: str) -> Path:
    """Returns the folder that a config's path means; 'package:NAME' is one that ships with kd_jax.

    Raises:
      ValueError: kd_jax has no model NAME, or the path is an address.
    """
    if not path.startswith(PACKAGED):
        return remote.local_folder(path)
    assets, name = Path(__file__).parent / "assets", path.removeprefix(PACKAGED)
    known = sorted(where.name for where in assets.iterdir() if (where / "config.json").exists())
    if name not in known:
        raise ValueError(
            f"{path}: kd_jax has no model {name!r}; it has {', '.join(PACKAGED + other for other in known)}."
        )
    return assets / name


def model_folder(path: str, key: str) -> Path:
    """Returns the folder of a model, after a look at its config.json.

    Args:
      path: as in `folder`.
      key: of the setting that names the path, for the message.

    Raises:
      ValueError: the folder does not exist, is an adapter's, or its config.json describes no model that is supported.
    """
    where = folder(path)
    models.check_folder(where, key)
    models.load_config(where)
    return where


def check_numbers(config: Any) -> None:
    """What can be said of a config's numbers before anything is read.

    Raises:
      ValueError: one that is out of range, with its key.
    """
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
    if config.student.dtype == "float16":
        raise ValueError(
            "student.dtype='float16' is not supported: small gradients become 0 in float16, whose smallest number is 6e-8. "
            "Use bfloat16, which has the range of float32; teacher.dtype may be float16, since a teacher has no gradient."
        )
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
            "attention='cudnn' needs an NVIDIA GPU, student.dtype=bfloat16, and teacher.dtype bfloat16 or float16; 'plain' needs "
            "none of these."
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


def load_tokenizer(config: Any) -> data.Tokenizer:
    """Loads the tokenizer of tokenizer.path, or else of the teacher's cache or folder, or else of the student's.

    The models' folders are looked at first: where one of them is wrong, its tokenizer is not what is amiss.

    Raises:
      ValueError: nothing names a tokenizer, or a folder that does not exist or has no model or no tokenizer.
    """
    if config.teacher.path and not config.teacher.cache:
        model_folder(config.teacher.path, "teacher.path")
    if config.student.path and config.student.init == "pretrained":
        model_folder(config.student.path, "student.path")
    paths = {
        "tokenizer.path": config.tokenizer.path,
        "teacher.cache": f"{config.teacher.cache}/tokenizer" if config.teacher.cache else "",
        "teacher.path": config.teacher.path,
        "student.path": config.student.path,
    }
    key = next((key for key, path in paths.items() if path), None)
    if key is None:
        raise ValueError("nothing names a tokenizer: set tokenizer.path, teacher.path or student.path to a folder.")
    where = folder(paths[key])
    untrusted.check_folder(where, key)
    return data.Tokenizer.load(where)


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
    """Checks that the tokenizer in a model's folder numbers every token as the run's tokenizer does.

    Args:
      path: the model's folder.
      tokenizer: of the run.
      who: 'teacher' or 'student', for the message.

    Raises:
      ValueError: the folder has no tokenizer, or the two vocabularies differ; up to five differing tokens are named.
    """
    if not (path / "tokenizer.json").exists():
        raise ValueError(f"{path} has no tokenizer.json, so its vocabulary cannot be compared with the run's; add it.")
    own = data.Tokenizer.load(path)
    different = differing_tokens(tokenizer.vocabulary(), own.vocabulary())
    if different:
        first = "; ".join(
            f"{untrusted.shown(token)} has {_as_id(ours)} in the run's and {_as_id(theirs)} in the {who}'s"
            for token, ours, theirs in different[:SHOWN_TOKENS]
        )
        raise ValueError(
            f"the {who}'s tokenizer ({path}, {own.vocab_size} ids) is not the run's ({tokenizer.vocab_size} ids): "
            f"{len(different)} {'token differs' if len(different) == 1 else 'tokens differ'}: {first}"
            f"{'; ...' if len(different) > SHOWN_TOKENS else ''}. "
            "A divergence compares id by id; choose models that share a tokenizer."
        )


def _as_id(number: int | None) -> str:
    return "no id" if number is None else f"id {number}"
