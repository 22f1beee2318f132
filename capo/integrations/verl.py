"""Step-level credit in verl: the advantage estimator ``capo``, which verl finds by its entry points ``verl.plugins``.

    algorithm.adv_estimator=capo  +algorithm.capo.rule=capo  +algorithm.capo.judge=my_lib.make_judge

verl hands an estimator rewards, masks and group ids, nothing else of a batch. What the judge said comes with the rows
(`judgement`), and `critiques` holds it ready while verl computes advantages. `capo.integrations.verl_runtime` has the agent
loops that ask the judge, and the trainers that do the rest.

Dimension key: B responses, T columns, M steps, K critiques.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from capo.credit import CreditRule
from capo.critique import agreement, vote_table
from capo.judges import JudgeError, JudgeReply
from capo.shaping import shape

OLDEST = (0, 9)

try:
    import verl
    from omegaconf import OmegaConf
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, register_adv_est
except ImportError as error:
    raise ImportError(f"capo.integrations.verl needs verl: pip install 'capo[verl]' ({error})") from error
if tuple(map(int, verl.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(f"capo.integrations.verl needs verl>=0.9 for its trainers; this is {verl.__version__}")

FIELD = "capo"  # of a row's extra_fields, and of a DataProto's non_tensor_batch
# Estimators that take rewards, mask and group ids, and treat each group by itself.
Host = Literal["grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo"]
_RULE_FIELDS = ("vote", "outcome_weight", "process_weight", "normalize", "std_floor", "clamp")


class Settings(pydantic.BaseModel):
    """The section ``algorithm.capo`` of verl's configuration.

    Args:
        rule: preset of `capo.CreditRule` that uses steps: capo, vppo, fapo, papo, grpo_process.
        vote, outcome_weight, process_weight, normalize, std_floor, clamp: fields of the rule; None leaves the preset's.
            With ``process_weight`` 0 the advantages are those of ``host``, and the judge is not asked.
        base: ``rule``: the rule's advantages, and those of ``host`` in groups without a valid critique; ``host``: those
            of ``host`` plus what the critiques change under the rule.
        host: verl's estimator that this one stands in for.
        judge: import path of a judge (see `capo.judges.Judge`), or of what makes one. The trainer and each agent loop
            worker make their own: a client of a server, not a model.
        judge_options: what the judge is made with.
        judge_threads: calls of the judge at a time, in each of verl's agent loop workers.
        max_failure_rate: if more than this share of a batch's critiques has failed, training stops; 1: never.
        num_votes: K, critiques of each response.
        delimiter: what separates steps.
        question: key of ``extra_info`` with the question for the judge; None: the prompt.
        reference: key of ``extra_info`` with a reference solution; None: ``reward_model.ground_truth``.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    rule: str = "capo"
    vote: str | None = None
    outcome_weight: float | None = None
    process_weight: float | None = None
    normalize: str | None = None
    std_floor: float | None = None
    clamp: float | None = None
    base: Literal["rule", "host"] = "rule"
    host: Host = "grpo"
    judge: str | None = None
    judge_options: dict[str, Any] = {}
    judge_threads: int = pydantic.Field(64, ge=1)
    max_failure_rate: float = pydantic.Field(0.2, ge=0, le=1)
    num_votes: int = pydantic.Field(5, ge=1, le=127)
    delimiter: str = pydantic.Field("\n\n", min_length=1)
    question: str | None = None
    reference: str | None = None

    @functools.cached_property
    def credit(self) -> CreditRule:
        """The rule."""
        changes = {name: value for name in _RULE_FIELDS if (value := getattr(self, name)) is not None}
        return CreditRule.preset(self.rule, **changes)

    @property
    def active(self) -> bool:
        """Whether steps have a say."""
        return self.credit.process_weight > 0

    @classmethod
    def of(cls, algorithm: Any) -> Settings:
        """The settings in verl's section ``algorithm``: a `DictConfig`, a mapping, or None.

        Raises:
            ValueError: a setting that is unknown, of the wrong kind or out of range, or does not go with another.
        """
        given = _plain((algorithm or {}).get("capo") or {})
        try:
            settings = cls(**given)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise ValueError(
                    f"algorithm.capo.{name} is no setting; there are {', '.join(cls.model_fields)}"
                ) from None
            raise ValueError(f"algorithm.capo.{name}={first['input']!r}: {first['msg']}") from None
        try:
            active = settings.active
        except ValueError as error:
            raise ValueError(f"algorithm.capo: {error}") from None
        if not active and settings.process_weight != 0:
            raise ValueError(
                f"algorithm.capo.rule={settings.rule!r} looks at outcomes only: these would be verl's own advantages. "
                "Choose a rule that uses steps (capo, vppo, fapo, papo, grpo_process), or say so by process_weight=0"
            )
        if active and (algorithm or {}).get("use_kl_in_reward"):
            raise ValueError(
                "algorithm.use_kl_in_reward=True does not go with step-level credit: it adds a penalty to the reward of "
                "every token, and no outcome would be left; use actor_rollout_ref.actor.use_kl_loss"
            )
        return settings


