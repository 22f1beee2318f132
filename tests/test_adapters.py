"""The adapters of trainers that cannot run here, against the trainers' own code where it has been fetched.

`.ci/trainers` fetches the releases and runs this file with CAPO_TRAINERS, the folder that they are in: then the advantages
that must not change are those of the trainer's code. Without it they are those of the formula, as recorded here.
"""

import asyncio
import copy
import functools
import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from test_step_credit import BAD, DEAF, END, GOLDEN, JUDGE, RESPONSES, SILENT, TOKEN_BYTES, WORD
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from trainer_sources import contracts, differences, extract, need

import capo
from capo.integrations import areal, nemo_rl, openrlhf, prime_rl, skyrl, slime, tinker
from capo.judges import JudgeReply
from capo.shaping import StepCredit, configured_credit

FOLDER = Path(os.environ["CAPO_TRAINERS"]) if os.environ.get("CAPO_TRAINERS") else None
EXTRA = WORD  # a token of a tool or of padding: what it says must not matter


class Judge:
    """The scripted judge, which notes what it is asked and has no answer where the question says so."""

    def __init__(self):
        self.asked = []

    def critique(self, requests, num_votes):
        self.asked += requests
        answers = JUDGE.critique(requests, num_votes)
        failure = [JudgeReply.failure("deadline")] * num_votes
        return [failure if "silence" in r.question else a for r, a in zip(requests, answers, strict=True)]


