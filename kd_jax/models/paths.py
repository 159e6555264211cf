"""The folder that a config's path names."""

from pathlib import Path

from kd_jax.models.folders import check_folder
from kd_jax.models.huggingface import load_config
from kd_jax.storage import remote

PACKAGED = "package:"


def folder(path: str) -> Path:
    """Returns the folder for a path of a config; 'package:NAME' is a folder that ships with kd_jax.

    Raises:
      ValueError: kd_jax has no model NAME, or the path is an address.
    """
    if not path.startswith(PACKAGED):
        return remote.local_folder(path)
    assets, name = Path(__file__).parent.parent / "assets", path.removeprefix(PACKAGED)
    known = sorted(where.name for where in assets.iterdir() if (where / "config.json").exists())
    if name not in known:
        raise ValueError(
            f"{path}: kd_jax has no model {name!r}; it has {', '.join(PACKAGED + other for other in known)}."
        )
    return assets / name


def model_folder(path: str, key: str) -> Path:
    """Returns the folder of a model, after a look at its config.json.

    Args:
      path: as in `folder`.
      key: of the setting that names the path, for the message.

    Raises:
      ValueError: the folder does not exist, is an adapter's, or its config.json describes no model that is supported.
    """
    where = folder(path)
    check_folder(where, key)
    load_config(where)
    return where
