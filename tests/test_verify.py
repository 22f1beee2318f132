import ast
import asyncio
import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import capo.verify
from capo.answers import MAX_CHARS, Number, choice, chosen, clean, extract, read
from capo.metrics import verifier_metrics
from capo.verify import AnswerTooLong, Outcome, Verifier, VerifierError, final_answer

RIGHT, WRONG, UNDECIDED = Outcome
PLAIN = Verifier(engine="plain")
ROOT = Path(capo.verify.__file__).parent
SOLUTIONS = ROOT.parents[1] / "shared" / "data" / "gsm8k_solutions.jsonl"
if not SOLUTIONS.exists():  # a checkout beside others
    SOLUTIONS = ROOT.parents[2] / "shared" / "data" / "gsm8k_solutions.jsonl"

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")


def boxed(text):
    return rf"so \boxed{{{text}}}"


def outcome(response, answer, verifier=PLAIN):
    return verifier.verify([response], [answer])[0]


def reason(response, answer, verifier):
    before = verifier.counts
    verifier.verify([response], [answer])
    return next(name for name in verifier.counts - before if name != "compared")


@pytest.fixture(scope="module")
def verifier():
    with Verifier(engine="math-verify", timeout=20, cpu=20, workers=4) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def strict():
    """One with the usual number of workers and little time."""
    with Verifier(engine="math-verify", timeout=3, cpu=3) as verifier:
        verifier.start()
        yield verifier


def processes(verifier):
    """The nursery and its workers."""
    nursery = verifier._pool.pid
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == nursery and fields[0] not in "ZX":
            found.append(int(status.parent.name))
    return nursery, [pid for pid in found if pid != nursery]


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


# ---- where the answer stands


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),  # the last one is not complete
        (r"\boxed{1} then \boxed{ }", "1"),
        (r"\boxed{1} then \boxed{{}}", "1"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{1 + \boxed{2}", "2"),
        (r"{\boxed{3}}", "3"),
        (r"{ \boxed{3}", "3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed {4}", "4"),
        (r"\fbox{4}", "4"),
        ("```python\nprint(r'\\boxed{5}')\n```", "5"),
        (r"\boxed", None),
        (r"\\boxed{3}", None),  # a line break, then a word
        (r"\boxed{6}" + "\n#### 5", "6"),  # a box counts before anything else
        ("#### 5\nThe answer is 6", "5"),
        ("7+5=2\n\n#2", "2"),
        ("# Step 1\n#3", "3"),
        ("#3\n# The end", "3"),
        ("#### x + 1\n", "x + 1"),
        ("#### Step 2\ntext", None),  # a heading
        ("### Result\nThe answer is 5", "5"),
        ("# 3 or 4", None),
        ("A: 26", "26"),
        ("so\nA: $26$\n", "26"),
        ("A: 26\nA: 27", "27"),
        ("A: 5\nB: 6\nC: 7", None),  # options
        ("A: 5\nB: 6\nThe answer is (B).", "(B)."),
        ("The answer is 5. I hope it is right.", "5"),
        ("The answer is 4.5", "4.5"),
        ("The answer is $x+1$, as said.", "x+1"),
        ("**Answer:** 42", "42"),
        ("**Final Answer**: 42", "42"),
        ("Answer:\n\n42", "42"),
        ("the correct option is C", "C"),
        ("Answer: 1\nAnswer: ", "1"),
        ("Answer:", None),
        ("1/2", None),  # no form
        ("#", None),
        ("", None),
    ],
)
def test_extraction(text, written):
    assert extract(text) == written


def test_forms_are_a_choice():
    text = "A: 1\n" + r"\boxed{2}" + "\n#### 3"
    found = {form: extract(text, [form]) for form in ("boxed", "hashes", "answer", "bare")}
    assert found == {"boxed": "2", "hashes": "3", "answer": "1", "bare": text}
    assert extract(text, ["answer", "boxed"]) == "1"
    only = Verifier(engine="plain", forms=["hashes"])
    assert only.verify([text, boxed(3)], ["3", "3"]) == [RIGHT, WRONG]
    assert Verifier(engine="plain", forms=["bare"]).verify(["3", "#### 3"], ["3", "3"]) == [RIGHT, WRONG]


@given(st.text(alphabet="{}\\boxed1 \n#A:", max_size=60))
def test_extraction_takes_any_text(text):
    written = extract(text)
    assert written is None or (written in text and written.strip())
    assert PLAIN.verify([text], ["1"])[0] in Outcome


