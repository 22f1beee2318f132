"""Step-level credit in AReaL.

    from capo.integrations.areal import install

    install()  # in the training script, before PPOTrainer(...)
    trainer.train(workflow="capo.integrations.areal.CapoRLVRWorkflow", ...)

with CAPO_CREDIT in the environment of every process. The workflow asks the judge and sends its votes along as a tensor more;
the actor shapes the advantages that AReaL computes.

Layout B: all that the loss uses is rolled by one: position t of ``advantages`` belongs to token t + 1 of ``input_ids``. The
votes travel unrolled.

Read: areal 1.0.4 (PyPI): workflow/rlvr.py, trainer/ppo/actor.py, trainer/rl_trainer.py, engine/fsdp_engine.py,
infra/remote_inf_engine.py, infra/dist_rollout.py.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from capo.shaping import (
    CRITIC,
    KL_IN_REWARD,
    SEQUENCE_RATIO,
    StepCredit,
    configured_credit,
    question_text,
    refuse,
    setting,
)

VOTES = "capo_votes"

_log = logging.getLogger(__name__)


class _WorkflowMixin:
    """Args: those of the workflow."""

    _capo_credit: StepCredit | None = None

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> Any:
        result = await super().arun_episode(engine, data)  # type: ignore[misc]
        if result is None:
            return None
        if not isinstance(result, dict) or "input_ids" not in result:
            raise ValueError("a workflow without input_ids (one of interactions) does not go with step-level credit")
        credit = self._capo_credit or configured_credit()
        ids, mask = result["input_ids"], result["loss_mask"].bool()
        result[VOTES] = torch.zeros_like(ids, dtype=torch.int32)
        if credit.active and not _evaluates():
            before = [row[: int(live.float().argmax())] for row, live in zip(ids, mask, strict=True)]
            questions = [_question(credit, data, prompt) for prompt in before]
            references = [_reference(data)] * len(ids)
            result[VOTES] = torch.stack(await credit.votes_async(list(ids), questions, references, list(mask)))
        return result


class _ActorMixin:
    """Args: those of the actor."""

    _capo_credit: StepCredit | None = None

    def compute_advantages(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        credit = self._capo_credit or configured_credit()
        check(credit, self.config)  # type: ignore[attr-defined]
        groups = super().compute_advantages(data, *args, **kwargs)  # type: ignore[misc]
        for group in groups:
            _shape(credit, group)
        if credit.active:
            _log.info("%s", credit.take_metrics())
        return groups


def _shape(credit: StepCredit, group: dict[str, Any]) -> None:
    """Shape a group in place: what came of one prompt, whose rewards AReaL never parts."""
    votes = group.pop(VOTES, None)
    if not credit.active:
        return
    if votes is None:
        raise ValueError(f"trajectories without {VOTES}: the workflow must be one of capo_workflow")
    if "values" in group:
        raise ValueError(f"values of a critic do not go with step-level credit: {CRITIC}")
    host = group["advantages"]
    rolled = votes.roll(-1, -1).to(host.device)
    group["advantages"] = credit.shape(host, group["rewards"], rolled, [0] * len(host), group["loss_mask"].bool())


def capo_workflow(base: type, credit: StepCredit | None = None) -> type:
    """A workflow class whose trajectories come with votes.

    Args:
        base: ``RLVRWorkflow``, or another that returns tensors with ``input_ids`` and ``loss_mask`` [n, L].
        credit: the judge, and how its votes count; None takes that of CAPO_CREDIT.
    """
    return type(f"Capo{base.__name__}", (_WorkflowMixin, base), {"_capo_credit": credit, "__module__": __name__})


def capo_actor(base: type, credit: StepCredit | None = None) -> type:
    """An actor class whose advantages are shaped: of ``FSDPPPOActor``, ``MegatronPPOActor`` or ``PPOActor``.

    Raises:
        ValueError: (of the class) settings that do not go with step-level credit, with the reason.
    """
    return type(f"Capo{base.__name__}", (_ActorMixin, base), {"_capo_credit": credit, "__module__": __name__})


def install() -> None:
    """Let AReaL's trainer make its actors with step-level credit, in this process and in those that it starts."""
    import areal.engine

    for name in ("FSDPPPOActor", "MegatronPPOActor"):
        try:
            setattr(areal.engine, name, __getattr__(f"Capo{name}"))
        except ImportError as error:
            _log.info("%s: no step-level credit, for it cannot be imported: %s", name, error)


def __getattr__(name: str) -> Any:
    """``CapoRLVRWorkflow``, ``CapoFSDPPPOActor`` and ``CapoMegatronPPOActor``: what AReaL imports by path."""
    if name == "CapoRLVRWorkflow":
        from areal.workflow.rlvr import RLVRWorkflow

        made = capo_workflow(RLVRWorkflow)
    elif name == "CapoFSDPPPOActor":
        from areal.engine.fsdp_engine import FSDPPPOActor

        made = capo_actor(FSDPPPOActor)
    elif name == "CapoMegatronPPOActor":
        from areal.engine.megatron_engine import MegatronPPOActor

        made = capo_actor(MegatronPPOActor)
    else:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    globals()[name] = made
    return made


def check(credit: StepCredit, config: Any) -> None:
    """Raise ValueError for settings of the actor that do not go with step-level credit."""
    level, kl = setting(config, "importance_sampling_level", "token"), setting(config, "kl_ctl", 0)
    refuse(
        credit,
        actor__importance_sampling_level=(level, None if level == "token" else SEQUENCE_RATIO),
        actor__kl_ctl=(kl, KL_IN_REWARD if kl and credit.base == "rule" else None),
    )


def _evaluates() -> bool:
    try:
        from areal.infra import workflow_context
    except ImportError:
        return False
    return workflow_context.get().is_eval


def _question(credit: StepCredit, data: dict[str, Any], prompt_ids: Any) -> str:
    messages = data.get("messages")
    return credit.text(prompt_ids) if messages is None else question_text(messages)


def _reference(data: dict[str, Any]) -> str | None:
    found = next((data[name] for name in ("solution", "answer") if data.get(name) is not None), None)
    return None if found is None else str(found)
