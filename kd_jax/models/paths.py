"""The folder of a path in a config."""

from pathlib import Path

from kd_jax.models.folders import check_folder
from kd_jax.models.huggingface import load_config
from kd_jax.storage import hub, remote

PACKAGED = "package:"


def folder(path: str, weights: bool = True) -> Path:
    """Returns the folder of a path in a config.

    Args:
      path: a local path; 'package:NAME', a folder that is part of kd_jax; or an address such as hf://ORG/NAME, which is
        downloaded from the Hugging Face hub.
      weights: False to download only the configuration and the tokenizer.

    Raises:
      ValueError: kd_jax has no model NAME, the path is an address of a store, or the hub refuses, as in `hub.model`.
      ConnectionError: the hub cannot be reached, and the model was not downloaded before.
    """
    if hub.is_hub(path):
        return hub.model(path, weights)
    if not path.startswith(PACKAGED):
        return remote.local_folder(path)
    assets, name = Path(__file__).parent.parent / "assets", path.removeprefix(PACKAGED)
    known = sorted(asset.name for asset in assets.iterdir() if (asset / "config.json").exists())
    if name not in known:
        raise ValueError(
            f"{path}: kd_jax has no model {name!r}; the models are {', '.join(PACKAGED + other for other in known)}."
        )
    return assets / name


def model_folder(path: str, key: str) -> Path:
    """Returns the folder of a model, after a check of config.json.

    Args:
      path: the path in a config, as in `folder`.
      key: the setting that names the path, such as 'teacher.path', for the message.

    Raises:
      ValueError: the folder does not exist or belongs to an adapter, or config.json describes no supported model.
      ConnectionError: as in `folder`.
    """
    local = folder(path, weights=False)  # the weights on the hub are downloaded after the check
    check_folder(local, f"{key}={path}" if hub.is_hub(path) else key)
    load_config(local)
    return folder(path)
