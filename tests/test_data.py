import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import capo
from capo.config import TaskConfig
from capo.data import DELIMITER, ArithmeticTask
from capo.judges import JudgeRequest
from capo.verify import Outcome, Verifier

TASK = ArithmeticTask(TaskConfig(), seed=0)
VERIFIER = Verifier(engine="plain")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def request(question, text):
    return JudgeRequest(question, None, tuple(text.split(DELIMITER)))


def test_the_reference_solution_is_right_in_every_step_and_in_the_end():
    problems = TASK.problems(200, generator(0))
    assert len({problem.question for problem in problems}) > 190
    for problem in problems:
        assert TASK.check(request(problem.question, problem.solution)) == [False] * 7
        assert VERIFIER.verify([problem.solution], [problem.answer]) == [Outcome.RIGHT]
        assert len(TASK.encode(problem.question)) == TASK.prompt_length
        assert len(TASK.encode(problem.solution)) + 1 == TASK.response_length


def test_solutions_are_computed_from_left_to_right_modulo_ten():
    for problem in TASK.problems(200, generator(1)):
        value = int(problem.question[0])
        for operator, operand in zip(problem.question[1:-1:2], problem.question[2:-1:2], strict=True):
            value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[operator] % 10
        assert problem.answer == str(value)


def test_held_out_problems_are_never_trained_on():
    small = TaskConfig(steps=2, operators="+-")  # few enough that any overlap would show
    trained, held_out = set(), set()
    for seed in range(5):
        task = ArithmeticTask(small, seed)
        trained |= {problem.question for problem in task.problems(5000, generator(seed))}
        trained |= {task.decode(demo[: task.prompt_length]) for demo in task.demos(5000, generator(seed)).tolist()}
        held_out |= {problem.question for problem in task.problems(2000, generator(seed), held_out=True)}
    number = 10 * (2 * 9) ** 2
    assert not trained & held_out
    assert len(trained | held_out) > 0.99 * number
    assert 0.03 < len(held_out) / number < 0.1


def test_a_tiny_task_repeats_its_few_held_out_problems():
    problems = ArithmeticTask(TaskConfig(steps=1, operators="+"), 0).problems(50, generator(0), held_out=True)
    assert len(problems) == 50 and 1 <= len(set(problems)) < 20


def test_demos_err_on_fixed_facts_in_a_fixed_way_and_carry_on():
    task = ArithmeticTask(TaskConfig(misconceptions=0.4, misconception_rate=0.6), seed=3)
    seen: dict[str, dict[str, int]] = {}
    for demo in task.demos(4000, generator(0)).tolist():
        assert demo[-1] == task.eos_id
        question, text = task.decode(demo[: task.prompt_length]), task.decode(demo[task.prompt_length :])
        *steps, answer = text.split(DELIMITER)
        value = question[0]
        for step in steps:
            fact, result = step.split("=")
            assert fact[0] == value  # each step goes on from what the one before has written
            seen.setdefault(fact, {}).setdefault(result, 0)
            seen[fact][result] += 1
            value = result
        assert answer == f"#{value}"
    believed = 0
    for fact, results in seen.items():
        a, operator, b = int(fact[0]), fact[1], int(fact[2])
        true = str({"+": a + b, "-": a - b, "*": a * b}[operator] % 10)
        wrong = results.keys() - {true}
        assert len(wrong) <= 1  # one misconception, always the same
        if wrong:
            believed += 1
            assert 0.35 < sum(results[result] for result in wrong) / sum(results.values()) < 0.85
    assert len(seen) == 270 and 0.3 < believed / 270 < 0.5


def test_demos_without_misconceptions_are_right():
    for config in (TaskConfig(misconceptions=0.0), TaskConfig(misconception_rate=0.0)):
        task = ArithmeticTask(config, 0)
        for demo in task.demos(100, generator(0)).tolist():
            question, text = task.decode(demo[: task.prompt_length]), task.decode(demo[task.prompt_length :])
            assert not any(task.check(request(question, text)))


