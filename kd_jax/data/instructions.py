"""The papers' five evaluation sets: prompts with one or several responses that are good, to evaluate on."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from kd_jax import remote
from kd_jax.data import download, jsonl

# MiniLLM's files on the Hugging Face hub: repository, revision, file. The bytes of a full revision cannot change; of the others
# only the first digits of the newest revision were known here: ad9edcc of self-inst, 05a1870 of Vicuna, b1e63ef of sinst.
URL = "https://huggingface.co/datasets/MiniLLM/{}"
FILES = {
    "dolly_eval": "dolly/resolve/d131636138be0ff3fd0901c12c1739844d337279/valid.jsonl",
    "self_instruct": "self-inst/resolve/main/valid.jsonl",
    "vicuna": "Vicuna/resolve/main/valid.jsonl",
    "super_natural": "sinst/resolve/main/11_/valid.jsonl",
    "unnatural": "uinst/resolve/b3c77603ffaf9b9c15dc1f1a20dc2f2145580db0/11_/valid.jsonl",
}
FIELDS = {"prompt": "prompt", "references": "output"}


def source(
    name: str, path: str = "", sha256: str = ""
) -> tuple[str, dict[str, Callable[[], Iterable[dict[str, Any]]]]]:
    """A split test, of rows with prompt, context (always empty) and references.

    dolly_eval: 500 held-out instructions of databricks-dolly-15k. self_instruct: Self-Instruct's 252 user-oriented instructions, of
    which MiniLLM's file has 242. vicuna: Vicuna's 80 questions, answered by a larger model. super_natural, unnatural: what of
    Super-Natural Instructions' test tasks and Unnatural Instructions' core has references of 11 words and more; MiniLLM takes the
    first 10,000 of the latter.

    The prompts have the template of Alpaca already and are used as they are: template plain. No file's SHA-256 is known
    here, so the first download is trusted, as `download.fetch` says.

    Args:
      name: one of the five.
      path: a local .jsonl or .jsonl.gz in MiniLLM's form, with prompt and output, a text or a list of texts; its contents are taken
        as they are. Empty: the file is downloaded from the Hugging Face hub, once.
      sha256: what the file must hash to, if you know it, downloaded or local.

    Raises:
      ValueError: a file that does not exist, a checksum that is none, or a file with another one.
      ConnectionError: no download.

    References:
      Gu et al., "MiniLLM: knowledge distillation of large language models", https://arxiv.org/abs/2306.08543, 2024.
      Wang et al., "Self-Instruct", https://arxiv.org/abs/2212.10560, 2023. Chiang et al., "Vicuna", https://lmsys.org/blog/2023-03-30-vicuna,
      2023. Wang et al., "Super-NaturalInstructions", https://arxiv.org/abs/2204.07705, 2022. Honovich et al., "Unnatural
      Instructions", https://arxiv.org/abs/2212.09689, 2023.
    """
    if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256={sha256!r} is no SHA-256: it has 64 digits of 0123456789abcdef.")
    file = remote.local_file(path) if path else download.fetch(URL.format(FILES[name]), sha256)
    fingerprint = jsonl.digest([file], name)
    if path and sha256 and (found := download.sha256_of(file)) != sha256:
        raise ValueError(f"{file} hashes to {found}, not to {sha256}.")
    return fingerprint, {"test": lambda: jsonl.read_references(file, FIELDS)}
