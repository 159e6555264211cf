"""GSM8K: 7,473 and 1,319 word problems of grade-school mathematics with worked answers that end in "#### NUMBER" (MIT)."""

from collections.abc import Callable, Iterable

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
    """Splits train and test, as published, and validation: 3 % of train, by a hash of the question.

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

    def rows(held_out: bool) -> Iterable[dict[str, str]]:
        return (row for row in jsonl.read(files["train"], FIELDS) if (jsonl.fraction(row["prompt"]) < 0.03) == held_out)

    splits = {"train": lambda: rows(False), "validation": lambda: rows(True)}
    return jsonl.digest(list(files.values()), "gsm8k"), splits | {"test": lambda: jsonl.read(files["test"], FIELDS)}
