"""The addresses on the Hugging Face hub that a config names, and their commits."""

from collections.abc import Iterator, Mapping

from kd_jax.data.options import dataset_options
from kd_jax.settings import Settings
from kd_jax.storage import directory, hub


def addresses(config: Settings) -> list[str]:
    """Returns the addresses of the models, the tokenizer and the datasets that a run reads.

    Example:
      >>> import dataclasses
      >>> settings = Settings()
      >>> teacher = dataclasses.replace(settings.teacher, path="hf://org/teacher@v1")
      >>> addresses(dataclasses.replace(settings, teacher=teacher))
      ['hf://org/teacher@v1']
    """
    models = [config.teacher, *config.members.values()]
    paths: list[object] = [model.path for model in models if not model.cache]
    paths += [config.tokenizer.path, config.student.path if config.student.init == "pretrained" else ""]
    paths.append(dataset_options(config))
    if config.text.name:
        paths.append(dataset_options(config, "text"))
    return list(dict.fromkeys(text for text in _texts(paths) if hub.is_hub(text)))


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


def _texts(tree: object) -> Iterator[str]:
    """Yields the texts in nested mappings and sequences."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value)
