"""Files and tables of comparisons of methods."""

import csv
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'capo[train]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'capo[train]'")

from capo.evaluate import write_comparison

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("example", ["arithmetic", "trl"])
def test_the_table_of_an_example_is_that_of_its_csv(example, tmp_path):
    curves = {}
    with (EXAMPLES / example / "comparison.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault((row["method"], int(row["seed"])), {})[int(row["update"])] = float(row["accuracy"])
    table = write_comparison(curves, tmp_path, "title")
    assert table in (EXAMPLES / example / "README.md").read_text() and table.count("\n") == 10
    assert (tmp_path / "comparison.md").read_text() == table
    written = (tmp_path / "comparison.csv").read_bytes()
    assert written == (EXAMPLES / example / "comparison.csv").read_bytes()
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_updates_that_a_run_lacks_are_in_no_column(tmp_path):
    curves = {
        ("capo", 0): {0: 0.25, 10: 0.5, 20: 1.0},
        ("grpo", 0): {0: 0.25, 20: 0.5},
        ("capo", 1): {0: 0.75, 20: 0.0},
    }
    assert write_comparison(curves, tmp_path, "title").splitlines() == [
        "| method | seed | update 0 | update 20 |",
        "|---|---|---|---|",
        "| capo | 0 | 0.250 | 1.000 |",
        "| capo | 1 | 0.750 | 0.000 |",
        "| capo | mean | 0.500 | 0.500 |",
        "| grpo | 0 | 0.250 | 0.500 |",
        "| grpo | mean | 0.250 | 0.500 |",
    ]