@dataclass
class Batch:
    """What a trainer has sampled: prompts, responses, what of them the policy wrote, outcomes, and groups of equal size."""

    responses: list[list[int]]
    outcomes: list[float]
    size: int = 2
    questions: list[str] = field(default_factory=list)
    masks: list[list[int]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)

    def __post_init__(self):
        count = len(self.responses)
        self.questions = self.questions or ["?"] * count
        self.masks = self.masks or [[1] * len(row) for row in self.responses]
        # The prompts of a group are equal; those of different groups differ in length and in what they say.
        self.prompts = self.prompts or [[END] * (2 + row // self.size) for row in range(count)]

    @property
    def groups(self):
        return [row // self.size for row in range(len(self.responses))]

    def whole(self):
        """Prompts and responses, one after the other, and the masks of both."""
        ids = [[*p, *r] for p, r in zip(self.prompts, self.responses, strict=True)]
        return ids, [[0] * len(p) + m for p, m in zip(self.prompts, self.masks, strict=True)]


@dataclass
class Result:
    """``host``: the trainer's advantages without the adapter; ``raw``: with it; ``rows``: those, by token of the response."""

    host: list[torch.Tensor]
    raw: list[torch.Tensor]
    rows: list[list[float]]


def through_skyrl(credit, batch, source=None):
    class Data(dict):
        metadata = {"uids": batch.groups, "avg_response_length": 5.0}  # noqa: RUF012

        def to(self, device):
            return self

    class Generator:
        async def generate(self, input_batch):
            return {
                "prompt_token_ids": batch.prompts,
                "response_ids": batch.responses,
                "rewards": batch.outcomes,
                "loss_masks": batch.masks,
            }

    class Trainer:
        def __init__(self):
            algorithm = {"advantage_estimator": "grpo", "gamma": 1.0, "lambd": 1.0, "grpo_norm_by_std": True}
            algorithm |= {"use_kl_in_reward": False, "policy_loss_type": "regular"}
            self.cfg = config(generator__step_wise_trajectories=False, trainer__algorithm=algorithm)
            self.generator = skyrl.JudgedGenerator(Generator(), credit)
            self.all_metrics = {}

        def compute_advantages_and_returns(self, data):
            data["advantages"] = grpo(data["rewards"], data["response_mask"], data.metadata["uids"])
            return data

    lay_out = right_aligned
    if source is not None:
        compute, lay_out = skyrl_sources(source)
        Trainer.compute_advantages_and_returns = compute

    def data():
        rewards = [
            [*[0.0] * (len(row) - 1), r][: len(row)] for row, r in zip(batch.responses, batch.outcomes, strict=True)
        ]
        tokenizer = SimpleNamespace(pad_token_id=BAD)
        parts = lay_out(tokenizer, batch.prompts, batch.responses, rewards, batch.masks)
        names = ("sequences", "attention_mask", "response_mask", "rewards", "loss_mask")
        return Data(zip(names, parts, strict=False), values=None)

    messages = [[{"role": "user", "content": question}] for question in batch.questions]
    extras = [{"reward_spec": {"ground_truth": "7"}}] * len(messages)
    trainer = Trainer()
    host = trainer.compute_advantages_and_returns(data())["advantages"]
    asyncio.run(trainer.generator.generate({"prompts": messages, "env_extras": extras, "batch_metadata": None}))
    raw = skyrl.with_credit(trainer).compute_advantages_and_returns(data())["advantages"]
    assert credit.active == ("capo/host_advantages" in trainer.all_metrics)
    edge = raw.shape[1]
    return Result([host], [raw], [raw[i, edge - len(r) :].tolist() for i, r in enumerate(batch.responses)])


def skyrl_sources(source):
    logger = SimpleNamespace(info=lambda text: None, warning=lambda text: None)
    known = {"torch": torch, "np": np, "defaultdict": defaultdict, "logger": logger}
    registry = SimpleNamespace(get=lambda name: estimators[f"compute_{name}_outcome_advantage"])
    estimators = extract(
        need(source, "skyrl/backends/skyrl_train/utils/ppo_utils.py"),
        ["compute_grpo_outcome_advantage", "compute_advantages_and_returns"],
        AdvantageEstimatorRegistry=registry,
        **known,
    )
    trainer = extract(
        need(source, "skyrl/train/trainer.py"),
        ["RayPPOTrainer.compute_advantages_and_returns"],
        ppo_utils=SimpleNamespace(**estimators),
        **known,
    )
    preprocess = extract(
        need(source, "skyrl/train/dataset/preprocess.py"),
        ["convert_prompts_responses_to_batch_tensors"],
        _verify_inputs=lambda *args: None,
        **known,
    )
    convert = preprocess["convert_prompts_responses_to_batch_tensors"]
    return trainer["RayPPOTrainer"].compute_advantages_and_returns, convert


def right_aligned(tokenizer, prompts, responses, rewards, masks):
    total, window = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), max(map(len, responses))
    left = lambda row, size, value=0: [value] * (size - len(row)) + list(row)
    both = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    return (
        torch.tensor([left(row, total, tokenizer.pad_token_id) for row in both]),
        torch.tensor([left([1] * len(row), total) for row in both]),
        torch.tensor([left([1] * len(row), window) for row in responses]),
        torch.tensor([left(row, window) for row in rewards]),
        torch.tensor([left(row, window) for row in masks]),
    )


def grpo(rewards, mask, index):
    """SkyRL's: (reward - mean) / (std + 1e-6) over each prompt's responses, times the mask."""
    scores = rewards.sum(-1)
    for group in set(index):
        rows = torch.tensor([i for i, id_ in enumerate(index) if id_ == group])
        scores[rows] = (scores[rows] - scores[rows].mean()) / (scores[rows].std() + 1e-6)
    return scores.unsqueeze(-1) * mask


def through_openrlhf(credit, batch, source=None):
    args = SimpleNamespace(
        algo=SimpleNamespace(
            advantage=SimpleNamespace(estimator="group_norm", gamma=1.0, no_std_norm=False),
            kl=SimpleNamespace(init_coef=0.0, use_loss=False),
        ),
        actor=SimpleNamespace(policy_loss_type="ppo"),
        rollout=SimpleNamespace(n_samples_per_prompt=batch.size),
        reward=SimpleNamespace(clip_range=None),
    )
    base = openrlhf_maker(args, source)
    ids, masks = batch.whole()
    order = list(range(len(ids)))[::-1]  # experiences come in the order of their lengths, not of their prompts

    def experiences():
        made = []
        for part in (order[:1], order[1:]):  # micro-batches of different sizes, padded to different lengths
            longest = max(len(ids[i]) for i in part)
            fill = lambda row, value, longest=longest: list(row) + [value] * (longest - len(row))
            mask = torch.tensor([fill(masks[i], 0) for i in part])[:, 1:]
            made.append(
                SimpleNamespace(
                    sequences=torch.tensor([fill(ids[i], BAD) for i in part]),
                    action_mask=mask,
                    rewards=torch.tensor([batch.outcomes[i] for i in part]),
                    kl=torch.zeros(mask.shape),
                    index=part,
                    prompts=[batch.questions[i] for i in part],
                    labels=["7" for _ in part],
                    info={},
                    advantages=None,
                    returns=None,
                )
            )
        return made

    plain = base().compute_advantages_and_returns(experiences())
    maker = openrlhf.capo_maker(base, credit)()
    given_ = experiences()
    shaped = maker.compute_advantages_and_returns(maker.make_experience(given_))
    again = openrlhf.capo_maker(base, credit)().compute_advantages_and_returns(experiences())  # without the head start
    assert all(torch.equal(one.advantages, other.advantages) for one, other in zip(shaped, again, strict=True))
    rows = [[]] * len(ids)
    for experience in shaped:
        for row, i in zip(experience.advantages, experience.index, strict=True):
            first = len(batch.prompts[i]) - 1  # the log-probability of token t is at t - 1
            rows[i] = row[first : first + len(batch.responses[i])].tolist()
    return Result([e.advantages for e in plain], [e.advantages for e in shaped], rows)


def openrlhf_maker(args, source):
    class Base:
        def __init__(self):
            self.strategy = SimpleNamespace(args=args)
            self.args, self.kl_ctl = args, SimpleNamespace(value=0.0)
            self.advantage_estimator = args.algo.advantage.estimator

        def make_experience(self, samples_list):
            return samples_list

        def compute_advantages_and_returns(self, experiences):
            """OpenRLHF's group_norm: (reward - mean) / (std + 1e-9), up to the last token that the policy wrote."""
            size = args.rollout.n_samples_per_prompt
            place = torch.tensor([i for e in experiences for i in e.index])
            rewards = torch.empty(len(place))
            rewards[place] = torch.cat([e.rewards for e in experiences])
            rewards = rewards.reshape(-1, size)
            rewards = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-9)
            for e in experiences:
                until = e.action_mask.flip(1).cumsum(1).flip(1) > 0
                e.advantages = torch.where(until, rewards.reshape(-1)[e.index, None], 0.0)
            return experiences

    if source is None:
        return Base
    file = need(source, "openrlhf/trainer/ppo_utils/experience_maker.py")
    compute = extract(
        need(source, "openrlhf/models/utils.py"), ["compute_reward"], torch=torch, Union=dict, Optional=dict, Tuple=dict
    )["compute_reward"]
    maker = "RemoteExperienceMaker"
    names = [f"{maker}.compute_advantages_and_returns", f"{maker}.get_cumulative_returns"]
    known = {"torch": torch, "itertools": itertools, "compute_reward": compute, "logger": None}
    theirs = extract(file, names, apply_length_penalties=lambda *args: None, **known)[maker]
    return type(maker, (theirs,), {"__init__": Base.__init__, "make_experience": Base.make_experience})


def through_nemo_rl(credit, batch, source=None):
    if source is not None:
        pytest.skip("NeMo-RL is not on PyPI")

    class LeaveOneOut:
        """NeMo-RL's default: reward less the mean of the others, over their std; one number a row, without copies."""

        last_metrics = {"host": 1.0}  # noqa: RUF012

        def compute_advantage(self, prompt_ids, rewards, mask, **kwargs):
            assert set(kwargs) == {"repeated_batch", "logprobs_policy", "logprobs_reference"}
            _, index = torch.unique(prompt_ids, dim=0, return_inverse=True)
            others = index[:, None] == index[None]
            others.fill_diagonal_(False)
            base = (others * rewards).sum(1) / others.sum(1).clamp(min=1)
            return ((rewards - base) / 0.7).unsqueeze(-1).expand(mask.shape)

    ids, masks = batch.whole()
    longest = max(map(len, ids)) + 2
    mask = torch.tensor([row + [0] * (longest - len(row)) for row in masks]).float()
    logs = []
    for prompt, response, written, question in zip(
        batch.prompts, batch.responses, batch.masks, batch.questions, strict=True
    ):
        log = [{"role": "user", "content": question, "token_ids": torch.tensor(prompt)}]
        cuts = [0, *(t for t in range(1, len(response)) if written[t] != written[t - 1]), len(response)]
        for start, end in itertools.pairwise(cuts):
            role = "assistant" if response and written[start] else "environment"
            log.append({"role": role, "content": "...", "token_ids": torch.tensor(response[start:end]).long()})
        logs.append(log)
    given_ = {
        "prompt_ids": pad_sequence([torch.tensor(p) for p in batch.prompts], batch_first=True, padding_value=BAD),
        "rewards": torch.tensor(batch.outcomes),
        "mask": mask,
        "repeated_batch": {"message_log": logs, "extra_env_info": [{"ground_truth": "7"}] * len(logs)},
        "logprobs_policy": torch.zeros(mask.shape),
        "logprobs_reference": None,
    }
    estimator = nemo_rl.CapoAdvantageEstimator(LeaveOneOut(), credit)
    raw = estimator.compute_advantage(**given_)
    assert estimator.last_metrics["host"] == 1.0
    firsts = [len(prompt) for prompt in batch.prompts]
    rows = [raw[i, first : first + len(batch.responses[i])].tolist() for i, first in enumerate(firsts)]
    return Result([LeaveOneOut().compute_advantage(**given_)], [raw], rows)


def through_slime(credit, batch, source=None):
    if source is not None:
        pytest.skip("slime is not on PyPI: the name there is another package's")
    args = slime_args(batch)
    ids, _ = batch.whole()
    samples = [
        SimpleNamespace(
            group_index=batch.groups[i],
            prompt=[{"role": "user", "content": batch.questions[i]}],
            tokens=ids[i],
            response_length=len(batch.responses[i]),
            label="7",
            loss_mask=batch.masks[i],
            remove_sample=False,
            metadata={},
            get_reward_value=lambda args, i=i: batch.outcomes[i],
        )
        for i in range(len(ids))
    ]
    use(credit)
    raw_rewards, rewards = slime.post_process(args, samples)
    assert raw_rewards == batch.outcomes
    order = list(range(len(ids)))[::-1]  # a rank gets some of the samples, in any order
    kl = [torch.zeros(len(batch.responses[i])) for i in order]
    rollout = {"rewards": [rewards[i] for i in order], "kl": kl}
    slime.advantages(args, rollout)
    assert all(torch.equal(a, r) for a, r in zip(rollout["advantages"], rollout["returns"], strict=True))
    # slime's own: rewards over their std in the group, spread over the tokens
    plain = torch.tensor(batch.outcomes).reshape(-1, batch.size)
    plain = plain - plain.mean(-1, keepdim=True)
    plain = (plain / (plain.std(-1, keepdim=True) + 1e-6)).flatten().tolist()
    assert rollout["rewards"] == [plain[i] for i in order]  # numbers again: the trainer adds them up for its log
    tensor = torch.tensor([plain[i] for i in order], dtype=torch.float32)
    host = [torch.ones_like(row) * tensor[place] for place, row in enumerate(kl)]
    return Result(host, rollout["advantages"], [row.tolist() for row in rollout["advantages"][::-1]])


def slime_args(batch):
    return SimpleNamespace(
        advantage_estimator="grpo",
        kl_coef=0.0,
        rewards_normalization=True,
        grpo_std_normalization=True,
        n_samples_per_prompt=batch.size,
        rollout_batch_size=len(batch.responses) // batch.size,
    )


def through_prime_rl(credit, batch, source=None):
    if source is not None:
        pytest.skip("prime-rl is not on PyPI")

    class GRPOAlgorithm:
        action_loss_type = "rl"

        async def score_group(self, episodes):
            """prime-rl's: reward less the mean; a node has one value for each token that was sampled."""
            traces = [trace for episode in episodes for trace in episode.traces]
            rewards = torch.tensor([trace.reward for trace in traces], dtype=torch.float32)
            for trace, advantage in zip(traces, (rewards - rewards.mean()).tolist(), strict=True):
                for node in trace.nodes:
                    if any(node.mask):
                        node.advantages = [advantage] * sum(node.mask)

    def episodes(group):
        made = []
        for i in (i for i, id_ in enumerate(batch.groups) if id_ == group):
            response, written = batch.responses[i], batch.masks[i]
            nodes = [node(batch.prompts[i], [0] * len(batch.prompts[i]))]
            cuts = [0, *(t for t in range(1, len(response)) if written[t] != written[t - 1]), len(response)]
            nodes += [node(response[a:b], written[a:b]) for a, b in itertools.pairwise(cuts)]
            task = SimpleNamespace(data=SimpleNamespace(prompt=batch.questions[i], answer="7"))
            made.append(SimpleNamespace(traces=[SimpleNamespace(nodes=nodes, reward=batch.outcomes[i], task=task)]))
        return made

    def node(ids, mask):
        return SimpleNamespace(token_ids=list(ids), mask=[bool(one) for one in mask], advantages=None)

    def run(kind):
        values, rows = [], []
        for group in sorted(set(batch.groups)):
            asyncio.run(kind().score_group(cohort := episodes(group)))
            for episode in cohort:
                row = []
                for one in episode.traces[0].nodes[1:]:
                    assert one.advantages is None or len(one.advantages) == sum(one.mask)
                    row += one.advantages or [0.0] * len(one.token_ids)
                    values.append(torch.tensor(one.advantages or [], dtype=torch.float64))
                rows.append(row)
        return values, rows

    raw, rows = run(prime_rl.capo_algorithm(GRPOAlgorithm, credit))
    return Result(run(GRPOAlgorithm)[0], raw, rows)


def through_tinker(credit, batch, source=None):
    ids, masks = batch.whole()
    tensor_data = cookbook = None
    if source is not None:
        sys.path.append(str(source))
        try:
            tensor_data = pytest.importorskip("tinker").TensorData
        finally:
            sys.path.remove(str(source))
        cookbook = tinker_cookbook(source)

    class TensorData:
        def __init__(self, tensor):
            self.tensor = tensor

        from_torch = classmethod(lambda cls, tensor: cls(tensor))

        def to_torch(self):
            return self.tensor

    class Observation(list):
        def to_ints(self):
            return list(self)

    tensor_data = tensor_data or TensorData

    def groups():
        made = []
        for group in sorted(set(batch.groups)):
            rows = [i for i, id_ in enumerate(batch.groups) if id_ == group]
            rewards = [batch.outcomes[i] for i in rows]
            trajectories = [SimpleNamespace(transitions=transitions(i)) for i in rows]
            made.append(SimpleNamespace(trajectories_G=trajectories, get_total_rewards=lambda r=rewards: r))
        return made

    def transitions(i):
        """One for every stretch that the policy wrote, after all that came before it."""
        made = []
        cuts = [0, *(t for t in range(1, len(ids[i])) if masks[i][t] != masks[i][t - 1]), len(ids[i])]
        for start, end in itertools.pairwise(cuts):
            if masks[i][start]:
                tokens = ids[i][start:end]
                action = SimpleNamespace(tokens=tokens, logprobs=[0.0] * len(tokens), sequence_id=None)
                seen = observation(ids[i][:start])
                made.append(SimpleNamespace(ob=seen, ac=action, metrics={}))
        return made or [SimpleNamespace(ob=observation(ids[i]), ac=SimpleNamespace(tokens=[], logprobs=[], sequence_id=None), metrics={})]  # fmt: skip

    def observation(tokens):
        return Observation(tokens) if cookbook is None else sys.modules["tinker"].ModelInput.from_ints(tokens)

    def data():
        if cookbook is not None:
            made = groups()
            return cookbook["assemble_training_data"](made, cookbook["compute_advantages"](made))
        datums, places = [], []
        for i, row in enumerate(ids):
            mine = torch.tensor(
                [r for r, id_ in zip(batch.outcomes, batch.groups, strict=True) if id_ == batch.groups[i]]
            )
            advantage = float(mine[i % batch.size] - mine.mean())
            fields = {
                "target_tokens": torch.tensor(row[1:]),
                "mask": torch.tensor(masks[i][1:]).float(),
                "advantages": torch.tensor([advantage * one for one in masks[i][1:]]).float(),
            }
            datums.append(SimpleNamespace(loss_fn_inputs={k: tensor_data.from_torch(v) for k, v in fields.items()}))
            places.append({"group_idx": batch.groups[i], "traj_idx": i % batch.size})
        return datums, places

    texts = lambda group, number: (batch.questions[group.start + number], "7")
    made = groups()
    for place, group in enumerate(made):
        group.start = place * batch.size
    datums, places = data()
    assert [place["group_idx"] * batch.size + place["traj_idx"] for place in places] == list(range(len(ids)))
    tinker.shape_data(credit, datums, places, made, texts)
    host = [datum.loss_fn_inputs["advantages"].to_torch() for datum in data()[0]]
    raw = [datum.loss_fn_inputs["advantages"].to_torch() for datum in datums]
    rows = []
    for i, row in enumerate(raw):
        first = len(batch.prompts[i]) - 1  # the target of position t is token t + 1
        found = row[first : first + len(batch.responses[i])].tolist()
        rows.append(found + [0.0] * (len(batch.responses[i]) - len(found)))
    return Result(host, raw, rows)


def tinker_cookbook(source):
    package = sys.modules["tinker"]
    file = need(source, "tinker_cookbook/rl/data_processing.py")
    common = extract(
        need(source, "tinker_cookbook/supervised/common.py"),
        ["create_rightshifted_model_input_and_leftshifted_targets"],
        tinker=package,
        cast=lambda kind, value: value,
        DataValidationError=ValueError,
    )
    names = ["compute_advantages", "_is_prefix", "_flat_ob_token_len", "_flat_ob_to_model_input", "_flatten_chunks"]
    known = {
        "tinker": package,
        "TensorData": package.TensorData,
        "torch": torch,
        "safezip": lambda *rows: zip(*rows, strict=True),
        "PARSE_ERROR_MASKED_METRIC_KEY": "masked",
        "FlatOb": list,
        "FlatObElem": int,
        "ProvenanceSpan": object,
        "create_rightshifted_model_input_and_leftshifted_targets": common[
            "create_rightshifted_model_input_and_leftshifted_targets"
        ],
    }
    return extract(file, [*names, "trajectory_to_data", "assemble_training_data"], **known)


def through_areal(credit, batch, source=None):
    ids, masks = batch.whole()
    config = SimpleNamespace(
        importance_sampling_level="token",
        kl_ctl=0.0,
        overlong_reward_penalty=False,
        use_decoupled_loss=False,
        recompute_logprob=False,
    )

    class Workflow:
        async def arun_episode(self, engine, data):
            i = data["i"]
            fields = {
                "input_ids": torch.tensor(ids[i], dtype=torch.int32),
                "loss_mask": torch.tensor(masks[i], dtype=torch.int32),
                "attention_mask": torch.ones(len(ids[i]), dtype=torch.bool),
                "logprobs": torch.zeros(len(ids[i])),
                "rewards": torch.tensor(batch.outcomes[i], dtype=torch.float32),
            }
            return {name: value.unsqueeze(0) for name, value in fields.items()}

    class Actor:
        def __init__(self):
            self.config, self.reward_bias, self.reward_scaling, self.reward_clip = config, 0.0, 1.0, 20.0
            self.reward_norm = self.adv_norm = None
            self.kl_ctl, self.discount, self.gae_lambda, self.mask_no_eos_with_zero = 0.0, 1.0, 1.0, False
            self.kl_estimator = lambda one, other: torch.zeros_like(one)

        def compute_advantages(self, data):
            """AReaL's, without discount and critic: the reward, up to the last token; all but the ids is rolled by one."""
            for group in data:
                last = group["attention_mask"].sum(-1) - 1
                group["loss_mask"] = group["loss_mask"].float().roll(-1, -1)
                there = torch.arange(group["loss_mask"].shape[1]) < last[:, None]
                there &= group["loss_mask"].flip(1).cumsum(1).flip(1) > 0
                group["advantages"] = torch.where(there, group["rewards"][:, None], 0.0)
            return data

    if source is not None:
        compute, call = areal_sources(source)
        compute_all = lambda self, data: call(lambda rows: compute(self, rows), data)
        Actor = type("PPOActor", (Actor,), {"compute_advantages": compute_all})

    async def episodes(kind):
        made = []
        for group in sorted(set(batch.groups)):
            rows = [i for i, id_ in enumerate(batch.groups) if id_ == group]
            one = [
                await kind().arun_episode(
                    None, {"i": i, "answer": "7", "messages": [{"role": "user", "content": batch.questions[i]}]}
                )
                for i in rows
            ]
            longest = max(part["input_ids"].shape[1] for part in one)
            made.append(
                {
                    name: torch.cat(
                        [pad(p[name], (0, longest - p[name].shape[1])) if p[name].dim() > 1 else p[name] for p in one]
                    )
                    for name in one[0]
                }
            )
        return made

    plain = Actor().compute_advantages(asyncio.run(episodes(Workflow)))
    shaped = areal.capo_actor(Actor, credit)().compute_advantages(
        asyncio.run(episodes(areal.capo_workflow(Workflow, credit)))
    )
    assert all(set(one) == set(other) for one, other in zip(plain, shaped, strict=True))  # the votes do not go further
    rows = []
    for i, group in enumerate(batch.groups):
        row = shaped[group]["advantages"][i % batch.size]
        first = len(batch.prompts[i]) - 1  # rolled: token t + 1 is at t
        rows.append(row[first : first + len(batch.responses[i])].tolist())
    return Result([g["advantages"] for g in plain], [g["advantages"] for g in shaped], rows)


def areal_sources(source):
    file = need(source, "areal/utils/data.py")
    names = [
        "TrajBatchMeta",
        "is_multi_modal_key",
        "get_batch_size",
        "_pad_cat_dim0",
        "concat_padded_tensors",
        "_unpad_splits",
    ]
    names += ["split_and_unpad_tensor", "concat_batch", "split_batch", "batched_call"]
    known = {"torch": torch, "F": torch.nn.functional, "copy": copy, "Any": Any, "dataclass": dataclass}
    data = extract(file, names, **known)
    actor = extract(need(source, "areal/trainer/ppo/actor.py"), ["PPOActor._compute_advantages"], torch=torch)
    return actor["PPOActor"]._compute_advantages, data["batched_call"]


ADAPTERS = {
    "skyrl": through_skyrl,
    "openrlhf": through_openrlhf,
    "nemo_rl": through_nemo_rl,
    "slime": through_slime,
    "prime_rl": through_prime_rl,
    "tinker": through_tinker,
    "areal": through_areal,
}


@pytest.fixture(params=ADAPTERS)
def through(request):
    return ADAPTERS[request.param]


@pytest.fixture(params=["recorded", "fetched"] if FOLDER else ["recorded"])
def source(request):
    return FOLDER if request.param == "fetched" else None


used = None


def use(credit):
    global used
    used = credit
    configured_credit.cache_clear()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("CAPO_CREDIT", "capo_test_settings.credit")
    module = ModuleType("capo_test_settings")
    module.credit = lambda: used
    monkeypatch.setitem(sys.modules, "capo_test_settings", module)
    configured_credit.cache_clear()
    yield
    configured_credit.cache_clear()


def credit_of(judge=None, **changes):
    return StepCredit(judge or Judge(), TOKEN_BYTES, **changes)


def same_bits(one, other):
    def bits(tensor):
        return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)

    pairs = list(zip(one, other, strict=True))
    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs)