def judgement(
    steps: Sequence[tuple[int, int]], replies: Sequence[JudgeReply], length: int, seconds: float = 0.0
) -> dict[str, Any]:
    """What travels with a row: plain lists and numbers.

    Args:
        steps: (start, end) positions in the response, in order.
        replies: K of them.
        length: of the response, with tokens of tools.
        seconds: waited for the judge.
    """
    votes = vote_table([[reply.critique for reply in replies]], [len(steps)], len(replies))
    return {
        "steps": [list(step) for step in steps],
        "votes": votes.tolist(),
        "states": [reply.state for reply in replies],
        "errors": [reply.error for reply in replies if reply.error is not None],
        "length": length,
        "judge_tokens": sum(reply.prompt_tokens + reply.completion_tokens for reply in replies),
        "seconds": seconds,
        "problem": None,
    }


def problem(text: str) -> dict[str, Any]:
    """A row whose response could not be judged for a reason that has to stop the training."""
    return {"problem": text}


_held: ContextVar[tuple[Sequence[Any], dict[str, float]] | None] = ContextVar("capo_critiques", default=None)


@contextlib.contextmanager
def critiques(rows: Sequence[Any]) -> Iterator[dict[str, float]]:
    """While this is open, the estimator ``capo`` takes these critiques for the rows of its batch.

    ::

        with critiques(data.non_tensor_batch["capo"]) as metrics:
            data = compute_advantage(data, "capo", config=config.algorithm)

    Args:
        rows: [B], a `judgement` for each row of the batch, in its order; None for one that nobody judged.

    Yields:
        a dictionary that the estimator fills with metrics, under ``capo/``.
    """
    metrics: dict[str, float] = {}
    token = _held.set((rows, metrics))
    try:
        yield metrics
    finally:
        _held.reset(token)


@register_adv_est("capo")
def capo_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    reward_baselines: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages of tokens, as verl asks its estimators for them.

    Args:
        token_level_rewards: float [B, T]; a row's sum is its outcome.
        response_mask: 0 or 1, [B, T]; what the policy wrote.
        index: [B], ids of groups.
        config: verl's section ``algorithm``.
        reward_baselines: not used.

    Returns:
        advantages and returns, which are the same: float32 [B, T], 0 where the mask is.

    Raises:
        ValueError: settings or critiques that are missing or contradict each other.
        JudgeError: too many critiques have failed.
    """
    settings = Settings.of(config)
    if index is None:
        raise ValueError("adv_estimator=capo needs the group of each row, non_tensor_batch['uid']")
    host, returns = _host(settings, token_level_rewards, response_mask, index, config)
    if not settings.active:
        return host, returns
    held = _held.get()
    if held is None:
        raise ValueError(
            "adv_estimator=capo has no critiques: a trainer of capo hands them over (trainer.use_v1=True and "
            "trainer.v1.trainer_mode=capo_sync, capo_colocate_async or capo_separate_async). A loop of your own opens "
            "capo.integrations.verl.critiques around compute_advantage"
        )
    rows, metrics = held
    began = time.perf_counter()
    live = response_mask.bool()
    judged = _judged(rows, live)
    _check_failures(judged, settings)
    outcomes = token_level_rewards.sum(-1)
    votes = _vote_tensor(judged)
    steps = [[] if row is None else [tuple(step) for step in row["steps"]] for row in judged]
    shaped_by = functools.partial(shape, outcomes, votes, groups=index, steps=steps, mask=live)
    values = shaped_by(rule=settings.credit)
    if settings.base == "host":
        change = values - shaped_by(rule=dataclasses.replace(settings.credit, process_weight=0.0))
        values = torch.where(change == 0, host, host + change)
    heard = torch.tensor([row is not None and "valid" in row["states"] for row in judged])
    shaped = _in_groups(heard, index).to(host.device)
    values = torch.where(shaped[:, None], values, host)
    metrics.update(_metrics(judged, votes, outcomes.cpu(), shaped.cpu(), values[live]))
    metrics["capo/time/shape"] = time.perf_counter() - began
    return values, values


def _host(settings: Settings, rewards: Tensor, mask: Tensor, index: Any, config: Any) -> tuple[Tensor, Tensor]:
    """What verl's own estimator says."""
    options: dict[str, Any] = {"config": config}
    if settings.host == "grpo":  # as verl itself hands it over
        options["norm_adv_by_std_in_grpo"] = (config or {}).get("norm_adv_by_std_in_grpo", True)
    estimator = get_adv_estimator_fn(settings.host)
    return estimator(token_level_rewards=rewards, response_mask=mask, index=index, **options)


