"""Checks of a model's folder: the folder exists, is not the folder of an adapter, and has a config.json."""

from pathlib import Path

from kd_jax.storage import untrusted
from kd_jax.storage.files import Json

ADAPTER = "adapter_config.json"  # PEFT and transformers recognise an adapter by this file
MERGE = (
    "Merge the adapter into its base model first (PEFT: merge_and_unload, then save_pretrained of model and tokenizer), "
    "and give the folder of the merged model"
)


def check_folder(folder: Path, named: str = "") -> None:
    """Checks a model's folder before its config.json is read.

    Args:
      folder: the folder of the model.
      named: the setting that names the folder, such as 'teacher.path', for the message.

    Raises:
      ValueError: the folder does not exist, belongs to an adapter or to a run, has no config.json, or has pointers of
        Git LFS in place of its weights.
    """
    untrusted.check_folder(folder, named)
    where, config = f"{named}: {folder}" if named else str(folder), folder / "config.json"
    if (folder / ADAPTER).exists():
        kind = _adapter(untrusted.read_json(folder / ADAPTER))
        if config.exists():
            raise ValueError(
                f"{where}: beside config.json the folder has {ADAPTER}, of {kind}. transformers would apply the adapter, "
                f"and kd_jax would not. {MERGE}; or remove {ADAPTER} if the weights are merged already."
            )
        raise ValueError(f"{where}: this is the folder of {kind} ({ADAPTER}), not of a complete model. {MERGE}.")
    if not config.exists():
        snapshots = " This is a folder of the hub's cache: give one of the folders in snapshots."
        raise ValueError(
            f"{where}: the folder has no config.json; expected a Hugging Face folder with config.json, weights in "
            f"safetensors, and tokenizer.json.{snapshots if (folder / 'snapshots').is_dir() else ''}"
        )
    # The weights are checked now, because a student's weights are read much later.
    for file in sorted(folder.glob("*.safetensors")):
        if file.is_file():
            with file.open("rb") as stream:
                untrusted.refuse_pointer(file, stream.read(len(untrusted.LFS)))
    if "model_type" not in untrusted.read_json(config) and (folder / "checkpoints").is_dir():
        student = folder / "student"
        hint = f"give {student}" if student.is_dir() else f"{student} appears when the run ends"
        raise ValueError(f"{where}: this is the work directory of a run, not the folder of a model; {hint}.")


def _adapter(fields: Json) -> str:
    """Returns the kind of an adapter and the base model, for a message."""
    kind, base = fields.get("peft_type"), fields.get("base_model_name_or_path")
    name = "a LoRA adapter" if kind in (None, "LORA") else f"an adapter of the type {untrusted.printable(kind)}"
    return f"{name} for {untrusted.printable(base)}" if base else name