GOLDEN_BATCH = Batch(RESPONSES, [1.0, 0.0])


def test_the_golden_vector(through, source):
    credit = credit_of()
    result = through(credit, GOLDEN_BATCH, source)
    assert result.rows == GOLDEN
    assert not same_bits(result.raw, result.host)
    assert sum(tensor.abs().sum() for tensor in result.raw) == 4.5 + 4.5  # and nothing anywhere else
    assert {(request.question.removeprefix("user: "), request.reference) for request in credit.judge.asked} == {
        ("?", "7")
    }


def test_prompts_and_rows_of_different_lengths(through, source):
    batch = Batch(RESPONSES[::-1] + RESPONSES, [0.0, 1.0, 1.0, 0.0])
    assert through(credit_of(), batch, source).rows == GOLDEN[::-1] + GOLDEN


def test_what_tools_say_counts_for_nothing(through, source):
    written = [[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1]]
    responses = [
        [WORD, WORD, BAD, END, WORD, BAD],  # without the tool's words it would be one step
        [WORD, WORD, END, BAD, WORD, WORD, WORD],
    ]
    rows = through(credit_of(), Batch(responses, [1.0, 0.0], masks=written), source).rows
    live = [[a for a, one in zip(row, mask, strict=True) if one] for row, mask in zip(rows, written, strict=True)]
    assert live == GOLDEN
    assert not any(
        a for row, mask in zip(rows, written, strict=True) for a, one in zip(row, mask, strict=True) if not one
    )


