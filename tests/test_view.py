"""`capo view`: every token of a response is shown once, with the right numbers, and hostile text stays text."""

import html.parser
import io
import json
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from capo.cli import app
from capo.errors import UsageError
from capo.samples import Part, Run, Sample, read_samples, token_texts
from capo.steps import TokenBytes
from capo.view import print_samples, to_html

HOSTILE = (
    "</span><script>alert(1)</script><img src=x onerror=y> [red]x[/red] \x1b[2J\x1b]0;t\x07 \u202eabc\udc80 \r&amp;"
)


def row(**changes):
    content = {
        "response_id": "a", "group": 3, "prompt": "2 + 2?", "outcome": 1.0,
        "tokens": ["2", "+2", "\n\n", "4", "!"], "advantages": [0.5, 0.5, 0.5, -1.0, 0.0],
        "step_starts": [0, 3], "step_ends": [3, 4], "step_weights": [0.0, 1.0], "votes": [[0, -1], [1, -1]],
        "critiques": [{"text": "Judgment: No", "error": None}, {"text": None, "error": "deadline"}],
    }  # fmt: skip
    return {**content, **changes}


def file_of(tmp_path, *rows):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(content) + "\n" for content in rows))
    return path


def test_a_row_as_parts(tmp_path):
    (sample,) = read_samples(file_of(tmp_path, row()))
    assert sample.parts == [
        Part([Run("2+2\n\n", 3, 0.5)], 0, 0.0, [0, -1]),
        Part([Run("4", 1, -1.0)], 1, 1.0, [1, -1]),
        Part([Run("!", 1, 0.0)]),
    ]
    assert (sample.id, sample.group, sample.outcome, sample.prompt) == ("a", "3", 1.0, "2 + 2?")
    assert sample.replies == ["Judgment: No", "no reply: deadline"]
    assert sample.steps == sample.parts[:2]
    assert sample.kinds == ["right", "flagged"]


@pytest.mark.parametrize(("outcome", "kind"), [(0.0, "wrong"), (-1.0, "wrong"), (0.25, "right"), (None, "undecided")])
def test_kinds(tmp_path, outcome, kind):
    (sample,) = read_samples(file_of(tmp_path, row(outcome=outcome, step_weights=[0.0, 0.0])))
    assert sample.kinds == [kind]


def test_characters_over_several_tokens_and_tokens_without_bytes():
    smile = "😀".encode()
    table = TokenBytes([b"a", smile[:2], smile[2:], b"", b"\xff"])
    assert token_texts([0, 1, 2, 3, 0], table) == ["a", "", "😀", "⟨3⟩", "a"]
    assert token_texts([1, 3], table) == ["", "\ufffd⟨3⟩"]
    assert token_texts([0, 1], table) == ["a", "\ufffd"]
    assert token_texts([4, 0], table) == ["\ufffd", "a"]
    assert token_texts([], table) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"advantages": [0.5]}, "5 tokens, but 1 advantages"),
        ({"step_ends": [3]}, "2 step_starts, 1 step_ends"),
        ({"step_starts": [0, 2]}, "step 1 is from 2 to 4, after 3"),
        ({"step_ends": [3, 6]}, "step 1 is from 3 to 6"),
        ({"step_starts": [1, 0]}, "step 1 is from 0"),
        ({"votes": [[0, 2], [1, -1]]}, "votes must be 1, 0 or -1, got {2}"),
        ({"step_weights": [0.0, "much"]}, "much"),
        ({"outcome": []}, "float"),
        ({"tokens": None}, "NoneType"),
    ],
)
def test_rows_that_contradict_themselves_are_named(tmp_path, change, words):
    with pytest.raises(UsageError, match=re.escape(words)) as error:
        read_samples(file_of(tmp_path, row(), row(**change)))
    assert "samples.jsonl, row 2" in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(UsageError, match="row 1: no 'advantages'"):
        read_samples(path)
    path.write_text("[1]\n")
    with pytest.raises(UsageError, match="row 1"):
        read_samples(path)
    path.write_text("no\n")
    with pytest.raises(UsageError, match="metrics.jsonl:1: not JSON"):
        read_samples(path)
    path.write_text(json.dumps(row()) + '\n{"response_id": "b", "adv')  # a run is writing it
    assert [sample.id for sample in read_samples(path)] == ["a"]


def test_wanted_ones_up_to_a_number(tmp_path):
    path = file_of(tmp_path, *(row(response_id=str(number), outcome=number % 2) for number in range(9)))
    found = read_samples(path, wanted=lambda sample: "right" in sample.kinds, most=3)
    assert [sample.id for sample in found] == ["1", "3", "5"]


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("where", ["tokens", "prompt", "response_id", "group_id", "critiques"])
def test_hostile_text_stays_text(tmp_path, where):
    value = {"tokens": [HOSTILE, "+2", "\n\n", "4", "!"], "critiques": [HOSTILE]}.get(where, HOSTILE)
    samples = read_samples(file_of(tmp_path, row(**{where: value})))
    page = to_html(samples, "title")
    page.encode()
    parsed = Page(page)
    assert not parsed.tags & {"script", "img"}
    assert not parsed.attributes & {"onerror", "src", "href"}
    assert "<script>alert(1)</script>" in "".join(parsed.text)
    assert "default-src 'none'" in page
    out = io.StringIO()
    print_samples(samples, Console(file=out, width=400, force_terminal=False), replies=True)
    shown = out.getvalue()
    assert "[red]x[/red]" in shown
    for text in (page, shown):
        assert not set(text) & set("\x1b\x07\r\u202e\udc80")
        assert "\u241b[2J" in text


