"""Scores of a text against one or several references, in any script."""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from kd_jax.data.words import PAPERS, UNICODE, UnicodeTokenizer, normal, tokenizer_of

if TYPE_CHECKING:
    from rouge_score import rouge_scorer

__all__ = ["exact_match", "number_match", "rouge_l"]

# The first alternative is a number with points between thousands and a comma before its fraction.
_NUMBER = re.compile(r"-?[1-9]\d{0,2}(?:\.\d{3})+,\d+|-?\d+(?:,\d+)*(?:\.\d+)?|-?\.\d+")
# Non-breaking spaces, thin spaces and apostrophes between thousands.
_BETWEEN_THOUSANDS = re.compile(r"(?<=\d)(?<!\d{4})[\u00a0\u202f\u2009'\u2019](?=\d{3}(?!\d))")
# Minus signs, and the points and commas of Arabic and full-width numbers. The full-width comma separates clauses, so it
# is omitted.
_SIGNS = str.maketrans({"\u2212": "-", "\uff0d": "-", "\u066b": ".", "\uff0e": ".", "\u066c": ","})


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Returns the largest ROUGE-L F-measure of the text over the references, in [0, 100].

    A reference in Latin letters is compared by the words of the papers: a to z and 0 to 9, stemmed. A reference in
    another script is compared by words of letters and digits of that script. Scripts without spaces between words, such
    as Chinese, Japanese and Thai, are compared by single characters. `words.tokenizer_of` chooses the words of a
    reference, and `rouge_tokens` counts the choices.

    Example:
      >>> round(rouge_l("the cats sat", ["no", "the cat sat down"]), 1)
      85.7
      >>> rouge_l("我喜欢猫", ["我喜欢狗"]), rouge_l("Привет, мир!", ["привет мир"])
      (75.0, 100.0)

    References:
      Lin, "ROUGE", https://aclanthology.org/W04-1013, 2004, computed by the package rouge-score. The maximum over
      references and the stemmer are as in the evaluation of MiniLLM and DistiLLM.
    """
    return 100 * max(
        _scorer(tokenizer_of(reference)).score(reference, text)["rougeL"].fmeasure for reference in references
    )


def rouge_tokens(references: Iterable[str]) -> dict[str, int]:
    """Returns the numbers of references that ROUGE-L compares by the papers' words, and by words of any script.

    Example:
      >>> rouge_tokens(["A cat.", "猫"])
      {'papers': 1, 'unicode': 1}
    """
    counts = Counter(map(tokenizer_of, references))
    return {kind: counts[kind] for kind in (PAPERS, UNICODE)}


def exact_match(text: str, references: Sequence[str]) -> float:
    """Returns 100 if the text equals a reference up to case, punctuation and white space, else 0.

    Example:
      >>> exact_match("Paris. ", ["London", "paris"]), exact_match("「東京」。", ["東京"]), exact_match("?", ["!"])
      (100.0, 100.0, 0.0)
    """
    return 100.0 * any(_normalised(text) == _normalised(reference) for reference in references)


def number_match(text: str, references: Sequence[str]) -> float:
    """Returns the accuracy of GSM8K: 100 if the last number of the text is the last number of a reference, else 0.

    Example:
      >>> number_match("6 x 200 is $1,200.00.", ["So it is 1200 #### 1200"])
      100.0
    """
    number = final_number(text)
    return 100.0 * (number is not None and any(number == final_number(reference) for reference in references))


def final_number(text: str) -> Decimal | None:
    """Returns the last number in a text, in the digits of any script, or None if there is no number.

    A comma before three digits separates thousands, as in English. A single comma before other digits begins the
    fraction. Several such commas separate numbers.

    Example:
      >>> [str(final_number(text)) for text in ("1,200.50", "1.200,50", "3,5", "1,2,3")]
      ['1200.50', '1200.50', '3.5', '3']
      >>> [str(final_number(text)) for text in ("１２个", "٣٫٥", "1\u202f200", "\u22125")]
      ['12', '3.5', '1200', '-5']
    """
    numbers = _NUMBER.findall(_BETWEEN_THOUSANDS.sub("", text.translate(_SIGNS)))
    if not numbers:
        return None
    try:
        return Decimal(_with_a_point(numbers[-1]))
    except InvalidOperation:
        return None


def _with_a_point(number: str) -> str:
    """Returns the number without thousands separators, and with a point before its fraction."""
    if -1 < number.find(".") < number.find(","):
        return number.replace(".", "").replace(",", ".")
    _, *groups = number.partition(".")[0].split(",")
    sizes = [len(group) for group in groups]
    if sizes[-1:] in ([], [3]) and set(sizes[:-1]) <= {2, 3}:  # groups of 2 are used in India: 1,00,000
        return number.replace(",", "")
    return number.replace(",", ".") if len(groups) == 1 and "." not in number else number.rpartition(",")[2]


@functools.cache
def _scorer(kind: str) -> "rouge_scorer.RougeScorer":
    from rouge_score import rouge_scorer  # imported here because it imports nltk and scipy.stats, which takes seconds

    options = {"use_stemmer": True} if kind == PAPERS else {"tokenizer": UnicodeTokenizer()}
    return rouge_scorer.RougeScorer(["rougeL"], **options)


def _normalised(text: str) -> str:
    text = normal(text)
    words = "".join(character for character in text if not _is_punctuation(character)).split()
    return " ".join(words or text.split())  # a text without words consists of punctuation only


@functools.lru_cache(maxsize=65536)
def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