# ---- plain answers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("+42", 42),
        ("-0", 0),
        ("−1", -1),  # U+2212
        ("１２", 12),  # full-width digits
        ("٣", None),  # other digits are not read
        ("1,234", 1234),
        ("1{,}234", 1234),
        (r"1\,234", 1234),
        ("1 234", 1234),
        ("1,234,567.5", Fraction("1234567.5")),
        ("1,23", None),
        ("1.000,5", None),
        ("1,2,3", None),
        ("0.75", Fraction(3, 4)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("3/4", Fraction(3, 4)),
        ("1.5/2", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac34", Fraction(3, 4)),
        (r"-\tfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("1e3", 1000),
        (r"1.5 \times 10^{3}", 1500),
        (r"2\cdot10^{-2}", Fraction(1, 50)),
        ("1.5 million", 1500000),
        ("2 dozen", 24),
        ("50%", Fraction(1, 2)),
        (r"50\%", Fraction(1, 2)),
        ("50 percent", Fraction(1, 2)),
        ("$5", 5),
        (r"\$5.50", Fraction(11, 2)),
        (r"$\$5$", 5),
        ("-$5", -5),
        ("5 apples", 5),
        (r"5\text{ cm}", 5),
        (r"5\ \mathrm{cm}^2", 5),
        ("5cm", 5),
        (r"30^\circ", 30),
        ("30°", 30),
        ("60 miles per hour", 60),
        (r"\boxed{7}", 7),
        (r"\(7\)", 7),
        ("$$7$$", 7),
        ("**7**.", 7),
        (r"\text{7}", 7),
        ("{7}", 7),
        ("= 7", 7),
        ("5x", None),
        ("5 x", None),
        ("5 pi", None),
        ("5 and a half", None),
        ("5 or 6", None),
        ("5 squared", None),
        ("3 4", None),
        ("0x10", None),
        ("1_000", None),
        ("--3", None),
        ("nan", None),
        ("inf", None),
        ("1/0", None),
        ("0/0", None),
        ("1/0.0", None),
        (r"\frac{1}{0}", None),
        (r"\pm 2", None),
        ("12:30", None),
        ("", None),
    ],
)
def test_numbers(text, value):
    number = read(text)
    assert (number.value / (100 if number.percent else 1) if isinstance(number, Number) else None) == value
    assert final_answer(boxed(text)) == value or not text


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("1/2", "0.5", RIGHT),
        ("0.3333333333333333", "1/3", WRONG),  # exact, not close
        ("9007199254740993", "9007199254740992", WRONG),  # equal as floats
        ("50%", "0.5", RIGHT),
        ("50%", "50", RIGHT),  # percent may be the unit that is asked for
        ("0.5%", "0.5", WRONG),
        ("0.5%", "0.005", RIGHT),
        ("50%", "50%", RIGHT),
        ("50%", "51%", WRONG),
        ("1,000", "1000", RIGHT),
        ("1.000,5", "1000.5", (UNDECIDED, WRONG)),  # unreadable: undecided as known answer, wrong as response
        ("−1", "-1", RIGHT),
        ("１", "1", RIGHT),
        ("5 apples", "5", RIGHT),
        ("5 apples", "5 apple", RIGHT),
        ("5 cm", "5 m", UNDECIDED),  # units are not converted
        ("500 cm", "5 m", UNDECIDED),
        ("$5", "5 dollars", RIGHT),
        ("Monday", "monday", RIGHT),
        (r"\text{Monday}", "Monday", RIGHT),
        ("even", "neve", WRONG),
        ("Monday", "5", WRONG),
        ("undefined", "undefined", RIGHT),
        ("nan", "5", (UNDECIDED, WRONG)),
        ("nan", "nan", RIGHT),  # the same text
        ("2 + x", "2+x", (UNDECIDED, UNDECIDED)),
    ],
)
def test_pairs_of_plain_answers_either_way(first, second, expected):
    both = expected if isinstance(expected, tuple) else (expected, expected)
    assert (outcome(boxed(second), first), outcome(boxed(first), second)) == both


@given(
    st.fractions(max_denominator=10**6),
    st.fractions(max_denominator=10**6),
    st.sampled_from(["#{}", "####  {}\n", r"text \boxed{{{}}} text", "A: {}", "The answer is {}."]),
)
def test_fractions_are_compared_exactly(value, other, form):
    assert final_answer(form.format(value)) == value
    assert outcome(form.format(value), str(other)) is (RIGHT if value == other else WRONG)


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("The answer is (B).", "B", RIGHT),
        (boxed("B"), "(B)", RIGHT),
        (boxed("b"), "B", RIGHT),
        (boxed(r"\text{(B)}"), "B", RIGHT),
        ("Answer: B) 5 apples", "B", RIGHT),
        ("Answer: C) 5 apples", "B", WRONG),
        ("Answer: (A) or (B)", "B", WRONG),
        ("Answer: A, B", "B", WRONG),
        ("Answer: B or C", "B", WRONG),
        ("Answer: Because", "B", WRONG),
        (boxed("5"), "B", WRONG),
        (boxed("K"), "K", RIGHT),  # no letter of a choice, but the same text
    ],
)
def test_multiple_choice(response, answer, expected):
    assert outcome(response, answer) is expected
    assert choice(answer) == (answer.strip("()") if answer != "K" else None)


