"""What a config names on disk: tokenizer, teacher, student and rows, checked against each other."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import data, models, sharding

PACKAGED = "package:"
INITS = ("random", "pretrained", "layers")


@dataclasses.dataclass(frozen=True)
class Models:
    """The two models of a run; `init_student` makes the student's initial parameters, placed on the mesh."""

    student: models.Model
    init_student: Callable[[jax.Array], Any]
    teacher: Any
    teacher_params: Any

    @property
    def max_positions(self) -> int:
        """The longest sequence that both models take."""
        both = [self.student] + ([self.teacher] if self.teacher else [])
        return min(model.config.max_positions for model in both)


def folder(path: str) -> Path:
    """The folder that a config's path means; 'package:NAME' is one that ships with kd_jax."""
    if path.startswith(PACKAGED):
        return Path(__file__).parent / "assets" / path.removeprefix(PACKAGED)
    return Path(path).expanduser()


def load_tokenizer(config: Any) -> data.Tokenizer:
    """Of tokenizer.path, or else of the teacher's folder, or else of the student's."""
    path = config.tokenizer.path or config.teacher.path or config.student.path
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
    if (needs_teacher or init == "layers") and not config.teacher.path:
        raise ValueError(
            "teacher.path is empty, but the objective or student.init='layers' needs a teacher; name its folder."
        )
    teacher: Any = None
    teacher_params: Any = None
    if needs_teacher or init == "layers":
        path = folder(config.teacher.path)
        _check_vocabulary(config.teacher.path, models.load_config(path), tokenizer, "teacher")
        teacher, teacher_params = models.load_pretrained(path, dtype=config.teacher.dtype, shardings=place)

    if init == "random":
        sizes: dict[str, Any] = {
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        }
        try:
            student = models.from_config(models.ModelConfig(**{**sizes, **student_options}), dtype=config.student.dtype)
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
        _check_same_tokenizer(path, tokenizer)
        student, params = models.load_pretrained(path, dtype=jnp.float32, shardings=place)
    else:
        student, params = models.take_layers(teacher, teacher_params, tuple(config.student.layers))
    student = dataclasses.replace(student, dtype=config.student.dtype, param_dtype=jnp.float32)
    # A copy: the state is donated to every step, and these arrays may be the teacher's too.
    copy = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree))
    kept_teacher = (teacher, teacher_params) if needs_teacher else (None, None)
    return Models(student, lambda key: copy(params), *kept_teacher)


def load_data(config: Any, tokenizer: data.Tokenizer, max_length: int) -> tuple[Any, Any, dict[str, Any]]:
    """Training rows, held-out rows, and what became of the rows of each, per split."""
    options = config.data
    if max_length < options.max_length:
        raise ValueError(
            f"data.max_length={options.max_length} is longer than the {max_length} positions that the models have; lower it."
        )
    rows, counts = [], {}
    for split, limit in ((options.train_split, 0), (options.eval_split, options.eval_rows)):
        source: Any = data.load(options.name, split=split, data_dir=options.data_dir or None, **dict(options.options))
        if limit and limit < len(source):
            source = [source[i] for i in range(limit)]
        if options.name == "text":
            tokenized, counts[split] = data.pack(source, tokenizer, max_length=options.max_length)
        else:
            tokenized, counts[split] = data.tokenize(
                source, tokenizer, template=options.template, max_length=options.max_length,
                max_prompt_length=options.max_prompt_length, long_prompts=options.long_prompts,
                long_responses=options.long_responses,
                # Held-out rows are scored on their responses, whatever the training is on.
                loss_on=options.loss_on if split == options.train_split else "response",
            )  # fmt: skip
        if options.packed and split == options.train_split:
            tokenized = data.join(tokenized, max_length=options.max_length)
            counts[split] |= {"packed into": len(tokenized)}
        rows.append(tokenized)
    return rows[0], rows[1], counts


def _check_vocabulary(path: str, config: models.ModelConfig, tokenizer: data.Tokenizer, who: str) -> None:
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the {who} ({path}) has an output of {config.vocab_size} ids, fewer than the tokenizer's "
            f"{tokenizer.vocab_size}: teacher, student and tokenizer must share one vocabulary (padding beyond it is fine)."
        )


def _check_same_tokenizer(path: Path, tokenizer: data.Tokenizer) -> None:
    if not (path / "tokenizer.json").exists():
        raise ValueError(
            f"{path} has no tokenizer.json, so its vocabulary cannot be compared with the teacher's; add it."
        )
    own = data.Tokenizer.load(path)
    if own.vocabulary() != tokenizer.vocabulary():
        different = sum(own.vocabulary().get(token) != i for token, i in tokenizer.vocabulary().items())
        raise ValueError(
            f"the student's tokenizer ({path}, {own.vocab_size} ids) is not the run's ({tokenizer.vocab_size} ids): "
            f"{different} tokens have another id or none. A divergence compares id by id; choose models that share a tokenizer."
        )
