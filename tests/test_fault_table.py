"""docs/faults.md names tests: each of them is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "faults.md"


def test_every_test_that_the_table_names_exists():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", TABLE.read_text(encoding="utf-8"))
    assert len(named) > 50
    missing = [
        f"{file}::{test}" for file, test in named if f"def {test}(" not in (TESTS / file).read_text(encoding="utf-8")
    ]
    assert not missing


def test_every_fault_has_a_test():
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if re.match(r"\| (P0)? ?\|", line)]
    rows = [row for row in rows if not row.startswith("| | fault |") and not row.startswith("| | attack |")]
    assert len(rows) > 40
    assert [row for row in rows if "::test_" not in row] == []
