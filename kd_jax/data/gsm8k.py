"""GSM8K: 7,473 and 1,319 word problems of grade-school mathematics with worked answers that end in "#### NUMBER" (MIT)."""

from collections.abc import Callable, Iterable, Iterator

from kd_jax import remote
from kd_jax.data import download, jsonl

# A commit, whose bytes cannot change, and what they hash to.
URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data/{}.jsonl"
)
SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
FIELDS = {"prompt": "question", "response": "answer"}


def source(path: str = "") -> tuple[str, dict[str, Callable[[], Iterable[dict[str, str]]]]]:
    """Splits train and test, as published, and validation: 3 % of train, by a hash of the question, and at least one.

    Args:
      path: a folder with train.jsonl and test.jsonl, whose contents are taken as they are; empty: they are downloaded from
        GitHub, once, and refused unless their SHA-256 is the one in this module.

    Raises:
      ValueError: a file that does not exist, or a download with another checksum.
      ConnectionError: no download.

    References:
      Cobbe et al., "Training Verifiers to Solve Math Word Problems", https://arxiv.org/abs/2110.14168, 2021.
    """
    files = {
        name: remote.local_file(f"{path}/{name}.jsonl") if path else download.fetch(URL.format(name), sha256)
        for name, sha256 in SHA256.items()
    }

    def rows(split: str) -> Iterator[dict[str, str]]:
        read = lambda: jsonl.read(files["train"], FIELDS)
        low, high = jsonl.divide((jsonl.fraction(row["prompt"]) for row in read()), {"validation": 0.03})[split]
        yield from (row for row in read() if low <= jsonl.fraction(row["prompt"]) < high)

    splits: dict[str, Callable[[], Iterable[dict[str, str]]]] = {
        split: lambda split=split: rows(split) for split in ("train", "validation")
    }
    fingerprint = jsonl.digest(list(files.values()), "gsm8k, at least one" if path else "gsm8k")
    return fingerprint, splits | {"test": lambda: jsonl.read(files["test"], FIELDS)}
