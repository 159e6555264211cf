"""The flags of python -m kd_jax.evaluate."""

import json
from types import SimpleNamespace

from absl import flags

from kd_jax import command, data
from kd_jax.evaluate.of_run import DEFAULTS
from kd_jax.settings.value_types import WholeNumberParser
from kd_jax.storage.files import Json

FLAGS = flags.FlagValues()  # flags of this command only, because other commands have flags of the same names
OF_RUN = ("data", *DEFAULTS)  # flags whose defaults come from the run of --model
ABOUT = """usage: python -m kd_jax.evaluate --model=FOLDER --data=NAME-OR-FILE --out=DIR [--teacher=FOLDER] ...

Compares a model's texts with references, and the model's distributions with those of a teacher. If --model is the work
directory of a finished run, or its exported student, then the run's dataset, template and lengths are the defaults."""


class _JsonParser(flags.ArgumentParser):
    """Parses an object of JSON."""

    syntactic_help = "an object of JSON"

    def parse(self, argument: str) -> Json:
        try:
            value = json.loads(argument)
        except ValueError as error:
            raise ValueError(
                f"the value is not JSON ({error}); write an object such as '{{\"name\": value}}'."
            ) from None
        if not isinstance(value, dict):
            raise ValueError("the value must be an object of JSON, such as '{\"name\": value}'.")
        return value


def _text(name: str, default: str | None, meaning: str) -> None:
    flags.DEFINE_string(name, default, meaning, flag_values=FLAGS)


def _count(name: str, default: int | None, meaning: str) -> None:
    flags.DEFINE(WholeNumberParser(), name, default, meaning, flag_values=FLAGS)


def _json(name: str, meaning: str) -> None:
    flags.DEFINE(_JsonParser(), name, None, meaning, flag_values=FLAGS)


def _number(name: str, default: float, meaning: str) -> None:
    flags.DEFINE_float(name, default, meaning, flag_values=FLAGS)


_text("model", None, "A Hugging Face folder, the work directory of a finished run, or package:NAME. Required.")
_text("teacher", "", "The teacher, given like --model, with which the model is compared. Empty: no comparison.")
_text("data", None, f"A file of JSON lines, or the name of a dataset: {', '.join((*data.SOURCES, *data.EVALUATION))}.")
_json("data_options", "Options of a named dataset, as JSON.")
_text("out", None, "A new folder for the results. Required.")
_text(
    "split", None,
    "The split of a named dataset. Default for a run's dataset: test, or else the split of the run's evaluations.",
)  # fmt: skip
_text("data_path", "", "A local file or folder of a named dataset that would otherwise be downloaded.")
_text("data_sha256", "", "The SHA-256 of a dataset's file or download, for a dataset whose checksum kd_jax lacks.")
_text("data_dir", None, "The folder of built datasets. Empty: the default folder of tensorflow_datasets.")
_count("rows", 0, "The number of rows that are used, from the first row on. 0: all rows.")
_text("prompt_field", "prompt", "The field of a file that has the prompt.")
_text("context_field", "", "The field of a file that has the context. Empty: there is no context.")
_text("reference_field", "response", "The field of a file that has the reference: one text, or a list of valid texts.")
flags.DEFINE_enum("template", None, list(data.TEMPLATES), "The template of prompts.", flag_values=FLAGS)
_json("template_options", "The variables of a chat template, as JSON: '{\"enable_thinking\": false}'.")
_text("system", None, "The system message of a chat.")
_count("max_prompt_length", None, "The largest number of tokens of a prompt. Longer prompts are truncated.")
_count("max_new_tokens", None, "The largest number of tokens of a response.")
_number("temperature", 1.0, "The sampling temperature, never taken from a run. 0: always the likeliest token.")
_number("top_p", 1.0, "The likeliest tokens that together have this probability are sampled from. 1: all tokens.")
_count("top_k", 0, "The number of likeliest tokens that are sampled from. 0: all tokens.")
_count(
    "no_repeat_ngram_size", 0, "The size of n-grams that may not be repeated. MiniLLM and DistiLLM use 6. 0: no limit."
)
_text("seeds", "10,20,30,40,50", "The seeds of generation; the default is that of the papers. Empty: no generation.")
flags.DEFINE_bool(
    "numbers", False, "Counts the answers with the same last number as the reference, as for GSM8K.", flag_values=FLAGS
)
_text("lm_eval", "", "Tasks of EleutherAI's lm-eval, separated by commas. They need pip install 'lm-eval[hf]'.")
_text("lm_eval_path", "", "A folder with lm-eval tasks of your own.")
_count("lm_eval_limit", 0, "The number of prompts of each lm-eval task, from the first prompt on. 0: all prompts.")
_count("batch_size", 32, "The number of prompts that are processed at a time.")
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "The type of parameters and computation.", flag_values=FLAGS
)
_count("fsdp", 1, "The number of devices that divide the parameters.")
_count("tensor", 1, "The number of devices that divide each matrix.")


def parse(argv: list[str]) -> SimpleNamespace:
    """Returns the parsed flags, without missing flags that `of_run.filled` may take from a run.

    Args:
      argv: the flags, without the name of the program.
    """
    required, defaults = ("model", "out"), _shown_defaults()
    values, *_ = command.parse("evaluate", FLAGS, argv, about=ABOUT, defaults=defaults, required=required)
    return SimpleNamespace(**{name: value for name, value in values.items() if name not in OF_RUN or value is not None})


def _shown_defaults() -> dict[str, str]:
    """Returns the defaults of `OF_RUN` as the help shows them."""
    in_words = {name: "none" if value in ("", {}) else value for name, value in {"data": "", **DEFAULTS}.items()}
    return {name: f"that of the run of --model, or else {value}" for name, value in in_words.items()}
