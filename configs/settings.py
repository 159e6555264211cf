"""Settings: models and data, named by the part of a config after the colon (--config=configs/amid.py:dolly_smollm2)."""

import difflib

from ml_collections import ConfigDict

from configs import base


def get(name: str) -> ConfigDict:
    """Returns the base config with the models and the data of a setting."""
    settings = {f.__name__: f for f in SETTINGS}
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
    """Distils MiniLLM's GPT-2 XL into GPT-2 on databricks-dolly-15k, as in MiniLLM and DistiLLM.

    The hyper-parameters are those of the scripts of MiniLLM and DistiLLM. The run has 20 epochs of about 12,500 rows in
    batches of 32 (8 on each of 4 devices). AdamW has the learning rate 5e-4 and the weight decay 0.01, except for
    biases and the parameters of norms. The learning rate follows a cosine to 1e-7 without warm-up. The gradient's norm
    is clipped at 1. A row has up to 512 tokens, of which the prompt has up to 256. Both models are fine-tuned on Dolly.

    This setting was not run at full size, and the repositories on the hub were not opened.
    """
    _dolly_of_the_papers(config, epochs=20)
    config.teacher.path = "hf://MiniLLM/teacher-gpt2-1.5B"
    config.student.path = "hf://MiniLLM/init-gpt2-120M"
    config.optimizer.no_decay = ("*norm*", "*bias")
    config.student.dtype = "bfloat16"


def dolly_opt(config: ConfigDict) -> None:
    """Distils MiniLLM's OPT-13B into OPT-1.3B on databricks-dolly-15k, as in MiniLLM.

    The hyper-parameters are those of MiniLLM's script for OPT-1.3B: 10 epochs in batches of 32 and the learning rate
    5e-5. All others are those of `dolly_gpt2`. Both models are fine-tuned on Dolly.

    This setting was not run at full size, and the repositories on the hub were not opened.
    """
    _dolly_of_the_papers(config, epochs=10)
    config.learning_rate = base.cosine(config, 5e-5)
    config.teacher.path = "hf://MiniLLM/teacher-OPT-13B"
    config.student.path = "hf://MiniLLM/SFT-OPT-1.3B"
    config.student.dtype = "bfloat16"
    config.student.remat = "nothing_saveable"


def _dolly_of_the_papers(config: ConfigDict, epochs: int) -> None:
    """Sets the data and the hyper-parameters that the scripts of MiniLLM share."""
    config.steps = 390 * epochs
    config.student.init = "pretrained"
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

    This setting was not run at full size.
    """
    _dolly_of_the_papers(config, epochs=10)
    config.teacher.path = "models/open_llama_7b_v2-dolly"
    config.student.path = "models/open_llama_3b_v2"
    config.student.lora.rank, config.student.lora.alpha, config.student.lora.dropout = 16, 64.0, 0.1
    config.student.lora.targets = ("q_proj", "v_proj")
    config.student.dtype = config.student.frozen_dtype = config.teacher.dtype = "bfloat16"
    config.student.remat = "nothing_saveable"


def gsm8k_qwen25(config: ConfigDict) -> None:
    """Distils Qwen2.5-3B-Instruct into Qwen2.5-0.5B-Instruct on the problems of GSM8K.

    The run has 3 epochs of about 7,250 problems in batches of 32. The prompts have the chat template of the tokenizer.
    Measure the answers with `python -m kd_jax.evaluate --data=gsm8k --numbers`.

    The learning rate is a guess, and this setting was not run at full size. The repositories were not opened.
    """
    _chat(config, steps=680)
    config.teacher.path = "hf://Qwen/Qwen2.5-3B-Instruct"
    config.student.path = "hf://Qwen/Qwen2.5-0.5B-Instruct"
    config.data.name = "gsm8k"
    config.data.max_length = 640
    config.data.max_prompt_length = 320
    config.sampling.max_new_tokens = 320


def ultrachat_gemma2(config: ConfigDict) -> None:
    """Distils Gemma 2 9B into Gemma 2 2B on the first third of UltraChat 200k.

    The run has about 64,000 conversations in batches of 32. Both models are gated: accept the conditions on the page of
    each model, and log in with `hf auth login`.

    The learning rate is a guess, and this setting was not run at full size. The repositories were not opened.
    """
    _chat(config, steps=2000)
    config.teacher.path = "hf://google/gemma-2-9b-it"
    config.student.path = "hf://google/gemma-2-2b-it"
    config.data.name = "jsonl"
    config.data.defaults.jsonl = ConfigDict(
        dict(
            path="hf://datasets/HuggingFaceH4/ultrachat_200k@8049631c405ae6576f93f445c6b8166f76f5505a/data/"
            "train_sft-00000-of-00003-a3ecf92756993583.parquet"
        )
    )
    config.data.max_length = 2048
    config.data.max_prompt_length = 1024
    config.sampling.max_new_tokens = 512


def smollm3(config: ConfigDict) -> None:
    """Distils SmolLM3-3B into a student of every third of its layers on databricks-dolly-15k.

    The run has 10 epochs of about 14,000 rows in batches of 32.

    The learning rate is a guess, and this setting was not run at full size. The repository was not opened.
    """
    _chat(config, steps=4400)
    config.learning_rate = base.cosine(
        config, 2e-4, 1e-6
    )  # a student without some of its layers is far from its teacher
    config.teacher.path = "hf://HuggingFaceTB/SmolLM3-3B"
    config.student.init = "layers"
    config.student.layers = tuple(range(0, 36, 3))
    config.data.name = "dolly"
    config.sampling.max_new_tokens = 256


def _chat(config: ConfigDict, steps: int) -> None:
    """Sets the keys that the settings with larger chat models share."""
    config.steps = steps
    config.learning_rate = base.cosine(config, 1e-5)
    config.student.init = "pretrained"
    config.student.dtype = config.teacher.dtype = "bfloat16"
    config.student.remat = "nothing_saveable"
    config.data.template = "chat"
    config.data.long_prompts = "drop"


SETTINGS = (
    docstrings, smoke, dolly_smollm2, dolly_gpt2, dolly_opt, dolly_openllama, gsm8k_qwen25, ultrachat_gemma2, smollm3,
)  # fmt: skip
