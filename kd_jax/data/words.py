"""Words of a text in any script, for scores that compare texts.

The tokenizer of the package rouge-score keeps a to z and 0 to 9: of a Chinese or a Russian text it keeps nothing, and of "déjà" it
keeps "d" and "j". The papers' numbers are of that tokenizer, so that Latin text keeps it, accents or not.
"""

import functools
import unicodedata

from rouge_score import tokenizers

# The beginnings of the names that Unicode gives to characters of scripts without spaces between words.
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HENTAIGANA", "THAI", "LAO", "KHMER", "MYANMAR")
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # ASCII, as wide as a Chinese character
JOINERS = "\u200c\u200d"  # inside words of Persian and of Indian scripts
PAPERS, UNICODE = "papers", "unicode"
DESCRIBED = {
    PAPERS: "words of a to z and 0 to 9, stemmed, as in the papers",
    UNICODE: "words of letters and digits of any script, and single characters of scripts without spaces",
}


def normal(text: str) -> str:
    """Returns the text with one code for what looks the same: composed accents, ASCII for full-width ASCII, and small letters.

    Example:
      >>> normal("ＡＢＣ１２３") == "abc123", normal("É") == normal("E\u0301")
      (True, True)
    """
    return unicodedata.normalize("NFC", text.translate(FULL_WIDTH).lower())


def words(text: str) -> list[str]:
    """Returns the text's words: runs of letters, digits and marks, or in a script without spaces a letter with its marks.

    Example:
      >>> words("Привет, мир! 使用Python３。"), words("สวัสดี")
      (['привет', 'мир', '使', '用', 'python3'], ['ส', 'วั', 'ส', 'ดี'])
    """
    found: list[str] = []
    kind = ""  # of the last character: a word goes on, or a mark joins a letter that stands alone
    for character in normal(text):
        before, kind = kind, _kind(character)
        if kind in ("mark", "joiner"):
            kind = before
            if before:
                found[-1] += character
        elif kind == "word" and before == "word":
            found[-1] += character
        elif kind:
            found.append(character)
    return [word.strip(JOINERS) for word in found]


def tokenizer_of(reference: str) -> str:
    """Returns which tokenizer ROUGE-L takes for a reference, `PAPERS` or `UNICODE`.

    The papers' tokenizer is for references in which at least half of the words have a Latin letter, and for numbers. The
    decision is the reference's alone, so that all models are measured alike.

    Example:
      >>> [tokenizer_of(text) for text in ("Café 8", "Привет, world", "使用Python编程", "42", "٤٢", "É")]
      ['papers', 'papers', 'unicode', 'papers', 'unicode', 'unicode']
    """
    lettered = [word for word in words(reference) if any(map(str.isalpha, word))]
    latin = sum(any(map(_is_latin, word)) for word in lettered)
    return PAPERS if 2 * latin >= len(lettered) and _has_papers_word(reference) else UNICODE


class UnicodeTokenizer(tokenizers.Tokenizer):
    """`words` as a tokenizer of the package rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.lru_cache(maxsize=65536)
def _kind(character: str) -> str:
    """Returns "word", "alone", "mark" or "joiner"; "" for what separates words."""
    if character in JOINERS:
        return "joiner"
    category = unicodedata.category(character)
    if category.startswith("M"):
        return "mark"
    if category[0] not in "LN":
        return ""
    return "alone" if category[0] == "L" and unicodedata.name(character, "").startswith(UNSPACED) else "word"


@functools.lru_cache(maxsize=65536)
def _is_latin(character: str) -> bool:
    return unicodedata.name(character, "").startswith("LATIN")


def _has_papers_word(text: str) -> bool:
    return any(character.isascii() and character.isalnum() for character in text.lower())