def test_an_empty_response(through, source):
    batch = Batch([*RESPONSES, []], [1.0, 0.0, 0.0], size=3)
    assert through(credit_of(), batch, source).rows == [*GOLDEN, []]


@pytest.mark.parametrize("base", ["rule", "host"])
def test_without_a_penalty_the_trainers_own_bit_for_bit(through, source, base):
    batch = Batch(RESPONSES + RESPONSES[::-1], [1.0, 0.25, 0.5, 0.0])
    result = through(StepCredit(None, None, rule=SILENT, base=base), batch, source)
    assert same_bits(result.raw, result.host) and any(tensor.any() for tensor in result.raw)


@pytest.mark.parametrize("base", ["rule", "host"])
def test_without_a_critique_the_trainers_own_bit_for_bit(through, source, base):
    batch = Batch(RESPONSES + RESPONSES[::-1], [1.0, 0.25, 0.5, 0.0])
    result = through(credit_of(DEAF, base=base), batch, source)
    assert same_bits(result.raw, result.host)


def test_groups_without_a_critique_keep_the_trainers_own_bit_for_bit(through, source):
    batch = Batch(RESPONSES + RESPONSES, [1.0, 0.0, 0.75, 0.0], questions=["?", "?", "silence", "silence"])
    mixed = through(credit_of(), batch, source)
    deaf = through(credit_of(DEAF), batch, source)
    assert mixed.rows[:2] == GOLDEN and mixed.rows[2:] == deaf.rows[2:] != GOLDEN
    assert same_bits(deaf.raw, deaf.host)


