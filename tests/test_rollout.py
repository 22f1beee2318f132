import pytest
import torch

from capo.config import ModelConfig, TaskConfig
from capo.data import ArithmeticTask
from capo.evaluate import accuracy
from capo.models import build_model
from capo.rollout import cumulative, response_logits, sample

TASK = ArithmeticTask(TaskConfig(steps=3), seed=0)
PROMPTS = [TASK.encode(text) for text in ("7+5*3-1=", "1-1+9*2=", "3*3*3*3=", "9+9+9+9=")]
RAGGED = [TASK.encode(text) for text in ("7", "1-1+9*2=", "3*3", "9+9+9+9")]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request):
    config = ModelConfig(arch=request.param, layers=2, hidden=32, heads=4, mlp=48, init_std=0.3)
    return build_model(config, TASK, seed=0)


def draw(model, prompts=RAGGED, n=3, seed=0, **options):
    options = {"max_new_tokens": 12, "eos_id": TASK.eos_id, **options}
    return sample(model, prompts, n, generator=torch.Generator().manual_seed(seed), **options)


def responses(rollouts):
    return [ids.tolist() for ids in rollouts.token_ids.split(rollouts.cu_seqlens.diff().tolist())]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_logprobs_are_those_of_a_plain_forward_pass_of_each_response_alone(model, temperature):
    rollouts = draw(model, temperature=temperature)
    logprobs = rollouts.logprobs.split(rollouts.cu_seqlens.diff().tolist())
    for index, response in enumerate(responses(rollouts)):
        prompt = RAGGED[index // 3]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        expected = torch.log_softmax(logits / temperature, -1)[torch.arange(len(response)), response]
        torch.testing.assert_close(logprobs[index].double(), expected, rtol=0, atol=2e-5)


def test_greedy_responses_do_not_depend_on_padding_or_company(model):
    together = responses(draw(model, temperature=0, n=2))
    for index, prompt in enumerate(RAGGED):
        alone = responses(draw(model, prompts=[prompt], temperature=0, n=1))[0]
        assert together[2 * index] == together[2 * index + 1] == alone


def test_prompts_are_kept_with_their_padding(model):
    rollouts = draw(model, n=2)
    for row, (ids, mask) in enumerate(zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)):
        assert ids[mask].tolist() == RAGGED[row // 2]
        assert not mask[: len(ids) - len(RAGGED[row // 2])].any()


def test_seeds(model):
    one, same, other = (draw(model, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.token_ids, same.token_ids) and torch.equal(one.logprobs, same.logprobs)
    assert responses(one) != responses(other)
    assert len({tuple(response) for response in responses(one)}) > 6  # samples of one prompt differ


def test_sampling_follows_the_distribution(model):
    rollouts = draw(model, prompts=PROMPTS[:1], n=4000, max_new_tokens=1)
    with torch.no_grad():
        expected = model(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1)
    counts = torch.bincount(rollouts.token_ids, minlength=TASK.vocab_size) / 4000
    # Five standard deviations of each frequency.
    assert bool(((counts - expected).abs() <= 5 * (expected / 4000).sqrt() + 1e-3).all())


def test_a_response_ends_with_its_first_eos_or_is_truncated(model):
    rollouts = draw(model, n=40)
    ended = 0
    for response, truncated in zip(responses(rollouts), rollouts.truncated.tolist(), strict=True):
        assert TASK.eos_id not in response[:-1]
        assert truncated == (response[-1] != TASK.eos_id)
        assert len(response) == 12 if truncated else len(response) <= 12
        ended += not truncated
    assert 0 < ended < len(rollouts.truncated)  # both kinds occur


def test_select(model):
    rollouts = draw(model, n=3)
    rows = torch.tensor([1, 4, 5, 11])
    part = rollouts.select(rows)
    assert responses(part) == [responses(rollouts)[row] for row in rows]
    assert torch.equal(part.logprobs, rollouts.logprobs[rollouts.token_index(rows)])
    assert torch.equal(part.prompt_ids, rollouts.prompt_ids[rows])
    assert torch.equal(part.truncated, rollouts.truncated[rows])
    assert torch.equal(part.cu_seqlens, cumulative(torch.tensor([len(response) for response in responses(part)])))


@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED], ids=["equal", "ragged"])
def test_response_logits_are_those_of_the_whole_forward_pass(model, prompts):
    rollouts = draw(model, prompts=prompts, n=2)
    logits = response_logits(model, rollouts).split(rollouts.cu_seqlens.diff().tolist())
    for index, response in enumerate(responses(rollouts)):
        prompt = prompts[index // 2]
        expected = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[index], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [{"prompts": []}, {"prompts": [[1], []]}, {"n": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}]
    + [{"temperature": float(value)} for value in ("nan", "inf")],
)
def test_arguments_are_checked(model, wrong):
    with pytest.raises(ValueError, match="sample:"):
        draw(model, **wrong)


class Script:
    """Responses by prompt, for `capo.evaluate.sample`."""

    def __init__(self, texts, truncated):
        self.texts, self.cut = texts, truncated

    def __call__(self, model, prompts, n, *, max_new_tokens, eos_id, temperature):
        assert (n, temperature, max_new_tokens) == (1, 0, TASK.response_length)
        questions = [TASK.decode(prompt) for prompt in prompts]
        ids = [TASK.encode(self.texts[question]) for question in questions]
        self.cu_seqlens = cumulative(torch.tensor([len(response) for response in ids]))
        self.token_ids = torch.tensor([id_ for response in ids for id_ in response])
        self.truncated = torch.tensor([question in self.cut for question in questions])
        return self


def test_accuracy_of_a_known_policy(monkeypatch):
    problems = TASK.problems(30, torch.Generator().manual_seed(0))
    right, wrong, cut = problems[::3], problems[1::3], problems[2::3]
    texts = {problem.question: problem.solution for problem in [*right, *cut]}
    texts |= {problem.question: f"#{(int(problem.answer) + 1) % 10}" for problem in wrong}
    monkeypatch.setattr("capo.evaluate.sample", Script(texts, {problem.question for problem in cut}))
    assert accuracy(None, TASK, problems, batch=7) == pytest.approx(1 / 3)
    assert accuracy(None, TASK, right) == 1
    with pytest.raises(ValueError, match="no problems"):
        accuracy(None, TASK, [])
