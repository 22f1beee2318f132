"""verl's trainers and agent loops with step-level credit. Every process of a run has to import this module:

    VERL_USE_EXTERNAL_MODULES=capo.integrations.verl_runtime

in the environment of Ray's workers. Then there are the trainer modes ``capo_sync``, ``capo_colocate_async`` and
``capo_separate_async``, and the agents ``capo_single_turn_agent`` and ``capo_tool_agent``. An agent loop asks the judge as
soon as its response is complete, while others are still sampled; the judgement goes with the row, and the trainer
hands it to the estimator ``capo``.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from capo.integrations.verl import FIELD, Settings, critiques, judgement, problem
from capo.judges import JudgeError, JudgeReply, JudgeRequest
from capo.shaping import Rows
from capo.steps import TokenBytes, step_texts

try:
    import transfer_queue
    from omegaconf import open_dict
    from tensordict import NonTensorData, NonTensorStack
    from verl.experimental.agent_loop.agent_loop import register
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
    from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
    from verl.trainer.ppo.v1 import (
        PPOTrainerColocateAsync,
        PPOTrainerSeparateAsync,
        PPOTrainerSync,
        register_trainer,
    )
except ImportError as error:
    raise ImportError(f"capo.integrations.verl_runtime needs verl[verl-core] 0.9 or later ({error})") from error

PREFIX = "capo_"  # of the names of agents that ask the judge; without it they are those of verl
# Losses in which each token has its own advantage; geo_mean takes the mean over a response.
LOSSES = ("vanilla", "gspo", "sapo", "gpg", "cispo", "dppo_tv", "dppo_kl", "dro", "bypass_mode")


def check(config: Any) -> Settings:
    """The settings of a run, if all of its configuration goes with them.

    Args:
        config: verl's whole configuration.

    Raises:
        ValueError: a setting that drops, or gives another meaning to, advantages of tokens, with the reason.
    """
    settings = Settings.of(config.algorithm)
    actor = config.actor_rollout_ref.actor
    mode = actor.policy_loss.loss_mode
    reasons = {
        "algorithm.adv_estimator": "verl would run its own estimator; set algorithm.adv_estimator=capo"
        if config.algorithm.adv_estimator != "capo"
        else None,
        "critic.enable": "a critic learns the return of every token, which step-level credit has none of"
        if config.critic.enable
        else None,
        "actor_rollout_ref.actor.policy_loss.loss_mode": f"checked with {', '.join(LOSSES)} only"
        + (": it takes the mean advantage of a response, in which steps are averaged away" * (mode == "geo_mean"))
        if settings.active and mode not in LOSSES
        else None,
        "distillation.enabled": "the loss of a distillation has advantages of its own"
        if settings.active and config.get("distillation") is not None and config.distillation.enabled
        else None,
        "algorithm.capo.judge": "who names wrong steps is missing; without a judge set algorithm.capo.process_weight=0"
        if settings.active and settings.judge is None
        else None,
    }
    for name, reason in reasons.items():
        if reason is not None:
            value = functools.reduce(lambda section, key: (section or {}).get(key), name.split("."), config)
            raise ValueError(f"{name}={value!r} does not go with step-level credit: {reason}")
    if settings.active:
        _make_judge(settings)  # so that a wrong path or option is told before any model is loaded
    return settings


class CapoAgentMixin:
    """What comes before an agent loop of verl: when its response is complete, the judge is asked.

    For a loop of your own::

        @register("capo_mine")
        class CapoMyLoop(CapoAgentMixin, MyLoop): ...

    Validation uses the loop that is registered without the prefix ``capo_``.
    """

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        """See verl's ``AgentLoopBase``; the output's ``extra_fields`` have a `judgement` in addition."""
        loop: Any = self
        output = await super().run(sampling_params, **kwargs)  # type: ignore[misc]
        settings = Settings.of(loop.config.algorithm)
        if not settings.active or not output:
            return output
        if isinstance(output, list):
            for one in output:
                one.extra_fields[FIELD] = problem("its agent loop gives several sequences, of which one is rewarded")
            return output
        output.extra_fields[FIELD] = await _judge_output(settings, loop.tokenizer, output, kwargs)
        return output


@register("capo_single_turn_agent")
class CapoSingleTurnAgentLoop(CapoAgentMixin, SingleTurnAgentLoop):
    """verl's ``single_turn_agent`` with a judge."""