def test_base_host_adds_to_the_trainers_own(through, source):
    batch = Batch(RESPONSES + RESPONSES, [1.0, 0.0, 0.75, 0.25])
    host = through(credit_of(DEAF), batch, source).rows
    plain = capo.shape(batch.outcomes, None, groups=2, steps=[[]] * 4, token_ids=batch.responses)
    rule = through(credit_of(), batch, source).rows
    for row, own, shaped, silent in zip(
        through(credit_of(base="host"), batch, source).rows, host, rule, plain, strict=True
    ):
        change = (torch.tensor(shaped) - silent).to(torch.float64)
        wanted = torch.tensor(own, dtype=torch.float64) + change
        assert torch.equal(torch.tensor(row), torch.where(change == 0, torch.tensor(own), wanted.float()))


# What a trainer hands over and what it does not stand


@pytest.mark.skipif(FOLDER is None, reason="CAPO_TRAINERS is not set: .ci/trainers fetches the trainers")
@pytest.mark.parametrize("trainer", [name for name, one in contracts().items() if "package" in one])
def test_recorded_signatures_are_those_of_the_fetched_release(trainer):
    assert not differences(FOLDER, contracts()[trainer]["symbols"])


def test_changes_of_a_signature_are_seen(tmp_path):
    (tmp_path / "a.py").write_text(
        "from b import Kept\nclass C:\n    x: int\n    y: int = 0\n    def f(self, a, b=1, *, c, **d): ...\nasync def g(a): ...\n"
    )
    there = {"import": ["Kept"], "C": ["x", "y"], "C.f": ["self", "a", "b=", "*", "c", "**d"], "g": ["a"]}
    assert not differences(tmp_path, {"a.py": there})
    wanted = {"import": ["Gone"], "C": ["z"], "C.f": ["self", "a", "b", "*", "c", "**d"], "g": ["a", "e"], "h": []}
    assert differences(tmp_path, {"a.py": wanted, "b.py": {}}) == [
        "a.py has no Gone",
        "a.py: C has no z",
        "a.py: C.f(self, a, b, *, c, **d) is now (self, a, b=, *, c, **d)",
        "a.py: g(a, e) is now (a)",
        "a.py: h is gone",
        "b.py is gone",
    ]