def _judged(rows: Sequence[Any], live: Tensor) -> list[dict[str, Any] | None]:
    """The judgement of each row; None for rows without tokens, with which verl fills a batch up."""
    if len(rows) != len(live):
        raise ValueError(f"critiques are of {len(rows)} rows, but the batch has {len(live)}")
    columns = torch.arange(1, live.shape[1] + 1, device=live.device)
    needed = (live * columns).amax(1).tolist() if live.shape[1] else [0] * len(live)
    judged: list[dict[str, Any] | None] = []
    for number, (row, length) in enumerate(zip(rows, needed, strict=True)):
        if length == 0:
            judged.append(None)
            continue
        if row is None:
            raise ValueError(
                f"row {number} has no critiques: its agent loop is none of capo's. Set "
                "actor_rollout_ref.rollout.agent.default_agent_loop=capo_single_turn_agent or capo_tool_agent, and agent "
                "names in the data likewise"
            )
        if row["problem"] is not None:
            raise JudgeError(f"row {number} could not be judged: {row['problem']}")
        if length > row["length"]:
            raise ValueError(
                f"row {number} has a token at position {length - 1}, but its critiques are of a response of length "
                f"{row['length']}: rows were mixed up"
            )
        judged.append(dict(row))
    return judged


def _check_failures(judged: Sequence[Mapping[str, Any] | None], settings: Settings) -> None:
    states = [state for row in judged if row is not None for state in row["states"]]
    failed = states.count("failed")
    if failed > settings.max_failure_rate * len(states):
        errors = Counter(error for row in judged if row is not None for error in row["errors"])
        told = ", ".join(f"{error} {count}" for error, count in errors.most_common(5))
        raise JudgeError(
            f"{failed} of the {len(states)} critiques of a batch have failed, more than "
            f"algorithm.capo.max_failure_rate={settings.max_failure_rate:g} allows. What went wrong, with critiques that "
            f"could not be read: {told}"
        )


def _vote_tensor(judged: Sequence[Mapping[str, Any] | None]) -> Tensor:
    """int8 [M, K] of the steps of all rows, end to end; critiques that a row has fewer than others abstain."""
    ballots = [ballot for row in judged if row is not None for ballot in row["votes"]]
    width = max(map(len, ballots), default=0)
    padded = [[*ballot, *[-1] * (width - len(ballot))] for ballot in ballots]
    return torch.tensor(padded, dtype=torch.int8).reshape(len(ballots), width)


def _in_groups(heard: Tensor, index: Any) -> Tensor:
    """Whether anybody in the group of a row was heard. bool [B]"""
    ids = index.tolist() if hasattr(index, "tolist") else list(index)
    groups = {id_ for id_, one in zip(ids, heard.tolist(), strict=True) if one}
    return torch.tensor([id_ in groups for id_ in ids], dtype=torch.bool)


def _metrics(
    judged: Sequence[Mapping[str, Any] | None], votes: Tensor, outcomes: Tensor, shaped: Tensor, values: Tensor
) -> dict[str, float]:
    """What a step tells, under ``capo/``; shares of nothing are left out."""
    real = [row for row in judged if row is not None]
    there = torch.tensor([row is not None for row in judged])
    counts = torch.tensor([0 if row is None else len(row["steps"]) for row in judged])
    of_steps = outcomes.repeat_interleave(counts)
    states = [state for row in real for state in row["states"]]

    def flags(part: Tensor) -> float | None:
        valid = int((part >= 0).sum())
        return int((part == 1).sum()) / valid if valid else None

    metrics = {
        "flag_rate/right": flags(votes[of_steps > 0]),
        "flag_rate/wrong": flags(votes[of_steps <= 0]),
        "vote_agreement": agreement(votes).agreement,
        "critiques/invalid": states.count("invalid"),
        "critiques/failed": states.count("failed"),
        "host_advantages": (~shaped[there]).double().mean().item() if real else None,
        "undecided": int(outcomes[there].isnan().sum()),
        "dead_tokens": (values == 0).double().mean().item() if len(values) else None,
        "max_advantage": values.abs().max().item() if len(values) else None,
        "judge_tokens_per_token": sum(row["judge_tokens"] for row in real) / len(values) if len(values) else None,
        "time/judge": max((row["seconds"] for row in real), default=None),
    }
    return {f"capo/{name}": float(value) for name, value in metrics.items() if value is not None}


def _plain(section: Any) -> dict[str, Any]:
    """A section of verl's configuration as a dictionary."""
    plain: Any = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
    if not hasattr(plain, "items"):
        raise ValueError(f"algorithm.capo must be a section of settings, got {section!r:.80}")
    return {str(name): value for name, value in plain.items()}
