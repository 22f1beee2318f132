import asyncio
import inspect
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'capo[trl]'")

import trl
from datasets import Dataset
from numerics import assert_as_accurate
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from typer.testing import CliRunner

import capo
from capo import cli
from capo.integrations.trl import LOSS_TYPES, CapoConfig, CapoGRPOTrainer, capo_trainer
from capo.judges.scripted import ScriptedJudge

TOKENS = [*"0123456789", "+", "-", "*", "=", "#", "ĊĊ", "<eos>"]
EOS = len(TOKENS) - 1
DATA = [{"prompt": "7+5=", "answer": "2"}, {"prompt": "3*3=", "answer": "9"}] * 8


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In place of the fixture of all tests: attention on the CPU has no deterministic backward in every version."""


def tokenizer():
    """Characters of sums, and a blank line, as a fast tokenizer with bytes of its own for each token."""
    # What is no token is read as EOS, which only the check of the byte table meets.
    backend = Tokenizer(models.WordLevel({token: id_ for id_, token in enumerate(TOKENS)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex("ĊĊ|."), "isolated"),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", model_input_names=names
    )


def model(seed=0):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(TOKENS),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
    )


def config(tmp_path, kind=CapoConfig, **options):
    settings = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if kind is CapoConfig:
        settings["capo_num_votes"] = 3
    return kind(**{**settings, **options})


def odd(completions, **columns):
    """An outcome: 1 for responses of odd length, so that groups are mixed."""
    return [float(len(completion) % 2) for completion in completions]


def judge(**rates):
    return ScriptedJudge(lambda request: [i % 2 == 1 for i in range(len(request.steps))], **rates)


def make(args, judge=None, rewards=odd, base=GRPOTrainer, weights=None, **options):
    """A trainer: capo's if the settings are, else the base itself."""
    kind, extra = (base, {}) if type(args) is GRPOConfig else (capo_trainer(base), {"judge": judge})
    return kind(
        model=weights or model(),
        reward_funcs=rewards,
        args=args,
        train_dataset=Dataset.from_list(DATA),
        processing_class=tokenizer(),
        **extra,
        **options,
    )


def run(trainer):
    """Train, with the same samples whatever ran before."""
    torch.manual_seed(3)
    trainer.train()


class Spy:
    """Keeps what a trainer learns from."""

    def __init__(self, trainer):
        self.seen, self.generated = [], []
        compute, generate = trainer._compute_loss, trainer._generate_and_score_completions

        def compute_loss(model, inputs):
            self.seen.append({key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)})
            return compute(model, inputs)

        def generate_and_score(inputs):
            output = generate(inputs)
            self.generated.append({k: v.clone() for k, v in output.items() if isinstance(v, torch.Tensor)})
            return output

        trainer._compute_loss, trainer._generate_and_score_completions = compute_loss, generate_and_score


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def supported(loss_type):
    if f'"{loss_type}"' not in inspect.getsource(GRPOTrainer._compute_loss):
        pytest.skip(f"TRL {trl.__version__} has no loss_type {loss_type}")
    if loss_type == "sapo" and hasattr(GRPOTrainer, "get_sapo_token_loss"):
        with pytest.raises(ValueError, match="loss_type='sapo' does not go with step-level credit"):
            config("unused", loss_type="sapo")
        pytest.skip(f"sapo of TRL {trl.__version__} takes one advantage a response, and is refused")