@pytest.mark.parametrize(
    ("pip", "code", "outcome"), [("true", 1, "changed"), ("false", 2, "not installable: pip failed")]
)
def test_the_comparison_fails_where_it_should(tmp_path, pip, code, outcome):
    script = Path(__file__).parent.parent / ".ci" / "trainers"
    run = [sys.executable, str(script), "--no-tests", str(tmp_path)]
    done = subprocess.run(run, check=False, capture_output=True, text=True, env={**os.environ, "PIP_COMMAND": pip})
    lines = [line for line in done.stdout.splitlines() if line.startswith("skyrl ")]
    assert done.returncode == code and lines[0].endswith(outcome), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("trainer", "file", "symbol", "function"),
    [
        *(
            (
                "nemo-rl",
                "nemo_rl/algorithms/advantage_estimator.py",
                f"{name}AdvantageEstimator.compute_advantage",
                nemo_rl.CapoAdvantageEstimator(None, None).compute_advantage,
            )
            for name in ("GRPO", "GDPO", "ReinforcePlusPlus")
        ),
        ("slime", "slime/backends/megatron_utils/loss.py", "compute_advantages_and_returns", slime.advantages),
        (
            "prime-rl",
            "src/prime_rl/orchestrator/algo/base.py",
            "Algorithm.score_group",
            prime_rl.capo_algorithm(object, StepCredit(None, None, rule=SILENT))().score_group,
        ),
        (
            "skyrl",
            "skyrl/train/generators/base.py",
            "GeneratorInterface.generate",
            skyrl.JudgedGenerator(None, None).generate,
        ),
        (
            "openrlhf",
            "openrlhf/trainer/ppo_utils/experience_maker.py",
            "RemoteExperienceMaker.make_experience",
            functools.partial(openrlhf.capo_maker(object).make_experience, None),
        ),
        (
            "openrlhf",
            "openrlhf/trainer/ppo_utils/experience_maker.py",
            "RemoteExperienceMaker.compute_advantages_and_returns",
            functools.partial(openrlhf.capo_maker(object).compute_advantages_and_returns, None),
        ),
        ("areal", "areal/workflow/rlvr.py", "RLVRWorkflow.arun_episode", areal.capo_workflow(object)().arun_episode),
        (
            "areal",
            "areal/trainer/ppo/actor.py",
            "PPOActor.compute_advantages",
            areal.capo_actor(object)().compute_advantages,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hooks_take_what_the_trainer_hands_over(trainer, file, symbol, function):
    recorded = contracts()[trainer]["symbols"][file][symbol]
    names = [name.rstrip("=") for name in recorded if not name.startswith("*") and name != "self"]
    inspect.signature(function).bind(**dict.fromkeys(names))


def config(**settings):
    """Nested namespaces from dotted names, with a double underscore for the dot."""
    root: dict = {}
    for name, value in settings.items():
        *path, last = name.split("__")
        place = root
        for step in path:
            place = place.setdefault(step, {})
        place[last] = value
    space = lambda one: SimpleNamespace(**{k: space(v) for k, v in one.items()}) if isinstance(one, dict) else one
    return space(root)


def check_skyrl(credit, **settings):
    generator = skyrl.JudgedGenerator(None, credit)
    trainer = SimpleNamespace(generator=generator, cfg=config(**settings), compute_advantages_and_returns=None)
    skyrl.with_credit(trainer)


def check_prime_rl(credit, action_loss_type):
    prime_rl.capo_algorithm(type("Base", (), {"action_loss_type": action_loss_type}), credit)()


def check_slime(credit, **changes):
    slime.check(credit, SimpleNamespace(**{"advantage_estimator": "grpo", "kl_coef": 0.0, **changes}))


CHECKS = {
    "skyrl": check_skyrl,
    "openrlhf": lambda credit, **settings: openrlhf._check(credit, config(**settings)),
    "nemo_rl": lambda credit, **settings: nemo_rl.check(credit, config(**settings)),
    "areal": lambda credit, **settings: areal.check(credit, config(**settings)),
    "slime": check_slime,
    "prime_rl": check_prime_rl,
}
ONLY_RULE = "use base='host'"
REFUSED = [
    ("skyrl", {"generator__step_wise_trajectories": True}, "generator.step_wise_trajectories=True .* last turn"),
    (
        "skyrl",
        {"trainer__algorithm__policy_loss_type": "gspo"},
        "trainer.algorithm.policy_loss_type='gspo' .* one ratio",
    ),
    ("skyrl", {"trainer__algorithm__advantage_estimator": "gae"}, "advantage_estimator='gae' .* critic"),
    ("skyrl", {"trainer__algorithm__use_kl_in_reward": True}, ONLY_RULE),
    ("openrlhf", {"algo__advantage__estimator": "gae"}, "algo.advantage.estimator='gae' .* critic"),
    ("openrlhf", {"algo__advantage__estimator": "flash_reinforce"}, "no groups"),
    ("openrlhf", {"actor__policy_loss_type": "gspo"}, "actor.policy_loss_type='gspo' .* one ratio"),
    ("openrlhf", {"algo__kl__init_coef": 0.01, "algo__kl__use_loss": False}, ONLY_RULE),
    ("nemo_rl", {"grpo__adv_estimator__name": "opd"}, "grpo.adv_estimator.name='opd' .* distillation"),
    ("nemo_rl", {"grpo__adv_estimator__name": "gdpo"}, ONLY_RULE),
    ("nemo_rl", {"loss_fn__sequence_level_importance_ratios": True}, "one ratio a response"),
    ("nemo_rl", {"grpo__adv_estimator__name": "reinforce_plus_plus", "loss_fn__use_kl_in_reward": True}, ONLY_RULE),
    ("areal", {"importance_sampling_level": "sequence"}, "actor.importance_sampling_level='sequence' .* one ratio"),
    ("areal", {"kl_ctl": 0.1}, ONLY_RULE),
    ("slime", {"advantage_estimator": "gspo"}, "advantage_estimator='gspo' .* one ratio"),
    ("slime", {"advantage_estimator": "ppo"}, "advantage_estimator='ppo' .* checked with grpo and cispo"),
    ("slime", {"kl_coef": 0.1}, ONLY_RULE),
    ("prime_rl", {"action_loss_type": "ce"}, "action_loss_type='ce' .* no advantages"),
]


@pytest.mark.parametrize(("trainer", "settings", "reason"), REFUSED)
def test_what_does_not_go_together_is_refused_with_the_reason(trainer, settings, reason):
    with pytest.raises(ValueError, match=reason):
        CHECKS[trainer](credit_of(), **settings)
    if reason == ONLY_RULE:
        CHECKS[trainer](credit_of(base="host"), **settings)
    if "checked with" not in reason:
        CHECKS[trainer](StepCredit(None, None, rule=SILENT), **settings)


def test_usual_settings_are_not_refused():
    check_skyrl(
        credit_of(), trainer__algorithm__advantage_estimator="grpo", trainer__algorithm__policy_loss_type="regular"
    )
    CHECKS["openrlhf"](
        credit_of(), algo__kl__init_coef=0.01, algo__kl__use_loss=True, algo__advantage__estimator="rloo"
    )
    CHECKS["nemo_rl"](credit_of(), loss_fn__use_kl_in_reward=True)
    nemo_rl.check(credit_of(), {"grpo": {"adv_estimator": {"name": "grpo"}}, "loss_fn": {}})
    CHECKS["areal"](credit_of(), importance_sampling_level="token", kl_ctl=0.0)
    check_slime(credit_of(), advantage_estimator="cispo")


def test_skyrl_asks_no_judge_in_evaluation_and_forgets_what_was_trained_on():
    class Generator:
        name = "theirs"

        async def generate(self, input_batch, disable_tqdm=False):
            rows = {"prompt_token_ids": [[END], [END]], "response_ids": RESPONSES, "rewards": [1, 0]}
            return {**rows, "loss_masks": [[1] * len(row) for row in RESPONSES], "tqdm": disable_tqdm}

    credit = credit_of()
    generator = skyrl.JudgedGenerator(Generator(), credit)
    assert generator.name == "theirs" and copy.copy(generator).name == "theirs"
    batch = {"prompts": ["?", "?"], "env_extras": None, "batch_metadata": SimpleNamespace(training_phase="eval")}
    assert asyncio.run(generator.generate(batch, disable_tqdm=True))["tqdm"] and not credit.judge.asked
    batch["batch_metadata"].training_phase = "train"
    asyncio.run(generator.generate(batch))
    assert [request.reference for request in credit.judge.asked] == [None, None]
    sequences = [torch.tensor([END, *row]) for row in RESPONSES]
    votes = generator.recall(sequences[::-1], [6, 4])
    assert [len(row) for row in votes] == [6, 4]
    with pytest.raises(ValueError, match="row 0 was not judged when it was sampled"):
        generator.recall(sequences, [4, 6])
    with pytest.raises(ValueError, match="2 responses for 1 prompts"):
        asyncio.run(generator.generate({**batch, "prompts": ["?"]}))
    with pytest.raises(TypeError, match="must be a JudgedGenerator, got Generator"):
        skyrl.with_credit(SimpleNamespace(generator=Generator(), cfg=None))


def test_skyrl_remembers_only_so_much(monkeypatch):
    monkeypatch.setattr(skyrl, "KEPT", 1)

    class Generator:
        async def generate(self, input_batch):
            return {"prompt_token_ids": [[END]] * 2, "response_ids": RESPONSES, "loss_masks": [[1] * 4, [1] * 6]}

    generator = skyrl.JudgedGenerator(Generator(), credit_of())
    asyncio.run(generator.generate({"prompts": ["?", "?"]}))
    assert len(generator.recall([torch.tensor([END, *RESPONSES[1]])], [6])) == 1


def test_nemo_rl_needs_messages_and_one_tensor():
    class Pair:
        def compute_advantage(self, **kwargs):
            return torch.zeros(1, 2), None

    given_ = {"prompt_ids": torch.zeros(1, 1), "rewards": torch.zeros(1), "mask": torch.ones(1, 2)}
    with pytest.raises(TypeError, match="Pair gives a tuple"):
        nemo_rl.CapoAdvantageEstimator(Pair(), credit_of()).compute_advantage(**given_)
    host = SimpleNamespace(compute_advantage=lambda **kwargs: torch.zeros(1, 2))
    with pytest.raises(ValueError, match="no message_log"):
        nemo_rl.CapoAdvantageEstimator(host, credit_of()).compute_advantage(
            **given_, repeated_batch={"total_reward": 0}
        )
    logs = {"message_log": [[{"role": "assistant", "content": "", "token_ids": torch.zeros(3, dtype=torch.int64)}]]}
    with pytest.raises(ValueError, match="has 3 tokens, but the mask has 2 columns"):
        nemo_rl.CapoAdvantageEstimator(host, credit_of()).compute_advantage(**given_, repeated_batch=logs)


def test_nemo_rl_rows_that_are_not_valid_do_not_count():
    host = SimpleNamespace(compute_advantage=lambda rewards, mask, **kwargs: rewards[:, None].expand(mask.shape))
    rows = [*RESPONSES, RESPONSES[0]]
    logs = [[{"role": "assistant", "content": "", "token_ids": torch.tensor(row)}] for row in rows]
    mask = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in rows])
    actual = nemo_rl.CapoAdvantageEstimator(host, credit_of()).compute_advantage(
        prompt_ids=torch.zeros(3, 1),
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        mask=mask,
        repeated_batch={"message_log": logs},
        valid_mask=torch.tensor([1.0, 1.0, 0.0]),
    )
    assert actual.tolist() == [[*GOLDEN[0], 0, 0], GOLDEN[1], [0] * 6]


