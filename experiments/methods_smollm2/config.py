"""Every method on one pair: SmolLM2-135M-Instruct, fine-tuned on Dolly, into ten of its thirty layers, from one student.

In order, with models/SmolLM2-135M-Instruct a Hugging Face folder:

python -m kd_jax.main --config=experiments/smollm2_dolly/config.py --config.steps=240 --workdir=runs/smollm2_start
python -m kd_jax.main --config=experiments/methods_smollm2/config.py:teacher --workdir=runs/smollm2_teacher
python -m kd_jax.ablate --config=experiments/methods_smollm2/config.py:short --workdir=runs/methods_smollm2

`short` is what two CPU cores do in an hour; `full` is for accelerators, 2,000 steps of 64 rows and three seeds, and wants a start of
2,000 steps, too. After a comma there may be a copy of databricks-dolly-15k: short,FILE.jsonl.gz; else it is downloaded.
"""

import importlib

from ml_collections import ConfigDict

from configs import sft, table
from configs.ablations import base

START, TEACHER = "runs/smollm2_start/student", "runs/smollm2_teacher/student"


def get_config(stage: str = "short") -> ConfigDict:
    stage, _, path = stage.partition(",")
    if stage == "teacher":
        return _teacher(path)
    if stage not in ("short", "full"):
        raise ValueError(f"there is no stage {stage!r}: teacher, short or full.")
    methods = {name: importlib.import_module(f"configs.{name}").get_config("dolly_smollm2") for name in table.METHODS}
    for config in methods.values():
        _data(config, path)
        config.teacher.path = TEACHER
        config.student.init = "pretrained"
        config.student.path = START
        _short(config) if stage == "short" else _full(config)
        if config.prefixes.name == "teacher":
            config.prefixes.num_rows = (
                2 * config.steps * config.data.batch_size
            )  # some have not ended, and are left out
    metrics = ("forward_kl", "reverse_kl", "total_variation", "cross_entropy", "top1_agreement", "accuracy")
    if stage == "short":  # what the students write is for kd_jax.evaluate
        return base.ablation(methods, {}, seeds=(0,), metrics=metrics)
    return base.ablation(methods, {}, metrics=(*metrics, "own_reverse_kl", "rouge_l"))


def _teacher(path: str) -> ConfigDict:
    """The teacher's own fine-tuning, all of its layers on hard labels; `teacher` is what it starts from, to compare with."""
    config = sft.get_config("dolly_smollm2")
    _data(config, path)
    _short(config)
    config.steps = 40
    config.learning_rate.init_value = 2e-5
    config.student.layers = tuple(range(30))
    config.eval_every = config.checkpoint_every = 20
    return config


def _data(config: ConfigDict, path: str) -> None:
    if path:
        config.data.options.path = path


def _short(config: ConfigDict) -> None:
    config.steps = 12
    config.learning_rate.init_value = 2e-4
    config.data.max_length = 112
    config.data.max_prompt_length = 64
    config.data.eval_rows = 24
    config.sampling.max_new_tokens = 48
    config.sample_tokens = 32
    config.text.batch_size = 4
    config.eval_every = config.checkpoint_every = config.steps
    config.keep_checkpoints = 1


def _full(config: ConfigDict) -> None:
    config.steps = 2000
    config.learning_rate.init_value = 2e-4
    config.data.max_length = 512
    config.data.max_prompt_length = 256
    config.sampling.max_new_tokens = 256
    config.data.batch_size = 64
    config.data.eval_batch_size = 64
    config.data.eval_rows = 512
    config.text.batch_size = 64
    config.eval_every = config.checkpoint_every = 500
    config.eval_prompts = 256
