"""Declares every key of a config, with the default value and the meaning of the key.

The file of a method sets the objective. A setting sets the models and the data.

A *spec* is {"name": ..., keyword: number, ...}. The name is that of a function in the module that the key's comment
gives, or of a function of your own, as "module:function". The other entries are keywords of that function. A spec
accepts new keywords, also from the command line (--config.objective.terms.distil.divergence.skew=0.2). All other keys
are locked.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

OPEN = (
    "options",
    "template_options",
    "defaults",
    "config",
    "learning_rate",
    "optimizer",
    "divergence",
    "assistant",
    "weight",
    "coefficient",
    "prefixes",
)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # random seed of the initial parameters, the order of the rows, and the samples
    config.steps = 1000  # updates
    config.microbatches = 1  # number of parts in which a batch is processed; changes memory, not results
    config.optimizer = ConfigDict({"name": "adamw", "weight_decay": 0.01})  # spec: an optimiser of optax
    config.optimizer.no_decay = ()  # name patterns of the parameters without weight decay, such as ('*norm*', '*bias')
    config.learning_rate = cosine(config, 5e-4)  # spec: a schedule of kd_jax.schedules
    config.clip_norm = 1.0  # largest norm of the gradient; larger gradients are scaled down; 0: no clipping

    config.objective = ConfigDict()
    config.objective.temperature = 1.0  # divides the logits of both models; a T^2 factor belongs in the coefficients
    config.objective.terms = ConfigDict()  # name -> term(); the loss is the sum of the terms

    config.prefixes = ConfigDict({"name": "data"})  # spec: kd_jax.prefixes, a source of each step's rows

    config.sampling = ConfigDict()
    config.sampling.max_new_tokens = 128  # largest number of tokens in a response that a model writes
    config.sampling.temperature = 1.0  # sampling temperature of the model that writes; 0: the likeliest token
    config.sampling.top_p = 1.0  # sample from the likeliest tokens that together have this probability; 1: all tokens
    config.sampling.top_k = 0  # sample from this many likeliest tokens; 0: all tokens
    config.sampling.teacher_share = 0.0  # weight of the teacher in the mixture that the student's rows are sampled from
    config.sampling.rollouts_per_prompt = 1  # number of responses to each prompt; a batch then has fewer prompts
    config.sampling.show_every = 200  # number of steps between printed samples of new student responses; 0: never

    config.loss = ConfigDict()
    config.loss.chunk = 0  # number of tokens per device whose logits are in memory at once; 0: automatic

    config.teacher = ConfigDict()
    config.teacher.path = ""  # a Hugging Face folder, or package:NAME for a model of kd_jax; empty: no teacher
    config.teacher.cache = ""  # a folder from kd_jax.cache_teacher, used in place of the model at teacher.path
    config.teacher.dtype = "float32"  # number type of the parameters and the computation
    config.teacher.weights = "float"  # float: as in dtype; int8: matrices of the layers in int8, one scale per output
    config.teacher.int8_report = True  # measure the error of int8 at the start, also with one layer at a time in dtype
    config.teacher.sharding = "student"  # student: same; spread: also over data; tensor: over tensor; whole: copies

    config.student = ConfigDict()
    config.student.init = "random"  # random (sizes in config), pretrained (path), or layers (of the teacher)
    config.student.path = ""  # for init=pretrained: a Hugging Face folder
    config.student.layers = ()  # for init=layers: indices of the teacher's layers to copy, counted from 0
    config.student.config = ConfigDict()  # for init=random: keywords of kd_jax.models.ModelConfig
    config.student.dtype = "float32"  # number type of the computation; the parameters are float32
    config.student.remat = "none"  # none, or a policy of jax.checkpoint_policies: values kept for the backward pass

    config.attention = "plain"  # of both models: plain, xla, or cudnn (flash attention: NVIDIA GPU, not in float32)

    config.tokenizer = ConfigDict()
    config.tokenizer.path = ""  # a folder with tokenizer.json; empty: that of the teacher, or else that of the student

    config.data = ConfigDict()
    config.data.name = "docstrings"  # name of the dataset: docstrings, dolly, gsm8k, jsonl, text
    config.data.options = ConfigDict()  # keywords of the dataset's builder, such as path
    config.data.defaults = ConfigDict()  # dataset name -> keywords of the builder; data.options takes precedence
    config.data.data_dir = ""  # folder for the built datasets; empty: the default of tensorflow_datasets
    config.data.train_split = "train"  # name of the split to train on
    config.data.eval_split = "validation"  # name of the split of held-out rows
    config.data.eval_rows = 512  # number of held-out rows to evaluate on, from the start of the split; 0: all
    config.data.template = "plain"  # prompt template: plain, alpaca, or chat (the template of the tokenizer)
    config.data.template_options = ConfigDict()  # variables of a chat template; `date` is 2026-01-01 by default
    config.data.system = ""  # system message of a chat; empty: none
    config.data.max_length = 512  # largest number of tokens of a row that the models read
    config.data.max_prompt_length = 256  # largest number of tokens of a prompt, as part of max_length
    config.data.long_prompts = "drop"  # drop: omit the row; cut: truncate the user's text, but never the template
    config.data.long_responses = "cut"  # cut: truncate the response; drop: omit the row
    config.data.loss_on = "response"  # counted in training: response (with its end), or all; held-out: response
    config.data.packing = "none"  # none; rows: several rows in one, kept separate; stream: joined, all tokens count
    config.data.batch_size = 32  # number of rows in an update, over all devices
    config.data.eval_batch_size = 32  # number of rows in an evaluation batch, over all devices

    config.text = ConfigDict()  # a second stream, for terms with rows="text"; every token of the stream counts
    config.text.name = ""  # name of a dataset, as in data.name; empty: no second stream
    config.text.options = ConfigDict()  # keywords of the builder; empty: data.options, if the dataset is the same
    config.text.split = config.data.get_oneway_ref("train_split")  # split of the dataset; default: data.train_split
    config.text.batch_size = 8  # number of rows added to each update, of data.max_length tokens each

    config.mesh = ConfigDict()
    config.mesh.data = -1  # number of devices that divide the batch; -1: all devices not used by fsdp and tensor
    config.mesh.fsdp = 1  # number of devices that divide both the batch and the parameters
    config.mesh.tensor = 1  # number of devices that divide each matrix

    config.eval_every = 200  # number of steps between evaluations
    config.checkpoint_every = 200  # number of steps between checkpoints
    config.keep_checkpoints = 2  # number of newest checkpoints that are kept
    config.max_skipped = 0  # largest number of consecutive non-finite steps that are skipped before the run stops
    config.profile_steps = ()  # (first, last): steps to trace, for xprof, into the folder profile of the work directory
    config.log_every = 10  # number of steps between two reads of the metrics; the metrics of every step are written
    config.eval_prompts = 0  # number of held-out prompts answered per evaluation: ROUGE-L, KLs on student text
    config.sample_tokens = 64  # largest number of tokens in a sample shown at the end
    return lock(config)


def term(**changes: Any) -> ConfigDict:
    """Returns one summand of the objective. A changed key must be one of the keys below.

    Only terms of kind divergence use divergence, pair, assistant, weight, stop_gradient and importance. Only terms of
    kind policy_gradient use policy.
    """
    values: dict[str, Any] = {
        "kind": "divergence",  # divergence; hard_labels: -log q(token); policy_gradient of KL(q || p): see policy
        "divergence": {"name": "forward_kl"},  # spec: a divergence of kd_jax.divergences
        "assistant": {"name": "none"},  # spec: an assistant of kd_jax.assistants, or none
        "pair": ("teacher", "student"),  # first and second argument of the divergence: teacher, student or assistant
        "stop_gradient": False,  # treat the student inside the assistant as a constant in the gradient
        "weight": 0.0,  # weight of the teacher in the assistant: a number, or a spec of kd_jax.schedules
        "coefficient": 1.0,  # factor of the term; may be a kd_jax.schedules spec, as may an assistant's keywords
        "rows": "all",  # rows that count: all (of the first stream), or of one origin: data, teacher, student, text
        "importance": False,  # weigh each token by q / mixture; for a divergence on rows with sampling.teacher_share
        "policy": policy(),  # for kind=policy_gradient: the settings of the policy gradient
        "average": "token",  # token: mean over the batch's tokens; sequence: mean over rows of each row's mean
    }
    if unknown := changes.keys() - values.keys():
        raise KeyError(f"a term has no key {sorted(unknown)}; it has {', '.join(values)}.")
    values |= changes
    values |= {key: number(values[key]) for key in ("weight", "coefficient")}
    values["assistant"] = {key: number(value) for key, value in dict(values["assistant"]).items()}
    return ConfigDict(values)


def number(value: Any) -> Any:
    """Returns a number as a field that may later hold a schedule.

    A flag may replace the number by a schedule's call, and a config may replace it by a schedule's ConfigDict. Any
    other value is returned unchanged.
    """
    return FieldReference(value, field_type=object) if isinstance(value, int | float) else value


def policy(**changes: Any) -> ConfigDict:
    """Returns the settings of a policy gradient on the student's own text.

    The reward of each token is log p - log q.
    The defaults are those of the MiniLLM paper.
    """
    values = {
        "discount": 1.0,  # factor per token by which later rewards are discounted
        "include_current": False,  # count the token's own reward as well as the rewards of the tokens after it
        "length_normalised": True,  # average the rewards over their tokens instead of adding them
        "whiten": "none",  # scale advantages to mean 0, variance 1: none, counted (tokens), or all (also after the end)
        "baseline": "none",  # none, or kl: subtract the exact mean -KL(q || p) from the reward of each token
        "clip": 0.2,  # limit of the ratio q / (q when sampled) to 1 - clip and 1 + clip; 0: no limit
        "reward_scale": 1.0,  # rewards are divided by this number
        "reward_limit": 0.0,  # scaled rewards are limited to plus and minus this number; 0: no limit
    }
    if unknown := changes.keys() - values.keys():
        raise KeyError(f"a policy has no key {sorted(unknown)}; it has {', '.join(values)}.")
    return ConfigDict(values | changes)


def hard_labels(**changes: Any) -> ConfigDict:
    """Returns a term that is the cross-entropy of the tokens in the rows."""
    return term(kind="hard_labels", **changes)


def cosine(config: ConfigDict, peak: float, final: float = 1e-7) -> ConfigDict:
    """Returns a cosine schedule from `peak` to `final` over the run, as in the papers.

    The length of the schedule follows config.steps when config.steps changes.
    """
    steps = config.get_oneway_ref("steps")
    return ConfigDict(
        {"name": "cosine_decay_schedule", "init_value": peak, "decay_steps": steps, "alpha": final / peak}
    )


def set_terms(config: ConfigDict, **terms: ConfigDict) -> ConfigDict:
    """Returns the config with the given terms as the whole objective."""
    with config.unlocked():
        config.objective.terms = ConfigDict(terms)
    return lock(config)


def lock(config: ConfigDict) -> ConfigDict:
    """Returns the config with its declared keys locked. Specs, and the keywords of builders and models, stay open."""
    config.lock()

    def open_specs(node: ConfigDict) -> None:
        for key in node:
            value = node[key]
            if isinstance(value, ConfigDict):
                value.unlock() if key in OPEN else open_specs(value)

    open_specs(config)
    return config