def test_slime_takes_votes_that_were_asked_for_beside_the_reward():
    use(credit_of())
    samples = [
        SimpleNamespace(group_index=None, prompt="?", tokens=[END, *row], response_length=len(row), label=None,
                        loss_mask=None, remove_sample=False, metadata={}, get_reward_value=lambda args, r=reward: r)
        for row, reward in zip(RESPONSES, [1.0, 0.0], strict=True)
    ]  # fmt: skip

    async def beside():
        await asyncio.gather(*map(slime.judge, samples))

    asyncio.run(beside())
    assert len(used.judge.asked) == 2
    _, rewards = slime.post_process(slime_args(Batch(RESPONSES, [1.0, 0.0])), samples)
    assert len(used.judge.asked) == 2 and [row[1:] for row in rewards] == GOLDEN
    samples[1].remove_sample = True  # its tokens count no more; the other's are alone in their group
    _, rewards = slime.post_process(slime_args(Batch(RESPONSES, [1.0, 0.0])), samples)
    assert rewards[0][1:] == [1.0, 1.0, -1.0, -1.0] and rewards[1][1:] == [0.0] * 6


def test_slime_cuts_advantages_as_the_ranks_of_a_sequence_have_them(monkeypatch):
    cuts = []

    def slice_log_prob_with_cp(log_prob, total_length, response_length):
        cuts.append((total_length, response_length))
        return torch.cat([log_prob[:1], log_prob[-1:]])

    package = "slime.backends.megatron_utils.cp_utils"
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils", package):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[package].slice_log_prob_with_cp = slice_log_prob_with_cp
    data = {"rewards": [[0.5, *GOLDEN[0]], 0.25], "kl": [torch.zeros(2), torch.zeros(3)]}
    data |= {"total_lengths": [7, 9], "response_lengths": [4, 6]}
    slime.advantages(None, data)
    assert [row.tolist() for row in data["advantages"]] == [[1.75, 0.5], [0.25] * 3]
    assert cuts == [(7, 4)] and data["rewards"] == [0.5, 0.25]
    bad = {**data, "rewards": [[0.5, *GOLDEN[0]]], "kl": [torch.zeros(3)]}
    with pytest.raises(ValueError, match="sample 0 has 3 tokens in this process, but 2 advantages"):
        slime.advantages(None, bad)


def test_slime_normalises_as_it_is_told():
    args = slime_args(Batch(RESPONSES * 2, [0.0] * 4))
    rewards = torch.tensor([[0.5, -0.5], [1.0, -1.0]])
    wanted = rewards / (torch.tensor([[0.5**0.5], [2**0.5]]) + 1e-6)
    assert torch.allclose(torch.tensor(slime._normalised(args, [1.0, 0.0, 3.0, 1.0])), wanted.flatten())
    args.grpo_std_normalization = False
    assert slime._normalised(args, [1.0, 0.0, 3.0, 1.0]) == rewards.flatten().tolist()
    assert slime._normalised(args, [1.0, 0.0, 2.0]) == [0.0, -1.0, 1.0]  # incomplete: slime takes all as one group
    args.rewards_normalization = False
    assert slime._normalised(args, [1.0, 0.0]) == [1.0, 0.0]


def test_prime_rl_finds_question_and_answer_where_they_are():
    credit = credit_of()
    node = SimpleNamespace(token_ids=[WORD, END], mask=[False, False])
    sampled = SimpleNamespace(token_ids=[BAD], mask=[True])
    trace = lambda **data: SimpleNamespace(task=SimpleNamespace(data=SimpleNamespace(**data)), nodes=[node, sampled])
    assert prime_rl.task_texts(credit, trace(question="why?", answer=7)) == ("why?", "7")
    assert prime_rl.task_texts(credit, trace()) == ("a.\n\n", None)


def test_areal_refuses_what_has_no_votes_no_tokens_or_a_critic():
    class Odd:
        async def arun_episode(self, engine, data):
            return data

    odd = areal.capo_workflow(Odd, credit_of())()
    assert asyncio.run(odd.arun_episode(None, None)) is None
    with pytest.raises(ValueError, match="without input_ids"):
        asyncio.run(odd.arun_episode(None, {"completion": object()}))
    group = {"advantages": torch.zeros(1, 2), "rewards": torch.zeros(1), "loss_mask": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="trajectories without capo_votes"):
        areal._shape(credit_of(), dict(group))
    votes = {"capo_votes": torch.zeros(1, 2, dtype=torch.int32)}
    with pytest.raises(ValueError, match="values of a critic"):
        areal._shape(credit_of(), {**group, **votes, "values": torch.zeros(1, 2)})


def test_areal_asks_no_judge_in_evaluation(monkeypatch):
    class Workflow:
        async def arun_episode(self, engine, data):
            return {"input_ids": torch.tensor([[END, WORD]]), "loss_mask": torch.tensor([[0, 1]])}

    credit = credit_of()
    workflow = areal.capo_workflow(Workflow, credit)()
    monkeypatch.setattr(areal, "_evaluates", lambda: True)
    assert not asyncio.run(workflow.arun_episode(None, {}))["capo_votes"].any() and not credit.judge.asked
    monkeypatch.setattr(areal, "_evaluates", lambda: False)
    assert asyncio.run(workflow.arun_episode(None, {}))["capo_votes"].any()
    assert credit.judge.asked[0].question == ".\n\n"  # the prompt's tokens, where there are no messages


def test_tinker_data_of_one_trajectory_are_judged_as_one_response():
    class TensorData:
        def __init__(self, tensor):
            self.tensor = tensor

        from_torch = classmethod(lambda cls, tensor: cls(tensor))

        def to_torch(self):
            return self.tensor

    def datum(ids):  # one token of a prompt before them
        fields = {"target_tokens": torch.tensor(ids), "mask": torch.ones(len(ids)), "advantages": torch.ones(len(ids))}
        return SimpleNamespace(loss_fn_inputs={name: TensorData(value) for name, value in fields.items()})

    credit = credit_of()
    data = [
        datum([WORD, WORD]),
        datum([WORD, BAD]),
        datum(RESPONSES[1]),
    ]  # a turn did not begin with what was before it
    places = [{"group_idx": 0, "traj_idx": i} for i in (0, 0, 1)]
    seen = SimpleNamespace(ob=SimpleNamespace(to_ints=lambda: [WORD, END]))
    trajectories = [SimpleNamespace(transitions=[seen]), SimpleNamespace(transitions=[])]
    group = SimpleNamespace(trajectories_G=trajectories, get_total_rewards=lambda: [1.0, 0.0])
    metrics = tinker.shape_data(credit, data, places, [group])
    rows = [one.loss_fn_inputs["advantages"].to_torch().tolist() for one in data]
    assert rows == [GOLDEN[0][:2], GOLDEN[0][2:], GOLDEN[1]]
    assert next((r.question, r.reference, r.steps) for r in credit.judge.asked) == ("a.\n\n", None, ("aa", "a!"))
    assert metrics["capo/flag_rate/right"] == 0.5 and tinker.shape_data(credit, [], [], []) == {}


