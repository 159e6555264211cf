"""Settings: models and data, named by the part of a config after the colon (--config=configs/amid.py:dolly_smollm2)."""

import difflib

from ml_collections import ConfigDict

from configs import base


def get(name: str) -> ConfigDict:
    """Returns the base config with the models and the data of a setting."""
    settings = {f.__name__: f for f in (docstrings, smoke, dolly_smollm2, dolly_gpt2, dolly_openllama)}
    if name not in settings:
        close = difflib.get_close_matches(name, settings, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no setting {name!r}.{hint} The settings are {', '.join(settings)}.")
    config = base.get_config()
    settings[name](config)
    return config


def own_teacher(config: ConfigDict, **changes: object) -> ConfigDict:
    """Makes the student its own teacher. A setting without a pretrained student takes its teacher as the student.

    Args:
      config: the config of a setting.
      **changes: keys of the section teacher, such as `follow`.
    """
    if config.student.init != "pretrained":
        config.student.init, config.student.path = "pretrained", config.teacher.path
        config.learning_rate = base.cosine(config, 1e-4, 1e-6)  # the other settings train a student from its start
    config.teacher.path = "student"
    config.teacher.update(changes)
    return config


def docstrings(config: ConfigDict) -> None:
    """The task is to write the docstring of a Python function from its source, with data from this machine.

    The student has less than a quarter of the teacher's size.
    """
    config.steps = 1500
    config.learning_rate = base.cosine(config, 3e-3, 1e-5)
    config.teacher.path = config.tokenizer.path = "package:docstrings_teacher"
    config.student.config = ConfigDict(
        dict(family="llama", hidden_size=128, num_layers=2, num_heads=4, intermediate_size=320, max_positions=256)
    )
    config.data.max_length = 176
    config.data.max_prompt_length = 128
    config.sampling.max_new_tokens = 48
    config.data.batch_size = 16


def smoke(config: ConfigDict) -> None:
    """Makes a run of a few seconds, for tests.

    The rows come from two small packages, and the student has 70 thousand parameters.
    """
    docstrings(config)
    config.steps = 2
    config.student.config = ConfigDict(
        dict(family="llama", hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=64)
    )
    config.data.defaults.docstrings = ConfigDict(dict(packages=("optax", "flax"), standard_library=False))
    config.data.long_prompts = "cut"
    config.data.max_length = 48
    config.data.max_prompt_length = 32
    config.sampling.max_new_tokens = 8
    config.text.batch_size = 8
    config.data.batch_size = 8
    config.data.eval_batch_size = 8
    config.data.eval_rows = 8
    config.sample_tokens = 4


def dolly_smollm2(config: ConfigDict) -> None:
    """Distils SmolLM2-135M-Instruct into a student of every third layer, on databricks-dolly-15k.

    Prompts have the chat template of the tokenizer.
    """
    config.steps = 4000
    config.learning_rate = base.cosine(config, 1e-3, 1e-5)
    config.teacher.path = "models/SmolLM2-135M-Instruct"
    config.student.init = "layers"
    config.student.layers = tuple(range(0, 30, 3))
    config.data.name = "dolly"
    config.data.template = "chat"
    config.data.max_length = 256
    config.data.max_prompt_length = 160
    config.sampling.max_new_tokens = 96
    config.data.batch_size = 8
    config.data.eval_batch_size = 8
    config.data.eval_rows = 64


def dolly_gpt2(config: ConfigDict) -> None:
    """Distils GPT-2 XL into GPT-2 on databricks-dolly-15k, as in MiniLLM and DistiLLM.

    The hyper-parameters are those of the scripts of MiniLLM and DistiLLM. The run has 20 epochs of about 12,500 rows in
    batches of 32 (8 on each of 4 devices). AdamW has the learning rate 5e-4 and the weight decay 0.01, except for
    biases and the parameters of norms. The learning rate follows a cosine to 1e-7 without warm-up. The gradient's norm
    is clipped at 1. A row has up to 512 tokens, of which the prompt has up to 256. Both models must be fine-tuned on
    Dolly first, for example with

        python -m kd_jax.main --config=configs/sft.py:dolly_gpt2 --config.teacher.path= --config.student.path=FOLDER
    """
    config.steps = 7800
    config.teacher.path = "models/gpt2-xl-dolly"
    config.student.init = "pretrained"
    config.student.path = "models/gpt2-dolly"
    config.optimizer.no_decay = ("*norm*", "*bias")
    config.student.dtype = "bfloat16"
    config.teacher.dtype = "bfloat16"
    config.seed = 10
    config.data.name = "dolly"
    config.data.template = "alpaca"
    config.data.eval_rows = 500
    config.sampling.max_new_tokens = 256
    config.text.batch_size = 32
    config.eval_every = 390
    config.checkpoint_every = 390


def dolly_openllama(config: ConfigDict) -> None:
    """Distils OpenLLaMA2 7B into OpenLLaMA2 3B with LoRA on databricks-dolly-15k, as in DistiLLM.

    The hyper-parameters are those of DistiLLM's scripts. LoRA has rank 16, alpha 64 and dropout 0.1, on the query and
    value projections (PEFT's default for Llama). The run has 10 epochs of about 12,500 rows in batches of 32 (8 on each of 4
    devices), the learning rate 5e-4 with a cosine to 1e-7, and the weight decay 0.01. The teacher is fine-tuned on
    Dolly first, and the student begins with an adapter that was fine-tuned on Dolly, for example with

        python -m kd_jax.main --config=configs/sft.py:dolly_openllama --config.teacher.path= --workdir=runs/sft
        python -m kd_jax.main --config=configs/distillm.py:dolly_openllama --config.student.lora.path=runs/sft/adapter
    """
    config.steps = 3900
    config.teacher.path = "models/open_llama_7b_v2-dolly"
    config.student.init = "pretrained"
    config.student.path = "models/open_llama_3b_v2"
    config.student.lora.rank, config.student.lora.alpha, config.student.lora.dropout = 16, 64.0, 0.1
    config.student.lora.targets = ("q_proj", "v_proj")
    config.student.dtype = config.student.frozen_dtype = config.teacher.dtype = "bfloat16"
    config.student.remat = "nothing_saveable"
    config.seed = 10
    config.data.name = "dolly"
    config.data.template = "alpaca"
    config.data.eval_rows = 500
    config.sampling.max_new_tokens = 256
    config.text.batch_size = 32
    config.eval_every = 390
    config.checkpoint_every = 390
