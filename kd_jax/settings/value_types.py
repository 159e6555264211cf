"""The types of a config's values: the parsers of flags, and the descriptions of the types for messages."""

import decimal
import math

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

EXPECTED: dict[type, str] = {
    int: "a whole number, such as 1000, 1_000 or 1e3",
    float: "a number, such as 0.5 or 1e-3",
    bool: "true or false",
    str: "a text, such as 'name'",
    tuple: "a tuple, such as (0, 3, 6) or ('a', 'b')",
    ConfigDict: "a dict such as {'name': 'adamw'}; a flag sets one entry, such as --config.data.name=jsonl",
}


def whole_number(text: str | int) -> int:
    """Converts a text such as 1000, 1_000, 1000.0, 1e3 or 0x3e8 to an int.

    Raises:
      ValueError: the text is not a whole number; the message says which form is expected.

    Example:
      >>> [whole_number(text) for text in ("1000", "1_000", "1000.0", "1e3")]
      [1000, 1000, 1000, 1000]
    """
    try:
        return flags.IntegerParser().convert(text)
    except (TypeError, ValueError):
        pass
    try:
        if float(text).is_integer():
            return int(decimal.Decimal(text))  # exact; a float has only 53 bits
    except (TypeError, ValueError, OverflowError, decimal.InvalidOperation):
        pass
    raise ValueError(_expects(int))


class WholeNumberParser(flags.IntegerParser):
    """Parses a whole number in any of the forms of `whole_number`."""

    syntactic_help = EXPECTED[int]

    def convert(self, argument: str | int) -> int:
        return whole_number(argument)


class _FloatParser(flags.FloatParser):
    def convert(self, argument: str | float) -> float:
        try:
            if math.isfinite(number := super().convert(argument)):
                return number
        except (TypeError, ValueError):
            pass
        raise ValueError(_expects(float))


class _BooleanParser(flags.BooleanParser):
    def parse(self, argument: str | int) -> bool:
        try:
            return super().parse(argument)
        except (TypeError, ValueError):
            raise ValueError(_expects(bool)) from None


class _TupleParser(tuple_parser.TupleParser):
    def parse(self, argument: str | tuple[object, ...]) -> tuple[object, ...]:
        if isinstance(argument, str) and not argument.strip():  # ml_collections would make ("",) of it
            return ()
        try:
            return super().parse(argument)
        except ValueError:
            raise ValueError(_expects(tuple)) from None


def register() -> None:
    """Makes ml_collections parse the flags of a config's keys with the parsers of this module."""
    parsers = {
        int: WholeNumberParser(),
        float: _FloatParser(),
        bool: _BooleanParser(),
        tuple: _TupleParser(),
    }
    for kind, parser in parsers.items():
        config_flags.register_flag_parser_for_type(kind, parser)


def fits(value: object, expected: type) -> bool:
    """Returns True if a value of a config has a type. A finite int also fits float, and a list fits tuple."""
    if expected in (int, float) and isinstance(value, bool):  # Python counts True as 1
        return False
    if expected is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, (tuple, list) if expected is tuple else expected)


def _expects(kind: type) -> str:
    return f"the key takes {EXPECTED[kind]}."
