"""patch_causal_lm: the same loss and gradients as from the model's logits, and no tensor of their size."""

import copy
import inspect

import numerics
import pytest
import torch
import transformers
from batches import lengths_to_cu
from causal_lms import KINDS, SIZES, TEMPERATURE, VOCAB, Case, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import capo
import capo.ops
from capo import LossRule, PolicyInputs

RULE = LossRule(kl_coef=0.05, entropy_coef=0.01, temperature=TEMPERATURE)


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    assert all(grad is not None for grad in found.values()) and found
    return found


def by_logits(model, case, rule=RULE):
    values = case.values(model)
    out = capo.policy_loss(case.logits(model), case.labels, cu_seqlens=case.cu_seqlens, rule=rule, **values)
    out.loss.backward()
    return out, gradients(model)


def by_patch(model, case, rule=RULE, **inputs):
    values = case.values(model)
    with capo.patch_causal_lm(model):
        out = model(
            case.input_ids,
            **case.model_inputs(),
            capo=PolicyInputs(**{"response_mask": case.response_mask, "rule": rule, **values, **inputs}),
        )
        out.loss.backward()
    return out, gradients(model)


def assert_same(actual, expected):
    """Equal up to the order of sums in float32: the two ways multiply matrices of different shapes."""
    (out, grads), (other, other_grads) = actual, expected
    assert isinstance(out, capo.PolicyLoss)
    for mine, theirs in zip(out, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        error = (grad - other_grads[name]).norm() / other_grads[name].norm()
        assert error < 1e-5, f"{name}: off by {error}"


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loss_of_the_logits(kind, device):
    model, case = build(kind).to(device), Case()
    assert_same(by_patch(model, case), by_logits(model, case))


def test_every_value_can_have_the_shape_of_the_mask(device):
    model, case = build(), Case()
    padded = {name: case.spread(values) for name, values in case.values(model).items()}
    assert_same(by_patch(model, case, **padded), by_logits(model, case))


def test_a_mask_of_the_last_positions(device):
    model, case = build(), Case()
    last = case.response_mask[:, 5:]
    advantages = case.spread(case.advantages)[:, 5:]
    assert last.sum() == case.response_mask.sum()
    out = by_patch(model, case, response_mask=last.long(), credit=advantages)
    assert_same(out, by_logits(model, case))


@pytest.mark.parametrize("kind", ["qwen2", "gemma2-softcap", "granite-scaling"])
def test_logprobs_without_credit(kind, device):
    model, case = build(kind), Case()
    with torch.no_grad():
        expected = capo.logprobs(case.logits(model), case.labels, TEMPERATURE, case.mask)
        inputs = PolicyInputs(case.response_mask, rule=RULE, mask=case.spread(case.mask))
        with capo.patch_causal_lm(model):
            actual = model(case.input_ids, **case.model_inputs(), capo=inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_logprobs_that_can_be_differentiated(kind, autocast, device):
    """For a loss of any kind: here squares, with weight 0 for some tokens."""
    model, case = build(kind).to(device), Case()
    weights = torch.linspace(-1, 1, len(case.labels), device=device, dtype=torch.float64).relu()

    def by_logits(model):
        logits = case.logits(model)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE
        return logits.log_softmax(-1).gather(-1, case.labels[:, None])[:, 0]

    def by_patch(model):
        inputs = PolicyInputs(case.response_mask, rule=RULE, differentiable=True)
        with capo.patch_causal_lm(model):
            logp, entropy = model(case.input_ids, **case.model_inputs(), capo=inputs)
        assert not entropy.requires_grad and bool((entropy > 0).all())
        return logp

    def numbers(way, model):
        """Log-probabilities and gradients, each tensor relative to the largest number that it truly has."""
        logp = way(model)
        (weights * logp.square()).sum().backward()
        return [logp.detach(), *gradients(model).values()]

    truth = numbers(by_logits, copy.deepcopy(model).double())
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        eager, actual = numbers(by_logits, model), numbers(by_patch, model)
    sizes = [x.abs().max() for x in truth]
    scaled = [
        torch.cat([(x / size).flatten() for x, size in zip(xs, sizes, strict=True)]) for xs in (actual, eager, truth)
    ]
    numerics.assert_as_accurate(*(x.cpu() for x in scaled))


def test_logprobs_that_can_be_differentiated_take_no_credit():
    case = Case()
    for given in ({"credit": case.advantages}, {"mask": case.mask}):
        with pytest.raises(
            ValueError, match="differentiable=True returns the log-probabilities of all response tokens"
        ):
            PolicyInputs(case.response_mask, differentiable=True, **given)


def test_credit_from_votes(device):
    model, case = build(), Case()
    steps = capo.Steps(torch.tensor([0, 2, 6, 8]), torch.tensor([2, 6, 8, 10]), torch.tensor([0, 2, 3, 4]))
    votes = torch.tensor([[1], [0], [0], [1]], dtype=torch.int8)
    credit = capo.Credit(torch.tensor([1.0, 0.0, 1.0]), votes, steps, case.cu_seqlens, torch.zeros(3).long())
    case.advantages = credit.advantages()
    assert_same(by_patch(model, case, credit=credit), by_logits(model, case))


def test_responses_packed_into_one_row(device):
    """Two sequences and three responses in a row without padding; the second sequence has two responses (turns)."""
    model, case = build(), Case(prompts=(2, 3), responses=(4, 7))
    keep = case.attention_mask.bool()
    packed = copy.copy(case)
    packed.input_ids = case.input_ids[keep][None]
    packed.response_mask = case.response_mask[keep][None].clone()
    packed.response_mask[0, 6 + 3 + 2] = False  # ends the first turn of the second sequence
    packed.position_ids = case.position_ids[keep][None]
    split = case.response_mask.clone()
    split[1, 3 + 2] = False
    case.response_mask = split
    case.cu_seqlens = lengths_to_cu([4, 2, 4])
    for name in ("advantages", "mask"):
        setattr(case, name, getattr(case, name)[:10])
    case.noise = case.noise[:, :10]
    expected = by_logits(model, case)
    values = case.values(model)
    with capo.patch_causal_lm(model):
        out = model(
            packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=block_causal(packed.position_ids),
            capo=PolicyInputs(packed.response_mask, rule=RULE, cu_seqlens=case.cu_seqlens, **values),
        )
        out.loss.backward()
    assert_same((out, gradients(model)), expected)


def block_causal(position_ids):
    """Attention within each sequence of a packed row. [1, 1, T, T], as eager attention adds it"""
    sequence = (position_ids[0] == 0).cumsum(0)
    allowed = (sequence[:, None] == sequence) & torch.ones(len(sequence), len(sequence)).tril().bool()
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


def test_what_stands_in_padding_has_no_influence():
    model, case = build(), Case()
    first = by_patch(model, case)
    case.input_ids = torch.where(case.attention_mask.bool(), case.input_ids, 7)
    second = by_patch(model, case)
    assert torch.equal(first[0].loss, second[0].loss)


def test_gradient_checkpointing():
    model, case = build(), Case()
    expected = by_logits(model, case)
    model.gradient_checkpointing_enable()
    assert_same(by_patch(model.train(), case), expected)


def test_autocast():
    model, case = build(), Case()
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = by_patch(model, case)
        other, other_grads = by_logits(model, case)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    torch.testing.assert_close(out.loss, other.loss, rtol=0.02, atol=0.02)
    for name, grad in grads.items():
        assert torch.cosine_similarity(grad.flatten(), other_grads[name].flatten(), 0) > 0.99, name


def test_adapters_of_peft():
    """LoRA on the layers: only the adapters get gradients."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install --no-deps peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, case = peft.get_peft_model(build(), config), Case()

    def trained():
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad(set_to_none=True)
        assert all(grad is not None for grad in grads.values())
        return grads

    values = case.values(model)
    out = capo.policy_loss(case.logits(model), case.labels, cu_seqlens=case.cu_seqlens, rule=RULE, **values)
    out.loss.backward()
    expected = out, trained()
    with capo.patch_causal_lm(model):
        out = model(case.input_ids, **case.model_inputs(), capo=PolicyInputs(case.response_mask, rule=RULE, **values))
        out.loss.backward()
    assert_same((out, trained()), expected)
    with pytest.raises(ValueError, match="the head must be a torch.nn.Linear"):
        capo.patch_causal_lm(peft.get_peft_model(build(), peft.LoraConfig(target_modules=["lm_head"])))


def test_padded_vocabulary():
    """A head with more rows than the tokenizer has tokens: they get no probability and no gradient."""
    wide = build(vocab_size=VOCAB + 31)
    model = build()
    state = wide.state_dict()
    model.load_state_dict({k: v[:VOCAB] if v.shape[:1] == (VOCAB + 31,) else v for k, v in state.items()})
    case = Case()
    out, grads = by_logits(model, case)
    values = case.values(model)
    with capo.patch_causal_lm(wide, vocab_size=VOCAB):
        mine = wide(case.input_ids, **case.model_inputs(), capo=PolicyInputs(case.response_mask, rule=RULE, **values))
        mine.loss.backward()
    torch.testing.assert_close(mine.loss, out.loss, rtol=1e-5, atol=1e-6)
    assert not wide.lm_head.weight.grad[VOCAB:].any()
    torch.testing.assert_close(wide.lm_head.weight.grad[:VOCAB], grads["lm_head.weight"], rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, inside of capo's op, too."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.capo.linear_policy_loss.default:
            with self:
                return capo.ops._linear_policy_loss(*args)
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.nbytes)
        return result


def test_no_tensor_of_the_size_of_the_logits():
    """600 response tokens and 5,000 words: the logits have 12 MB; a chunk of 256 rows, the least there is, has 5.1 MB."""
    model = build(vocab_size=5_000)
    case = Case(prompts=(20,) * 20, responses=(30,) * 20, vocab=5_000)
    values = case.values(model)
    inputs = PolicyInputs(case.response_mask, rule=RULE, **values)
    with capo.patch_causal_lm(model, chunk_bytes=1), Largest() as seen:
        model(case.input_ids, **case.model_inputs(), capo=inputs).loss.backward()
    assert seen.size < 600 * 5_000 * 4 / 2
    with Largest() as seen:
        by_logits(model, case)
    assert seen.size >= 600 * 5_000 * 4


# ---- taking it on and off


@pytest.mark.parametrize("own", [False, True], ids=["class", "instance"])
def test_removal_restores_the_model_exactly(own):
    model, case = build(), Case()
    if own:  # as accelerate does
        model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    before, head_before = dict(model.__dict__), dict(model.lm_head.__dict__)
    expected = model(case.input_ids, labels=case.input_ids)
    patch = capo.patch_causal_lm(model)
    patched = model(case.input_ids, labels=case.input_ids)
    assert torch.equal(patched.logits, expected.logits) and torch.equal(patched.loss, expected.loss)
    patch.remove()
    patch.remove()
    assert model.__dict__ == before and model.lm_head.__dict__ == head_before
    # transformers ignores arguments that it does not know.
    assert model(case.input_ids, capo=PolicyInputs(case.response_mask, case.advantages)).loss is None


def test_a_copy_of_a_patched_model_stands_alone():
    model, case = build(), Case()
    inputs = PolicyInputs(case.response_mask, case.advantages)
    with capo.patch_causal_lm(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert torch.equal(other(case.input_ids, capo=inputs).entropy, torch.full((12,), VOCAB).log())
        assert not other(case.input_ids).logits.any()
        other(case.input_ids, capo=inputs).loss.backward()
        assert all(p.grad is None for p in model.parameters())
        assert model(case.input_ids).logits.any()


def test_removed_after_an_error():
    model = build()
    with pytest.raises(RuntimeError, match="on purpose"), capo.patch_causal_lm(model):
        raise RuntimeError("on purpose")
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


def test_generation_of_a_patched_model():
    model, case = build(), Case(responses=(3, 3, 3))
    inputs = {"attention_mask": case.attention_mask, "max_new_tokens": 3, "do_sample": False}
    with capo.patch_causal_lm(model):
        tokens = model.generate(case.input_ids, **inputs)
        names = inspect.signature(model.forward).parameters
    assert torch.equal(tokens, model.generate(case.input_ids, **inputs))
    assert names == inspect.signature(model.forward).parameters


# ---- refusals


def test_patched_twice():
    model = build()
    with capo.patch_causal_lm(model), pytest.raises(ValueError, match="patched already"):
        capo.patch_causal_lm(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "cohere", "subclass", "head"])
def test_other_models_are_refused(model):
    if model == "cohere":  # it scales its logits, in its own way
        config = transformers.CohereConfig(**{**SIZES, "pad_token_id": 0})
        model, message = transformers.CohereForCausalLM(config), "no patch for CohereForCausalLM.*linear_policy_loss"
    elif model == "subclass":

        class Mine(transformers.Qwen2ForCausalLM):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs)

        model, message = Mine(build().config), "Mine has a forward of its own; call capo.linear_policy_loss"
    elif model == "head":
        model, message = build(), "the head must be a torch.nn.Linear.*got Sequential"
        model.lm_head = nn.Sequential(model.lm_head)
    else:
        message = "no patch for Linear; there is one for .*Qwen3ForCausalLM"
    with pytest.raises(ValueError, match=message):
        capo.patch_causal_lm(model)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"response_mask must be \[3, 11\].*got \[3, 12\]", {"response_mask": torch.ones(3, 12)}),
        (ValueError, "the token in row 0, column 0 is the first of its sequence", {"response_mask": torch.ones(3, 11)}),
        (
            ValueError,
            r"credit must be \[12\] or \[3, 11\] as response_mask, got \[3, 10\]",
            {"credit": torch.ones(3, 10)},
        ),
        (ValueError, r"old_logprobs must be float \[12\], got float32 \[11\]", {"old_logprobs": torch.ones(11)}),
        (ValueError, r"cu_seqlens must rise from 0 to 12", {"cu_seqlens": torch.tensor([0, 11])}),
    ],
)
def test_inputs_that_do_not_fit(error, message, change):
    model, case = build(), Case()
    with pytest.raises(error, match=message):
        by_patch(model, case, **change)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "labels has no meaning", {"labels": torch.zeros(3, 11).long()}),
        (ValueError, "logits_to_keep has no meaning", {"logits_to_keep": 1}),
        (TypeError, "capo must be a capo.PolicyInputs, got dict", {"capo": {}}),
        (ValueError, "capo= needs input_ids", {"input_ids": None, "inputs_embeds": torch.zeros(3, 11, 32)}),
    ],
)
def test_arguments_that_do_not_fit(error, message, arguments):
    model, case = build(), Case()
    inputs = PolicyInputs(case.response_mask, case.advantages)
    with capo.patch_causal_lm(model), pytest.raises(error, match=message):
        model(**{"input_ids": case.input_ids, "capo": inputs, **arguments})


def test_a_response_without_a_prompt_behind_padding():
    model, case = build(), Case()
    case.attention_mask[2, 4] = 0  # the only token of the third prompt
    with pytest.raises(ValueError, match="row 2, column 5 is the first of its sequence: nothing predicts it"):
        by_patch(model, case)


def test_a_response_token_at_the_start_of_a_packed_sequence():
    model = build()
    mask = torch.tensor([[False, True, True, True]])
    with (
        capo.patch_causal_lm(model),
        pytest.raises(ValueError, match="row 0, column 2 is the first of its sequence: nothing predicts it"),
    ):
        model(
            torch.tensor([[1, 2, 3, 4]]),
            position_ids=torch.tensor([[0, 1, 0, 1]]),
            capo=PolicyInputs(mask, torch.ones(3), cu_seqlens=torch.tensor([0, 1, 3])),
        )
