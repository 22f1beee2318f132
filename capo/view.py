"""`capo view`: responses with their steps, votes and token advantages, on the terminal or as one HTML file.

The text is the policy's and the judge's, and hostile: the page has no script and forbids any, text is escaped, and control
characters, which could move a terminal's cursor or turn the direction of writing, are shown instead of obeyed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from capo.samples import Kind, Part, Run, Sample

_SHOWN = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
_SHOWN[0x7F] = "\u2421"
for _codes in (range(0x80, 0xA0), range(0x202A, 0x202F), range(0x2066, 0x206A), range(0xD800, 0xE000)):
    _SHOWN.update(dict.fromkeys(_codes, "\ufffd"))
_DOTS = {1: "●", 0: "○", -1: "·"}


def print_samples(samples: Sequence[Sample], console: Console, replies: bool = False) -> None:
    """Show responses on a terminal: one table each, a line a step with its votes and its advantage.

    Args:
        samples: what to show.
        console: where.
        replies: what the judge wrote, too.
    """
    for sample in samples:
        title = Text.assemble((_plain(sample.id), "bold"), f"  {_outcome(sample)}, group {_plain(sample.group)}")
        table = Table("step", "votes", "advantage", "text", box=None, padding=(0, 2, 0, 0), header_style="dim")
        for part in sample.parts:
            text = Text()
            for words, run in _runs(part):
                text.append(words, _terminal_style(run.advantage))
            if part.number is not None or text.plain:
                number = "" if part.number is None else str(part.number)
                table.add_row(number, _dots(part.votes), _advantages(part), text)
        rows: list = [title]
        if sample.prompt:
            rows.append(Padding(Text(_plain(sample.prompt), "dim"), (0, 0, 0, 2)))
        rows.append(Padding(table, (0, 0, 0, 2)))
        for vote, reply in enumerate(sample.replies if replies else ()):
            rows.append(Padding(Text(f"critique {vote}: {_plain(reply)}", "italic"), (0, 0, 0, 2)))
        console.print(Group(*rows), "", markup=False, highlight=False)


def _terminal_style(advantage: float) -> str:
    return "dim" if advantage == 0 else "blue" if advantage > 0 else "red"


def to_html(samples: Sequence[Sample], title: str, note: str = "") -> str:
    """One page that needs nothing else: groups, responses, steps with votes, text coloured by advantage.

    Args:
        samples: those of a group adjacent.
        title: of the page.
        note: a line below it.
    """
    full = _full_colour(samples)
    body = "".join(
        f"<section><h2>group {_html(name)}</h2>{''.join(_group(list(members), full))}</section>"
        for name, members in groupby(samples, key=lambda sample: sample.group)
    )
    counts = Counter(kind for sample in samples for kind in sample.kinds)
    choices = "".join(
        f'<label><input type="radio" name="kind" id="only-{kind.value}"> {kind.value} {counts[kind]}</label>'
        for kind in Kind
        if counts[kind]
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_html(title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{_html(title)}</h1><p>{_html(note)}</p>"
        f'<form><label><input type="radio" name="kind" checked> all {len(samples)}</label>{choices}</form>'
        f"<p class=legend>advantage <span class=minus style='--s:60%'>{-full:.3g}</span><span>0</span>"
        f"<span class=plus style='--s:60%'>{full:+.3g}</span> &nbsp; votes ● flagged ○ clear · abstained</p></header>"
        f"<main>{body}</main></body></html>\n"
    )


def _group(samples: list[Sample], full: float) -> Iterator[str]:
    prompts = {sample.prompt for sample in samples}
    shared = len(prompts) == 1
    if shared and samples[0].prompt:
        yield f"<blockquote>{_html(samples[0].prompt)}</blockquote>"
    for sample in samples:
        yield _response(sample, full, None if shared else sample.prompt)


def _response(sample: Sample, full: float, prompt: str | None) -> str:
    kinds = " ".join(kind.value for kind in sample.kinds)
    question = f"<blockquote>{_html(prompt)}</blockquote>" if prompt else ""
    rows = "".join(_row(part, full) for part in sample.parts)
    replies = "".join(f"<li><pre>{_html(reply)}</pre></li>" for reply in sample.replies)
    said = f"<details><summary>{len(sample.replies)} critiques</summary><ol start=0>{replies}</ol></details>"
    return (
        f'<article class="{kinds}"><h3>{_html(sample.id)} <b>{_html(_outcome(sample))}</b></h3>{question}'
        f"<table>{rows}</table>{said if replies else ''}</article>"
    )


def _row(part: Part, full: float) -> str:
    spans = "".join(
        f'<span class={"plus" if run.advantage > 0 else "minus"} style="--s:{_strength(run.advantage, full)}%" '
        f'title="advantage {run.advantage:+.4g}, {run.num_tokens} tokens">{escape(words)}</span>'
        for words, run in _runs(part)
    )
    if part.number is None:
        return f"<tr class=outside><td><td><td><td>{spans}</tr>" if any(words for words, _ in _runs(part)) else ""
    votes = f'<span title="weight {part.weight:.3g}">{_dots(part.votes)}</span>'
    return f"<tr><td>{part.number}<td>{votes}<td>{_advantages(part)}<td>{spans}</tr>"


def _strength(advantage: float, full: float) -> int:
    return 0 if advantage == 0 else round(10 + 50 * min(1.0, abs(advantage) / full))


def _full_colour(samples: Sequence[Sample]) -> float:
    """The advantage that has the fullest colour: nine in ten are smaller, so that a rare one does not make them pale."""
    sizes = sorted(
        abs(run.advantage) for sample in samples for part in sample.parts for run in part.runs if run.advantage
    )
    return sizes[len(sizes) * 9 // 10] if sizes else 1.0


def _outcome(sample: Sample) -> str:
    if sample.outcome is None:
        return "undecided"
    named = {1.0: "right", 0.0: "wrong"}
    return named.get(sample.outcome, f"reward {sample.outcome:g}")


def _advantages(part: Part) -> str:
    values = [run.advantage for run in part.runs] or [0.0]
    low, high = min(values), max(values)
    return f"{low:+.3f}" if low == high else f"{low:+.3f} to {high:+.3f}"


def _dots(votes: Iterable[int]) -> str:
    return "".join(_DOTS[vote] for vote in votes)


def _runs(part: Part) -> list[tuple[str, Run]]:
    """The runs with the text to show of each: plain, without the empty lines around the part."""
    texts = [_plain(run.text) for run in part.runs]
    if texts:
        texts[0] = texts[0].lstrip("\n")
        texts[-1] = texts[-1].rstrip()
    return list(zip(texts, part.runs, strict=True))


def _plain(text: str) -> str:
    return text.translate(_SHOWN)


def _html(text: str) -> str:
    return escape(_plain(text))


_STYLE = """
:root { color-scheme: light dark; --plus: #2b7bba; --minus: #d1552b; --line: #8884; --soft: #888; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 0 1rem 4rem; }
header { position: sticky; top: 0; background: Canvas; border-bottom: 1px solid var(--line); padding: .6rem 0; }
h1 { font-size: 1.25rem; margin: 0; overflow-wrap: anywhere; } header p { margin: .2rem 0; color: var(--soft); }
h2 { font-size: 1rem; margin: 2rem 0 .4rem; overflow-wrap: anywhere; }
h3 { font-size: .9rem; margin: 0 0 .4rem; font-weight: 400; color: var(--soft); overflow-wrap: anywhere; }
form label { margin-right: 1rem; } .legend span { padding: .1rem .5rem; border: 1px solid var(--line); color: CanvasText; }
blockquote { margin: .4rem 0; padding-left: .8rem; border-left: 3px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere; }
article { border: 1px solid var(--line); border-left-width: 4px; border-radius: 6px; padding: .6rem .8rem; margin: .6rem 0; }
article.right { border-left-color: var(--plus); } article.wrong { border-left-color: var(--minus); }
table { border-collapse: collapse; width: 100%; } td { vertical-align: top; padding: .15rem .6rem .15rem 0; }
td:nth-child(-n+3) { color: var(--soft); white-space: nowrap; width: 1%; font-variant-numeric: tabular-nums; }
td:nth-child(3) { text-align: right; }
td:last-child { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; } .outside { color: var(--soft); }
.plus { background: color-mix(in srgb, var(--plus) var(--s), transparent); }
.minus { background: color-mix(in srgb, var(--minus) var(--s), transparent); }
details { margin-top: .4rem; color: var(--soft); } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; }
body:has(#only-right:checked) article:not(.right), body:has(#only-wrong:checked) article:not(.wrong),
body:has(#only-undecided:checked) article:not(.undecided), body:has(#only-flagged:checked) article:not(.flagged) { display: none; }
section:not(:has(article)) { display: none; }
"""
