"""Uploads the student of a finished run, with a model card, to the Hugging Face hub."""

import json
import re
from pathlib import Path

import huggingface_hub
import jax

from kd_jax import sharding
from kd_jax.data.options import dataset_options
from kd_jax.run import hub_names, summary
from kd_jax.settings import Settings
from kd_jax.storage import hub, hub_upload, storing, write_whole
from kd_jax.storage.files import Json

STUDENT, CARD = "student", "README.md"  # the exported folder in a work directory, and the model card in it
# The datasets of kd_jax that are also on the hub, by their names in kd_jax.
ON_HUB = {"dolly": "databricks/databricks-dolly-15k", "gsm8k": "openai/gsm8k"}


def check(config: Settings) -> None:
    """Checks before training that the student can be uploaded at the end. All processes must call this function.

    Raises:
      ValueError: the address is wrong, there is no valid token, or the hub cannot be reached.
    """
    if not config.push:
        return
    problem = ""
    if jax.process_index() == 0:
        try:
            hub_upload.check(config.push)
        except (ValueError, OSError) as error:
            problem = f"push={error}"
    if problem := sharding.text_from_first_process(problem):
        raise ValueError(problem)


def push(config: Settings, workdir: str) -> str:
    """Uploads the folder `student` of a finished run, with a model card. All processes must call this function.

    A model card that is in the folder already is kept, so that it may be edited between two uploads.

    Args:
      config: the config of the run, whose key `push` names the repository.
      workdir: the work directory of the run, with its results.

    Returns:
      The web address of the repository.

    Raises:
      ConnectionError: the upload failed. The results of the run are complete, and the same command uploads again.
    """
    problem, url = "", ""
    folder = Path(workdir) / STUDENT
    if jax.process_index() == 0:
        try:
            if not (folder / CARD).exists():
                write_whole(folder / CARD, card(config, Path(workdir)))
            url = hub_upload.upload(folder, config.push, config.push_private, f"The student after {config.steps} steps")
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem := sharding.text_from_first_process(problem):
        raise ConnectionError(
            f"the run is complete and its student is in {folder}, but the upload to push={config.push} failed. The same command "
            f"uploads again, without training. {problem}"
        )
    return url


def card(config: Settings, workdir: Path) -> str:
    """Returns the text of a model card: metadata, method, teacher, data, measures, and the command.

    Args:
      config: the config of the run.
      workdir: the work directory of the run, with table.md and environment.json.
    """
    initial = {"pretrained": config.student.path, "layers": config.teacher.path}.get(config.student.init, "")
    options = dataset_options(config)
    datasets = [hub.parse(text).id for text in hub_names.texts(options) if hub.is_hub(text)]
    if config.data.name in ON_HUB and not options.get("path"):
        datasets.append(ON_HUB[config.data.name])
    metadata = huggingface_hub.ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["distillation", "kd_jax"],
        base_model=hub.parse(initial).id if hub.is_hub(initial) else None, datasets=list(dict.fromkeys(datasets)) or None,
    )  # fmt: skip
    with storing(workdir):
        measures = (workdir / "table.md").read_text(encoding="utf-8").strip()
        environment = json.loads((workdir / "environment.json").read_text(encoding="utf-8"))
    commits = hub_names.commits(config)
    beginning = {
        "random": "random parameters",
        "pretrained": _named(config.student.path, commits),
        "layers": f"the layers {', '.join(map(str, config.student.layers))} of the teacher",
    }[config.student.init]
    models = {"teacher": config.teacher, **config.members}
    rows = {
        "method": "; ".join([*summary.method(config), f"rows: {summary.spec_text(config.prefixes)}"]),
        **{name: _named(model.path or model.cache, commits) for name, model in models.items() if model.path or model.cache},
        "student before training": beginning,
        "data": ", ".join([config.data.name, *(_named(text, commits) for text in hub_names.texts(options) if hub.is_hub(text))]),
        "training": f"{config.steps} steps with {config.data.batch_size} rows of at most {config.data.max_length} tokens each",
    }  # fmt: skip
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows.items())
    return (
        f"---\n{metadata.to_yaml().strip()}\n---\n\n# {hub.parse(config.push).id.rpartition('/')[2]}\n\n"
        f"A language model that was distilled with kd_jax.\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"## Measures\n\nKL divergences and entropies are in nats per token of the held-out rows.\n\n{measures}\n\n"
        f"## Command\n\n```\n{_command(environment)}\n```\n\n"
        f"Date {environment['date']}; {environment['devices']}; jax {environment['jax']}.\n"
    )


def _named(path: str, commits: dict[str, str]) -> str:
    """Returns a link to a repository with the commit, or the name of a local folder without its parents."""
    if not hub.is_hub(path):
        return "the student before training" if path == "student" else Path(path).name
    uri = hub.parse(path)
    prefix, commit = "datasets/" if uri.type == "dataset" else "", commits.get(hub.repository(path), "")
    at = f", commit {commit[:12]}" if commit else ""
    return f"[{uri.id}](https://huggingface.co/{prefix}{uri.id}){at}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _command(environment: Json) -> str:
    """Returns the command of the run, without the folder of the program."""
    return re.sub(r"^\S*kd_jax/(\w+)\.py(?= |$)", r"python -m kd_jax.\1", environment["command"])
