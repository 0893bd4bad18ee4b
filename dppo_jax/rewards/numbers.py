"""Numbers in free text, as exact decimals: `$1,234.50` and `1234.5` are the same answer."""

import re
from decimal import Decimal

_MINUS = "-\N{MINUS SIGN}"

# A sign counts only where it cannot be an operator or a hyphen: "10-5" ends in 5, "= -5" in -5.
# Digits are ASCII: \d would also match digits of other scripts. A match never gives back what it
# took, so the search is linear in the text, whatever a policy writes.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\].])[{_MINUS}](?=\$?[0-9.]))?"
    rf"\$?(?P<after_dollar>(?<=\$)[{_MINUS}])?"
    r"(?P<digits>[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)"
)


def last_number(text: str) -> Decimal | None:
    """The last number in the text, or None.

    Thousands commas, a dollar sign before or after the minus, and a trailing full stop are
    understood. Fractions, powers and units are not: "3/4" ends in 4, "7 km" in 7.
    """
    found = list(_NUMBER.finditer(text))
    return _decimal(found[-1]) if found else None


def first_number(text: str) -> Decimal | None:
    """The first number in the text, or None; read as `last_number` reads it."""
    found = _NUMBER.search(text)
    return None if found is None else _decimal(found)


def parse_number(text: str) -> Decimal | None:
    """The number that is the whole text but for spaces and a full stop at the end, or None."""
    found = _NUMBER.fullmatch(text.strip().removesuffix("."))
    return None if found is None else _decimal(found)


def number_text(number: Decimal) -> str:
    """The shortest plain form: 1000, 18.5, -3; equal numbers have equal texts."""
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _decimal(found: re.Match[str]) -> Decimal:
    negative = (found["sign"] is not None) != (found["after_dollar"] is not None)
    return Decimal(("-" if negative else "") + found["digits"].replace(",", ""))
