"""Sentences with the numbers of a dataset's rows that were read, kept, truncated and dropped."""

import math
from collections.abc import Mapping

from kd_jax.data import pipeline
from kd_jax.data.formats import MESSAGES
from kd_jax.data.prompts import Template
from kd_jax.data.rows import Texts
from kd_jax.data.tokenizer import Tokenizer

MANY = 0.1  # share of truncated or dropped rows above which a warning is given
SAMPLE = 1000  # the smallest number of rows that are measured for a warning, if the source has as many
KEEPS_MOST = "prompt_length_90"  # name of a count: the 90th percentile of prompt lengths, in tokens
PROMPT = ("name", "prompt", "context", MESSAGES)  # the columns that decide a prompt
NAMES = {
    "read": "rows read",
    "prompts_cut": "prompts truncated",
    "prompts_dropped": "rows dropped for their prompts",
    "responses_cut": "responses truncated",
    "responses_dropped": "rows dropped for their responses",
    "empty": "empty responses dropped",
    "own_prefix": "prompts that begin with the tokenizer's first token, which is not added again",
}


def sentence(split: str, counts: Mapping[str, int]) -> str:
    """Returns the counts of `data.tokenize` or `data.pack` as a sentence. Counts of zero are omitted.

    Example:
      >>> sentence("train", {"read": 1034, "prompts_cut": 969, "prompts_dropped": 0, "empty": 12, "kept": 1022})
      'train: 1,034 rows read, 969 prompts truncated (94 %), 12 empty responses dropped (1 %), 1,022 kept'
    """
    parts = []
    for name, count in counts.items():
        if name == KEEPS_MOST or not (count or name in ("read", "kept")):
            continue
        of_rows = (name in NAMES and name != "read") or name.startswith(("prompts of ", "rows without "))
        share = f" ({_percent(count, counts['read'])})" if of_rows else ""
        parts.append(f"{count:,} {NAMES.get(name, name.replace('_', ' '))}{share}")
    return f"{split}: {', '.join(parts)}"


def warnings(split: str, counts: Mapping[str, int], *, prompts: str, responses: str) -> list[str]:
    """Returns a warning if more than a tenth of the prompts, or of the responses, is truncated or dropped.

    Args:
      split: the name of the dataset's split.
      counts: the counts of `data.tokenize`, with or without `KEEPS_MOST`.
      prompts: the advice for a warning about prompts.
      responses: the advice for a warning about responses.

    Example:
      >>> counts = {"read": 1034, "prompts_cut": 981, "prompts_dropped": 0, "prompt_length_90": 310}
      >>> print(*warnings("train", counts, prompts="Raise data.max_prompt_length=32.", responses=""))
      Warning: 95 % of the 1,034 rows of train have a prompt that is too long, and 981 prompts are truncated. Raise \
data.max_prompt_length=32. Nine of ten prompts have at most 310 tokens.
      >>> warnings("train", counts | {"prompts_cut": 100}, prompts="", responses="")
      []
    """
    sentences = []
    for part, advice in (("prompt", prompts), ("response", responses)):
        truncated, dropped = counts.get(f"{part}s_cut", 0), counts.get(f"{part}s_dropped", 0)
        if truncated + dropped <= MANY * counts["read"]:
            continue
        results = [f"{truncated:,} {part}s are truncated"] * bool(truncated)
        results += [f"{dropped:,} rows are dropped"] * bool(dropped)
        lengths = f" Nine of ten prompts have at most {counts[KEEPS_MOST]:,} tokens." if KEEPS_MOST in counts else ""
        sentences.append(
            f"Warning: {_percent(truncated + dropped, counts['read'])} of the {counts['read']:,} rows of {split} have a {part} "
            f"that is too long, and {' and '.join(results)}. {advice}{lengths if part == 'prompt' else ''}"
        )
    return sentences


def with_length(
    counts: dict[str, int], source: Texts, tokenizer: Tokenizer, template: str | Template
) -> dict[str, int]:
    """Adds the count `KEEPS_MOST` if more than a tenth of the prompts are too long.

    The prompt lengths are measured on fewer than 2,000 rows, which are evenly spaced over the source.
    """
    if counts["prompts_cut"] + counts["prompts_dropped"] <= MANY * counts["read"]:
        return counts
    step = max(1, len(source) // SAMPLE)
    rows = [{name: text for name, text in source[i].items() if name in PROMPT} for i in range(0, len(source), step)]
    encoded = pipeline.encode_prompts(rows, tokenizer=tokenizer, template=template, max_length=2**31, cut=False)
    lengths = sorted(len(ids or ()) for ids in encoded)
    return counts | {KEEPS_MOST: lengths[math.ceil(0.9 * len(lengths)) - 1]}


def _percent(count: int, total: int) -> str:
    return f"{count / total:.0%}".replace("%", " %") if count >= 0.005 * total else "under 1 %"
