"""Declares every key of a config: type, default value, range, and meaning.

A *spec* is {"name": ..., keyword: number, ...}. The name is that of a function in the module that the meaning of the
key names, or of a function of your own, as "module:function". The other entries are keywords of that function.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from kd_jax.settings.declare import Config, check_ranges, defaults, key, read, section
from kd_jax.settings.student_keys import DTYPES, Student, check_part
from kd_jax.settings.term_keys import Spec, Term


def name_of(spec: Spec) -> str:
    """Returns the name in a spec."""
    return spec if isinstance(spec, str) else spec.get("name", "")


@dataclasses.dataclass(frozen=True)
class Objective:
    temperature: float = key(
        1.0, "divisor T of both models' logits; to get the usual factor T^2, put it into the coefficients"
    )
    terms: Mapping[str, Any] = key({}, "name -> term(); the loss is the sum of the terms")


@dataclasses.dataclass(frozen=True)
class Sampling:
    max_new_tokens: int = key(128, "largest number of tokens in a response that a model writes", least=1)
    temperature: float = key(1.0, "sampling temperature of the model that writes; 0: the likeliest token", least=0)
    top_p: float = key(1.0, "sample from the likeliest tokens that together have this probability; 1: all tokens")
    top_k: int = key(0, "sample from this many likeliest tokens; 0: all tokens", least=0)
    teacher_share: float = key(0.0, "weight of the teacher in the mixture that the student's rows are sampled from")
    rollouts_per_prompt: int = key(1, "number of responses to each prompt; a batch then has fewer prompts", least=1)
    show_every: int = key(200, "number of steps between printed samples of new student responses; 0: never", least=0)


@dataclasses.dataclass(frozen=True)
class Loss:
    chunk: int = key(0, "number of tokens per device whose logits are in memory at once; 0: automatic", least=0)


@dataclasses.dataclass(frozen=True)
class Teacher:
    path: str = key(
        "",
        "a Hugging Face folder; hf://ORG/NAME on the hub; package:NAME, a model of kd_jax; student: the student before "
        "training; empty: no teacher",
    )
    follow: float = key(
        0.0,
        "for path=student: share of the student in each update of the teacher's average; 0: frozen; 1: a copy",
        least=0,
    )
    follow_every: int = key(1, "number of the student's updates between two updates of the average", least=1)
    follow_copy_first: bool = key(False, "copy the student after its first update, before the average begins")
    view: Spec = key(
        {"name": "none"}, "spec: kd_jax.views, the prompt that the teacher reads in place of the row's prompt; none: the same",
        is_open=True,
    )  # fmt: skip
    cache: str = key("", "a folder from kd_jax.cache_teacher, used in place of the model at teacher.path")
    dtype: str = key("float32", "number type of the parameters and the computation", choices=DTYPES)
    weights: str = key(
        "float", "float: as in dtype; int8: matrices of the layers in int8, one scale per output",
        choices=("float", "int8"),
    )  # fmt: skip
    int8_report: bool = key(True, "measure the error of int8 at the start, also with one layer at a time in dtype")
    sharding: str = key(
        "student", "student: like the student; spread: also over data; tensor: only over tensor; whole: a copy on each device",
        choices=("student", "spread", "tensor", "whole"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Member:
    """A frozen model beside the teacher."""

    path: str = key("", "a folder, hf://ORG/NAME, package:NAME, or student: the student before training")
    follow: float = key(0.0, "as teacher.follow", least=0)
    follow_every: int = key(1, "as teacher.follow_every", least=1)
    follow_copy_first: bool = key(False, "as teacher.follow_copy_first")
    view: Spec = key({"name": "none"}, "spec: kd_jax.views, as teacher.view", is_open=True)
    cache: str = key("", "a folder from kd_jax.cache_teacher --member=NAME --kind=hidden, used in place of the model")
    dtype: str = key("float32", "number type of the parameters and the computation", choices=DTYPES)
    weights: str = key("float", "float or int8, as teacher.weights", choices=("float", "int8"))
    sharding: str = key("student", "as teacher.sharding", choices=("student", "spread", "tensor", "whole"))


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    path: str = key(
        "", "a folder with tokenizer.json, or hf://ORG/NAME; empty: that of the teacher, or else of the student"
    )


@dataclasses.dataclass(frozen=True)
class Data:
    name: str = key("docstrings", "name of a dataset in the table of kd_jax/data/README.md")
    options: Mapping[str, Any] = key({}, "keywords of the dataset's builder, such as path", is_open=True)
    defaults: Mapping[str, Any] = key(
        {}, "dataset name -> keywords of the builder; data.options takes precedence", is_open=True
    )
    data_dir: str = key("", "folder for the built datasets; empty: the default of tensorflow_datasets")
    train_split: str = key("train", "name of the split to train on")
    eval_split: str = key("validation", "name of the split of held-out rows")
    eval_rows: int = key(512, "number of held-out rows to evaluate on, from the start of the split; 0: all", least=0)
    template: str = key("plain", "prompt template: plain, alpaca, or chat (the template of the tokenizer)")
    template_options: Mapping[str, Any] = key(
        {}, "variables of a chat template; `date` is 2026-01-01 by default", is_open=True
    )
    system: str = key("", "system message of a chat; empty: none")
    max_length: int = key(512, "largest number of tokens of a row that the models read")
    max_prompt_length: int = key(256, "largest number of tokens of a prompt, as part of max_length")
    long_prompts: str = key("drop", "drop: omit the row; cut: truncate the user's text, but never the template")
    long_responses: str = key("cut", "cut: truncate the response; drop: omit the row")
    loss_on: str = key(
        "response", "tokens that count: response or last (the last turn, with its end token); all: all turns of the assistant "
        "in a conversation, and all tokens of other rows",
    )  # fmt: skip
    packing: str = key(
        "none", "none; rows: several rows in one, kept separate; stream: joined, all tokens count",
        choices=("none", "rows", "stream"),
    )  # fmt: skip
    order: Spec = key(
        {"name": "shuffled"}, "spec: kd_jax.data.orders, the order in which the training rows are read", is_open=True
    )
    batch_size: int = key(32, "number of rows in an update, over all devices", least=1)
    eval_batch_size: int = key(32, "number of rows in an evaluation batch, over all devices", least=1)


@dataclasses.dataclass(frozen=True)
class Text:
    name: str = key("", "name of a dataset, as in data.name; empty: no second stream")
    options: Mapping[str, Any] = key(
        {}, "keywords of the builder; empty: data.options, if the dataset is the same", is_open=True
    )
    split: str = key("train", "split of the dataset; the same as data.train_split, unless it is set")
    batch_size: int = key(8, "number of rows added to each update, of data.max_length tokens each", least=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = key(-1, "number of devices that divide the batch; -1: all devices not used by fsdp and tensor")
    fsdp: int = key(1, "number of devices that divide the batch, and also the parameters, which are gathered when used")
    tensor: int = key(1, "number of devices that divide each matrix product; they do not divide the batch")


@dataclasses.dataclass(frozen=True)
class Log:
    wandb: str = key("", "project of Weights & Biases that also receives the metrics (package wandb); empty: none")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    seed: int = key(
        0, "random seed of the initial parameters, the order of the rows, and the samples", least=0, most=2**32
    )
    steps: int = key(1000, "number of updates", least=1)
    microbatches: int = key(1, "number of parts in which a batch is processed; changes memory, not results", least=1)
    optimizer: Spec = key(
        {"name": "adamw", "weight_decay": 0.01, "no_decay": ()},
        "spec: an optimiser of optax. no_decay has name patterns of the parameters without weight decay, such as "
        "('*norm*', '*bias')",
        is_open=True,
    )
    learning_rate: Spec = key(
        {"name": "cosine_decay_schedule", "init_value": 5e-4, "decay_steps": 1000, "alpha": 1e-7 / 5e-4},
        "spec: a schedule of kd_jax.schedules",
        is_open=True,
    )
    clip_norm: float = key(1.0, "largest norm of the gradient; larger gradients are scaled down; 0: no clipping")
    objective: Objective = section(Objective)
    prefixes: Spec = key({"name": "data"}, "spec: kd_jax.prefixes, a source of each step's rows", is_open=True)
    sampling: Sampling = section(Sampling)
    loss: Loss = section(Loss)
    teacher: Teacher = section(Teacher)
    members: Mapping[str, Any] = key(
        {}, "name -> member(): further frozen models, for pairs and assistants", is_open=True
    )
    student: Student = section(Student)
    attention: str = key(
        "plain", "of both models: plain, xla, or cudnn (flash attention: NVIDIA GPU, not in float32)",
        choices=("plain", "xla", "cudnn"),
    )  # fmt: skip
    tokenizer: Tokenizer = section(Tokenizer)
    data: Data = section(Data)
    text: Text = section(Text, 'a second stream, for terms with rows="text"; every token of the stream counts')
    mesh: Mesh = section(Mesh)
    eval_every: int = key(200, "number of steps between evaluations", least=1)
    checkpoint_every: int = key(200, "number of steps between checkpoints", least=1)
    keep_checkpoints: int = key(2, "number of newest checkpoints that are kept", least=1)
    max_skipped: int = key(
        0, "largest number of consecutive non-finite steps that are skipped before the run stops", least=0
    )
    profile_steps: tuple[int, ...] = key(
        (), "(first, last): steps to trace, for xprof, into the folder profile of the work directory", numbers=True
    )
    log_every: int = key(
        10, "number of steps between two reads of the metrics; the metrics of every step are written", least=1
    )
    eval_prompts: int = key(
        0, "number of held-out prompts answered per evaluation: ROUGE-L, KLs on student text", least=0
    )
    sample_tokens: int = key(64, "largest number of tokens in a sample shown at the end", least=1)
    log: Log = section(Log)
    push: str = key(
        "", "repository on the Hugging Face hub that receives the student at the end, hf://ORG/NAME; empty: none"
    )
    push_private: bool = key(True, "create that repository as private; an existing repository keeps its visibility")

    @classmethod
    def read(cls, config: Config) -> Self:
        """Returns the settings of a config, after a check of their types but not of their ranges.

        Args:
          config: an `ml_collections.ConfigDict`, or nested dicts, with all declared keys.

        Raises:
          ValueError: a key is missing, or a value has another type.
        """
        settings = read(cls, config)
        for name, term in settings.objective.terms.items():
            if term is not None:
                read(Term, term, f"objective.terms.{name}.")
        members = {name: _read_member(name, member) for name, member in settings.members.items() if member is not None}
        return dataclasses.replace(settings, members=members)

    @classmethod
    def parse(cls, config: "Config | Settings") -> "Settings":
        """Returns the settings of a config, checked as far as is possible before anything is read.

        Args:
          config: a config as in `read`, or settings, which are returned unchanged.

        Raises:
          ValueError: a value is wrong; the message names the key, the value, and what would be right.
        """
        if isinstance(config, Settings):
            return config
        settings = cls.read(config)
        check_ranges(settings)
        _check_choices(settings)
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as nested dicts, as `ConfigDict.to_dict` does."""
        return dataclasses.asdict(self)


