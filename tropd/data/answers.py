"""Finds the answer in what a model wrote: text -> number, letter or text.  Pure, linear in the text, never raises."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+"
_NUMBER = re.compile(
    rf"""(?<!\w)(?<!\d\.)(?P<sign>(?<![)\]}}])-)?[$€£]?
    (?:(?P<whole>\d{{1,9}})[ ](?P<part>\d{{1,9}}/\d{{1,9}})(?![\d/])
     |(?P<top>(?:{_DIGITS})(?:[eE][-+]?\d{{1,3}}(?!\d))?)(?:[ ]?/[ ]?(?P<bottom>{_DIGITS}))?)
    (?P<percent>[ ]?(?:%|percent\b))?""",
    re.VERBOSE | re.ASCII,
)
_MAX_DIGITS = 300
_REWRITES = (
    (re.compile(r"(?<=\d)\\[dt]?frac ?\{([^{}]{1,99})\} ?\{([^{}]{1,99})\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac ?\{([^{}]{1,99})\} ?\{([^{}]{1,99})\}"), r"\1/\2"),
    (re.compile(r" ?(?:\\times|\\cdot|×|\*|\bx\b) ?10 ?(?:\^|\*\*) ?\{?([-+]?\d{1,3})(?!\d)\}?", re.ASCII), r"e\1"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[,!;]|\{,\}(?=\d)"), ""),
    (re.compile("\u2212"), "-"),
)

# "I" is an option unless it begins a clause
_OPTION = r"(?:[A-HJ]|I(?! (?:think|believe|guess|would|am|do|have|can|will|know|choose|pick|select|say|find|got)\b))"
_OPENING = r"(?:\\(?:text|textbf|mathrm|mathbf|bf) ?\{?)?[\s(\[{*_`$\\\"']{0,4}"
_LETTER = rf"{_OPENING}(?P<letter>{_OPTION})(?![A-Za-z0-9'’])"
_AND_ANOTHER = re.compile(
    rf"[)\]}}*_.\s]{{0,4}}(?:,|/|&|\band\b|\bor\b|或|和)\s?(?:and |or )?[\s(\[{{*_]{{0,4}}{_OPTION}(?![A-Za-z'’])"
)
_LINKING = r"is|was|be|would|should|must|the|option|choice|letter|correct|likely|most|therefore|thus|then"
_THEN = rf"(?:[\s:=*_>,为是：-]|\b(?i:{_LINKING})\b){{0,12}}{_LETTER}"
# The strongest first: an answer that is called one outweighs options that are only talked about.
_CLAIMS = (
    (
        re.compile(rf"(?:\b(?i:answer|(?:correct|right|best) (?:option|choice|letter))\b|答案){_THEN}"),
        re.compile(rf"(?<![A-Za-z]){_LETTER}[)\]}}*_]{{0,3}} is (?:the )?(?:correct|right|best)\b"),
    ),
    (re.compile(rf"(?:\b(?i:option|choice|choose|select|pick|go with)\b|选项|选){_THEN}"),),
)
_ALONE = re.compile(rf"[\W_]{{0,6}}{_LETTER}[\W_]{{0,6}}")
_HEADING = re.compile(r"\s{0,3}[(\[*_]{0,3}(?P<letter>[A-J])[*_]{0,2}[.):\]](?=\s|$|\*)")
_IN_PARENTHESES = re.compile(r"\((?P<letter>[A-J])\)")


class Number(NamedTuple):
    value: Fraction
    is_percent: bool


def final_text(text: str) -> str:
    """What follows the model's thinking (nothing when it never ends), or the last line after GSM8K's ####."""
    answer = text.rpartition("</think>")[2].partition("<think>")[0].strip()
    _, marked, result = answer.rpartition("####")
    return result.strip() if marked and result.strip() and "\n" not in result.strip() else answer


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for position in range(begin, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[begin + 1 : position]
    return None


def normalize(text: str) -> str:
    """One spelling for what reads the same: width, case, spaces, and punctuation around the whole."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(" .,;:!?\"'`*$") or folded


def read_number(text: str) -> Number | None:
    """The last number of a text (of its last box, if that holds one): 1,234.5   -3/4   2 1/2   \\frac{1}{2}   50%"""
    boxed = last_boxed(text)
    for candidate in (boxed, text):
        number = None if candidate is None else _last_number(candidate)
        if number is not None:
            return number
    return None


def _last_number(text: str) -> Number | None:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    return None if last is None else _value_of(last)


def _value_of(match: re.Match[str]) -> Number | None:
    if len(match[0]) > _MAX_DIGITS:
        return None
    try:
        if match["whole"]:
            value = Fraction(match["whole"]) + Fraction(match["part"])
        else:
            value = Fraction(match["top"].replace(",", ""))
            value /= Fraction((match["bottom"] or "1").replace(",", ""))
    except ZeroDivisionError:
        return None
    return Number(-value if match["sign"] else value, bool(match["percent"]))


def read_choice(text: str) -> str | None:
    """The option A-J that a text settles on, or None when it names none or several."""
    bare = text.strip(" .()\n").upper()
    if len(bare) == 1:
        return bare if bare in "ABCDEFGHIJ" else None
    boxed = last_boxed(text)
    if boxed is not None and (match := re.match(_LETTER, boxed)):
        return None if _AND_ANOTHER.match(boxed, match.end()) else match["letter"]
    for patterns in _CLAIMS:
        claims = [match for pattern in patterns for match in pattern.finditer(text)]
        if claims:
            last = max(claims, key=lambda match: match.end("letter"))
            return None if _AND_ANOTHER.match(text, last.end("letter")) else last["letter"]
    lines = [line for line in text.splitlines() if line.strip()]
    for line in (*lines[-1:], *lines[:1]):
        if match := _ALONE.fullmatch(line):
            return match["letter"]
    heads = [match for line in lines if (match := _HEADING.match(line)) and not _AND_ANOTHER.match(line, match.end())]
    headings = {match["letter"] for match in heads}
    for letters in (headings, set(_IN_PARENTHESES.findall(text))):
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None