def test_a_page_has_everything(tmp_path):
    samples = read_samples(file_of(tmp_path, row(), row(response_id="b", outcome=None, votes=[[0, 0], [0, 0]])))
    page = to_html(samples, "title", "note")
    text = "".join(Page(page).text)
    for words in ("group 3", "2 + 2?", "right", "undecided", "○·", "●·", "+0.500", "-1.000", "Judgment: No", "note"):
        assert words in text, words
    assert "all 2" in text and "right 1" in text and "undecided 1" in text and 'id="only-wrong"' not in page
    assert page.count("2 + 2?") == 1  # the prompt of a group is there once
    assert 'title="advantage -1, 1 tokens">4<' in page


def test_colours_follow_sign_and_size():
    sizes = [1e-3, 0.5, 1.0]
    parts = [Part([Run(f"x{sign}{size}", 1, sign * size)], 0) for size in sizes for sign in (1, -1)]
    page = to_html([Sample("a", "g", 1.0, [*parts, Part([Run("nothing", 1, 0.0)], 1)])], "t")
    strength = {}
    for kind, percent, text in re.findall(r'<span class=(\w+) style="--s:(\d+)%" title="[^"]*">([^<]*)<', page):
        strength[text] = (1 if kind == "plus" else -1) * int(percent)
    assert strength["nothing"] == 0
    for sign in (1, -1):
        shown = [sign * strength[f"x{sign}{size}"] for size in sizes]
        assert 0 < shown[0] < shown[1] < shown[2]


def test_empty_responses(tmp_path):
    empty = {
        name: [] for name in ("tokens", "advantages", "step_starts", "step_ends", "step_weights", "votes", "critiques")
    }
    samples = read_samples(file_of(tmp_path, row(**empty, prompt=None)))
    assert samples[0].parts == []
    assert "right 1" in to_html(samples, "t")
    print_samples(samples, Console(file=io.StringIO()))


def test_command_line_on_a_samples_file(tmp_path):
    path = file_of(tmp_path, row(), row(response_id="b", outcome=0.0))
    shown = CliRunner().invoke(app, ["view", str(path), "--only", "wrong"])
    assert shown.exit_code == 0 and "b  wrong, group 3" in shown.stdout and "a  right" not in shown.stdout
    assert "Judgment" not in shown.stdout
    assert "Judgment" in CliRunner().invoke(app, ["view", str(path), "--response", "a"]).stdout
    page = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["view", str(path), "--html", str(page)]).exit_code == 0
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    nothing = CliRunner().invoke(app, ["view", str(path), "--only", "undecided"])
    assert isinstance(nothing.exception, UsageError) and "no such response" in str(nothing.exception)
    missing = CliRunner().invoke(app, ["view", str(tmp_path / "none.jsonl")])
    assert isinstance(missing.exception, UsageError)


def test_what_score_wrote(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra 'score' is not installed")
    pytest.importorskip("orjson", reason="the extra 'score' is not installed")
    from capo.score import score_file

    table = TokenBytes([b"a", b"\n\n", b"b", b"c"])
    rollouts, critiques, out = (tmp_path / name for name in ("rollouts.jsonl", "critiques.jsonl", "shaped.parquet"))
    rollouts.write_text(
        '{"prompt": "other", "responses": [{"id": "z", "token_ids": [3], "outcome": 1}]}\n'
        '{"prompt": [{"role": "user", "content": "spell"}], "responses": ['
        '{"id": "x", "token_ids": [0, 1, 2, 3], "outcome": 1}, {"id": "y", "token_ids": [2], "outcome": 0}]}\n'
    )
    critiques.write_text(
        '{"prompt_index": 1, "response_index": 0, "critiques": [{"flagged": [1]}, null, {"flagged": [], "valid": false, '
        '"error": "too_long"}]}\n{"nonsense": 1}\n{"response_id": "y", "critiques": ["Judgment: Yes"]}\n'
    )
    score_file(rollouts, critiques, table, out)
    x, y = read_samples(out, table, rollouts=rollouts, critiques=critiques, wanted=lambda sample: sample.group == "1")
    assert [("".join(run.text for run in part.runs), part.number, list(part.votes)) for part in x.parts] == [
        ("a", 0, [0, -1, -1]), ("\n\nbc", 1, [1, -1, -1])
    ]  # fmt: skip
    assert x.prompt == y.prompt == "spell"
    assert x.replies == ["flagged: [1]", "no reply", "invalid: too_long"] and y.replies == ["Judgment: Yes"]
    pq = pytest.importorskip("pyarrow.parquet")
    written = pq.read_table(out).to_pylist()[1]["advantages"]
    assert [run.advantage for part in x.parts for run in part.runs for _ in range(run.num_tokens)] == written
    with pytest.raises(UsageError, match="--tokenizer"):
        read_samples(out)
    rollouts.write_text('{"prompt": "other"}\n{"prompt": ["spell"]}\n')
    with pytest.raises(UsageError, match="rollouts.jsonl:2: prompt must be a string or a list of messages"):
        read_samples(out, table, rollouts=rollouts)
    with pytest.raises(UsageError, match=r"token 3, but the tokenizer has 2 tokens"):
        read_samples(out, TokenBytes([b"a", b"b"]))
    with pytest.raises(UsageError, match="not a parquet file"):
        (tmp_path / "no.parquet").write_bytes(b"no")
        read_samples(tmp_path / "no.parquet", table)
    pq.write_table(pq.read_table(out).drop(["votes"]), tmp_path / "less.parquet")
    with pytest.raises(UsageError, match="no column votes"):
        read_samples(tmp_path / "less.parquet", table)