def _read_member(name: str, member: Any) -> Member:
    """Returns a member of a config. A key that the config lacks has its default value."""
    if name in ("teacher", "student", "assistant") or not name.isidentifier():
        raise ValueError(f"members.{name}: a member needs a name of its own, such as reference or second_teacher.")
    if not hasattr(member, "keys"):
        raise ValueError(f"members.{name}={member!r} must be a dict such as {{'path': 'FOLDER'}}.")
    known = defaults(Member)
    if unknown := [key for key in member if key not in known]:
        raise ValueError(f"members.{name} has no key {unknown[0]!r}; the keys of a member are {', '.join(known)}.")
    found = read(Member, known | {key: member[key] for key in member}, f"members.{name}.")
    check_ranges(found, f"members.{name}.")
    if not found.path and not found.cache:
        raise ValueError(f"members.{name}.path is empty: set the folder of the model, or student.")
    return found


def _check_choices(settings: Settings) -> None:
    """Checks values that depend on JAX or on other values."""
    check_part(settings.student)
    import jax  # imported here because the help of the commands reads this module, and JAX takes seconds

    if settings.student.dtype == "float16":
        raise ValueError(
            "student.dtype='float16' is not supported, because gradients below 6e-8 become 0 in float16. Use bfloat16, "
            "which has the range of float32. teacher.dtype may be float16, because a teacher has no gradient."
        )
    for name, model in {
        "teacher": settings.teacher,
        **{f"members.{n}": m for n, m in settings.members.items()},
    }.items():
        if model.follow and (model.path != "student" or model.follow > 1):
            raise ValueError(
                f"{name}.follow={model.follow} and {name}.path={model.path!r}: only the student before training can follow the "
                f"student, by a share of at most 1. Set {name}.path='student', or {name}.follow=0."
            )
        if model.follow and model.cache:
            raise ValueError(
                f"{name}.follow={model.follow} and {name}.cache={model.cache!r}: a model that follows the student changes, so it "
                f"has no cache. Leave {name}.cache empty, or set {name}.follow=0."
            )
    policies = ["none", *(name for name in dir(jax.checkpoint_policies) if name.endswith("saveable"))]
    if settings.student.remat not in policies:
        raise ValueError(f"student.remat={settings.student.remat!r} is not one of {', '.join(policies)}.")
    if settings.attention == "cudnn" and (
        jax.default_backend() != "gpu" or "float32" in (settings.teacher.dtype, settings.student.dtype)
    ):
        raise ValueError(
            "attention='cudnn' needs an NVIDIA GPU, student.dtype=bfloat16, and teacher.dtype bfloat16 or float16. "
            "attention='plain' works everywhere."
        )
    profiled = settings.profile_steps or (1, settings.steps)
    if len(profiled) != 2 or not 1 <= profiled[0] <= profiled[1] <= settings.steps:
        raise ValueError(
            f"profile_steps={settings.profile_steps} must be (first, last), 1 <= first <= last <= {settings.steps}."
        )
    for name, size in {"data": settings.data.batch_size, "text": settings.text.batch_size}.items():
        if (name == "data" or settings.text.name) and size % settings.microbatches:
            raise ValueError(f"{name}.batch_size={size} must be a multiple of microbatches={settings.microbatches}.")
