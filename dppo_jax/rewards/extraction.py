"""Where the answer stands in a response. Every search is linear in the text, whatever it holds."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

Place = Literal["final", "boxed", "hashes", "answer", "anywhere", "whole"]

# What may stand between boxes that are one answer: "\boxed{1} and \boxed{-2}", "$ ,\quad $", and
# a unit: "\boxed{3} papers and \boxed{4} bins".
_CONNECTIVE = re.compile(
    r"(?:[ $]{0,3}[a-z]{1,12}(?= (?:and|or) ))?"
    r"(?:[\s$,;.]|\\[()\[\],;:!]|\\q?quad|and|or"
    r"|\\(?:text|mathrm)\s?\{[\s,]*(?:and|or)[\s,]*\}){1,20}"
)
_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])[ ]{0,4}")
_ANSWER = re.compile(
    r"(?i:\banswer)[ \t*_]{0,8}[:\N{FULLWIDTH COLON}]|答案[是为]?[:\N{FULLWIDTH COLON}]?"
)
_FINAL = re.compile(r"(?i:final answer is)[ :]{0,3}(.{1,200}?)\.?\s{0,4}I hope it is correct")
_HOPE = "I hope it is correct"
_BARE = re.compile(r"\\?[0-9A-Za-z]+")


class Found(NamedTuple):
    """A piece of a response."""

    text: str
    place: Place
    exact: bool  # the piece is the answer; otherwise the answer is somewhere in it


def find_answer(response: str, places: Sequence[str], *, tail: int = 4000) -> Found | None:
    """The answer by the first of `places` that the response has, or None.

    final: X of the last `final answer is X. I hope it is correct`, as in Minerva's prompts
    (arXiv:2206.14858). boxed: the last `\\boxed{...}` with balanced braces, together with the boxes
    right before it that only a comma, `and` or `or` separates, after a unit or not. hashes: the
    line after the last `####`. answer: the line after the last `Answer:`. anywhere: somewhere in
    the text. whole: all of it. Only the last `tail` characters are looked through, but for boxes.
    """
    for place in places:
        match place:
            case "final":
                said = (
                    [match[1] for match in _FINAL.finditer(response)] if _HOPE in response else []
                )
                found = Found(said[-1].strip(), place, False) if said else None
            case "boxed":
                boxes = boxed(response)
                found = Found(", ".join(boxes), place, True) if boxes else None
            case "hashes":
                _, marker, after = response.rpartition("####")
                line = after.lstrip().split("\n", 1)[0].strip()[-tail:]
                found = Found(line, place, False) if marker and line else None
            case "answer":
                found = _after_answer(response, tail)
            case "anywhere":
                found = Found(response[-tail:], place, False) if response.strip() else None
            case "whole":
                found = Found(response.strip(), place, True) if response.strip() else None
        if found is not None:
            return found
    return None


def boxed(text: str) -> list[str]:
    """Contents of the last box and of those joined to it, in order; [] where there is none.

    A box is `\\boxed{...}`, `\\fbox{...}` or `\\boxed 5`; one whose brace never closes is none.
    """
    boxes: list[tuple[int, int, str]] = []
    starts = list(_BOX.finditer(text))
    closes = _closing_braces(text) if starts else {}
    end = 0
    for start in starts:
        if start.start() < end:  # a box inside of a box belongs to the outer one
            continue
        after = start.end()
        if text[after : after + 1] == "{":
            if after not in closes:
                continue
            end = closes[after] + 1
            boxes.append((start.start(), end, text[after + 1 : end - 1].strip()))
        elif bare := _BARE.match(text, after):
            end = bare.end()
            boxes.append((start.start(), end, bare[0]))
    kept: list[str] = []
    for index in range(len(boxes) - 1, -1, -1):
        if kept and not _CONNECTIVE.fullmatch(text, boxes[index][1], boxes[index + 1][0]):
            break
        kept.append(boxes[index][2])
    return kept[::-1]


def _closing_braces(text: str) -> dict[int, int]:
    """Position of each opening brace's own closing one; `\\{` and `\\}` are text."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    return closing


def _after_answer(response: str, tail: int) -> Found | None:
    found = list(_ANSWER.finditer(response))
    if not found:
        return None
    # Markdown puts bold marks around the words and the answer often on the next line.
    after = response[found[-1].end() :].lstrip(" \t*_\r\n")
    line = after.split("\n\n", 1)[0].strip()
    if not line.startswith(("\\[", "$$")):
        line = line.split("\n", 1)[0].strip()
    line = line[-tail:].rstrip("*_ ")
    return Found(line, "answer", False) if line else None
