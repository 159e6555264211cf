"""GSM8K, downloaded: 7,473 training and 1,319 test problems, with worked answers that end in "#### NUMBER" (MIT)."""

from collections.abc import Callable, Iterable, Iterator

from kd_jax.data import download, jsonl
from kd_jax.storage import remote

# A fixed commit, whose bytes cannot change, and the SHA-256 of each file.
URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
    "grade_school_math/data/{}.jsonl"
)
SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
FIELDS = {"prompt": "question", "response": "answer", "answer": "answer"}
COLUMNS = ("answer",)


def source(path: str = "") -> tuple[str, dict[str, Callable[[], Iterable[dict[str, str]]]]]:
    """Returns the fingerprint and the splits of GSM8K: train, validation and test.

    The test split is the published test set. A hash of the question assigns 3 % of the published training set, and at
    least one row, to the validation split. The response and the column `answer` are both the worked answer.

    Args:
      path: a folder with train.jsonl and test.jsonl, which are not checked against checksums. If `path` is empty, both
        files are downloaded once from GitHub and must have the SHA-256 in this module.

    Raises:
      ValueError: a file does not exist, or a download has another checksum.
      ConnectionError: a download failed.

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
    fingerprint = jsonl.digest(list(files.values()), "gsm8k with answer, at least one" if path else "gsm8k with answer")
    return fingerprint, splits | {"test": lambda: jsonl.read(files["test"], FIELDS)}
