"""Every key of a config, its default, and what it means. A method's file sets the objective, a setting models and data.

A *spec* is {"name": ..., keyword: number, ...}: a function of the module named beside it, or of your own as
"module:function", with its keywords. Specs take new keywords, also from the command line
(--config.objective.terms.distil.divergence.skew=0.2); all else is locked.
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
    config.seed = 0  # of parameters, order of rows, samples
    config.steps = 1000  # updates
    config.microbatches = 1  # parts that a batch is worked through in; changes memory, not numbers
    config.optimizer = ConfigDict({"name": "adamw", "weight_decay": 0.01})  # spec: optax
    config.optimizer.no_decay = ()  # patterns of parameters that do not decay, such as ('*norm*', '*bias')
    config.learning_rate = cosine(config, 5e-4)  # spec: kd_jax.schedules
    config.clip_norm = 1.0  # largest norm of the gradient; 0: no clipping

    config.objective = ConfigDict()
    config.objective.temperature = 1.0  # divides both models' logits; a T^2 factor goes into the coefficients
    config.objective.terms = ConfigDict()  # name -> term(); the loss is their sum

    config.prefixes = ConfigDict({"name": "data"})  # spec: kd_jax.prefixes, whose text the models are compared on

    config.sampling = ConfigDict()
    config.sampling.max_new_tokens = 128  # of a response that a model writes
    config.sampling.temperature = 1.0  # of whoever writes
    config.sampling.top_p = 1.0  # the likeliest tokens that hold this mass; 1: all
    config.sampling.top_k = 0  # the likeliest so many; 0: all
    config.sampling.teacher_share = 0.0  # of the teacher in what the student's rows are drawn from: MiniLLM's mixture
    config.sampling.rollouts_per_prompt = 1  # responses to a prompt; a batch then has fewer prompts
    config.sampling.show_every = 200  # steps after which responses that were just drawn are shown; 0: never

    config.loss = ConfigDict()
    config.loss.chunk = 0  # tokens, per device, whose logits are held at a time; 0 chooses

    config.teacher = ConfigDict()
    config.teacher.path = ""  # a Hugging Face folder, or package:NAME for one that ships with kd_jax; empty: no teacher
    config.teacher.cache = ""  # a folder of kd_jax.cache_teacher, used in place of the model: path is not loaded
    config.teacher.dtype = "float32"  # of parameters and computation
    config.teacher.weights = "float"  # float: in dtype; int8: the layers' matrices, with a scale for each output
    config.teacher.int8_report = True  # the start measures what int8 changes, with one layer at a time also in dtype
    config.teacher.sharding = "student"  # as it lies; spread: also over data; tensor: over that alone; whole: copies

    config.student = ConfigDict()
    config.student.init = "random"  # random (sizes in config), pretrained (path), or layers (of the teacher)
    config.student.path = ""  # for pretrained: a Hugging Face folder
    config.student.layers = ()  # for layers: which of the teacher's, from 0
    config.student.config = ConfigDict()  # for random: keywords of kd_jax.models.ModelConfig
    config.student.dtype = "float32"  # of the computation; parameters are float32
    config.student.remat = "none"  # or one of jax.checkpoint_policies: what of a block is kept for the backward pass

    config.attention = "plain"  # of both models; or xla, or cudnn: flash attention on an NVIDIA GPU, not in float32

    config.tokenizer = ConfigDict()
    config.tokenizer.path = ""  # a folder with tokenizer.json; empty: the teacher's, or else the student's

    config.data = ConfigDict()
    config.data.name = "docstrings"  # docstrings, dolly, gsm8k, jsonl, text
    config.data.options = ConfigDict()  # keywords of that builder, such as path
    config.data.defaults = ConfigDict()  # name of a dataset -> keywords that hold for it unless options has others
    config.data.data_dir = ""  # where built datasets are kept; empty: tensorflow_datasets' default
    config.data.train_split = "train"  # split to train on
    config.data.eval_split = "validation"  # split of held-out rows
    config.data.eval_rows = 512  # held-out rows to evaluate on, the first of the split; 0: all
    config.data.template = "plain"  # plain, alpaca, or chat (the tokenizer's own)
    # Variables of a chat template, such as enable_thinking=False. `date` is also what its strftime_now gives: 2026-01-01 by default.
    config.data.template_options = ConfigDict()
    config.data.system = ""  # system message of a chat; empty: none
    config.data.max_length = 512  # tokens that the models see of a row
    config.data.max_prompt_length = 256  # of which the prompt, at most
    config.data.long_prompts = "drop"  # drop the row, or cut: truncate the user's text, and never the template
    config.data.long_responses = "cut"  # cut, or drop the row
    config.data.loss_on = "response"  # what training counts: response (and its end), or all; held-out rows: response
    config.data.packing = "none"  # none; rows: several in one, kept apart; stream: end to end, every token counts
    config.data.batch_size = 32  # rows an update, over all devices
    config.data.eval_batch_size = 32  # rows evaluated at a time

    config.text = ConfigDict()  # a second stream, for terms with rows="text": every token of it counts
    config.text.name = ""  # a dataset as in data; empty: there is none
    config.text.options = ConfigDict()  # keywords of that builder; empty: data.options, if it is the same dataset
    config.text.split = config.data.get_oneway_ref("train_split")  # of that dataset; as data.train_split unless set
    config.text.batch_size = 8  # rows an update beside the first stream's, each data.max_length tokens

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that divide the batch; -1: all that the other two leave
    config.mesh.fsdp = 1  # devices that divide the batch and the parameters
    config.mesh.tensor = 1  # devices that divide each matrix

    config.eval_every = 200  # steps
    config.checkpoint_every = 200  # steps
    config.keep_checkpoints = 2  # the newest so many
    config.max_skipped = 0  # steps in a row that are left out, their loss or gradient not finite, before the run stops
    config.profile_steps = ()  # (first, last): these are traced into the work directory's profile, for xprof
    config.log_every = 10  # steps between readings of the metrics, every step is written
    config.eval_prompts = 0  # held-out prompts answered at each evaluation: ROUGE-L, KLs on the student's own text
    config.sample_tokens = 64  # longest sample shown at the end
    return lock(config)


def term(**changes: Any) -> ConfigDict:
    """One summand of the objective; a changed key must be one of these.

    Of kind divergence alone are divergence, pair, assistant, weight, stop_gradient and importance, of policy_gradient policy.
    """
    values: dict[str, Any] = {
        "kind": "divergence",  # divergence; hard_labels: -log q(the row's token); policy_gradient of KL(q || p), see policy
        "divergence": {"name": "forward_kl"},  # spec: kd_jax.divergences
        "assistant": {"name": "none"},  # spec: kd_jax.assistants, or none
        "pair": ("teacher", "student"),  # first and second argument: two of teacher, student, assistant
        "stop_gradient": False,  # the assistant's student is a constant to the gradient
        "weight": 0.0,  # of the teacher in the assistant: a number, or a spec of kd_jax.schedules
        "coefficient": 1.0,  # in front of the term: a number, or a spec of kd_jax.schedules; so may be an assistant's keywords
        "rows": "all",  # all of the first stream, or by whose text they are: data, teacher, student, text
        "importance": False,  # for a divergence on rows drawn with sampling.teacher_share: weigh each token by q / mixture
        "policy": policy(),  # for policy_gradient
        "average": "token",  # token: over all tokens of the batch; sequence: over rows of each row's mean
    }
    if unknown := changes.keys() - values.keys():
        raise KeyError(f"a term has no key {sorted(unknown)}; it has {', '.join(values)}.")
    values |= changes
    values |= {key: number(values[key]) for key in ("weight", "coefficient")}
    values["assistant"] = {key: number(value) for key, value in dict(values["assistant"]).items()}
    return ConfigDict(values)


def number(value: Any) -> Any:
    """A number in whose place a flag may put a schedule's call, and a config a schedule's ConfigDict; all else as it is."""
    return FieldReference(value, field_type=object) if isinstance(value, int | float) else value


def policy(**changes: Any) -> ConfigDict:
    """How the student's own tokens are rewarded, with log p - log q each; the defaults are MiniLLM's paper's."""
    values = {
        "discount": 1.0,  # of rewards that come later
        "include_current": False,  # the token's own reward, too, and not only what follows it
        "length_normalised": True,  # rewards are averaged over the tokens they are of, not summed
        "whiten": "none",  # advantages get mean 0 and variance 1: over the counted tokens, or all, what follows their end too
        "baseline": "none",  # or kl: the reward of each token less its exact mean, -KL(q || p)
        "clip": 0.2,  # how far the ratio to the student that drew is followed; 0: wherever it goes
        "reward_scale": 1.0,  # rewards are divided by it
        "reward_limit": 0.0,  # and cut at plus and minus this; 0: not cut
    }
    if unknown := changes.keys() - values.keys():
        raise KeyError(f"a policy has no key {sorted(unknown)}; it has {', '.join(values)}.")
    return ConfigDict(values | changes)


def hard_labels(**changes: Any) -> ConfigDict:
    """The cross-entropy of the data's tokens as a term."""
    return term(kind="hard_labels", **changes)


def cosine(config: ConfigDict, peak: float, final: float = 1e-7) -> ConfigDict:
    """A cosine from `peak` to `final` over the run, as in the papers; it follows config.steps when that changes."""
    steps = config.get_oneway_ref("steps")
    return ConfigDict(
        {"name": "cosine_decay_schedule", "init_value": peak, "decay_steps": steps, "alpha": final / peak}
    )


def set_terms(config: ConfigDict, **terms: ConfigDict) -> ConfigDict:
    """The config with these terms as its whole objective."""
    with config.unlocked():
        config.objective.terms = ConfigDict(terms)
    return lock(config)


def lock(config: ConfigDict) -> ConfigDict:
    """Declared keys are locked; specs, and the keywords of builders and models, are open."""
    config.lock()

    def open_specs(node: ConfigDict) -> None:
        for key in node:
            value = node[key]
            if isinstance(value, ConfigDict):
                value.unlock() if key in OPEN else open_specs(value)

    open_specs(config)
    return config
