r"""Final answers: found in a text and, where they are plain, read exactly. Nothing here evaluates anything.

Plain is what needs no algebra: a number, a letter of a multiple choice, words. See docs/verify.md for the tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

FORMS = ("boxed", "hashes", "answer", "bare")
MAX_CHARS = 2000


class AnswerTooLong(ValueError):
    """An answer that is longer, or a number that has more digits, than is compared."""


@dataclass(frozen=True)
class Number:
    """A number as written: its value without the percent sign, whether it has one, its unit in a common spelling."""

    value: Fraction
    percent: bool = False
    unit: str = ""

    def equals(self, other: Number) -> bool | None:
        """Whether two numbers are the same; None where their units differ, as units are not converted.

        A percentage equals its hundredth (``50%`` is ``0.5``). As percent is often the unit that is asked for, it
        equals the bare number too (``50%`` is ``50``), but not below 1 (``0.5%`` is not ``0.5``).
        """
        if self.unit and other.unit and self.unit != other.unit:
            return None
        if self.percent == other.percent:
            return self.value == other.value
        share, bare = (self.value, other.value) if self.percent else (other.value, self.value)
        return share / 100 == bare or (share == bare and abs(share) >= 1)


@dataclass(frozen=True)
class Words:
    """An answer in words, compared without regard to case."""

    text: str


# ---- where the answer stands


def extract(text: str, forms: Sequence[str] = ("boxed", "hashes", "answer")) -> str | None:
    r"""The final answer as written in a text, or None.

    Args:
        text: a response, or a known answer with its working.
        forms: which forms are tried, the first that occurs counts:

            * ``boxed``: the last ``\boxed{...}`` or ``\fbox{...}`` whose braces close and that is not empty.
            * ``hashes``: what follows ``#`` to the end of its line: the last such line that holds a plain number; or,
              if it is the last line of the text and has ``####``, whatever it holds.
            * ``answer``: what follows the last ``answer is``, ``answer:``, ``option is``, ``choice:`` ..., or ``A:``
              at the beginning of a line, to the end of the sentence or line.
            * ``bare``: the whole text.
    """
    for form in forms:
        found = _EXTRACT[form](text)
        if found is not None:
            return found
    return None


_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)

_SOLID = re.compile(r"[^\s{}]")


def _boxed(text: str) -> str | None:
    boxes: list[tuple[int, int]] = []  # content of the boxes closed so far that lie in no other
    opened: list[int] = []  # for each open brace where the content of its box begins; 0: no box
    for match in _BRACES.finditer(text):
        if match[1] or match[0] == "{":
            opened.append(match.end() if match[1] else 0)
        elif match[0] == "}" and opened and (begin := opened.pop()) and _SOLID.search(text, begin, match.start()):
            while boxes and boxes[-1][0] > begin:
                boxes.pop()
            boxes.append((begin, match.start()))
    return text[slice(*boxes[-1])] if boxes else None


def _hashes(text: str) -> str | None:
    lines = text.rstrip().split("\n")
    for line in reversed(lines):
        mark = line.rfind("#") + 1
        written = line[mark:].strip()
        if not mark or not written:
            continue
        if (line is lines[-1] and "####" in line) or _is_number(written):
            return written
    return None


def _is_number(written: str) -> bool:
    if len(written) > MAX_CHARS:
        return written[:100].isdigit()
    try:
        return isinstance(read(written), Number)
    except AnswerTooLong:
        return True


_STARS = r"[*_]{0,3}"
_PHRASE = re.compile(
    rf"\b(?:answer|option|choice){_STARS}[ \t]*(?:\bis\b|:|=)[ \t]*:?{_STARS}[ \t]*\n{{0,2}}"
    rf"|^[ \t]*{_STARS}A:{_STARS}",
    re.IGNORECASE | re.MULTILINE,
)
_LISTED = re.compile(r"\s*[*_]{0,3}B[:.)]")
_SENTENCE = re.compile(r"\.\s|\n")
_INLINE = re.compile(r"\$\$?([^$]+)\$")


def _phrase(text: str) -> str | None:
    for match in reversed(list(_PHRASE.finditer(text))):
        end = text.find("\n", match.end())
        line = text[match.end() : end if end >= 0 else len(text)]
        # Options that are listed, "A: 5" above "B: 6", are no answers.
        if match[0].strip(" \t*_").upper() == "A:" and end >= 0 and _LISTED.match(text, end):
            continue
        written = _SENTENCE.split(line, maxsplit=1)[0].strip()
        inline = _INLINE.match(written)
        written = inline[1] if inline else written
        if written.strip("*_.,;:$ "):
            return written
    return None


_EXTRACT: dict[str, Callable[[str], str | None]] = {
    "boxed": _boxed,
    "hashes": _hashes,
    "answer": _phrase,
    "bare": lambda text: text.strip() or None,
}


# ---- what is written there

_SAME = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width characters
    | dict.fromkeys("\u2212\u2012\u2013", "-")
    | dict.fromkeys("\u00a0\u2009\u202f\u3000~", " ")
    | {"\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00f7": "/", "\u2215": "/", "\u2044": "/"}
)
_BLANKS = re.compile(r"(?:\\[,;:! ]|\\q?quad(?![A-Za-z])|\\(?:left|right|displaystyle|limits)(?![A-Za-z])|\s)+")
_FRAC = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mbox|rm|bf)\s*\{([^{}\\]*)\}")
_WRAPPED = (("**", "**"), ("__", "__"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`"))


def clean(written: str) -> str:
    r"""An answer without what does not change it: ``$`` around it, ``\text{}``, spacing commands, a full stop."""
    text = (
        _FRAC.sub(r"\\frac", written.translate(_SAME)).replace("{,}", ",").replace(r"\$", "\uff04").replace(r"\%", "%")
    )
    text = _TEXT.sub(r" \1 ", text)
    text = _BLANKS.sub(" ", text).strip()
    for _ in range(8):
        before = text
        text = text.rstrip(".,;: ").lstrip(":= ") if text not in (".", ":") else ""
        for opening, closing in _WRAPPED:
            inner = text[len(opening) : -len(closing)]
            if len(inner) > 0 and text == opening + inner + closing and opening not in inner:
                text = inner.strip()
        if text.startswith((r"\boxed{", r"\fbox{", "{")) and _boxed("\\boxed" + text[text.index("{") :]) == text[
            text.index("{") + 1 : -1
        ]:  # fmt: skip
            text = text[text.index("{") + 1 : -1].strip()
        if text == before:
            break
    return text


_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:(?:[0-9]{{1,3}}(?:\ [0-9]{{3}})+|{_INTEGER})(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\ ?(?P<currency>[$\uff04€£]?)\ ?(?P<inner>[+-]?)\ ?
    (?:
      (?:(?P<whole>{_INTEGER})\ ?)?
        \\frac\ ?(?:\{{\ ?(?P<over>[+-]?\ ?{_DECIMAL})\ ?\}}|(?P<over1>[0-9]))\ ?
        (?:\{{\ ?(?P<under>[+-]?\ ?{_DECIMAL})\ ?\}}|(?P<under1>[0-9]))
    | (?P<mixed>[0-9]+)\ (?P<part>[1-9][0-9]*)\ ?/\ ?(?P<parts>[0-9]+)
    | (?P<mantissa>{_DECIMAL})(?:\ ?(?:\\times|\\cdot|\*|x)\ ?10\ ?\^\ ?(?:\{{\ ?(?P<power>[+-]?[0-9]+)\ ?\}}|
                    (?P<power1>-?[0-9]+))
                               |[eE](?P<power2>[+-]?[0-9]+))
    | (?P<top>{_DECIMAL})(?:\ ?/\ ?(?P<bottom>{_DECIMAL}))?
    )
    (?:\ ?(?P<scale>hundred|thousand|million|billion|trillion|dozen)(?![A-Za-z]))?
    (?P<percent>\ ?(?:%|(?:percent|per\ cent|pct)(?![A-Za-z])))?
    (?P<unit>(?!\ ?[0-9.,]).*)""",
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_CURRENCIES = {"$": "dollar", "\uff04": "dollar", "€": "euro", "£": "pound"}
# 1.000,5: a European decimal comma, or a slip. Neither a number here nor a matter for algebra.
_EUROPEAN = re.compile(r"[+-]?[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]+")
_DEGREES = re.compile(r" ?(?:°|\^ ?\{? ?(?:\\circ|°) ?\}?|\\degree) ?([CFK]?)")
_GLUED = re.compile(r"(?:[cmk]?m|[mk]?g|m?l|mph|kmh|min|hrs?|ft|lbs?|oz|inch|inches)(?:\^?[23])?", re.IGNORECASE)
_UNIT = re.compile(
    r" ?(?:/ ?)?[A-Za-z]+\.?(?: ?\^ ?\{?[23]\}?)?(?:(?: ?/ ?| |-)[A-Za-z]+\.?(?: ?\^ ?\{?[23]\}?)?){0,4}"
)
_SHORT_UNITS = frozenset("mgshlL")
# Words that make something else of the number before them.
_NO_UNITS = frozenset(
    re.findall(
        "[a-z]+",
        """and or to plus minus times over by squared cubed factorial half halves third thirds quarter quarters point
        negative not mod choose pi sqrt sin cos tan log ln exp if when but is are equals than more less least most
        about root power divided multiplied theta alpha beta infinity infty i e x y z hundred thousand million billion
        trillion dozen none either nor maybe remainder""",
    )
)