def expected(batch, trainer, rule="capo"):
    """The advantages of a generated batch by another way: texts decoded, judged again, shaped."""
    mask = batch["completion_mask"]
    ids = [row[keep.bool()] for row, keep in zip(batch["completion_ids"], mask, strict=True)]
    cu_seqlens = torch.tensor([0, *map(len, ids)]).cumsum(0)
    token_bytes = capo.TokenBytes.from_tokenizer(trainer.processing_class)
    steps = capo.segment(torch.cat(ids), cu_seqlens, token_bytes)
    texts = capo.steps.step_texts(torch.cat(ids), steps, token_bytes)
    prompts = trainer.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
    answers = {row["prompt"]: row["answer"] for row in DATA}
    requests = [
        capo.judges.JudgeRequest(prompt, answers[prompt], tuple(text))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    critiques = [[reply.critique for reply in row] for row in trainer.capo_judge.critique(requests, 3)]
    outcomes = odd(["".join(trainer.processing_class.decode(row, skip_special_tokens=True)) for row in ids])
    return capo.shape(
        outcomes, critiques, groups=4, rule=rule, token_ids=batch["completion_ids"], mask=mask, token_bytes=token_bytes
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_trains_on_advantages_of_tokens(loss_type, tmp_path):
    supported(loss_type)
    trainer = make(config(tmp_path, loss_type=loss_type), judge(false_alarm=0.2))
    before, spy = weights(trainer), Spy(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 and not same(before, weights(trainer))
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    assert [batch["advantages"].shape for batch in spy.seen] == [batch["completion_ids"].shape for batch in spy.seen]
    assert any(row[keep.bool()].unique().numel() > 1 for b in spy.seen for row, keep in
               zip(b["advantages"], b["completion_mask"], strict=True))  # fmt: skip


def test_advantages_are_those_of_capo_shape_bit_for_bit(tmp_path):
    trainer = make(config(tmp_path), judge(false_alarm=0.3, missed=0.3, invalid=0.2))
    spy = Spy(trainer)
    trainer.train()
    assert len(spy.generated) == 2
    for batch in spy.generated:
        assert torch.equal(batch["advantages"], expected(batch, trainer))
        assert batch["advantages"].dtype == torch.float32 and batch["advantages"].any()


def test_accumulation_and_iterations_keep_advantages_with_their_tokens(tmp_path):
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}
    trainer = make(config(tmp_path, per_device_train_batch_size=4, max_steps=4, **options), judge(false_alarm=0.3))
    spy = Spy(trainer)
    trainer.train()
    assert trainer.state.global_step == 4 and len(spy.generated) == 1 and len(spy.seen) == 8

    def rows(batches):
        return {
            tuple(batch["prompt_ids"][i].tolist() + batch["completion_ids"][i].tolist()): batch["advantages"][i]
            for batch in batches
            for i in range(len(batch["prompt_ids"]))
        }

    generated, seen = rows(spy.generated), rows(spy.seen)
    assert len(generated) > 8 and generated.keys() == seen.keys()
    assert all(torch.equal(generated[key], seen[key]) for key in generated)


def test_lora_trains_the_adapter_only(tmp_path):
    trainer = make(
        config(tmp_path, beta=0.1), judge(), peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora" in name for name in changed)


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make(config(tmp_path / "a", **options), judge(false_alarm=0.3))
    whole.train()
    resumed = make(config(tmp_path / "a", **options), judge(false_alarm=0.3), weights=model(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 4 and same(weights(whole), weights(resumed))


@pytest.mark.parametrize("why, base", [("penalty 0", "rule"), ("failed", "rule"), ("invalid", "host")])
def test_without_penalty_or_critiques_the_run_is_the_hosts_bit_for_bit(why, base, tmp_path):
    class Forbidden:
        def critique(self, requests, num_votes):
            raise AssertionError("asked without need")

    plain = make(config(tmp_path, GRPOConfig))
    options, who = {"capo_base": base}, judge(failed=1.0)
    if why == "penalty 0":
        options, who = {**options, "capo_process_weight": 0.0}, Forbidden()
    if why == "invalid":
        who = judge(invalid=1.0)
    mine = make(config(tmp_path, **options), who)
    spies = Spy(plain), Spy(mine)
    run(plain)
    run(mine)
    assert same(weights(plain), weights(mine))
    for one, other in zip(spies[0].generated, spies[1].generated, strict=True):
        assert torch.equal(one["advantages"], other["advantages"]) and one["advantages"].any()


class Deaf:
    """A judge that fails on one prompt and never errs on the others."""

    def critique(self, requests, num_votes):
        replies = judge().critique(requests, num_votes)
        silent = judge(failed=1.0).critique(requests, num_votes)
        return [
            (no if request.question == "7+5=" else yes)
            for request, yes, no in zip(requests, replies, silent, strict=True)
        ]


@pytest.mark.parametrize("base", ["rule", "host"])
def test_groups_without_a_critique_keep_the_hosts_advantages_bit_for_bit(base, tmp_path):
    plain, mine = (
        make(config(tmp_path, GRPOConfig, max_steps=1)),
        make(config(tmp_path, max_steps=1, capo_base=base), Deaf()),
    )
    spies = Spy(plain), Spy(mine)
    run(plain)
    run(mine)
    host, shaped = spies[0].generated[0], spies[1].generated[0]
    assert torch.equal(host["completion_ids"], shaped["completion_ids"])
    deaf = [mine.processing_class.decode(ids, skip_special_tokens=True) == "7+5=" for ids in shaped["prompt_ids"]]
    assert sorted(set(deaf)) == [False, True]
    spread = host["advantages"][:, None] * shaped["completion_mask"]
    assert torch.equal(spread[deaf], shaped["advantages"][deaf]) and spread[deaf].any()
    assert not torch.equal(spread[[not d for d in deaf]], shaped["advantages"][[not d for d in deaf]])
    (row,) = [row for row in mine.state.log_history if "capo/host_advantages" in row]
    assert row["capo/host_advantages"] == 0.5 and row["capo/critiques/failed"] == 12


def test_base_host_adds_what_the_critiques_change(tmp_path):
    plain = make(config(tmp_path, GRPOConfig, max_steps=1, scale_rewards="none"))
    rule = {"capo_normalize": "group_mean", "capo_outcome_weight": 1.0, "capo_process_weight": 0.5}
    mine = make(config(tmp_path, max_steps=1, scale_rewards="none", capo_base="host", **rule), judge())
    spies = Spy(plain), Spy(mine)
    run(plain)
    run(mine)
    host, shaped = spies[0].generated[0], spies[1].generated[0]
    preset = capo.CreditRule(normalize="group_mean", outcome_weight=1.0, process_weight=0.5)
    without = capo.CreditRule(normalize="group_mean", outcome_weight=1.0, process_weight=0.0)
    change = expected(shaped, mine, preset) - expected(shaped, mine, without)
    wanted = (host["advantages"][:, None] + change) * shaped["completion_mask"]
    assert torch.equal(shaped["advantages"], wanted) and bool((change < 0).any())


# ---- the loss


def loss_by_hand(loss_type, logp, old, ref, advantages, mask, args, num_items):
    """TRL's losses as their papers have them, with one advantage a token."""
    ratio = (logp - old).exp()
    sequence_mean = mask / mask.sum(1, keepdim=True) / len(mask)
    weight = {
        "grpo": sequence_mean,
        "sapo": sequence_mean,
        "bnpo": mask / mask.sum(),
        "dr_grpo": mask / (len(mask) * args.max_completion_length),
        "luspo": mask / len(mask),
    }.get(loss_type, mask / num_items)
    if loss_type == "cispo":
        loss = -ratio.detach().clamp(max=args.epsilon_high) * advantages * logp
    elif loss_type == "sapo":
        positive, negative = args.sapo_temperature_pos, args.sapo_temperature_neg
        temperature = torch.where(advantages > 0, positive, negative)
        loss = -4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantages
    elif loss_type == "vespo":
        log_w = ((logp - old).detach() * mask).sum(1, keepdim=True).clamp(math.log(1e-8), 20)
        k = torch.where(advantages >= 0, args.vespo_k_pos, args.vespo_k_neg)
        strength = torch.where(advantages >= 0, args.vespo_lambda_pos, args.vespo_lambda_neg)
        loss = -(strength + k * log_w - strength * log_w.exp()).exp() * advantages * logp
    else:
        clipped = ratio.clamp(1 - args.epsilon, 1 + (args.epsilon_high or args.epsilon))
        loss = -torch.min(ratio * advantages, clipped * advantages)
    kl = (ref - logp).exp() - (ref - logp) - 1
    loss = loss + args.beta * kl * (ratio if args.use_bias_correction_kl else 1)
    return (torch.where(mask > 0, loss, 0.0) * weight).sum()


@pytest.mark.parametrize("linear", [False, True], ids=["trl", "linear"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_with_advantages_of_tokens_equal_the_reference(loss_type, linear, tmp_path):
    supported(loss_type)
    high = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    args = config(tmp_path, loss_type=loss_type, temperature=0.8, capo_linear_loss=linear, **high)
    trainer = make(args, judge())
    trainer.beta = args.beta = 0.05  # not from the start: TRL would load the reference model by a name
    g = torch.Generator().manual_seed(1)
    completion_mask = (torch.arange(12) < torch.tensor([12, 7, 1, 9, 12, 3, 5, 8])[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(0, EOS, (8, 4), generator=g),
        "prompt_mask": torch.ones(8, 4, dtype=torch.int64),
        "completion_ids": torch.randint(0, EOS, (8, 12), generator=g),
        "completion_mask": completion_mask,
        "advantages": torch.randn(8, 12, generator=g) * completion_mask,
        "num_items_in_batch": completion_mask.sum(),
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], completion_mask], 1)

    def logprobs(policy):
        logits = policy(ids, attention_mask=attention).logits[:, 3:-1] / args.temperature
        return logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]

    with torch.no_grad():
        near = logprobs(trainer.model)
    old, ref = (near + 0.3 * torch.randn(near.shape, generator=g) for _ in range(2))

    def by_hand(policy):
        policy.zero_grad()
        dtype = next(policy.parameters()).dtype
        rest = (x.to(dtype) for x in (old, ref, inputs["advantages"], completion_mask))
        loss = loss_by_hand(loss_type, logprobs(policy), *rest, args, inputs["num_items_in_batch"])
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in policy.parameters()]

    truth_loss, truth = by_hand(model().double())  # the weights that the trainer has
    eager_loss, eager = by_hand(model())
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    given = {**inputs, "old_per_token_logps": old, "ref_per_token_logps": ref}
    loss = trainer._compute_loss(trainer.model, given)
    loss.backward()
    assert_as_accurate(loss.detach(), eager_loss, truth_loss, size=float(truth_loss.abs()) + 1)
    # Every tensor relative to its largest number, all together: the worst number of a small one is a matter of luck.
    sizes = [exact.abs().max() for exact in truth]
    ways = [p.grad for p in trainer.model.parameters()], eager, truth
    assert_as_accurate(*(torch.cat([(x / size).flatten() for x, size in zip(way, sizes, strict=True)]) for way in ways))

    flat = trainer._compute_loss(trainer.model, {**given, "advantages": inputs["advantages"][:, 0]})
    assert not torch.allclose(flat, loss)  # the advantages of the other tokens matter


# ---- log-probabilities from hidden states


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "num_iterations": 2}], ids=["", "accumulated"]
)
def test_a_run_with_the_linear_loss_is_that_of_trl_up_to_rounding(options, tmp_path):
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "beta": 0.1, "learning_rate": 1e-4, **options}
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )  # the reference is the base model
    runs = []
    for linear in (False, True):
        torch.manual_seed(1)  # of the adapter's weights
        args = config(tmp_path, capo_linear_loss=linear, **options)
        trainer = make(args, judge(false_alarm=0.2), peft_config=lora)
        before = weights(trainer)
        run(trainer)
        after = weights(trainer)
        history = [row for row in trainer.state.log_history if "grad_norm" in row]
        runs.append((history, {name: after[name] - before[name] for name in after if "lora" in name}))
    (plain, changes), (mine, others) = runs
    for one, other in zip(plain, mine, strict=True):
        for name in ("loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
        assert one["kl"] > 0
    assert any(change.any() for change in changes.values()) and changes.keys() == others.keys()


def test_the_linear_loss_makes_no_logits_and_leaves_the_model_as_it_was(tmp_path):
    trainer = make(config(tmp_path, capo_linear_loss=True, max_steps=1), judge())
    forward = trainer.model.forward
    seen = []
    compute = trainer._compute_loss

    def compute_loss(model, inputs):
        hook = trainer.model.lm_head.register_forward_hook(lambda *given: seen.append(given[-1]))
        try:
            return compute(model, inputs)
        finally:
            hook.remove()

    trainer._compute_loss = compute_loss
    trainer.train()
    ((logprobs, entropies),) = seen
    assert logprobs.dim() == entropies.dim() == 1 and logprobs.requires_grad and not entropies.requires_grad
    assert trainer.model.forward == forward


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"entropy_coef": 0.01},
            "entropy_coef=0.01 does not go with capo_linear_loss=True: entropies have no gradient",
        ),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True.*entropies have no gradient"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True.*in its own type"),
    ],
)
def test_settings_that_the_linear_loss_cannot_follow_are_refused(options, message, tmp_path):
    if not all(name in GRPOConfig.__dataclass_fields__ for name in options):
        pytest.skip(f"TRL {trl.__version__} has no {next(iter(options))}")
    with pytest.raises(ValueError, match=message):
        config(tmp_path, capo_linear_loss=True, **options)


