"""The keywords of the dataset that the settings of a run name."""

from kd_jax.data.builder import SOURCES
from kd_jax.resolve import nearest
from kd_jax.settings import Settings
from kd_jax.storage.files import Json


def dataset_options(config: Settings, section: str = "data") -> Json:
    """Returns the keywords of the dataset that a section of the settings names.

    The section's `options` take precedence over the keywords of `data.defaults` for this dataset. If the section text
    has no options and names the same dataset as data, the options of data are used.

    Args:
      config: the settings of the run.
      section: the name of the section, data or text.

    Raises:
      ValueError: `data.defaults` has keywords for a dataset that does not exist.
    """
    part = config.text if section == "text" else config.data
    name, options, defaults = part.name, part.options, config.data.defaults
    for known in defaults:
        if known not in SOURCES:
            raise ValueError(
                f"data.defaults has keywords for the dataset {known!r}{nearest(known, SOURCES)}; the datasets are "
                f"{', '.join(SOURCES)}."
            )
    if not options and name == config.data.name:
        options = config.data.options
    return dict(defaults.get(name, {})) | dict(options)