def stub(monkeypatch, name, **names):
    module = ModuleType(name)
    module.__dict__.update(names)
    parts = name.split(".")
    for end in range(1, len(parts)):
        if ".".join(parts[:end]) not in sys.modules:
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    monkeypatch.setitem(sys.modules, name, module)
    if len(parts) > 1:
        monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], module, raising=False)
    return module


def test_install_puts_the_hooks_where_trainers_look_once(monkeypatch):
    credit = credit_of()
    maker = type("RemoteExperienceMaker", (), {})
    module = stub(monkeypatch, "openrlhf.trainer.ppo_trainer", RemoteExperienceMaker=maker)
    openrlhf.install(credit)
    installed = module.RemoteExperienceMaker
    openrlhf.install(credit)
    assert issubclass(installed, maker) and module.RemoteExperienceMaker is installed

    for place in prime_rl._PLACES:
        algorithm = type("GRPOAlgorithm", (), {})
        module = stub(monkeypatch, place, ALGORITHM_CLASSES={"grpo": algorithm, "opd": object})
        prime_rl.install(credit)
        prime_rl.install(credit)
        made = module.ALGORITHM_CLASSES["grpo"]
        assert made.__mro__[2] is algorithm and module.ALGORITHM_CLASSES["opd"] is object
        monkeypatch.delitem(sys.modules, place)
        monkeypatch.setitem(sys.modules, place, None)
    with pytest.raises(ImportError, match="finds no ALGORITHM_CLASSES"):
        prime_rl.install(credit)

    host = object()
    module = stub(monkeypatch, "nemo_rl.algorithms.grpo", _create_advantage_estimator=lambda master_config: host)
    nemo_rl.install(credit)
    nemo_rl.install(credit)
    estimator = module._create_advantage_estimator({"grpo": {}, "loss_fn": {}})
    assert estimator.host is host
    with pytest.raises(ValueError, match="one ratio"):
        module._create_advantage_estimator({"loss_fn": {"sequence_level_importance_ratios": True}})

    module = stub(monkeypatch, "tinker_cookbook.rl.train", assemble_training_data=lambda groups, advantages: ([], []))
    tinker.install(credit)
    tinker.install(credit)
    assert module.assemble_training_data([], advantages=[]) == ([], [])
    assert not hasattr(module.assemble_training_data.capo_host, "capo_host")


def test_launchers_start_the_trainers_own(monkeypatch):
    use(credit_of())
    started = []
    stub(monkeypatch, "ray", init=lambda **kwargs: started.append(kwargs["runtime_env"]))
    monkeypatch.setattr("runpy.run_module", lambda name, **kwargs: started.append((name, kwargs["run_name"])))
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    openrlhf.main()
    runtime, module = started
    assert runtime["worker_process_setup_hook"] == "capo.integrations.openrlhf.install"
    assert (
        runtime["env_vars"]["CAPO_CREDIT"] == os.environ["CAPO_CREDIT"] and runtime["env_vars"]["NCCL_DEBUG"] == "INFO"
    )
    assert module == ("openrlhf.cli.train_ppo_ray", "__main__")

    classes = {"grpo": object}
    stub(monkeypatch, prime_rl._PLACES[0], ALGORITHM_CLASSES=classes)
    stub(monkeypatch, "prime_rl.orchestrator.orchestrator", main=lambda: started.append(classes["grpo"].__name__))
    prime_rl.main()
    assert started[2] == "Capoobject"


RAY_FILES = {
    "openrlhf/trainer/ppo_trainer.py": """
import ray

class RemoteExperienceMaker:
    args = None

@ray.remote
class PPOTrainer:
    def kind(self):
        maker = RemoteExperienceMaker()
        return type(maker).__name__, maker.capo_credit.num_votes
""",
    "openrlhf/cli/train_ppo_ray.py": """
import sys
import ray
from openrlhf.trainer.ppo_trainer import PPOTrainer

if __name__ == "__main__":
    print(sys.argv[1:], *ray.get(PPOTrainer.remote().kind.remote()))
""",
    "my_credit.py": """
import capo
from capo.judges.scripted import ScriptedJudge

def credit():
    return capo.StepCredit(ScriptedJudge(lambda request: []), capo.TokenBytes([b"a"]), num_votes=3)
""",
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_openrlhf_workers_of_ray_run_the_hook(tmp_path):
    for name, text in RAY_FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "CAPO_CREDIT": "my_credit.credit"}
    run = [sys.executable, "-P", "-m", "capo.integrations.openrlhf", "--some.option", "1"]
    done = subprocess.run(run, check=False, capture_output=True, text=True, env=environment, timeout=300)
    assert "['--some.option', '1'] CapoRemoteExperienceMaker 3" in done.stdout, done.stdout + done.stderr


def test_areal_classes_are_made_when_they_are_named(monkeypatch):
    workflow, actor = type("RLVRWorkflow", (), {}), type("FSDPPPOActor", (), {})
    stub(monkeypatch, "areal.workflow.rlvr", RLVRWorkflow=workflow)
    engine = stub(monkeypatch, "areal.engine")
    stub(monkeypatch, "areal.engine.fsdp_engine", FSDPPPOActor=actor)
    monkeypatch.setitem(sys.modules, "areal.engine.megatron_engine", None)  # not installed
    try:
        areal.install()
        assert engine.FSDPPPOActor is areal.CapoFSDPPPOActor and issubclass(areal.CapoFSDPPPOActor, actor)
        assert not hasattr(engine, "MegatronPPOActor")
        made = areal.CapoRLVRWorkflow
        assert issubclass(made, workflow) and areal.CapoRLVRWorkflow is made
        # AReaL starts its workers by this path
        assert (made.__module__, made.__name__) == ("capo.integrations.areal", "CapoRLVRWorkflow")
    finally:
        for name in ("CapoRLVRWorkflow", "CapoFSDPPPOActor"):
            areal.__dict__.pop(name, None)
    with pytest.raises(AttributeError, match="has no attribute CapoNothing"):
        _ = areal.CapoNothing


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("trainer", ADAPTERS)
def test_examples_name_what_there_is(trainer):
    yaml = YAML(typ="safe")
    folder = EXAMPLES / trainer
    text = (folder / "README.md").read_text()
    for file in folder.iterdir():
        assert file.name in text or file.name == "README.md"
        if file.suffix == ".yaml":
            assert isinstance(yaml.load(file), dict)
        if file.suffix == ".py":
            source = file.read_text()
            compile(source, file.name, "exec")
            text += source
    module = importlib.import_module(f"capo.integrations.{trainer}")
    named = re.findall(rf"capo\.integrations\.{trainer}\.(\w+)", text)
    for imported in re.findall(rf"from capo\.integrations\.{trainer} import (.+)", text):
        named += imported.split(", ")
    assert named or f"-m {module.__name__} " in text
    made_when_named = {"CapoRLVRWorkflow"} if trainer == "areal" else set()
    assert not [name for name in named if name not in made_when_named and not hasattr(module, name)]


def test_the_examples_credit_can_be_made(monkeypatch, tmp_path):
    from tiny_model import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    for name, value in {"POLICY": str(tmp_path), "JUDGE": "judge", "JUDGE_URL": "http://localhost:8001/v1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("CAPO_CREDIT", "step_credit.credit")
    credit = configured_credit()
    assert credit.active and credit.num_votes == 5 and credit.judge is not None
    sys.modules.pop("step_credit", None)