def test_models_and_trainers_without_a_linear_loss_are_refused(tmp_path, monkeypatch):
    args = config(tmp_path, capo_linear_loss=True)
    for name, reason in (("use_liger_kernel", "by itself"), ("deepspeed", "sharded"), ("fsdp", "sharded")):
        with monkeypatch.context() as patch:
            patch.setattr(args, name, "on", raising=False)
            patch.setattr(GRPOTrainer, "compute_liger_loss", lambda: None, raising=False)
            with pytest.raises(ValueError, match=f"{name}='on' does not go with capo_linear_loss=True: .*{reason}"):
                make(args, judge())
    head = LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="does not go with this model.*the head must be a torch.nn.Linear|lm_head"):
        make(args, judge(), peft_config=head)

    class Other(Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="does not go with this model: .*Other has a forward of its own"):
        make(args, judge(), weights=Other(model().config))

    class OwnLogprobs(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    with pytest.raises(ValueError, match="does not go with this trainer: its log-probabilities are those of another"):
        make(args, judge(), base=OwnLogprobs)
    trainer = make(args, judge())
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="does not go with pixel_values of the batch"):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, ids, 2, pixel_values=torch.zeros(1))
    for name, reason in (("_is_vlm", "images"), ("aux_loss_enabled", "mixtures"), ("is_fsdp_enabled", "sharded")):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, True, raising=False)
            with pytest.raises(ValueError, match=f"does not go with this trainer: .*{reason}"):
                trainer._capo_check_linear_loss()


