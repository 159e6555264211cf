"""The keywords of the dataset that the settings of a run name."""

from typing import Any

from kd_jax.data.builder import SOURCES
from kd_jax.resolve import nearest
from kd_jax.settings import Settings


def dataset_options(config: Settings, section: str = "data") -> dict[str, Any]:
    """Returns the keywords of the dataset that a section names: the setting's for that dataset, and the section's own.

    Args:
      config: of the run.
      section: data, or text, whose empty options stand for those of data, if that is the same dataset.

    Raises:
      ValueError: `data.defaults` has keywords for a dataset that does not exist.
    """
    part = config.text if section == "text" else config.data
    name, own, defaults = part.name, part.options, config.data.defaults
    for known in defaults:
        if known not in SOURCES:
            raise ValueError(
                f"data.defaults has keywords for the dataset {known!r}{nearest(known, SOURCES)}; the datasets are "
                f"{', '.join(SOURCES)}."
            )
    if not own and name == config.data.name:
        own = config.data.options
    return dict(defaults.get(name, {})) | dict(own)
