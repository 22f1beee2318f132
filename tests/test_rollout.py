import math

import pytest
import torch

from capo.config import ModelConfig, TaskConfig
from capo.data import ArithmeticTask
from capo.evaluate import accuracy
from capo.models import build_model
from capo.rollout import (
    RolloutError,
    Rollouts,
    Sample,
    Sampling,
    TransformersEngine,
    cumulative,
    mismatch,
    pack,
    response_logits,
    sample,
)

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


SAMPLING = Sampling(max_new_tokens=12, eos_id=TASK.eos_id)


def equal(one, other):
    return all(
        torch.equal(value, getattr(other, name)) if isinstance(value, torch.Tensor) else value == getattr(other, name)
        for name, value in vars(one).items()
    )


def test_the_engine_samples_as_sample_does(model):
    assert equal(TransformersEngine(model, SAMPLING).sample(RAGGED, 3, seed=0), draw(model))


def test_prompts_without_room_for_a_response_are_dropped_and_counted(model):
    engine = TransformersEngine(model, Sampling(12, TASK.eos_id, context=12 + 3))
    rollouts = engine.sample(RAGGED, 2, seed=0)  # of 1, 8, 3 and 7 tokens
    assert rollouts.dropped == {"prompt_too_long": 2}
    assert rollouts.prompt_index.tolist() == [0, 0, 2, 2]
    assert [ids[mask].tolist() for ids, mask in zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)] == [
        RAGGED[index] for index in (0, 0, 2, 2)
    ]
    with pytest.raises(RolloutError, match="all 1 prompts are longer than 3 tokens"):
        engine.sample([RAGGED[1]], 2, seed=0)


