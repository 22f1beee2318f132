"""Step-level credit in OpenRLHF.

    CAPO_CREDIT=my_lib.credit python -m capo.integrations.openrlhf --actor.model_name_or_path ...

is ``python -m openrlhf.cli.train_ppo_ray ...`` with the same options. Every Ray worker runs `install`, which puts
`capo_maker` before OpenRLHF's experience maker: the judge reads the samples while the models compute their
log-probabilities, and the advantages that OpenRLHF computes are shaped.

Layout B: advantages are [B, S - 1], position t belongs to token t + 1 of the sequence, as in ``action_mask``.

Read: openrlhf 0.11.2 (PyPI): trainer/ppo_utils/experience_maker.py, experience.py, samples_generator.py,
trainer/ppo_trainer.py, cli/train_ppo_ray.py.

Dimension key: B samples, S tokens of a sequence.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from capo.shaping import (
    CREDIT_VARIABLE,
    CRITIC,
    KL_IN_REWARD,
    SEQUENCE_RATIO,
    StepCredit,
    configured_credit,
    refuse,
    setting,
)

_log = logging.getLogger(__name__)


def capo_maker(base: type, credit: StepCredit | None = None) -> type:
    """A class with step-level credit before OpenRLHF's ``RemoteExperienceMaker``, or one that behaves like it.

    Args:
        base: the experience maker.
        credit: the judge, and how its votes count; None takes that of CAPO_CREDIT, when a maker is made.

    Raises:
        ValueError: (of the class, when a maker is made) settings that do not go with step-level credit.
    """
    return type(f"Capo{base.__name__}", (_CapoMixin, base), {"_capo_credit": credit, "__module__": __name__})


def install(credit: StepCredit | None = None) -> None:
    """Let ``openrlhf.trainer.ppo_trainer`` make its experience with step-level credit, in this process."""
    from openrlhf.trainer import ppo_trainer

    if not issubclass(ppo_trainer.RemoteExperienceMaker, _CapoMixin):
        ppo_trainer.RemoteExperienceMaker = capo_maker(ppo_trainer.RemoteExperienceMaker, credit)


class _CapoMixin:
    _capo_credit: StepCredit | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.capo_credit = self._capo_credit or configured_credit()
        _check(self.capo_credit, self.args)  # type: ignore[attr-defined]
        self._capo_waiting: Future | None = None

    def make_experience(self, samples_list: list[Any]) -> list[Any]:
        if not self.capo_credit.active:
            return super().make_experience(samples_list)  # type: ignore[misc]
        with ThreadPoolExecutor(1, "capo votes") as beside:
            self._capo_waiting = beside.submit(_votes, self.capo_credit, samples_list)
            return super().make_experience(samples_list)  # type: ignore[misc]

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        experiences = super().compute_advantages_and_returns(experiences)  # type: ignore[misc]
        if self.capo_credit.active:
            waiting, self._capo_waiting = self._capo_waiting, None
            votes = _votes(self.capo_credit, experiences) if waiting is None else waiting.result()
            samples_per_prompt = self.args.rollout.n_samples_per_prompt  # type: ignore[attr-defined]
            _shape(self.capo_credit, experiences, votes, samples_per_prompt)
            _log.info("%s", self.capo_credit.take_metrics())
        return experiences


def _votes(credit: StepCredit, samples_list: list[Any]) -> list[Tensor]:
    """Votes on the tokens that log-probabilities belong to, S - 1 of each sample."""
    return credit.votes(
        [ids for samples in samples_list for ids in samples.sequences[:, 1:]],
        [question for samples in samples_list for question in samples.prompts],
        [label for samples in samples_list for label in samples.labels],
        [mask for samples in samples_list for mask in samples.action_mask],
    )


def _shape(credit: StepCredit, experiences: list[Any], votes: list[Tensor], samples_per_prompt: int) -> None:
    host = [row for experience in experiences for row in experience.advantages]
    shaped = credit.shape(
        host,
        torch.cat([experience.rewards for experience in experiences]),
        [of_sample.to(row.device) for of_sample, row in zip(votes, host, strict=True)],
        [place // samples_per_prompt for place in chain.from_iterable(e.index for e in experiences)],
        [mask.bool() for experience in experiences for mask in experience.action_mask],
    )
    if shaped is not host:
        rows = iter(shaped)
        for experience in experiences:
            experience.advantages = torch.stack([next(rows) for _ in experience.advantages])


def _check(credit: StepCredit, args: Any) -> None:
    estimator, loss = setting(args, "algo.advantage.estimator"), setting(args, "actor.policy_loss_type")
    kl, in_loss = setting(args, "algo.kl.init_coef", 0), setting(args, "algo.kl.use_loss", False)
    reasons = {"gae": CRITIC, "flash_reinforce": "it has no groups: a prompt is sampled once"}
    refuse(
        credit,
        algo__advantage__estimator=(estimator, reasons.get(estimator)),
        actor__policy_loss_type=(loss, SEQUENCE_RATIO if loss == "gspo" else None),
        algo__kl__init_coef=(kl, KL_IN_REWARD if kl and not in_loss and credit.base == "rule" else None),
    )


def main() -> None:
    """``openrlhf.cli.train_ppo_ray`` with `install` in every Ray worker; the options are the same."""
    import runpy

    import ray

    configured_credit()
    passed = (
        "TOKENIZERS_PARALLELISM",
        "NCCL_DEBUG",
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS",
        "PYTHONPATH",
        CREDIT_VARIABLE,
    )
    defaults = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
    variables = defaults | {name: os.environ[name] for name in passed if name in os.environ}
    ray.init(
        runtime_env={"env_vars": variables, "worker_process_setup_hook": "capo.integrations.openrlhf.install"},
    )
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