@register("capo_tool_agent")
class CapoToolAgentLoop(CapoAgentMixin, ToolAgentLoop):
    """verl's ``tool_agent`` with a judge. Steps are what the policy wrote; the judge does not see replies of tools."""


class CapoTrainerMixin:
    """What comes before a trainer of verl: critiques come with the rows, metrics under ``capo/`` are logged."""

    capo_mode: str  # the trainer mode that this is to verl

    def __init__(self, config: Any) -> None:
        self.capo_settings = check(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.capo_mode
        super().__init__(config)  # type: ignore[call-arg]

    def fit(self, agent_loop_manager: Any) -> None:
        """See verl's ``PPOTrainer``; validation does not ask the judge."""
        super().fit(self.capo_manager(agent_loop_manager))  # type: ignore[misc]

    def capo_manager(self, agent_loop_manager: Any) -> Any:
        """The manager, but that it validates by agents without a judge."""
        default = self.config.actor_rollout_ref.rollout.agent.default_agent_loop  # type: ignore[attr-defined]
        return _UnjudgedValidation(agent_loop_manager, default)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if not self.capo_settings.active:
            return super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        _refuse_parts(batch.keys)
        fields = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"]
        )
        rows = [(row or {}).get(FIELD) for row in fields["extra_fields"].tolist()]
        with critiques(rows) as found:
            batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        metrics.update(found)
        return batch


@register_trainer("capo_sync")
class CapoTrainerSync(CapoTrainerMixin, PPOTrainerSync):
    """verl's trainer ``sync`` with step-level credit."""

    capo_mode = "sync"


@register_trainer("capo_colocate_async")
class CapoTrainerColocateAsync(CapoTrainerMixin, PPOTrainerColocateAsync):
    """verl's trainer ``colocate_async`` with step-level credit."""

    capo_mode = "colocate_async"


@register_trainer("capo_separate_async")
class CapoTrainerSeparateAsync(CapoTrainerMixin, PPOTrainerSeparateAsync):
    """verl's trainer ``separate_async`` with step-level credit."""

    capo_mode = "separate_async"


class _UnjudgedValidation:
    """An agent loop manager that validates by the agents without a judge."""

    def __init__(self, manager: Any, default: str) -> None:
        self._manager, self._default = manager, default

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def generate_sequences(self, prompts: Any) -> Any:
        if "validate" not in prompts or not prompts["validate"]:
            return self._manager.generate_sequences(prompts)
        if "agent_name" in prompts:
            names = [name.removeprefix(PREFIX) for name in prompts["agent_name"].tolist()]
            prompts["agent_name"] = NonTensorStack(*names)
        else:
            prompts["agent_name"] = NonTensorData(self._default.removeprefix(PREFIX), batch_size=prompts.batch_size)
        return self._manager.generate_sequences(prompts)


def _refuse_parts(keys: list[str]) -> None:
    """Refuse sessions of several rows, whose keys end in numbers above 0."""
    for key in keys:
        if not key.endswith("_0"):
            raise ValueError(
                f"row {key} is a further sequence of a session: verl rewards only the last, and statistics of groups would "
                "count the session more than once. Use an agent loop with one sequence a session"
            )