def read(written: str, max_digits: int = 100) -> Number | Words | None:
    r"""The plain number or the words that an answer is, or None.

    Raises:
        AnswerTooLong: it is longer than 2,000 characters, or a number of more than ``max_digits`` digits, or with a
            power of ten beyond that.
    """
    if len(written) > MAX_CHARS:
        raise AnswerTooLong(f"an answer of {len(written)} characters, more than {MAX_CHARS}")
    text = clean(written)
    match = _NUMBER.fullmatch(text)
    if match is not None:
        return _number(match, max_digits)
    return _words(text, written)


def _number(match: re.Match[str], max_digits: int) -> Number | None:
    unit = _unit(match)
    if unit is None or (match["sign"] and match["inner"]):
        return None
    digits = len(re.sub("[^0-9]", "", match[0]))
    power = int(_first(match, "power", "power1", "power2") or 0) if digits <= max_digits else 0
    if digits > max_digits or abs(power) > max_digits:
        raise AnswerTooLong(f"a number of more than {max_digits} digits")
    divisor = Fraction(1)
    if _first(match, "over", "over1"):
        value = _decimal(_first(match, "over", "over1"))
        divisor = _decimal(_first(match, "under", "under1"))
        if match["whole"]:
            if value < 0 or divisor <= 0:
                return None
            value += int(match["whole"].replace(",", "")) * divisor
    elif match["mixed"]:
        divisor = _decimal(match["parts"])
        value = int(match["mixed"]) * divisor + int(match["part"])
    elif match["mantissa"]:
        value = _decimal(match["mantissa"]) * Fraction(10) ** power
    else:
        value = _decimal(match["top"])
        divisor = _decimal(match["bottom"] or "1")
    if not divisor:
        return None
    scale = (match["scale"] or "").lower()
    value = value / divisor * (12 if scale == "dozen" else 10 ** _SCALES.get(scale, 0))
    sign = -1 if "-" in (match["sign"], match["inner"]) else 1
    return Number(sign * value, bool(match["percent"]), unit)


