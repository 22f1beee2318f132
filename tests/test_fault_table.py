"""docs/faults.md names tests: each of them is there.

A name alone is that of a test in the file which the section names, or in one that the same row has named.
"""

import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "faults.md"


@cache
def source(file: str) -> str:
    return (TESTS / file).read_text(encoding="utf-8")


def rows():
    """The faults: (the file of their section, the row)."""
    file, inside = "", False
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            file = ""
        elif found := re.match(r"Files: `(test_\w+\.py)`", line):
            file = found[1]
        if line.startswith("| ---"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside:
            yield file, line


def test_every_test_that_the_table_names_exists():
    named, missing = 0, []
    for file, row in rows():
        files = [file] if file else []
        for in_file, test, cut in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)(\.\.\.)?`", row):
            files += [in_file] if in_file else []
            definition = f"def {test}" if cut else f"def {test}("
            named += 1
            if not any(definition in source(name) for name in files):
                missing.append(f"{test}, in {files}")
    assert named > 250
    assert not missing


def test_every_fault_has_a_test():
    faults = [row for _, row in rows()]
    assert len(faults) > 140
    assert [row for row in faults if not re.search(r"test_|::|the same", row)] == []