def test_seeds():
    def demos(seed, draw):
        return ArithmeticTask(TaskConfig(), seed).demos(50, generator(draw))

    assert torch.equal(demos(0, 0), demos(0, 0))
    assert not torch.equal(demos(0, 0), demos(0, 1))
    prompts = TASK.prompt_length
    assert torch.equal(demos(0, 0)[:, :prompts], demos(1, 0)[:, :prompts])
    assert not torch.equal(demos(0, 0), demos(1, 0))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("7+5=2|2*3=6|#6", []),
        ("7+5=3|3*3=9|#9", [0]),  # later steps build on the error, but make none
        ("7+5=2|2*3=7|#7", [1]),
        ("7+5=3|2*3=6|#6", [0, 1]),  # the second did not copy what was written: a mistake of its own
        ("7+5=2|2*3=6|#7", [2]),
        ("7+6=3|3*3=9|#9", [0]),  # another operand than the question's
        ("7-5=2|2*3=6|#6", [0]),  # another operator
        ("8+5=3|3*3=9|#9", [0]),  # another start
        ("7+5=2|2+3=5|#5", [1]),
        ("2*3=6|7+5=2|#2", [0, 1]),  # right facts, wrong places
        ("7+5=2|#2", [1]),  # a step left out
        ("7+5=2|2*3=6|6+1=7|#7", [2, 3]),  # one too many
        ("7+5=2|2*3=6|#6|#6", [3]),
        ("7+5=12|2*3=6|#6", [0]),  # unreadable; what follows is judged by itself
        ("nonsense|2*3=6|#6", [0]),
        ("7+5=2|2*3=|#6", [1]),
        ("7+5=2|2*3=6|6", [2]),
        ("7+5=2|2*3=6|#", [2]),
        ("7+5=2", []),
        ("#2", [0]),
    ],
)
def test_checker(text, wrong):
    steps = text.split("|")
    task = ArithmeticTask(TaskConfig(steps=2), 0)
    labels = task.check(JudgeRequest("7+5*3=", None, tuple(f"\n\n{step}" for step in steps)))
    assert [index for index, label in enumerate(labels) if label] == wrong
    assert len(labels) == len(steps)


@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 9))
def test_a_wrong_result_is_flagged_in_its_own_step_only(seed, step, shift):
    problem = TASK.problems(1, generator(seed))[0]
    steps = problem.solution.split(DELIMITER)
    value = None
    for index, text in enumerate(steps):
        if value is not None:  # go on from the wrong result
            operands = f"{value}{text[1:3]}" if "=" in text else ""
            value = str(eval_step(operands)) if operands else value
            steps[index] = f"{operands}={value}" if operands else f"#{value}"
        elif index == step:
            value = str((int(text[-1]) + shift) % 10)
            steps[index] = text[:-1] + value
    labels = TASK.check(JudgeRequest(problem.question, None, tuple(steps)))
    assert [index for index, label in enumerate(labels) if label] == [step]


def eval_step(text):
    a, operator, b = int(text[0]), text[1], int(text[2])
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


@given(st.lists(st.sampled_from([*"0123456789+-*=#", DELIMITER])))
def test_encode_and_decode_are_inverse(tokens):
    text = "".join(tokens)
    ids = TASK.encode(text)
    assert len(ids) == len(tokens) and TASK.decode([*ids, TASK.eos_id]) == text


@pytest.mark.parametrize("text", ["7 + 5", "7+5=2\n", "x"])
def test_unknown_characters_are_refused(text):
    with pytest.raises(ValueError, match="is no token"):
        TASK.encode(text)


def test_segmentation_finds_the_steps():
    ids = torch.tensor([*TASK.encode("7+5=2\n\n2*3=6\n\n#6"), TASK.eos_id])
    steps = capo.segment(ids, torch.tensor([0, len(ids)]), TASK.token_bytes, DELIMITER)
    assert capo.steps.step_texts(ids, steps, TASK.token_bytes) == [["7+5=2", "\n\n2*3=6", "\n\n#6"]]
    assert steps.ends[-1] == len(ids)  # EOS joins the last step