@pytest.mark.parametrize(
    "hedge", ["1, 2, 3, 4", "1 or 2 or 3", "all of: 1, 2, 3", "2 and 3", "3; 4", r"3 \text{ or } 4", "not 3"]
)
def test_several_candidates_are_no_answer(hedge):
    assert outcome(boxed(hedge), "3") is WRONG
    assert outcome(f"The answer is {hedge}", "3") is WRONG


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("#2", "2", RIGHT),
        ("#2", "#### 2", RIGHT),
        ("#2", r"long solution \boxed{2}", RIGHT),
        ("#2", "working\nA: 2", RIGHT),
        ("no answer", "2", WRONG),
        ("#1 #2 #3", "2", WRONG),
        ("#2\n#3", "2", WRONG),
        ("#2", "x + 1", UNDECIDED),  # the fault is not the response's
        ("#2", "", UNDECIDED),
        ("#2", " \n", UNDECIDED),
    ],
)
def test_outcomes(response, answer, expected):
    assert outcome(response, answer) is expected


def test_rewards():
    assert RIGHT.reward == 1 and WRONG.reward == 0 and UNDECIDED.reward != UNDECIDED.reward


def test_long_answers_are_undecided():
    assert outcome("#" + "1" * 100, "1") is WRONG
    assert outcome("#" + "1" * 101, "1") is UNDECIDED
    assert outcome("#1", "1" * 101) is UNDECIDED
    assert outcome("#" + "1" * 900, "1" * 900, Verifier(engine="plain", max_digits=1000)) is RIGHT
    for response in ("#" + "1" * 200_000, boxed("1" * 200_000), boxed("x" * (MAX_CHARS + 1)), boxed("1e101")):
        assert reason(response, "1", PLAIN) == "undecided/size"
    with pytest.raises(AnswerTooLong):
        final_answer("#0." + "0" * 200 + "1")


def test_powers_of_ten_are_bounded():
    began = time.process_time()
    for power in ("1e999999999", r"10^{999999999}", r"1 \times 10^{999999999}", "1e-999999999", "10^{10^{10}}"):
        assert outcome(boxed(power), "1") is not RIGHT
        assert outcome(boxed("1"), power) is UNDECIDED
    assert time.process_time() - began < 1


# ---- speed of what is done in this process


