"""The folder of a path in a config."""

from pathlib import Path

from kd_jax.models.folders import check_folder
from kd_jax.models.huggingface import load_config
from kd_jax.storage import remote

PACKAGED = "package:"


def folder(path: str) -> Path:
    """Returns the folder of a path in a config; 'package:NAME' is a folder that is part of kd_jax.

    Raises:
      ValueError: kd_jax has no model NAME, or the path is an address.
    """
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
    """
    local = folder(path)
    check_folder(local, key)
    load_config(local)
    return local
