"""A plain form of a mathematical answer: the same text for spellings that nobody would mark wrong.

It removes what is typography (spaces, `\\left`, `\\dfrac`, `\\text`), what MATH's own grader does
not judge (a unit at the end, the percent and degree signs, a dollar sign), and writes fractions and
roots with braces. Two answers with one plain form are equal; others may be too, which is for
symbolic comparison to find. The rules are those of Hendrycks et al. 2021, arXiv:2103.03874
(`is_equiv` of hendrycks/math@985bdc16), and of nothing else here is known to be undecided by them.
"""

import re

_SPACES = re.compile(r"\\[,;:!> ]|\\q?quad(?![a-zA-Z])|~|\s+")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])\.?")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|operatorname)\s*\{"
)
_UNIT = re.compile(
    r"(?<=[0-9}])\\(?:text|textbf|textnormal|mathrm|mbox)\{[^{}]*\}(?:\^\{?[23]\}?)?$"
)
_DEGREES = re.compile(r"\^\{?\\circ\}?|\\degree(?:s)?(?![a-zA-Z])|\N{DEGREE SIGN}")
_SHORT_FRACTION = re.compile(r"\\frac(?:([0-9a-zA-Z])|\{([^{}]*)\})(?:([0-9a-zA-Z])|\{([^{}]*)\})")
_SHORT_ROOT = re.compile(r"\\sqrt([0-9a-zA-Z])")
_SLASH = re.compile(r"(-?)([0-9]+)/([0-9]+)")
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_LISTED = re.compile(r",(?:\s|\\[ ;:]|\\q?quad(?![a-zA-Z]))")  # "100, 200" is two numbers
_NAMED = re.compile(r"[a-zA-Z](?:_\{?[0-9a-zA-Z]\}?)?=(?=[^=]+$)")
_DECIMAL = re.compile(r"(?<![0-9.])0*([0-9]*)\.([0-9]+)(?![0-9.])")
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def plain(answer: str) -> str:
    """The plain form of an answer; of an answer that is not mathematics, its letters."""
    text = answer.strip()
    for before, after in _WRAPPERS:
        inner = text[len(before) : -len(after)]
        if text.startswith(before) and text.endswith(after) and len(text) > len(before + after):
            if before[0] not in inner or before[0] == "\\":
                text = inner.strip()
                break
    text = text.rstrip(" .\n") if not text.endswith("\\.") else text
    text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text) if "\\begin" not in text else text
    text = text.replace("{,}", ",").replace("\\$", "").replace("\N{MINUS SIGN}", "-")
    text = re.sub(r"\\?%|\\percent", "", text).removeprefix("$")
    text = _DEGREES.sub("", text)
    text = _FRACTIONS.sub(r"\\frac", _SIZES.sub("", text))
    text = _UNIT.sub("", text.strip())
    text = _TEXT.sub("{", text)
    listed = _LISTED.search(text)
    text = _SPACES.sub("", text)
    text = re.sub(r"^\{([^{}]*)\}$", r"\1", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_FRACTION.sub(
        lambda m: f"\\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text
    )
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", ", " if listed else "")
    if slash := _SLASH.fullmatch(text):
        text = f"{slash[1]}\\frac{{{slash[2]}}}{{{slash[3]}}}"
    text = _DECIMAL.sub(_decimal, text)
    return text.casefold() if re.fullmatch(r"[a-zA-Z]{2,}", text) else text


def same(one: str, other: str) -> bool:
    """Whether two plain forms are one answer: `x=5` is 5, but not `y=5`."""
    return bool(one) and (one == other or _unnamed(one) == other or one == _unnamed(other))


def _unnamed(text: str) -> str:
    named = _NAMED.match(text)
    return plain(text[named.end() :]) if named else text


def _decimal(found: re.Match[str]) -> str:
    whole, part = found[1] or "0", found[2].rstrip("0")
    return f"{whole}.{part}" if part else whole