async def _judge_output(settings: Settings, tokenizer: Any, output: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The `judgement` of one response.

    To verl an exception is a group that failed, and it samples another in silence. So what goes wrong travels with the row,
    and the trainer raises it.
    """
    try:
        engine = _engine(settings.model_dump_json(), tokenizer)
        ids = torch.tensor(output.response_ids, dtype=torch.int64)
        mask = torch.tensor(output.response_mask, dtype=torch.bool)
        rows = Rows.of(ids, mask, [0, len(ids)])
        steps = rows.segment(ids, engine.token_bytes, settings.delimiter)
        texts = step_texts(ids[mask], steps, engine.token_bytes)[0]
        began = time.perf_counter()
        replies = await engine.critique(JudgeRequest(_question(settings, row), _reference(settings, row), tuple(texts)))
    except Exception as error:  # noqa: BLE001
        return problem(f"{type(error).__name__}: {error}")
    positions = mask.nonzero()[:, 0].tolist()
    spans = [
        (positions[a], positions[b - 1] + 1) for a, b in zip(steps.starts.tolist(), steps.ends.tolist(), strict=True)
    ]
    return judgement(spans, replies, len(ids), time.perf_counter() - began)


class _Engine:
    """The judge of this process, and the bytes of the policy's tokens."""

    def __init__(self, settings: Settings, tokenizer: Any) -> None:
        self.settings = settings
        self.token_bytes = TokenBytes.from_tokenizer(tokenizer)
        self.judge = _make_judge(settings)
        self.threads = ThreadPoolExecutor(settings.judge_threads, thread_name_prefix="capo judge")

    async def critique(self, request: JudgeRequest) -> list[JudgeReply]:
        """K replies; where the judge gives up, they have failed, and the trainer decides what that means."""
        votes = self.settings.num_votes
        if not request.steps:
            return []
        ask = self.judge.critique
        try:
            if inspect.iscoroutinefunction(ask):
                replies = await ask([request], votes)
            else:
                replies = await asyncio.get_running_loop().run_in_executor(self.threads, ask, [request], votes)
        except JudgeError as error:
            return [JudgeReply.failure(f"judge_error ({error})")] * votes
        if len(replies) != 1 or len(replies[0]) != votes:
            raise ValueError(f"the judge was asked for {votes} critiques of one response, and gave {replies!r:.80}")
        return list(replies[0])


@functools.lru_cache(maxsize=2)
def _engine(settings: str, tokenizer: Any) -> _Engine:
    return _Engine(Settings(**json.loads(settings)), tokenizer)


def _make_judge(settings: Settings) -> Any:
    """The judge that ``algorithm.capo.judge`` names.

    Raises:
        ValueError: it cannot be imported or made, or is no judge.
    """
    path = str(settings.judge)
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ValueError, AttributeError, ModuleNotFoundError) as error:
        raise ValueError(f"algorithm.capo.judge: cannot import {path!r}: {error}") from error
    if inspect.isclass(found) or not hasattr(found, "critique"):
        try:
            found = found(**settings.judge_options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"algorithm.capo.judge: {path} with judge_options {settings.judge_options}: {error}"
            ) from error
    elif settings.judge_options:
        raise ValueError(f"algorithm.capo.judge_options: {path} is a judge already, and takes none")
    if not hasattr(found, "critique"):
        raise ValueError(f"algorithm.capo.judge: {path} is no judge: it has no method critique(requests, num_votes)")
    return found


def _question(settings: Settings, row: dict[str, Any]) -> str:
    if settings.question is not None:
        return str(_extra(row, settings.question, "question"))
    said = [(message.get("role", ""), _content(message)) for message in row["raw_prompt"]]
    return said[0][1] if len(said) == 1 else "\n\n".join(f"{role}: {content}" for role, content in said)


def _reference(settings: Settings, row: dict[str, Any]) -> str | None:
    if settings.reference is not None:
        value = _extra(row, settings.reference, "reference")
    else:
        value = (row.get("reward_model") or {}).get("ground_truth")
    return None if value is None else str(value)


def _extra(row: dict[str, Any], key: str, option: str) -> Any:
    known = row.get("extra_info") or {}
    if key not in known:
        raise ValueError(f"algorithm.capo.{option}={key!r}: extra_info has only {', '.join(map(str, known))}")
    return known[key]


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