def _first(match: re.Match[str], *names: str) -> str:
    return next((match[name] for name in names if match[name]), "")


def _decimal(written: str) -> Fraction:
    digits = re.sub("[, ]", "", written)
    return Fraction(digits + "0" if digits.endswith(".") else digits)


def _unit(match: re.Match[str]) -> str | None:
    """The unit of a number in a common spelling, empty without one; None if what follows the number is no unit."""
    rest = match["unit"].rstrip()
    currency = _CURRENCIES.get(match["currency"], "")
    if not rest:
        return currency
    degrees = _DEGREES.fullmatch(rest)
    if degrees is not None:
        return f"degree{degrees[1].lower()}"
    words = re.findall(r"[A-Za-z]+", rest)
    if not rest.startswith((" ", "/")) and not match["percent"] and not _GLUED.fullmatch(rest):
        return None
    if _UNIT.fullmatch(rest) is None or any(word.lower() in _NO_UNITS for word in words):
        return None
    if any(len(word) == 1 and word not in _SHORT_UNITS for word in words[:1]):
        return None
    spelt = re.sub(r" ?/ ?", " per ", rest.lower().replace(".", "")).replace("^", "").strip()
    unit = " ".join(word.removesuffix("s") if len(word) > 2 else word for word in [currency, *spelt.split()] if word)
    return re.sub("[{}]", "", unit)


_WORDS = re.compile(r"[A-Za-z]+(?:[ '-][A-Za-z]+)*")
_SHORT_WORDS = frozenset(["yes", "no", "odd", "not"])
_NAMES = frozenset(
    ["infinity", "infty", "sqrt", "frac", "alpha", "beta", "gamma", "delta", "theta", "sigma", "omega", "lambda"]
)


def _words(text: str, written: str) -> Words | None:
    if _WORDS.fullmatch(text) is None:
        return None
    parts = [part.lower() for part in re.split("[ '-]", text)]
    marked = _TEXT.fullmatch(written.strip("$ .")) is not None and len(text) > 1
    long = any(len(part) >= 4 or part in _SHORT_WORDS for part in parts)
    return Words(" ".join(text.lower().split())) if (marked or long) and not _NAMES & set(parts) else None


def is_unreadable_number(written: str) -> bool:
    """Whether an answer has digits, points and commas in an order that has no one meaning, as in ``1.000,5``."""
    return _EUROPEAN.fullmatch(clean(written)) is not None


_CHOICE = re.compile(r"\(?([A-J])\)?")
_CHOSEN = re.compile(r"\(?([A-Ja-j])(?:\)?$|[).:](?![A-Za-z0-9]))")
_ANOTHER = re.compile(r"\(([A-J])\)|\b([A-HJ])[).:]|\b([B-HJ])\b")


def choice(written: str) -> str | None:
    """The letter of a known answer that is one, ``B`` or ``(B)``."""
    match = _CHOICE.fullmatch(clean(written))
    return match[1] if match else None


def chosen(written: str) -> str | None:
    """The letter that a response chooses, ``b``, ``(B)``, ``B) 5 apples``; None if it names several."""
    text = clean(written)
    match = _CHOSEN.match(text)
    if match is None:
        return None
    others = {"".join(filter(None, groups)) for groups in _ANOTHER.findall(text, match.end())}
    return match[1].upper() if others <= {match[1].upper()} else None
