"""databricks-dolly-15k, downloaded: 15,011 instructions and responses (CC BY-SA 3.0)."""

from collections.abc import Callable, Iterable, Iterator

from kd_jax.data import download, jsonl
from kd_jax.storage import remote

# A fixed revision, whose bytes cannot change, and the SHA-256 of the file.
URL = (
    "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/"
    "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a/databricks-dolly-15k.jsonl"
)
SHA256 = "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec"
FIELDS = {"prompt": "instruction", "context": "context", "response": "response", "category": "category"}
COLUMNS = ("category",)


def source(path: str = "") -> tuple[str, dict[str, Callable[[], Iterable[dict[str, str]]]]]:
    """Returns the fingerprint and the splits of Dolly: train, validation and test (about 94, 3 and 3 %).

    A hash of the instruction decides the split of a row. The column `category` has one of the eight kinds of
    instructions, such as closed_qa.

    Args:
      path: a local .jsonl or .jsonl.gz file, which is not checked against a checksum. Its rows may lack the category,
        which then is empty. Each split has at least one row if the file has enough instructions. If `path` is empty,
        the file is downloaded once from the Hugging Face hub and must have the SHA-256 in this module.

    Raises:
      ValueError: the file does not exist, or the download has another checksum.
      ConnectionError: the download failed.
    """
    file = remote.local_file(path) if path else download.fetch(URL, SHA256)

    read = lambda: jsonl.read(file, FIELDS, optional=COLUMNS)

    def rows(split: str) -> Iterator[dict[str, str]]:
        fractions = (jsonl.fraction(row["prompt"]) for row in read())
        low, high = jsonl.divide(fractions, {"validation": 0.03, "test": 0.03})[split]
        yield from (row for row in read() if low <= jsonl.fraction(row["prompt"]) < high)

    splits = ("train", "validation", "test")
    fingerprint = jsonl.digest([file], "dolly with category, at least one" if path else "dolly with category")
    return fingerprint, {split: lambda split=split: rows(split) for split in splits}
