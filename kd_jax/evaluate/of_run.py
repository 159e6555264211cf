"""Defaults that an evaluation takes from the run whose student it evaluates."""

import json
from pathlib import Path
from types import SimpleNamespace

from kd_jax import data, models
from kd_jax.storage import directory, hub, untrusted
from kd_jax.storage.files import Json

# The defaults for a model that does not come from a run.
DEFAULTS: Json = {
    "data_options": {}, "split": "test", "data_dir": "", "template": "plain", "template_options": {}, "system": "",
    "max_prompt_length": 256, "max_new_tokens": 256,
}  # fmt: skip
STUDENT = "student"  # the exported folder in a work directory


def config_of(path: str) -> Json | None:
    """Returns the config of the run at a path, which is a work directory or its exported student.

    Returns:
      The config, or None if the path is any other folder.

    Raises:
      ValueError: a config.json cannot be read.
    """
    if path.startswith(models.PACKAGED) or hub.is_hub(path):
        return None
    folder = models.folder(path).absolute()
    for candidate in (folder, *([folder.parent] if folder.name == STUDENT else [])):
        file = candidate / directory.CONFIG
        if file.is_file():
            config = untrusted.read_json(file)
            if {"data", "objective", "student"} <= config.keys():  # a model's config.json has other keys
                return config
    return None


def model_folder(path: str, flag: str) -> Path:
    """Returns the folder of a model, after a check of its config.json.

    For the work directory of a run this is the exported student.

    Args:
      path: the path that the user gave.
      flag: the flag of the path, for messages.

    Raises:
      ValueError: the path is a work directory whose run has not exported a student, or the folder is invalid, as in
        `models.model_folder`.
    """
    if hub.is_hub(path):
        return models.model_folder(path, flag)
    folder = models.folder(path)
    if (folder / STUDENT / "config.json").exists():
        return models.model_folder(str(folder / STUDENT), flag)
    if folder.name != STUDENT and config_of(path) is not None:
        raise ValueError(
            f"{flag}={path} is the work directory of a run that has not finished, because the folder {STUDENT} is "
            "missing. Finish the run with the command that started the run."
        )
    return models.model_folder(path, flag)


def filled(args: SimpleNamespace) -> tuple[SimpleNamespace, list[str]]:
    """Fills in flags that are not given, from the run of --model or else from `DEFAULTS`.

    A given flag has priority. Temperature, top_p and top_k are never taken from the run, because the papers evaluate
    with samples at temperature 1 from all tokens.

    Args:
      args: the parsed flags, without the flags that are not given.

    Returns:
      All arguments, and lines for the user. The lines say which values come from the run, and whether the teacher was
        trained with another template.

    Raises:
      ValueError: --data is missing, and --model does not come from a run with a dataset of prompts.
    """
    given, config = vars(args), config_of(args.model)
    _settle(given, config)
    of_run = {} if config is None else _settings(config, given)
    if "data" not in given and not of_run.get("data"):
        reason = "the rows of the run's dataset, text, have no prompts"
        reason = f"{args.model} is not the work directory of a run with a dataset" if config is None else reason
        raise ValueError(f"--data is missing, and {reason}: give a file of JSON lines or the name of a dataset.")
    completed = SimpleNamespace(**DEFAULTS | of_run | given)
    lines = []
    if of_run:
        flags = " ".join(f"--{name}={_text(value)}" for name, value in of_run.items() if name not in given)
        lines = [f"from the run of {args.model}: {flags or 'no flag, because all flags are given'}"]
    if args.teacher and (config := config_of(args.teacher)):
        teacher_template, template = data.Template.of(config["data"]), template_of(completed)
        if teacher_template != template:
            lines.append(
                f"Note: the prompts are written in {_described(template)}; the teacher, {args.teacher}, was trained "
                f"with {_described(teacher_template)}."
            )
    return completed, lines


def _settle(given: Json, config: Json | None) -> None:
    """Decides the commits of the repositories on the Hugging Face hub: those of the run of --model, if it has some.

    All processes must call this function.
    """
    options = {} if config is None else config["data"].get("options", {})
    values = {f"data.options.{option}": value for option, value in options.items()}
    values |= {f"--{flag}": given.get(flag) for flag in ("model", "teacher", "data", "data_path")}
    values |= {f"--data_options {option}": value for option, value in given.get("data_options", {}).items()}
    named = {value: key for key, value in values.items() if isinstance(value, str) and hub.is_hub(value)}
    run = models.folder(given["model"]) if config is not None else None
    if run is not None and run.name == STUDENT and not (run / directory.IDENTITY).exists():
        run = run.parent
    hub.settle(named, directory.read_commits(str(run)) if run is not None else None)


def template_of(args: SimpleNamespace) -> data.Template:
    """Returns the template that the arguments name."""
    return data.Template(args.template, args.template_options, args.system)


def _settings(config: Json, given: Json) -> Json:
    """Returns the run's settings as arguments. Settings that an older run lacks are omitted."""
    options, sampling = config["data"], config.get("sampling", {})
    settings: Json = {}
    if "data" not in given and options.get("name") and options["name"] != "text":
        settings["data"] = options["name"]
        # JSON has no tuples, and options with lists would describe another dataset.
        of_dataset = {**options.get("defaults", {}).get(options["name"], {}), **options.get("options", {})}
        of_dataset = {name: tuple(v) if isinstance(v, list) else v for name, v in of_dataset.items()}
        settings["data_options"] = of_dataset | given.get("data_options", {})
        settings["data_dir"] = options.get("data_dir", "")
        splits = data.splits(settings["data"], **settings["data_options"]) if "split" not in given else ()
        settings["split"] = "test" if "test" in splits else options.get("eval_split", "validation")
    template = data.Template.of(options)
    if given.get("data") in data.EVALUATION:
        template = data.Template("plain")  # the prompts of these sets already have the Alpaca template
    if given.get("template", template.name) == template.name:
        settings |= {"template": template.name, "template_options": template.options, "system": template.system}
    settings["max_prompt_length"] = options.get("max_prompt_length")
    settings["max_new_tokens"] = sampling.get("max_new_tokens")
    return {name: value for name, value in settings.items() if value is not None}


def _described(template: data.Template) -> str:
    return " ".join([f"the template {template.name}", *(f"{n}={_text(v)}" for n, v in template.set_apart().items())])


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) or " " in value else value
