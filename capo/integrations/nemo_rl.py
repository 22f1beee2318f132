"""Step-level credit in NeMo-RL's GRPO.

    from capo.integrations.nemo_rl import install

    install(credit)  # in the launch script, before grpo_train

NeMo-RL has no registry of estimators; `install` lets its factory wrap the one that the configuration names. It runs in the
driver, so no worker needs to know of it: the estimator hands all samples of the step to the judge at once.

Layout B: advantages are [B, S], position t belongs to token t; the loss drops position 0 of itself.

Read: NVIDIA-NeMo/RL at 00925dd1e44b816b5cb6afa27d23d7bd7af2b957 (nemo_rl/algorithms/advantage_estimator.py), and the call
in nemo_rl/algorithms/grpo.py of the same time.

Dimension key: B samples, S tokens of a padded sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capo.shaping import KL_IN_REWARD, SEQUENCE_RATIO, StepCredit, question_text, refuse, setting


class CapoAdvantageEstimator:
    """An advantage estimator of NeMo-RL, shaped by the judge's votes.

    Args:
        host: any estimator with ``compute_advantage``.
        credit: the judge, and how its votes count.
        reference: of a sample's ``extra_env_info``, a correct solution or answer, or None; by default its
            ``ground_truth``.
    """

    def __init__(
        self, host: Any, credit: StepCredit, reference: Callable[[dict[str, Any]], str | None] | None = None
    ) -> None:
        self.host, self.credit = host, credit
        self.reference = reference or (lambda info: setting(info, "ground_truth"))
        self.last_metrics: dict[str, float] = {}

    def compute_advantage(
        self, prompt_ids: Tensor, rewards: Tensor, mask: Tensor, repeated_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        """The host's advantages [B, S], with step-level credit where the judge had a say.

        Raises:
            ValueError: a batch without messages, as the data plane and the single controller hand it over.
        """
        advantages = self.host.compute_advantage(
            prompt_ids=prompt_ids, rewards=rewards, mask=mask, repeated_batch=repeated_batch, **kwargs
        )
        self.last_metrics = dict(getattr(self.host, "last_metrics", None) or {})
        if not self.credit.active:
            return advantages
        if not isinstance(advantages, Tensor):
            raise TypeError(
                f"{type(self.host).__name__} gives a {type(advantages).__name__}: an estimator with returns (PPO) does not go "
                "with step-level credit"
            )
        logs = setting(repeated_batch, "message_log")
        if logs is None:
            raise ValueError(
                "the estimator was given no message_log, in which the sampled tokens are: step-level credit needs "
                "grpo_train, not the data plane or the single controller"
            )
        valid = kwargs.get("valid_mask")
        outcomes = rewards if valid is None else torch.where(valid.bool(), rewards, torch.nan)
        _, groups = torch.unique(prompt_ids, dim=0, return_inverse=True)
        votes = self._votes(logs, setting(repeated_batch, "extra_env_info") or [None] * len(logs), mask)
        shaped = self.credit.shape(advantages, outcomes, votes.to(advantages.device), groups, mask.bool())
        self.last_metrics.update(self.credit.take_metrics())
        return shaped

    def _votes(self, logs: Any, infos: Any, mask: Tensor) -> Tensor:
        ids = [torch.cat([message["token_ids"].reshape(-1) for message in log]).cpu() for log in logs]
        columns = mask.shape[1]
        longest = max(map(len, ids), default=0)
        if longest > columns:
            raise ValueError(f"a message_log has {longest} tokens, but the mask has {columns} columns")
        live = [row[: len(of_row)] for row, of_row in zip(mask.bool().cpu(), ids, strict=True)]
        found = self.credit.votes(
            ids, [_question(log) for log in logs], [self.reference(info or {}) for info in infos], live
        )
        votes = torch.zeros(mask.shape, dtype=torch.int32)
        for row, of_row in zip(votes, found, strict=True):
            row[: len(of_row)] = of_row
        return votes


def install(credit: StepCredit, reference: Callable[[dict[str, Any]], str | None] | None = None) -> None:
    """Let ``nemo_rl.algorithms.grpo`` make its estimator with step-level credit, in this process.

    Raises:
        ValueError: (when the estimator is made) settings that do not go with step-level credit.
    """
    from nemo_rl.algorithms import grpo

    create = getattr(grpo._create_advantage_estimator, "capo_host", grpo._create_advantage_estimator)

    def create_with_credit(master_config: Any) -> CapoAdvantageEstimator:
        check(credit, master_config)
        return CapoAdvantageEstimator(create(master_config), credit, reference)

    create_with_credit.capo_host = create  # type: ignore[attr-defined]
    grpo._create_advantage_estimator = create_with_credit


def check(credit: StepCredit, master_config: Any) -> None:
    """Raise ValueError for settings that do not go with step-level credit."""
    name = setting(master_config, "grpo.adv_estimator.name", "grpo")
    by_sequence = setting(master_config, "loss_fn.sequence_level_importance_ratios", False)
    in_reward = setting(master_config, "loss_fn.use_kl_in_reward", False) and name == "reinforce_plus_plus"
    reasons = {"opd": "advantages of distillation differ from token to token already, and would be replaced"}
    if credit.base == "rule":
        reasons["gdpo"] = "base='rule' normalises the total reward itself, and would ignore the parts; use base='host'"
    refuse(
        credit,
        grpo__adv_estimator__name=(name, reasons.get(name)),
        loss_fn__sequence_level_importance_ratios=(by_sequence, SEQUENCE_RATIO if by_sequence else None),
        loss_fn__use_kl_in_reward=(in_reward, KL_IN_REWARD if in_reward and credit.base == "rule" else None),
    )


def _question(log: Any) -> str:
    before = []
    for message in log:
        if message["role"] == "assistant":
            break
        before.append(message)
    return question_text(before)