EOS = TASK.eos_id
FAULTS = {
    "logprobs_length": Sample([1, EOS], [-1.0, -1.0, -1.0]),
    "logprobs_length less": Sample([1, EOS], [-1.0]),
    "empty": Sample([], []),
    "id_out_of_range": Sample([TASK.vocab_size, EOS], [-1.0, -1.0]),
    "id_out_of_range below": Sample([-1, EOS], [-1.0, -1.0]),
    "logprob_not_finite": Sample([1, EOS], [-1.0, math.nan]),
    "logprob_not_finite too": Sample([1, EOS], [-math.inf, -1.0]),
    "wrong_end": Sample([1, EOS, 1, EOS], [-1.0] * 4),
    "wrong_end early": Sample([1, 2], [-1.0] * 2),
    "wrong_end late": Sample([1] * 13, [-1.0] * 13),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_response_whose_parts_do_not_fit_is_dropped_and_counted(model, case):
    good = [Sample([index, EOS], [-0.5, -0.25 * index]) for index in range(4)]
    groups = [[good[0], FAULTS[case]], [FAULTS[case], FAULTS[case]], [good[1], good[2]], [FAULTS[case], good[3]]]
    rollouts = pack(RAGGED, range(4), groups, SAMPLING, model)
    assert rollouts.dropped == {case.split()[0]: 4}
    assert rollouts.prompt_index.tolist() == [0, 2, 2, 3]
    assert responses(rollouts) == [list(response.ids) for response in good]
    assert rollouts.logprobs.tolist() == [value for response in good for value in response.logprobs]
    assert rollouts.logprobs.dtype == torch.float32
    with pytest.raises(RolloutError, match=f"no response can be used: {case.split()[0]} 1"):
        pack([RAGGED[1]], [0], [[FAULTS[case]]], SAMPLING, model)


def test_concat_is_one_call_on_all(model):
    whole = draw(model, PROMPTS + RAGGED, n=2, temperature=0)
    parts = [draw(model, prompts, n=2, temperature=0) for prompts in (PROMPTS, RAGGED)]
    joined = Rollouts.concat(parts, [len(PROMPTS), len(RAGGED)])
    assert responses(joined) == responses(whole)
    assert torch.equal(joined.prompt_index, whole.prompt_index)
    assert torch.equal(joined.cu_seqlens, whole.cu_seqlens)
    assert torch.equal(joined.prompt_mask, whole.prompt_mask)
    assert torch.equal(joined.prompt_ids[joined.prompt_mask], whole.prompt_ids[whole.prompt_mask])
    torch.testing.assert_close(joined.logprobs, whole.logprobs)


def test_concat_keeps_numbers_of_prompts_and_adds_up_what_is_dropped(model):
    engine = TransformersEngine(model, Sampling(12, TASK.eos_id, context=12 + 3))
    joined = Rollouts.concat([engine.sample(RAGGED, 1, seed) for seed in (0, 1)], [4, 4])
    assert joined.prompt_index.tolist() == [0, 2, 4, 6]
    assert joined.dropped == {"prompt_too_long": 4}


def padded(model, extra):
    """The same model with a vocabulary that is padded by tokens of very high probability."""
    config = ModelConfig(arch=model.config.model_type, layers=2, hidden=32, heads=4, mlp=48, init_std=0.3)
    wide = build_model(config, TASK, seed=0)
    embedding = wide.get_input_embeddings()
    weight = torch.cat([embedding.weight.detach(), embedding.weight.detach()[:extra] * 5])
    wide.resize_token_embeddings(TASK.vocab_size + extra)
    with torch.no_grad():
        wide.get_input_embeddings().weight.copy_(weight)
    return wide


def test_padding_of_the_vocabulary_is_never_sampled_and_has_no_probability(model):
    wide = padded(model, 7)
    assert draw(wide, n=8).token_ids.max() >= TASK.vocab_size
    rollouts, expected = draw(wide, n=8, num_tokens=TASK.vocab_size), draw(model, n=8)
    assert torch.equal(rollouts.token_ids, expected.token_ids)
    torch.testing.assert_close(rollouts.logprobs, expected.logprobs)
    assert response_logits(wide, rollouts).shape[1] == TASK.vocab_size
    torch.testing.assert_close(response_logits(wide, rollouts), response_logits(model, expected))
    assert torch.equal(rollouts.select(torch.tensor([0, 3])).token_ids, expected.select(torch.tensor([0, 3])).token_ids)
    assert rollouts.select(torch.tensor([0, 3])).num_tokens == TASK.vocab_size


def test_mismatch_by_hand():
    sampler = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    trainer = sampler + torch.tensor([0.0, math.log(2), -math.log(4), 0.0])
    metrics = mismatch(trainer, sampler, cap=3.0)
    expected = {
        "sampling/sampling_logp_difference/mean": 3 * math.log(2) / 4,
        "sampling/sampling_logp_difference/max": 2 * math.log(2),
        "sampling/importance_sampling_ratio/min": 0.25,
        "sampling/importance_sampling_ratio/mean": 4.25 / 4,
        "sampling/importance_sampling_ratio/max": 2.0,
        "sampling/kl": (1 - math.log(2) - 0.75 + 2 * math.log(2)) / 4,
        "sampling/outside_cap": 0.25,
    }
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert mismatch(trainer, sampler, cap=1.5)["sampling/outside_cap"] == 0.5
    assert mismatch(trainer, sampler, cap=None) == mismatch(trainer, sampler, cap=2.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"context": 0},
        {"num_tokens": 0},
        {"num_tokens": TASK.eos_id},
        {"eos_id": -1},
    ],
)
def test_sampling_is_checked(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"Sampling: .*{name}"):
        Sampling(**{"max_new_tokens": 12, "eos_id": TASK.eos_id, **wrong})


@pytest.mark.parametrize("name", ["context", "num_tokens"])
def test_sampling_must_fit_the_model(model, name):
    with pytest.raises(ValueError, match=f"Sampling: {name}=1000, but the model has"):
        TransformersEngine(model, Sampling(12, TASK.eos_id, **{name: 1000}))


def test_a_context_must_have_room_for_a_prompt(model):
    with pytest.raises(ValueError, match="max_new_tokens=12 leaves no room for a prompt in a context of 12"):
        TransformersEngine(model, Sampling(12, TASK.eos_id, context=12))
    TransformersEngine(model, Sampling(12, TASK.eos_id, context=13))


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
