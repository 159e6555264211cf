"""Every method on one pair of models, from one student.

The teacher is SmolLM2-135M-Instruct, fine-tuned on Dolly. The student has ten of its thirty layers.

`run.py` runs everything in order on an accelerator, at the size `medium`. The single commands are these. They need the
Hugging Face folder models/SmolLM2-135M-Instruct:

python -m kd_jax.main --config=experiments/methods_smollm2/config.py:start-SIZE --workdir=runs/smollm2_start
python -m kd_jax.main --config=experiments/methods_smollm2/config.py:teacher-SIZE --workdir=runs/smollm2_teacher
python -m kd_jax.ablate --config=experiments/methods_smollm2/config.py:methods-SIZE --workdir=runs/methods_smollm2

`short` takes an hour on two CPU cores, and `medium` takes ten minutes on one accelerator. `full` is for several
accelerators: 2,000 steps of 64 rows and three seeds. A copy of databricks-dolly-15k may follow after a comma:
methods-short,FILE.jsonl.gz. Without it the dataset is downloaded.
"""

import importlib

from ml_collections import ConfigDict

from configs import forward_kl, sft, table
from configs.ablations import base

START, TEACHER = "runs/smollm2_start/student", "runs/smollm2_teacher/student"
METRICS = ("forward_kl", "reverse_kl", "total_variation", "cross_entropy", "top1_agreement", "accuracy")
STEPS = {  # for each size
    "short": {"start": 240, "teacher": 40, "methods": 12},
    "medium": {"start": 1000, "teacher": 200, "methods": 200},
    "full": {"start": 6000, "teacher": 1000, "methods": 2000},
}


def get_config(stage: str = "methods-short") -> ConfigDict:
    stage, _, path = stage.partition(",")
    what, _, size = stage.partition("-")
    stages = {"start": _start, "teacher": _teacher, "methods": _methods}
    if size not in STEPS or what not in stages:
        names, sizes = ", ".join(stages), " or -".join(STEPS)
        raise ValueError(f"The setting {stage!r} is unknown. A setting is one of {names}, followed by -{sizes}.")
    return stages[what](size, path)


def _start(size: str, path: str) -> ConfigDict:
    """Returns the config of the start of all students: forward KL from the teacher before its fine-tuning."""
    config = _sized(forward_kl.get_config("dolly_smollm2"), "start", size, path)
    config.learning_rate.init_value = 1e-3
    if size == "short":  # the lengths of experiments/smollm2_dolly
        config.data.max_length, config.data.max_prompt_length = 160, 96
    return config


def _teacher(size: str, path: str) -> ConfigDict:
    """Returns the config of the teacher's fine-tuning: all layers, on hard labels.

    The key `teacher` is the model before fine-tuning, for comparison.
    """
    config = _sized(sft.get_config("dolly_smollm2"), "teacher", size, path)
    config.learning_rate.init_value = 2e-5
    config.student.layers = tuple(range(30))
    return config


def _methods(size: str, path: str) -> ConfigDict:
    """Returns the config of an ablation over all methods."""
    methods = {}
    for name in table.METHODS:
        config = importlib.import_module(f"configs.{name}").get_config("dolly_smollm2")
        methods[name] = _sized(config, "methods", size, path)
        config.learning_rate.init_value = 2e-4
        config.teacher.path = TEACHER
        config.student.init = "pretrained"
        config.student.path = START
        if config.prefixes.name == "teacher":  # unfinished responses are omitted, so more rows are needed
            config.prefixes.num_rows = (1 if size == "medium" else 2) * config.steps * config.data.batch_size
    if size == "short":  # texts.py samples the students' texts
        return base.ablation(methods, {}, seeds=(0,), metrics=METRICS)
    return base.ablation(methods, {}, metrics=(*METRICS, "entropy", "own_reverse_kl", "rouge_l"))


def _sized(config: ConfigDict, what: str, size: str, path: str) -> ConfigDict:
    if path:
        config.data.options.path = path
    config.steps = STEPS[size][what]
    {"short": _short, "medium": _medium, "full": _full}[size](config)
    return config


def _short(config: ConfigDict) -> None:
    config.data.max_length = 112
    config.data.max_prompt_length = 64
    config.data.eval_rows = 24
    config.sampling.max_new_tokens = 48
    config.sample_tokens = 32
    config.text.batch_size = 4
    config.eval_every = config.checkpoint_every = config.steps
    config.keep_checkpoints = 1


def _medium(config: ConfigDict) -> None:
    config.student.dtype = config.teacher.dtype = "bfloat16"
    config.data.batch_size = 32
    config.data.eval_batch_size = 64
    config.data.eval_rows = 256
    config.text.batch_size = 16
    config.eval_every = config.steps // 2
    config.eval_prompts = 64
    config.checkpoint_every = config.steps
    config.keep_checkpoints = 1


def _full(config: ConfigDict) -> None:
    config.data.max_length = 512
    config.data.max_prompt_length = 256
    config.sampling.max_new_tokens = 256
    config.data.batch_size = 64
    config.data.eval_batch_size = 64
    config.data.eval_rows = 512
    config.text.batch_size = 64
    config.eval_every = config.checkpoint_every = config.steps // 4
    config.eval_prompts = 256
