"""The words of a text in any script, for scores that compare texts.

The tokenizer of the package rouge-score reads only a to z and 0 to 9: nothing of a Chinese or a Russian text, and only
"d" and "j" of "déjà". The papers' numbers are made with this tokenizer, so it is used for Latin text, with or without
accents.
"""

import functools
import unicodedata

# The beginnings of the names that Unicode gives to characters of scripts without spaces between words.
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HENTAIGANA", "THAI", "LAO", "KHMER", "MYANMAR")
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width ASCII -> ASCII
JOINERS = "\u200c\u200d"  # these occur inside words of Persian and of Indian scripts
PAPERS, UNICODE = "papers", "unicode"
DESCRIBED = {
    PAPERS: "words of a to z and 0 to 9, stemmed, as in the papers",
    UNICODE: "words of letters and digits of any script, and single characters of scripts without spaces",
}


def normal(text: str) -> str:
    """Returns the text with one code for equal characters.

    Accents are composed, full-width ASCII becomes ASCII, and letters become lower-case.

    Example:
      >>> normal("ＡＢＣ１２３") == "abc123", normal("É") == normal("E\u0301")
      (True, True)
    """
    return unicodedata.normalize("NFC", text.translate(FULL_WIDTH).lower())


def words(text: str) -> list[str]:
    """Returns the text's words: runs of letters, digits and marks.

    In a script without spaces between words, each letter with its marks is a word.

    Example:
      >>> words("Привет, мир! 使用Python３。"), words("สวัสดี")
      (['привет', 'мир', '使', '用', 'python3'], ['ส', 'วั', 'ส', 'ดี'])
    """
    pieces: list[str] = []
    kind = ""  # the kind of the last character, which decides whether the next character continues the word
    for character in normal(text):
        before, kind = kind, _kind(character)
        if kind in ("mark", "joiner"):
            kind = before
            if before:
                pieces[-1] += character
        elif kind == "word" and before == "word":
            pieces[-1] += character
        elif kind:
            pieces.append(character)
    return [word.strip(JOINERS) for word in pieces]


def tokenizer_of(reference: str) -> str:
    """Returns the name of the tokenizer that ROUGE-L uses for a reference, `PAPERS` or `UNICODE`.

    The papers' tokenizer is used for numbers, and for references in which at least half of the words with letters have
    a Latin letter. The choice depends only on the reference, so that all models are measured in the same way.

    Example:
      >>> [tokenizer_of(text) for text in ("Café 8", "Привет, world", "使用Python编程", "42", "٤٢", "É")]
      ['papers', 'papers', 'unicode', 'papers', 'unicode', 'unicode']
    """
    lettered = [word for word in words(reference) if any(map(str.isalpha, word))]
    latin = sum(any(map(_is_latin, word)) for word in lettered)
    return PAPERS if 2 * latin >= len(lettered) and _has_papers_word(reference) else UNICODE


class UnicodeTokenizer:
    """The function `words` as a tokenizer of the package rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.lru_cache(maxsize=65536)
def _kind(character: str) -> str:
    """Returns "word", "alone", "mark" or "joiner", or "" for a character that separates words."""
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