HOSTILE = {
    "nested boxes": lambda n: "\\boxed{" * n + "}" * n,
    "unclosed boxes": lambda n: "\\boxed{" * n,
    "spaced boxes": lambda n: "\\boxed" + " " * n,
    "braces": lambda n: "\\boxed{" + "{" * n + "}" * n + "}",
    "backslashes": lambda n: "\\" * n,
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
    "phrases": lambda n: "answer is " * n,
    "lines of phrases": lambda n: "A:\n" * n,
    "options": lambda n: "A: 1\n" + "\n" * n + "C",
    "stars": lambda n: "answer" + "*" * n,
    "phrase and blanks": lambda n: "answer" + " " * n,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_is_linear(name):
    text = HOSTILE[name](100_000)
    began = time.process_time()
    outcome(text, "1")
    outcome("#1", text)
    # A quadratic scan of a hundred thousand repeats takes minutes.
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        "}",
        "\\text{",
        "$",
        "**",
        "1 ",
        "1,000",
        " 000",
        "a ",
        "a-",
        "\\frac",
        "^",
        "\\,",
        " / a",
        "(A) ",
        "`",
        ".",
        "^2",
    ],
)
def test_reading_an_answer_of_the_longest_kind_is_fast(piece):
    for text in (piece * (MAX_CHARS // len(piece)), "1" + piece * ((MAX_CHARS - 2) // len(piece)) + "!"):
        began = time.process_time()
        for use in (read, clean, choice, chosen):
            try:
                use(text)
            except AnswerTooLong:
                pass
        assert time.process_time() - began < 0.25


# ---- arguments, counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_digits": 0}, "max_digits must be in 1..1000, got 0"),
        ({"max_digits": 5000}, "max_digits"),
        ({"forms": []}, "forms must be some of boxed, hashes, answer, bare, got"),
        ({"forms": ["box"]}, "forms"),
        ({"forms": "boxed"}, "forms"),
        ({"engine": "sympy"}, "engine must be auto, plain or math-verify, got 'sympy'"),
        ({"timeout": 0}, "timeout must be in 0.01..3600 seconds, got 0"),
        ({"timeout": float("nan")}, "timeout"),
        ({"cpu": float("inf")}, "cpu"),
        ({"memory_mib": 0}, "memory_mib"),
        ({"workers": 0}, "workers must be in 1..400, got 0"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Verifier(**options)


def test_lengths_are_checked():
    with pytest.raises(ValueError, match="1 responses, but 2 answers"):
        PLAIN.verify(["#1"], ["1", "2"])


def test_counts_and_metrics():
    verifier = Verifier(engine="plain")
    verifier.verify(["#1"], ["1"])
    before = verifier.counts, verifier.seconds
    verifier.verify(["#1", "#2", "#1", boxed("5 cm"), "#1"], ["1", "1", "", "5 m", "x+y"])
    counts = verifier.counts - before[0]
    assert counts == {"right": 1, "wrong": 1, "undecided/parse": 1, "undecided/unit": 1, "undecided/engine": 1}
    metrics = verifier_metrics(verifier, *before)
    assert metrics.pop("capo/time/verify") == verifier.seconds - before[1] > 0
    assert metrics == {"capo/undecided/engine": 1, "capo/undecided/parse": 1, "capo/undecided/unit": 1}


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'capo\[verify\]'"):
        Verifier(engine="math-verify")
    verifier = Verifier()
    assert reason(boxed("1+x"), "x+1", verifier) == "undecided/engine"
    assert reason(boxed("x"), "5", verifier) == "undecided/engine"
    assert outcome(boxed("5"), "5", verifier) is RIGHT


def test_a_broken_reader_is_noticed_at_the_start(monkeypatch):
    monkeypatch.setattr(capo.verify, "read", lambda written, max_digits: None)
    with pytest.raises(VerifierError, match="self-test failed"):
        Verifier(engine="plain")


# ---- nothing of the answers is run


ATTACKS = [
    "__import__('os').system('touch CANARY')",
    "__import__('pathlib').Path('CANARY').touch()",
    "().__class__.__bases__[0].__subclasses__()",
    'f\'{open("CANARY","w")}\'',
    "lambda: open('CANARY','w')",
    "exec(\"open('CANARY','w')\")",
    r"\pi __import__('os').system('touch CANARY')",
    "[__import__('os').system('touch CANARY')]",
    r"\begin{pmatrix} __import__('os').system('touch CANARY') \end{pmatrix}",
    r"\operatorname{exec}(open('CANARY','w'))",
    r"\text{__import__('os').system('touch CANARY')}",
    r"\input{/etc/passwd}",
    r"\write18{touch CANARY}",
    "Symbol('x'); import os",
    "x.__init__.__globals__",
    "1 if open('CANARY','w') else 2",
    'S(\'__import__("os").system("touch CANARY")\')',
    "N(eval('1'))",
    "sympify('1')",
    "import math_verify; math_verify.verify = lambda *a, **k: True",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_is_not_an_answer(attack):
    assert outcome(boxed(attack), "1") is WRONG
    assert outcome("#1", boxed(attack)) is UNDECIDED
    assert outcome("#1", attack) is UNDECIDED


def test_no_file_calls_what_evaluates_text():
    names = {"eval", "exec", "compile", "sympify", "parse_expr", "__import__", "literal_eval", "lambdify"}
    for file in ("answers.py", "verify.py", "verify_pool.py", "verify_worker.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            name = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            # re.compile takes patterns of ours.
            assert name not in names or ast.unparse(called) == "re.compile", f"{file}:{node.lineno}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "pickle" not in ast.unparse(node), f"{file}:{node.lineno}"
    for file in ("answers.py", "verify.py", "verify_pool.py"):
        assert "SIGALRM" not in (ROOT / file).read_text() and "import signal" not in (ROOT / file).read_text()


@needs_math_verify
def test_attacks_run_nothing_here_or_in_a_worker(tmp_path):
    """In a process of its own, as an audit hook cannot be taken off again."""
    script = f"""
    import json, os, signal, sys
    from capo.verify import Verifier
    attacks = {ATTACKS!r}
    verifier = Verifier(engine="math-verify", timeout=20)
    verifier.start()
    seen = []
    sys.addaudithook(lambda event, args: event in {{"exec", "compile", "os.system", "subprocess.Popen"}}
                     and seen.append(event) or event.startswith("socket.") and seen.append(event))
    handlers = [signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGCHLD)]
    boxed = [r"\\boxed{{%s}}" % attack.replace("CANARY", {str(tmp_path / "canary")!r}) for attack in attacks]
    first = verifier.verify(boxed, ["x+1"] * len(boxed))
    second = verifier.verify([r"\\boxed{{x-y}}"] * len(boxed), boxed)
    after = verifier.verify([r"\\boxed{{1+x}}", r"\\boxed{{2+x}}"], ["x+1", "x+1"])
    same = handlers == [signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGCHLD)]
    names = [[outcome.value for outcome in outcomes] for outcomes in (first, second, after)]
    print(json.dumps([*names, seen, same]))
    """
    environment = {**os.environ, "CAPO_CANARY": "secret-canary"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    first, second, after, seen, same = json.loads(ran.stdout)
    assert set(first) <= {"wrong", "undecided"} and "right" not in second
    assert after == ["right", "wrong"]
    assert seen == [] and same
    assert not list(tmp_path.iterdir())


@needs_math_verify
@needs_proc
def test_workers_have_limits_and_no_environment(monkeypatch):
    monkeypatch.setenv("CAPO_CANARY", "secret-canary")
    with Verifier(engine="math-verify", workers=2, memory_mib=128) as verifier:
        verifier.start()

        seen = []

        def workers_are_there():
            """And what /proc says of one and of all environments; a process that only forked another may just have ended."""
            nursery, workers = processes(verifier)
            try:
                environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in (nursery, *workers)]
                seen[:] = Path(f"/proc/{workers[0]}/limits").read_text(), environments
            except (OSError, IndexError):
                return False
            return len(workers) == 2

        assert wait_for(workers_are_there)
        limits, environments = seen
        rows = {line[:26].strip(): line[26:].split() for line in limits.splitlines()}
        assert rows["Max file size"][:2] == rows["Max core file size"][:2] == rows["Max processes"][:2] == ["0", "0"]
        assert 128 << 20 < int(rows["Max address space"][1]) < 2 << 30
        assert int(rows["Max open files"][1]) <= 32
        assert not any(b"secret" in environment for environment in environments)


@pytest.fixture(scope="module")
def worker_module():
    spec = importlib.util.spec_from_file_location("worker_under_test", ROOT / "verify_worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("event", "args"),
    [
        ("compile", (b"__import__('os')", "<string>")),
        ("open", ("/tmp/x", "w", 0)),
        ("open", ("/tmp/x", None, os.O_WRONLY)),
        ("os.system", (b"ls",)),
        ("os.fork", ()),
        ("os.remove", ("/tmp/x", -1)),
        ("socket.__new__", ()),
        ("subprocess.Popen", ()),
        ("ctypes.dlopen", ("x",)),
        ("pickle.find_class", ("os", "system")),
    ],
)
def test_what_a_worker_may_not_do(worker_module, event, args):
    with pytest.raises(worker_module.Refused):
        worker_module._forbid(event, args)


@pytest.mark.parametrize(
    ("event", "args"),
    [("open", ("/usr/lib/x.pyc", "r", os.O_CLOEXEC)), ("compile", (b"def monomial_mul(A, B): ...", "<string>")),
     ("compile", (b"x", "/lib/x.py")), ("import", ("x",)), ("os.listdir", ("/",))],
)  # fmt: skip
def test_what_a_worker_may_do(worker_module, event, args):
    worker_module._forbid(event, args)


@pytest.mark.parametrize(
    ("written", "latex"),
    [
        ("x**10", "x^{10}"),
        ("9**9**9", "9^{9^{9}}"),
        ("2*pi*r^2", r"2\cdot \pi \cdot r^{2}"),
        ("sqrt(2)/2", r"\sqrt{2}/2"),
        ("e^-x", "e^{-x}"),
        (r"x^10 \pi", r"x^10 \pi"),
        ("(1, oo)", r"(1, \infty )"),
    ],
)
def test_notation_of_programs(worker_module, written, latex):
    assert worker_module.ascii_to_latex(written) == latex
    began = time.process_time()
    for piece in ("^a", "^ ", "sqrt(", "sqrt ", "**", "pi"):
        worker_module.ascii_to_latex(piece * MAX_CHARS)
    assert time.process_time() - began < 1


# ---- Math-Verify


@needs_math_verify
@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("1+x", "x+1", RIGHT),
        ("x+2", "x+1", WRONG),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", RIGHT),
        ("2*sqrt(3)", r"2\sqrt3", RIGHT),
        (r"\sqrt{16}", "4", RIGHT),
        ("x=5", "5", RIGHT),
        ("5", "x=5", RIGHT),
        (r"\{2,1\}", "1,2", RIGHT),
        ("(1,2)", "(1,2)", RIGHT),
        ("[1,2]", "(1,2)", WRONG),
        ("(1,2)", "[1,2]", WRONG),
        ("(2,1)", "(1,2)", WRONG),
        ("1,2", "(1,2)", RIGHT),  # an open interval or a pair: brackets may be left out
        ("2", r"\pm 2", WRONG),
        ("2, -2", r"\pm 2", RIGHT),
        ("1, 2, 3, 4", "3", WRONG),
        ("3", "1, 2, 3, 4", WRONG),
        ("1 or 3", "3", WRONG),
        ("1 = 3", "3", RIGHT),  # the right side of an equation counts, as in x = 3
        ("x < 2", r"(-\infty, 2)", RIGHT),
        (r"(-\infty, 2)", "x < 2", RIGHT),
        ("2-3i", "2+3i", WRONG),
        (r"\infty", r"\infty", RIGHT),
        (r"-\infty", r"\infty", WRONG),
        ("nan", "5", WRONG),
        (r"\frac{1}{0}", "5", WRONG),
        (r"\frac{0}{0}", "x", WRONG),
        (r"\infty", "5", WRONG),
        ("i", "5", WRONG),
        ("5", r"\frac{1}{0}", UNDECIDED),
        ("5", r"\frac{0}{0}", UNDECIDED),
        ("5", r"\frac{1}{", UNDECIDED),
        ("5", "](", UNDECIDED),
        (r"\frac{1}{", "5", WRONG),
        ("](", "x", WRONG),
        ("x\ny\x00\ud800", "x+1", WRONG),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", RIGHT),
        (r"\begin{pmatrix}1\\2\\3\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", WRONG),
        ("1,000.5", "1000.5", RIGHT),
    ],
)
def test_what_is_not_plain_is_compared(verifier, response, answer, expected):
    assert outcome(boxed(response) if "{" not in response or response.count("{") == response.count("}") else f"#### {response}",
                   answer, verifier) is expected  # fmt: skip


@needs_math_verify
def test_results_are_in_order_and_pairs_are_compared_once(verifier):
    pairs = [("3", "3"), ("x+1", "1+x"), ("4", "3"), ("x+1", "2+x"), ("", "1"), ("y", "y+0"), ("x+1", "1+x")] * 30
    before = verifier.counts
    outcomes = verifier.verify([boxed(given) for _, given in pairs], [known for known, _ in pairs])
    assert outcomes == [RIGHT, RIGHT, WRONG, WRONG, UNDECIDED, RIGHT, RIGHT] * 30
    assert (verifier.counts - before)["compared"] == 120


@needs_math_verify
def test_known_answers_that_are_not_understood_are_counted(verifier):
    assert reason(boxed("5"), r"\frac{1}{", verifier) == "undecided/parse"
    assert reason(boxed("x"), "](", verifier) == "undecided/parse"


def from_here(verifier):
    return [each.value for each in verifier.verify([boxed("1+x"), boxed("x"), boxed("7")], ["x+1", "x+1", "7"])]


@needs_math_verify
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_from_another_process(verifier, method):
    texts, answers = [boxed("1+x"), boxed("x"), boxed("7")], ["x+1", "x+1", "7"]
    assert verifier.verify(texts, answers) == [RIGHT, WRONG, RIGHT]
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context(method)) as process:
        assert process.submit(verifier.verify, texts, answers).result(120) == [RIGHT, WRONG, RIGHT]
    assert verifier.verify(texts, answers) == [RIGHT, WRONG, RIGHT]  # the parent's processes are untouched


@needs_math_verify
def test_from_threads_and_event_loops(verifier):
    expected = from_here(verifier)

    async def in_a_loop():
        here = from_here(verifier)
        others = await asyncio.gather(*(asyncio.to_thread(from_here, verifier) for _ in range(8)))
        return [here, *others]

    assert all(each == expected for each in asyncio.run(in_a_loop()))
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        loops = [threads.submit(asyncio.run, in_a_loop()) for _ in range(2)]
        alone = [threads.submit(from_here, verifier) for _ in range(14)]
        assert all(each.result() == expected for each in alone)
        assert all(each == expected for loop in loops for each in loop.result())


# ---- limits


SLOW = "5^{5^{5^{5^5}}}"
TORTURE = [
    "9**9**9**9",
    SLOW,
    "((9!)!)!",
    "10^{10^{10}}",
    "1" * 200_000,
    "(" * 3000 + "x" + ")" * 3000,
    r"\frac{1}{" * 400 + "x" + "}" * 400,
    "(" * 900 + "x" + ")" * 900,
    r"\frac{1}{" * 180 + "x" + "}" * 180,
    r"\sqrt{" * 250 + "x" + "}" * 250,
]


def slowdown():
    """Wall clock of half a second's work on each core: about 1 on a machine with nothing else to do, 5 beside four others."""
    work = "import time\nwhile time.process_time() < 0.5: pass"
    began = time.monotonic()
    probes = [subprocess.Popen([sys.executable, "-S", "-c", work]) for _ in range(len(os.sched_getaffinity(0)))]
    assert [probe.wait() for probe in probes] == [0] * len(probes)
    return (time.monotonic() - began) / 0.5


@needs_math_verify
@needs_proc
def test_the_torture_set_64_at_a_time(strict):
    """Every hostile answer is undecided by a limit, nothing else suffers, and the pool is well after it."""
    items = [TORTURE[i % len(TORTURE)] + (f"+{i}" if i >= len(TORTURE) else "") for i in range(58)]
    items += ["1+x", "x+3", r"\frac{2x+2}{2}", "x+2-1", "x", "x-1"]
    assert wait_for(lambda: len(processes(strict)[1]) == 64)
    nursery, workers = processes(strict)
    peak, stop = [], threading.Event()

    def watch():
        while not stop.wait(0.1):
            for pid in processes(strict)[1]:
                try:
                    peak.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
                except OSError:
                    pass

    watching = threading.Thread(target=watch)
    watching.start()
    before, slow = strict.counts, slowdown()
    began = time.monotonic()
    outcomes = strict.verify([boxed(item) for item in items], ["x+1"] * 64)
    took = time.monotonic() - began
    stop.set()
    watching.join()
    # The limit of 3 seconds and one more, which is longer where others compute, too; one by one it is two minutes.
    assert took < 3 + max(slow, slowdown())
    assert outcomes[:58] == [UNDECIDED] * 58
    truth = [RIGHT, WRONG, RIGHT, RIGHT, WRONG, WRONG]
    assert all(each in (expected, UNDECIDED) for each, expected in zip(outcomes[58:], truth, strict=True))
    counts = strict.counts - before
    assert set(counts) <= {
        "compared",
        "right",
        "wrong",
        *(f"undecided/{name}" for name in ("timeout", "memory", "size")),
    }
    assert counts["undecided/timeout"] >= 10 and counts["undecided/size"] >= 15
    assert max(peak) < 400 << 20  # what it begins with, and 256 MiB
    assert strict._pool.pid == nursery  # what forks the workers was never in danger
    assert wait_for(lambda: len(processes(strict)[1]) == 64)
    assert from_here(strict) == ["right", "wrong", "right"]
    assert len(set(workers) & set(processes(strict)[1])) < 64


@needs_math_verify
def test_each_limit_by_itself():
    with Verifier(engine="math-verify", timeout=60, cpu=3, memory_mib=32, workers=2) as verifier:
        verifier.start()
        began = time.monotonic()
        assert reason(boxed("5^{5^{5^{5^5}}}"), "x+1", verifier) == "undecided/timeout"
        assert time.monotonic() - began < 50
        assert reason(boxed("2^{10^{9}}"), "x+1", verifier) == "undecided/memory"
        assert outcome(boxed("1+x"), "x+1", verifier) is RIGHT


# ---- death and delay


def begun(verifier, count=1):
    """Wait until so many workers compute."""

    def busy():
        ticks = 0
        for pid in processes(verifier)[1]:
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += int(fields[11]) + int(fields[12]) > 20
        return ticks >= count

    return wait_for(busy)


def busiest(verifier):
    def ticks(pid):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0
        return int(fields[11]) + int(fields[12])

    return max(processes(verifier)[1], key=ticks)


@needs_math_verify
@needs_proc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_worker_that_dies_costs_one_item(verifier, how):
    items = ["1+x", SLOW, *(f"x+{i}" for i in range(2, 12))]
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        before = verifier.counts
        batch = thread.submit(verifier.verify, [boxed(item) for item in items], ["x+1"] * len(items))
        assert begun(verifier)
        os.kill(busiest(verifier), how)
        outcomes = batch.result(30)
    assert outcomes == [RIGHT, UNDECIDED] + [WRONG] * 10
    assert (verifier.counts - before)["undecided/crash"] == 1
    assert from_here(verifier) == ["right", "wrong", "right"]


@needs_math_verify
@needs_proc
def test_the_death_of_the_nursery_is_survived(verifier):
    verifier.start()
    nursery, workers = processes(verifier)
    os.kill(nursery, signal.SIGKILL)
    assert from_here(verifier) == ["right", "wrong", "right"]
    assert verifier._pool.pid != nursery
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        before = verifier.counts
        batch = thread.submit(verifier.verify, [boxed(item) for item in ("1+x", SLOW, "x")], ["x+1"] * 3)
        for _ in range(2):  # what was under way is tried once more
            assert begun(verifier) and not batch.done()
            nursery = verifier._pool.pid
            os.kill(nursery, signal.SIGKILL)
            assert wait_for(lambda gone=nursery: batch.done() or verifier._pool.pid not in (gone, None))
        assert batch.result(60) == [RIGHT, UNDECIDED, WRONG]
        assert (verifier.counts - before)["undecided/crash"] == 1


@needs_math_verify
@needs_proc
def test_the_clock_starts_in_the_worker(strict):
    """A machine so busy that nothing runs for longer than the limit: no answer is lost to it."""
    wait_for(lambda: len(processes(strict)[1]) == 64)
    nursery = strict._pool.pid
    os.kill(nursery, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        batch = thread.submit(from_here, strict)
        time.sleep(4.0)
        assert not batch.done()
        os.kill(nursery, signal.SIGCONT)
        assert batch.result(30) == ["right", "wrong", "right"]


@needs_math_verify
@needs_proc
def test_a_nursery_that_falls_silent_is_replaced(verifier, monkeypatch):
    import dataclasses

    assert from_here(verifier) == ["right", "wrong", "right"]  # it has started, and does not fall silent in that
    monkeypatch.setattr(verifier._pool, "_limits", dataclasses.replace(verifier._pool._limits, stall=2.0))
    nursery = verifier._pool.pid
    os.kill(nursery, signal.SIGSTOP)
    assert from_here(verifier) == ["right", "wrong", "right"]
    assert verifier._pool.pid != nursery and not Path(f"/proc/{nursery}").exists()


@needs_math_verify
@needs_proc
def test_closing_ends_everything_even_a_batch_under_way():
    verifier = Verifier(engine="math-verify", timeout=30, cpu=30, workers=4)
    verifier.start()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        batch = thread.submit(verifier.verify, [boxed(SLOW)], ["x+1"])
        assert begun(verifier)
        nursery, workers = processes(verifier)
        began = time.monotonic()
        verifier.close()
        with pytest.raises(VerifierError, match="closed"):
            batch.result(5)
        assert time.monotonic() - began < 5
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in [nursery, *workers]))
    with pytest.raises(VerifierError, match="the verifier is closed"):
        verifier.verify([boxed("x")], ["x+1"])
    assert outcome(boxed("5"), "5", verifier) is RIGHT
    verifier.close()


def gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@needs_math_verify
@needs_proc
def test_a_verifier_that_is_dropped_ends_its_processes():
    verifier = Verifier(engine="math-verify", workers=1)
    verifier.start()
    group = verifier._pool.pid
    assert not gone(group)
    del verifier
    assert wait_for(lambda: gone(group))


@needs_math_verify
@needs_proc
@pytest.mark.parametrize("end", ["killed", "exits"])
def test_no_process_is_left_behind(end):
    script = f"""
    import threading, time
    from capo.verify import Verifier
    verifier = Verifier(engine="math-verify", timeout=60, cpu=60, workers=2)
    verifier.start()
    threading.Thread(target=verifier.verify, args=([r"\\boxed{{{SLOW}}}"], ["x+1"]), daemon=True).start()
    time.sleep(0.5)
    print(verifier._pool.pid, flush=True)
    if {end!r} == "killed":
        time.sleep(60)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        group = int(child.stdout.readline())
        if end == "killed":
            assert not gone(group)
            child.kill()
        assert wait_for(lambda: gone(group))
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_plain_answers_start_no_process():
    verifier = Verifier()
    verifier.verify(["#1", boxed("1/2"), "no", boxed("B"), boxed("Monday")], ["1", "0.5", "2", "B", "Monday"])
    assert verifier._pool is None or verifier._pool.pid is None


@needs_math_verify
def test_a_wrong_verdict_at_the_start_is_an_error(monkeypatch):
    import capo.verify_pool

    monkeypatch.setattr(capo.verify_pool, "KNOWN_PAIRS", [("x+1", "x+2", "right")])
    with Verifier(engine="math-verify", workers=1) as verifier:
        with pytest.raises(VerifierError, match="self-test failed for 1 of 1 pairs"):
            verifier.start()
        with pytest.raises(VerifierError):
            verifier.verify([boxed("x")], ["x+1"])


def test_nothing_is_trained_with_a_broken_verifier(monkeypatch, tmp_path):
    """Not by an error that a run could come over: nothing is sampled, and no folder is made for it."""
    from capo.config import load_config
    from capo.train import train

    monkeypatch.setattr(capo.verify, "read", lambda written, max_digits: None)
    with pytest.raises(VerifierError, match="self-test failed"):
        train(load_config(None, [f"output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


@needs_math_verify
def test_a_process_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    import capo.verify_pool

    broken = tmp_path / "worker.py"
    for source, message in (
        ("raise SystemExit(3)", "ends at once"),
        ('print(\'{"error": "no such thing"}\')', "no such thing"),
    ):
        broken.write_text(source)
        monkeypatch.setattr(capo.verify_pool, "_SCRIPT", broken)
        with Verifier(engine="math-verify") as verifier, pytest.raises(VerifierError, match=message):
            verifier.verify([boxed("x")], ["x+1"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with Verifier(engine="math-verify") as verifier, pytest.raises(VerifierError, match="does not start"):
        verifier.start()


# ---- real solutions


def test_labels_of_gsm8k():
    if not SOLUTIONS.exists():
        pytest.skip("gsm8k_solutions.jsonl is not there")
    rows = [json.loads(line) for line in SOLUTIONS.read_text(encoding="utf-8").splitlines()]
    pairs = [(each["text"], row["answer"], each["is_correct"]) for row in rows for each in row["responses"]]
    verifier = Verifier()
    outcomes = verifier.verify([text for text, _, _ in pairs], [answer for _, answer, _ in pairs])
    verifier.close()
    decided = [
        (each is RIGHT, label) for each, (_, _, label) in zip(outcomes, pairs, strict=True) if each is not UNDECIDED
    ]
    assert len(pairs) == 5276 and len(pairs) - len(decided) <= 0.002 * len(pairs)
    assert all(given == label for given, label in decided)