def test_a_sequence_ratio_would_average_the_advantages_of_steps_away(tmp_path):
    """Why it is refused: the gradient of every log-probability of a response is the same."""
    args = config(tmp_path, GRPOConfig, importance_sampling_level="sequence", loss_type="grpo")
    logp = torch.randn(1, 4).requires_grad_(True)
    trainer = make(args)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros(1, 4), None)[: _width(trainer)]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    ones = torch.ones(1, 4, dtype=torch.int64)
    advantages = torch.tensor([[1.0, 1.0, -2.0, 0.5]])
    inputs = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": ones, "completion_mask": ones}
    loss = trainer._compute_loss(None, {**inputs, "advantages": advantages, "num_items_in_batch": ones.sum()})
    loss.backward()
    assert logp.grad[0, 0] != 0 and (logp.grad == logp.grad[0, 0]).all()


def _width(trainer):
    """How many values the method returns in this version."""
    return 3 if "aux_loss" in inspect.getsource(GRPOTrainer._compute_loss) else 2


# ---- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"importance_sampling_level": "sequence"}, "averaged away"),
        ({"off_policy_mask_threshold": 0.1}, "cut responses apart"),
        ({"loss_type": "mystery"}, "loss_type='mystery'.*checked with grpo"),
        ({"scale_rewards": "none"}, "scale_rewards='none'.*use capo_base=host"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective.*use capo_base=host"),
        ({"capo_rule": "rloo"}, "looks at outcomes only"),
        ({"capo_rule": "ppo"}, "CreditRule.preset: name must be one of"),
        ({"capo_vote": "plurality"}, "vote must be one of"),
        ({"capo_process_weight": -1.0}, "process_weight must be finite and at least 0"),
        ({"capo_base": "mine"}, "capo_base must be rule or host, got 'mine'"),
        ({"capo_num_votes": 0}, "capo_num_votes must be in 1..127, got 0"),
        ({"capo_delimiter": ""}, "capo_delimiter must not be empty"),
        ({"capo_max_steps": 0}, "capo_max_steps must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_reason(options, message, tmp_path):
    if not all(name.startswith("capo_") or name in GRPOConfig.__dataclass_fields__ for name in options):
        pytest.skip(f"TRL {trl.__version__} has no {next(iter(options))}")
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_plain_configuration_is_checked_too_and_has_the_defaults(tmp_path):
    with pytest.raises(ValueError, match="averaged away"):
        CapoGRPOTrainer(
            model=model(), reward_funcs=odd, args=config(tmp_path, GRPOConfig, importance_sampling_level="sequence"),
            train_dataset=Dataset.from_list(DATA), processing_class=tokenizer(), judge=judge(),
        )  # fmt: skip
    trainer = CapoGRPOTrainer(
        model=model(), reward_funcs=odd, args=config(tmp_path, GRPOConfig, max_steps=1), judge=judge(),
        train_dataset=Dataset.from_list(DATA), processing_class=tokenizer(),
    )  # fmt: skip
    assert trainer.capo_settings.rule == capo.CreditRule() and trainer.capo_settings.num_votes == 5
    trainer.train()
    assert any("capo/flag_rate/wrong" in row for row in trainer.state.log_history)


def test_liger_is_refused_where_trl_has_its_loss(tmp_path, monkeypatch):
    args = config(tmp_path)
    monkeypatch.setattr(args, "use_liger_kernel", True, raising=False)
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", lambda: None, raising=False)
    with pytest.raises(ValueError, match="use_liger_kernel=True .*silently wrong"):
        make(args, judge())


@pytest.mark.parametrize("name", ["compute_loss", "_compute_loss"])
def test_a_loss_that_another_library_put_into_trl_is_refused(name, tmp_path, monkeypatch):
    def patched(self, *args, **kwargs):
        raise AssertionError("not reached")

    patched.__module__ = "unsloth_compiled_cache.UnslothGRPOTrainer"
    monkeypatch.setattr(GRPOTrainer, name, patched)
    with pytest.raises(ValueError, match=f"{name} of this trainer comes from unsloth_compiled_cache.*not from TRL"):
        make(config(tmp_path), judge())
    make(config(tmp_path, capo_process_weight=0.0))  # TRL's own advantages
    monkeypatch.setattr(CapoGRPOTrainer, "capo_token_advantages", True, raising=False)
    CapoGRPOTrainer(
        model=model(), reward_funcs=odd, args=config(tmp_path), judge=judge(), train_dataset=Dataset.from_list(DATA),
        processing_class=tokenizer(),
    )  # fmt: skip


def test_without_a_judge_nothing_starts(tmp_path):
    with pytest.raises(ValueError, match="judge must have a method critique.*got None"):
        make(config(tmp_path))


def test_bases_that_may_drop_advantages_of_tokens_are_refused():
    class OwnLoss(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    with pytest.raises(ValueError, match="OwnLoss has a _compute_loss of its own.*capo_token_advantages = True"):
        capo_trainer(OwnLoss)
    OwnLoss.capo_token_advantages = True
    assert issubclass(capo_trainer(OwnLoss), OwnLoss)
    with pytest.raises(ValueError, match="object has no _generate_and_score_completions"):
        capo_trainer(object)


def test_a_base_that_reorders_rows_is_refused(tmp_path):
    class Reorders(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return {**output, "completion_ids": output["completion_ids"].flip(0)}

    trainer = make(config(tmp_path), judge(), base=Reorders)
    with pytest.raises(ValueError, match="changed its completions after they were rewarded"):
        trainer.train()


def test_a_custom_base_keeps_its_own_behaviour(tmp_path):
    class Counts(GRPOTrainer):
        calls = 0

        def _generate_and_score_completions(self, inputs):
            type(self).calls += 1
            return super()._generate_and_score_completions(inputs)

    trainer = make(config(tmp_path), judge(), base=Counts)
    spy = Spy(trainer)
    trainer.train()
    assert type(trainer).calls == 2 and spy.seen[0]["advantages"].dim() == 2
    assert type(trainer).__name__ == "CapoCounts"


# ---- the judge


@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_the_judge_works_beside_the_reward_functions(kind, tmp_path):
    started = threading.Event()
    loops = set()

    class Blocking:
        def critique(self, requests, num_votes):
            started.set()
            return judge().critique(requests, num_votes)

    class Coroutine:
        async def critique(self, requests, num_votes):
            started.set()
            loops.add(id(asyncio.get_running_loop()))
            await asyncio.sleep(0)
            return judge().critique(requests, num_votes)

    def reward(completions, **columns):
        assert started.wait(30), "the judge waits for the reward functions"
        started.clear()
        return odd(completions)

    trainer = make(config(tmp_path), Blocking() if kind == "function" else Coroutine(), rewards=reward)
    spy = Spy(trainer)
    trainer.train()
    assert all(batch["advantages"].dim() == 2 for batch in spy.seen)
    assert len(loops) == (kind == "coroutine")  # one loop for the whole run, so that a client can keep its connections


def test_faults_of_the_judge_are_raised_where_they_belong(tmp_path):
    class Raises:
        def critique(self, requests, num_votes):
            raise ConnectionError("no judge at this address")

    class Short:
        def critique(self, requests, num_votes):
            return judge().critique(requests, num_votes)[1:]

    with pytest.raises(ConnectionError, match="no judge at this address"):
        make(config(tmp_path), Raises()).train()
    with pytest.raises(ValueError, match="asked for 3 critiques of each of 8 responses"):
        make(config(tmp_path), Short()).train()


def test_a_failing_reward_function_is_not_hidden_by_a_slow_judge(tmp_path):
    release = threading.Event()

    class Slow:
        def critique(self, requests, num_votes):
            release.wait(30)
            return judge().critique(requests, num_votes)

    def broken(completions, **columns):
        raise RuntimeError("no reward today")

    try:
        with pytest.raises(RuntimeError, match="no reward today"):
            make(config(tmp_path), Slow(), rewards=broken).train()
    finally:
        release.set()


class Recorder:
    def __init__(self):
        self.requests = []

    def critique(self, requests, num_votes):
        self.requests += requests
        return judge().critique(requests, num_votes)


def test_the_judge_reads_the_question_the_reference_and_the_steps_as_sampled(tmp_path):
    who = Recorder()
    trainer = make(config(tmp_path, max_steps=1), who)
    spy = Spy(trainer)
    trainer.train()
    assert {(request.question, request.reference) for request in who.requests} == {("7+5=", "2"), ("3*3=", "9")}
    decoded = trainer.processing_class.batch_decode(spy.generated[0]["completion_ids"], skip_special_tokens=True)
    assert ["".join(request.steps).strip() for request in who.requests] == [text.strip() for text in decoded]
    assert any(len(request.steps) > 1 for request in who.requests)


def test_columns_for_the_judge_are_chosen_by_name(tmp_path):
    who = Recorder()
    make(config(tmp_path, max_steps=1, capo_question="answer", capo_reference="prompt"), who).train()
    assert {(request.question, request.reference) for request in who.requests} == {("2", "7+5="), ("9", "3*3=")}
    with pytest.raises(ValueError, match="capo_reference='proof': the dataset has no such column, only .*answer"):
        make(config(tmp_path, capo_reference="proof"), who).train()


def test_prompts_that_are_conversations_reach_the_judge_as_text():
    from capo.shaping import question_text

    assert question_text([{"role": "user", "content": "2 + 2?"}]) == "2 + 2?"
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert question_text(talk) == "system: Be brief.\n\nuser: What is it?"


def test_evaluation_does_not_ask_the_judge(tmp_path):
    who = Recorder()
    args = config(tmp_path, max_steps=1, per_device_eval_batch_size=8)
    trainer = make(args, who, eval_dataset=Dataset.from_list(DATA[:2]))
    trainer.evaluate()
    assert any("eval_reward" in row for row in trainer.state.log_history) and not who.requests
    trainer.train()
    assert who.requests


# ---- masks, metrics


def test_tokens_of_tools_and_masked_responses_get_no_advantage_and_do_not_count(tmp_path):
    from capo.integrations.trl import _Judged

    trainer = make(config(tmp_path, max_steps=1), judge())
    token_bytes = trainer.capo_token_bytes
    rows = [[1, 15, 2, 3, EOS], [4, 15, 5, EOS], [6, 7, EOS], [8, 15, 9, 9, 9, EOS]]
    ids, cu_seqlens = torch.tensor([id_ for row in rows for id_ in row]), torch.tensor([0, *map(len, rows)]).cumsum(0)
    steps = capo.segment(ids, cu_seqlens, token_bytes)
    texts = capo.steps.step_texts(ids, steps, token_bytes)
    replies = judge().critique([capo.judges.JudgeRequest("?", None, tuple(text)) for text in texts], 3)
    padded = torch.full((4, 6), EOS)
    mask, tools = torch.zeros(4, 6, dtype=torch.int64), torch.ones(4, 6, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    tools[0, 2] = tools[3, 3] = tools[3, 4] = 0
    mask[2] = 0  # truncated, with mask_truncated_completions
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    output = {"completion_ids": padded, "completion_mask": mask, "tool_mask": tools, "advantages": rewards}
    judged = _Judged(ids, cu_seqlens, steps, replies, rewards, 0.0)
    actual = trainer._capo_advantages(output, judged)
    ranges = [[(0, 1), (1, 5)], [(0, 1), (1, 4)], [(0, 3)], [(0, 1), (1, 6)]]
    critiques = [[reply.critique for reply in row] for row in replies]
    wanted = capo.shape(rewards, critiques, groups=4, steps=ranges, token_ids=padded, mask=mask * tools)
    assert torch.equal(actual, wanted) and wanted.any()
    assert not actual[(mask * tools) == 0].any()


def test_metrics_say_how_the_judge_behaves(tmp_path):
    trainer = make(config(tmp_path, max_steps=1), judge(invalid=0.3, failed=0.2))
    trainer.train()
    row = next(row for row in trainer.state.log_history if "reward" in row)
    mine = {name.removeprefix("capo/"): value for name, value in row.items() if name.startswith("capo/")}
    assert mine.keys() == {
        "flag_rate/right", "flag_rate/wrong", "vote_agreement", "critiques/invalid", "critiques/failed",
        "judge_tokens_per_token", "undecided", "dead_tokens", "host_advantages", "max_advantage", "time/judge",
        "time/shape",
    }  # fmt: skip
    assert 0 < mine["critiques/invalid"] + mine["critiques/failed"] < 24
    assert mine["vote_agreement"] == 1.0 and mine["undecided"] == 0 and mine["judge_tokens_per_token"] > 0
    assert 0 < mine["time/shape"] < 10 and mine["max_advantage"] > 0


def test_an_undecided_outcome_is_counted_and_moves_nothing(tmp_path):
    def sometimes(completions, **columns):
        return [None if i % 4 == 0 else reward for i, reward in enumerate(odd(completions))]

    trainer = make(config(tmp_path, max_steps=1), judge(), rewards=sometimes)
    spy = Spy(trainer)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "capo/undecided" in row)
    assert row["capo/undecided"] == 2
    advantages = spy.generated[0]["advantages"]
    assert not advantages[::4].any() and advantages.any() and bool(advantages.isfinite().all())


# ---- processes and the command line


def torchrun(*command, cwd, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command]
    done = subprocess.run(launcher, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.slow
def test_two_processes_with_split_groups_have_the_advantages_of_one(tmp_path):
    torchrun(str(Path(__file__).parent / "trl_two_processes.py"), str(tmp_path), cwd=tmp_path)
    for base in ("rule", "host"):
        ranks = [torch.load(tmp_path / f"{base}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert [len(rank["advantages"]) for rank in ranks] == [6, 6]  # three groups of four: the second one is split
        whole = ranks[0]["whole"], ranks[1]["whole"]
        assert torch.equal(*whole)
        parts = torch.cat([rank["advantages"] for rank in ranks])
        mask = torch.cat([rank["mask"] for rank in ranks]).bool()
        assert_as_accurate(parts[mask], whole[0][mask], ranks[0]["truth"][mask], size=1.0)
        assert parts[mask].unique().numel() > 4
        logs = json.loads((tmp_path / f"{base}-log.json").read_text())
        assert logs["capo/critiques/failed"] == ranks[0]["failed"] > 0 and logs["capo/max_advantage"] == float(
            parts[mask].abs().max()
        )


PROJECT = """
from capo.judges.scripted import ScriptedJudge

def odd(completions, **columns):
    return [float(len(completion) % 2) for completion in completions]

def judge():
    return ScriptedJudge(lambda request: [i % 2 == 1 for i in range(len(request.steps))])
"""
YAML = """
model_name_or_path: model
dataset_name: data
reward_funcs: [project_of_mine.odd]
capo_judge: project_of_mine.judge
capo_delimiter: '\\n\\n'
output_dir: out
use_cpu: true
bf16: false
gradient_checkpointing: false
per_device_train_batch_size: 2
num_generations: 4
max_completion_length: 12
max_steps: 2
logging_steps: 1
report_to: none
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    (tmp_path / "project_of_mine.py").write_text(PROJECT)
    (tmp_path / "grpo.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("project_of_mine", None)


def test_the_command_trains_by_yaml_and_options(project):
    done = CliRunner().invoke(
        cli.app, ["trl", "--config", "grpo.yaml", "--per_device_train_batch_size", "4", "--max_steps", "1"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (project / "out" / "model.safetensors").exists()
    state = json.loads((project / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert "capo/flag_rate/wrong" in state["log_history"][0]


def test_options_of_the_launcher_go_to_accelerate_and_the_rest_to_its_processes(project, monkeypatch):
    from accelerate.commands import launch

    launched = []
    monkeypatch.setattr(launch, "launch_command", launched.append)
    monkeypatch.setenv("CAPO_TRL_LAUNCHED", "")  # so that it is as before in the end
    monkeypatch.delenv("CAPO_TRL_LAUNCHED")
    (project / "grpo.yaml").write_text(YAML + "num_machines: 1\n")
    options = [
        "--config",
        "grpo.yaml",
        "--per_device_train_batch_size",
        "4",
        "--max_steps",
        "1",
        "--num_processes",
        "2",
    ]
    CliRunner().invoke(cli.app, ["trl", *options], catch_exceptions=False)
    (settings,) = launched
    assert (settings.num_processes, settings.num_machines, settings.module) == (2, 1, True)
    assert [settings.training_script, *settings.training_script_args] == ["capo.cli", "trl", *options]
    assert os.environ["CAPO_TRL_LAUNCHED"] == "1"

    CliRunner().invoke(cli.app, ["trl", *options], catch_exceptions=False)  # as one of those processes
    assert len(launched) == 1 and (project / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_command_runs_on_two_processes(project):
    torchrun("-m", "capo.cli", "trl", "--config", "grpo.yaml", "--capo_linear_loss", "true", cwd=project)
    assert (project / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--capo_judge", "project_of_mine.nobody"], "capo_judge: cannot import 'project_of_mine.nobody'"),
        (["--capo_judge", "nowhere.judge"], "capo_judge: cannot import 'nowhere.judge': No module named"),
        (["--reward_funcs", "exact"], "'exact' is no name in trl.rewards"),
        (["--capo_rule", "rloo"], "looks at outcomes only"),
        (["--dataset_name", "./nothing"], "there is no ./nothing"),
        (["--config", "nothing.yaml"], "--config: .*nothing.yaml"),
    ],
)
def test_the_command_names_what_is_wrong(options, message, project):
    rest = [] if "--config" in options else ["--config", "grpo.yaml"]
    with pytest.raises(capo.errors.UsageError, match=message):
        CliRunner().invoke(
            cli.app, ["trl", *rest, "--per_device_train_batch_size", "4", *options], catch_exceptions=False
        )


def test_import_capo_does_not_import_trl():
    code = "import sys, capo, capo.shaping, capo.cli; sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_callback_sees_the_metrics(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    make(config(tmp_path, max_steps=1), judge(), callbacks=[Watch()]).train()
    assert any("capo/flag_rate/right" in logs for logs in seen)
