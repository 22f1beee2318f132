import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capo.verify import AnswerTooLong, Outcome, Verifier, final_answer

RIGHT, WRONG, UNDECIDED = Outcome


def outcome(response, answer, **options):
    return Verifier(**options).verify([response], [answer])[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7+5=2\n\n#2", 2),
        ("so\n#### 42\n", 42),
        ("#### 42.", 42),
        ("####42", 42),
        ("# $1,234$", 1234),
        ("#-3", -3),
        ("# 3/4", Fraction(3, 4)),
        ("# 0.75", Fraction(3, 4)),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{-\dfrac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{\frac{-3}{4}}.", Fraction(-3, 4)),
        (r"\boxed{1} then \boxed{2}", 2),
        (r"\boxed{1} then \boxed{2", 1),  # the last one is not complete
        (r"\boxed{\boxed{3}}", 3),
        (r"{\boxed{3}}", 3),
        (r"\boxed{4} and \boxed{}", 4),
        (r"\boxed{4} and \boxed{x}", 4),
        ("#5\n" + r"\boxed{6}", 6),
        (r"\boxed{6}" + "\n#5", 5),
        ("# Step 1\n#3", 3),
        ("#3\n# The end", 3),
        ("1/2", None),  # no marker
        ("# 3 or 4", None),
        ("# 1, 2, 3, 4", None),
        ("# 1,2,3", None),
        ("# 1.000,5", None),
        ("# 50%", None),
        ("# 5 apples", None),
        ("# −1", None),  # a minus sign that is not ASCII
        ("# １", None),  # full-width digit
        ("# ٣", None),  # Arabic digit
        ("# 1e3", None),
        ("# 0x10", None),
        ("# 1_000", None),
        ("# nan", None),
        ("# inf", None),
        ("# 1/0", None),
        ("# 0/0", None),
        (r"\boxed{\frac12}", None),
        ("# .5", None),
        ("#", None),
        ("", None),
    ],
)
def test_final_answer(text, value):
    assert final_answer(text) == value


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("#2", "2", RIGHT),
        ("#2", "3", WRONG),
        ("#0.5", "1/2", RIGHT),
        (r"\boxed{\frac{2}{4}}", "0.50", RIGHT),
        ("#0.3333333333333333", "1/3", WRONG),  # exact, not close
        ("#9007199254740993", "9007199254740992", WRONG),  # equal as floats
        ("#1,000", "1000", RIGHT),
        ("#-0", "0", RIGHT),
        ("no answer", "2", WRONG),
        ("#2", "#### 2", RIGHT),
        ("#2", r"long solution \boxed{2}", RIGHT),
        ("#2", "x + 1", UNDECIDED),  # the fault is not the response's
        ("#2", "", UNDECIDED),
        ("#1 #2 #3", "2", WRONG),
        ("#2\n#3", "2", WRONG),
    ],
)
def test_outcomes(response, answer, expected):
    assert outcome(response, answer) is expected


@given(
    st.fractions(max_denominator=10**6),
    st.fractions(max_denominator=10**6),
    st.sampled_from(["#{}", "####  {}\n", r"text \boxed{{{}}} text"]),
)
def test_fractions_are_compared_exactly(value, other, form):
    assert final_answer(form.format(value)) == value
    assert outcome(form.format(value), str(other)) is (RIGHT if value == other else WRONG)


def test_rewards():
    assert RIGHT.reward == 1 and WRONG.reward == 0 and UNDECIDED.reward != UNDECIDED.reward


def test_long_numbers_are_undecided():
    assert outcome("#" + "1" * 100, "1") is WRONG
    assert outcome("#" + "1" * 101, "1") is UNDECIDED
    assert outcome("#1", "1" * 101) is UNDECIDED
    assert outcome("#" + "1" * 4000, "1" * 4000, max_digits=4000) is RIGHT
    with pytest.raises(AnswerTooLong):
        final_answer("#0." + "0" * 200 + "1")


@pytest.mark.parametrize("attack", ["__import__('os').system('touch {}')", "().__class__", "exec('1')", "9**9**9**9"])
def test_nothing_is_evaluated(tmp_path, attack):
    marker = tmp_path / "marker"
    text = attack.replace("{}", str(marker))
    for form in ("#{}", "\\boxed{{{}}}", "\\boxed{{[{}]}}", "\\boxed{{\\pi {}}}"):
        assert outcome(form.format(text), "1") is WRONG
        assert outcome("#1", form.format(text)) is UNDECIDED
    assert not marker.exists()


HOSTILE = {
    "nested boxes": lambda n: "\\boxed{" * n + "}" * n,
    "unclosed boxes": lambda n: "\\boxed{" * n,
    "braces": lambda n: "\\boxed{" + "{" * n + "}" * n + "}",
    "hashes": lambda n: "#" * n + "x",
    "spaced hashes": lambda n: "# " * n + "x",
    "blanks": lambda n: "#" + " " * n + "#x",
    "blank lines": lambda n: "# \n" * n,
    "commas": lambda n: "#" + "1,000" * n,
    "groups": lambda n: "#1" + ",000" * n + "x",
    "digits": lambda n: "#" + "1" * n + "x",
    "slashes": lambda n: "#" + "1/" * n,
    "signs": lambda n: "#" + "-" * n,
    "boxes in a row": lambda n: "\\boxed{x}" * n,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_is_linear(name):
    def seconds(size):
        text = HOSTILE[name](size)
        began = time.process_time()
        outcome(text, "1")
        return time.process_time() - began

    # A quadratic scan of a hundred thousand repeats takes minutes.
    assert seconds(100_000) < 1.0


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="1 responses, but 2 answers"):
        Verifier().verify(["#1"], ["1", "2"])
    with pytest.raises(ValueError, match="max_digits"):
        Verifier(max_digits=0)
    with pytest.raises(ValueError, match="max_digits"):
        Verifier(max_digits=5000)
