import io

import pytest
from rich.console import Console

from capo.progress import stage


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (7, 7), (10, 10), (60, 10), (700, 10), (705, 10)])
def test_plain_lines_where_there_is_no_terminal(total, lines):
    output = io.StringIO()
    with stage(Console(file=output), "name", total) as show:
        for step in range(1, total + 1):
            show(step, "a text that is longer than eighty columns " * 3)
    written = output.getvalue().splitlines()
    assert len(written) == lines
    assert written[-1].startswith(f"name {total}/{total} ") and "/s a text" in written[-1]


def test_a_bar_on_a_terminal():
    output = io.StringIO()
    with stage(Console(file=output, force_terminal=True, width=120), "name", 5, done=2) as show:
        for step in (3, 4, 5):
            show(step, f"text {step}")
    assert "5/5" in output.getvalue() and "text 5" in output.getvalue()


def test_a_stage_of_no_length():
    with stage(Console(file=io.StringIO()), "name", 0):
        pass
