"""The addresses on the Hugging Face hub that a config names, and their commits."""

from collections.abc import Iterator, Mapping

from kd_jax.data.options import dataset_options
from kd_jax.settings import Settings
from kd_jax.storage import directory, hub


def addresses(config: Settings) -> dict[str, str]:
    """Returns the addresses of the models, the tokenizer and the datasets that a run reads, each with its key.

    Example:
      >>> import dataclasses
      >>> settings = Settings()
      >>> teacher = dataclasses.replace(settings.teacher, path="hf://org/teacher@v1")
      >>> addresses(dataclasses.replace(settings, teacher=teacher))
      {'hf://org/teacher@v1': 'teacher.path'}
    """
    models = {"teacher": config.teacher} | {f"members.{name}": member for name, member in config.members.items()}
    values: dict[str, object] = {f"{key}.path": model.path for key, model in models.items() if not model.cache}
    values["tokenizer.path"] = config.tokenizer.path
    values["student.path"] = config.student.path if config.student.init == "pretrained" else ""
    values["student.lora.path"] = config.student.lora.path
    for section in ("data", "text") if config.text.name else ("data",):
        options = dataset_options(config, section)
        values |= {f"{section}.options.{option}": value for option, value in options.items()}
    found = [(text, key) for key, value in values.items() for text in texts(value) if hub.is_hub(text)]
    return dict(reversed(found))  # of several keys with an address, the first one


def settle(config: Settings, workdir: str = "") -> None:
    """Decides the commit of each repository that a run reads. All processes must call this function.

    Args:
      config: the config of the run.
      workdir: the work directory of the run, whose recorded commits are used; "" for none.

    Raises:
      ValueError, ConnectionError: as in `hub.commit`.
    """
    if named := addresses(config):
        hub.settle(named, directory.read_commits(workdir) if workdir else None)


def commits(config: Settings) -> dict[str, str]:
    """Returns the commit of each repository that a run reads, by `hub.repository`."""
    return {hub.repository(address): hub.commit(address) for address in addresses(config)}


def lines(config: Settings) -> list[str]:
    """Returns a line for each repository that a run reads, for the beginning of the run."""
    return [f"hub      {name} at the commit {commit[:12]}" for name, commit in commits(config).items()]


def texts(tree: object) -> Iterator[str]:
    """Yields the texts in nested mappings and sequences."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from texts(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from texts(value)
