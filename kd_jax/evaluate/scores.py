"""How good a text is, against one or several references."""

import functools
import re
import string
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from rouge_score import rouge_scorer

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def rouge_l(text: str, references: Sequence[str]) -> float:
    """The F-measure of ROUGE-L, stemmed, for the reference it fits best; in [0, 100].

    Example:
      >>> round(rouge_l("the cats sat", ["no", "the cat sat down"]), 1)
      85.7

    References:
      Lin, "ROUGE", https://aclanthology.org/W04-1013, 2004, by the package rouge-score; the best over references and the
      stemmer as in MiniLLM's and DistiLLM's evaluation.
    """
    return 100 * max(_scorer().score(reference, text)["rougeL"].fmeasure for reference in references)


def exact_match(text: str, references: Sequence[str]) -> float:
    """100 if the text is one of the references but for case, punctuation and white space, else 0.

    Example:
      >>> exact_match("Paris. ", ["London", "paris"])
      100.0
    """
    return 100.0 * any(_normalised(text) == _normalised(reference) for reference in references)


def number_match(text: str, references: Sequence[str]) -> float:
    """100 if the last number of the text is the last number of a reference, else 0: the accuracy of GSM8K.

    Example:
      >>> number_match("6 x 200 is $1,200.00.", ["So it is 1200 #### 1200"])
      100.0
    """
    found = final_number(text)
    return 100.0 * (found is not None and any(found == final_number(reference) for reference in references))


def final_number(text: str) -> Decimal | None:
    """The last number in a text, without thousands' commas; None where there is none."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", ""))
    except InvalidOperation:
        return None


@functools.cache
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _normalised(text: str) -> str:
    return " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())
