"""The five evaluation sets of the papers. Each row has a prompt and one or several good responses."""

import re
from collections.abc import Callable, Iterable

from kd_jax.data import download, jsonl
from kd_jax.storage import remote
from kd_jax.storage.files import Json

# Files of MiniLLM on the Hugging Face hub: repository, revision, file. The bytes of a full revision cannot change.
# Three files are read from `main`, because only the first digits of the newest revisions were known: ad9edcc of
# self-inst, 05a1870 of Vicuna, b1e63ef of sinst. These files may change.
URL = "https://huggingface.co/datasets/MiniLLM/{}"
FILES = {
    "dolly_eval": "dolly/resolve/d131636138be0ff3fd0901c12c1739844d337279/valid.jsonl",
    "self_instruct": "self-inst/resolve/main/valid.jsonl",
    "vicuna": "Vicuna/resolve/main/valid.jsonl",
    "super_natural": "sinst/resolve/main/11_/valid.jsonl",
    "unnatural": "uinst/resolve/b3c77603ffaf9b9c15dc1f1a20dc2f2145580db0/11_/valid.jsonl",
}
FIELDS = {"prompt": "prompt", "references": "output"}


def source(name: str, path: str = "", sha256: str = "") -> tuple[str, dict[str, Callable[[], Iterable[Json]]]]:
    """Returns the fingerprint and the split `test` of an evaluation set.

    Each row has a prompt, an empty context and references. The sets are:

    - dolly_eval: 500 held-out instructions of databricks-dolly-15k.
    - self_instruct: the 252 user-oriented instructions of Self-Instruct, of which MiniLLM's file has 242.
    - vicuna: the 80 questions of Vicuna, answered by a larger model.
    - super_natural: the rows of Super-Natural Instructions' test tasks whose references have 11 words or more.
    - unnatural: the rows of Unnatural Instructions' core set whose references have 11 words or more. MiniLLM uses the
      first 10,000 of these rows.

    The prompts already have the Alpaca template, so they are used with the template `plain`. The SHA-256 of the files
    is not known, so the first download is trusted, as described in `download.fetch`.

    Args:
      name: one of the five names above.
      path: a local .jsonl or .jsonl.gz file in MiniLLM's format, which is not checked unless `sha256` is given. A row
        has the fields prompt and output; output is a text or a list of texts. If `path` is empty, the file is
        downloaded once from the Hugging Face hub.
      sha256: the expected SHA-256 of the file, if known. The SHA-256 of a download or of a local file must match.

    Raises:
      ValueError: the file does not exist, `sha256` is not a SHA-256, or the file has another checksum.
      ConnectionError: the download failed.

    References:
      Gu et al., "MiniLLM: knowledge distillation of large language models", https://arxiv.org/abs/2306.08543, 2024.
      Wang et al., "Self-Instruct", https://arxiv.org/abs/2212.10560, 2023.
      Chiang et al., "Vicuna", https://lmsys.org/blog/2023-03-30-vicuna, 2023.
      Wang et al., "Super-NaturalInstructions", https://arxiv.org/abs/2204.07705, 2022.
      Honovich et al., "Unnatural Instructions", https://arxiv.org/abs/2212.09689, 2023.
    """
    if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256={sha256!r} must be a SHA-256: 64 digits of 0123456789abcdef.")
    file = remote.local_file(path) if path else download.fetch(URL.format(FILES[name]), sha256)
    fingerprint = jsonl.digest([file], name)
    if path and sha256 and (actual := download.sha256_of(file)) != sha256:
        raise ValueError(f"{file} has the SHA-256 {actual}; expected {sha256}.")
    return fingerprint, {"test": lambda: jsonl.read_references(file, FIELDS)}
