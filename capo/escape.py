"""Makes untrusted text harmless inside a judge's prompt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable


def neutralise(text: str) -> str:
    """Untrusted text with everything that could pass for a marker made inert, visibly and with the least change.

    The brackets of a tag become ``‹ ›`` (``<step_3>`` -> ``‹step_3›``, ``[/INST]`` -> ``‹/INST›``), and the word of a
    judgment line is put between them (``‹Judgment›:``). Markers are the tags and headings of the prompt with any nonce,
    reasoning tags, and the control tokens of common chat templates; found whatever their case, spacing, invisible
    characters, full-width forms and look-alike letters. Lone surrogates, which no encoder takes, become U+FFFD. All
    other text is left as it is; doing it twice changes nothing more. Takes linear time.

    Args:
        text: question, reference solution or step, from the data set or the policy.
    """
    # Most text holds no marker, which is quickly seen where it has no look-alikes.
    judgment = ":" in text and ("j" in text or "J" in text)
    if text.isascii() and not (judgment or "<" in text or "[" in text):
        return text
    text = _replace(_JUDGMENT_WORD, _SURROGATE.sub("\ufffd", text), lambda found, folded: f"‹{found}›")
    return _replace(
        _MARKER,
        text,
        lambda found, folded: f"‹{found[1:-1]}›" if folded[-1] in ">]" else f"‹{found[1:]}",
    )


def _replace(pattern: re.Pattern[str], text: str, escape: Callable[[str, str], str]) -> str:
    pieces, done = [], 0
    for match in pattern.finditer(text.translate(_FOLD)):  # folding keeps lengths, so spans hold in `text` too
        start, end = match.span()
        pieces += [text[done:start], escape(text[start:end], match[0])]
        done = end
    return "".join([*pieces, text[done:]])


class _Fold(dict[int, str]):
    """Code point -> the one plain character it looks like; what cannot be seen becomes NUL."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if unicodedata.category(char) in ("Cf", "Cc", "Mn", "Me") and not char.isspace():
            plain = "\0"
        else:
            plain = unicodedata.normalize("NFKD", char).casefold()[0]
            plain = _LOOK_ALIKES.get(plain, plain)
        self[code] = plain
        return plain


# Cyrillic, Greek, Armenian, small capitals and symbols, for the characters that occur in markers.
_LOOK_ALIKES = {
    alike: plain
    for plain, alikes in {
        "a": "аαɑᴀ", "c": "сᴄ", "d": "ԁᴅ", "e": "еεᴇ", "g": "ցɡɢ", "h": "һʜ", "i": "іιıɩɪ", "j": "јϳᴊ", "k": "кκᴋ",
        "l": "ӏʟ", "m": "мμᴍ", "n": "ոηɴ", "o": "оοօᴏ", "p": "рρᴘ", "q": "ԛ", "r": "гʀ", "s": "ѕꜱ", "t": "тτᴛ",
        "u": "սυᴜ", "y": "уγʏ", "<": "˂ᐸ❮⟨〈", ">": "˃ᐳ❯⟩〉", "[": "【⟦〔", "]": "】⟧〕", "|": "∣ǀ│", "_": "▁",
        "/": "⁄∕", ":": "꞉∶ː",
    }.items()
    for alike in alikes
}  # fmt: skip
_FOLD = _Fold()
_SURROGATE = re.compile("[\ud800-\udfff]")


def _words(*phrases: str) -> str:
    """A pattern for any of the phrases, in folded text: invisible characters anywhere, any joint between words."""
    return "(?:" + "|".join(_JOINT.join("\0*".join(word) for word in phrase.split()) for phrase in phrases) + ")"


_JOINT = r"[\s_\-.:#*\0]*"
_JUDGMENT_WORD = re.compile(_words("judgment", "judgement") + r"(?=[\s*`_\0]*:)")
_MARKER = re.compile(
    r"(?:<[\s/\\\0]*(?:"
    + "|".join(
        [
            _words("step") + _JOINT + r"\d",
            _words("incorrect step"),
            _words("think", "thinking", "thought", "reasoning", "tool call", "tool response") + "(?![a-z])",
            _words("start of turn", "end of turn", "s", "sys", "system", "user", "assistant", "bos", "eos")
            + r"[\s\0]*(?=>)",
            r"\|[\w\s\-\0]{1,64}\|(?=>)",
        ]
    )
    + r")|\[[\s/\\\0]*"
    + _words("question", "ground truth", "solution to judge", "inst", "system prompt", "tool calls", "tool results")
    + r"(?![a-z]))[^<>\[\]\n]{0,80}[>\]]?"
)
