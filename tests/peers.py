"""The policy losses of TRL and verl, executed from their installed packages on packed batches.

Every difference between their definitions and capo's is a mapping here, named in ``MAPPINGS``; none is a tolerance.

Dimension key: B responses, N packed tokens, T longest response, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import sys
import types
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from batches import Batch
from torch import Tensor

from capo import LossRule

VERSIONS = {"TRL": "1.16.0", "verl": "0.9.1"}
# What core_algos imports beyond torch and transformers.
VERL_PACKAGES = "verl==0.9.1 tensordict pyvers cloudpickle omegaconf codetiming"

MAPPINGS = {
    "TRL": (
        ("`grpo` is `sequence_mean`, `bnpo` (or `dapo` with the batch's own token count) `token_mean`, `dr_grpo` "
        "`constant` with B x `max_completion_length`, `luspo` `constant` with B."),
        "`delta` is `clip_dual`, where it is above 1 + `epsilon_high`: TRL holds the ratio before it takes the minimum.",
        ("`cispo` bounds the ratio from above only, by `epsilon_high` itself: `clip_low=1`, `clip_high=epsilon_high - 1`; "
        "its loss is always a token mean."),
        ('The ratio of `importance_sampling_level="sequence"` lets the gradient through all tokens, as '
        '`ratio="sequence"`; a KL term stays one of tokens.'),
        "KL is k3 only. The entropy bonus is a token mean whatever the reduction of the loss.",
        "Log-ratios are not limited (capo: 20, no gradient beyond).",
    ),
    "verl": (
        "`seq-mean-token-mean` divides by the responses that have an unmasked token; `sequence_mean` by all responses.",
        ("`seq-mean-token-sum-norm` with `loss_scale_factor` is `constant` with `loss_scale_factor` x the responses that "
        "have an unmasked token; `token-sum` is `constant` with 1."),
        "The dual clip is always on: without one `clip_ratio_c` is put above exp(20), which no ratio exceeds.",
        ('`gspo` lets the gradient of a token\'s loss through that token alone, as `ratio="sequence_token"`; its loss '
        'also has the value of `ratio="sequence"`. Its log-ratio is limited from above, at 10.'),
        "k3 is at most 10, with gradient 0 beyond; capo limits d = logp - ref_logp at 20.",
        "Importance weights are those of `rollout_is=\"token\"` with one threshold.",
    ),
}  # fmt: skip


class NotOffered(Exception):
    """The peer has no such loss; the message says what is missing."""


class Padded:
    """A packed batch as these trainers hold it: [B, T] tensors and a mask. ``logits``: [N, V] with gradient."""

    def __init__(self, batch: Batch, logits: Tensor, logprobs: Tensor, entropy: Tensor):
        self.lengths = batch.cu_seqlens.diff()
        self.present = torch.arange(int(self.lengths.max())) < self.lengths[:, None]
        active = torch.ones_like(batch.labels, dtype=torch.bool) if batch.mask is None else batch.mask
        self.mask = self(active)
        self.logprobs, self.entropy = self(logprobs), self(entropy)
        self.advantages = self(batch.credit)
        self.old = self.logprobs.detach() if batch.old_logprobs is None else self(batch.old_logprobs)
        self.ref, self.rollout = self(batch.ref_logprobs), self(batch.rollout_logprobs)

    def __call__(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.present.shape).masked_scatter(self.present, values)


# ---- TRL


@functools.cache
def trl():
    """TRL's modules, or a skipped test."""
    try:
        from trl.trainer import grpo_trainer, utils
    except ImportError as error:
        pytest.skip(f"TRL cannot be imported ({error}): pip install trl==1.16.0")

    return types.SimpleNamespace(trainer=grpo_trainer.GRPOTrainer, utils=utils)


def trl_settings(rule: LossRule) -> dict[str, object]:
    """What of GRPOConfig says the same as a rule."""
    if rule.kl_coef > 0 and rule.kl != "k3":
        raise NotOffered(f"kl {rule.kl}")
    if rule.ratio == "sequence_token":
        raise NotOffered("gradient of a sequence ratio through one token")
    if rule.entropy_coef and rule.reduce != "token_mean":
        raise NotOffered("entropy bonus other than a token mean")
    if rule.objective == "cispo" and (rule.reduce != "token_mean" or rule.clip_low < 1):
        raise NotOffered("cispo other than a token mean without lower bound")
    loss_type = {"sequence_mean": "grpo", "token_mean": "bnpo", "constant": "dr_grpo"}[rule.reduce]
    return {
        "loss_type": "cispo" if rule.objective == "cispo" else loss_type,
        "importance_sampling_level": rule.ratio,
        "epsilon_low": rule.clip_low,
        "epsilon_high": rule.clip_high + (rule.objective == "cispo"),
        "delta": rule.clip_dual,
        "beta": rule.kl_coef,
    }


class _OneProcess:
    num_processes, sync_gradients = 1, True

    def reduce(self, values, reduction):
        return values

    def gather(self, values):
        return values


def trl_loss(batch: Batch, logits: Tensor, rule: LossRule, **changes) -> Tensor:
    """``GRPOTrainer._compute_loss`` of a trainer that has settings and no model.

    Args:
        batch: the rest of the arguments; not all ``None``.
        logits: [N, V], with gradient.
        rule: what to compute.
        changes: settings other than those of ``trl_settings``.

    Raises:
        NotOffered: TRL has no such loss.
    """
    settings = {**trl_settings(rule), **changes}
    logprobs, entropy = trl().utils.selective_log_softmax_and_entropy(
        logits[None], batch.labels[None], temperature=rule.temperature
    )
    x = Padded(batch, logits, logprobs[0], entropy[0])
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(
            use_bias_correction_kl=False, delta=settings.pop("delta"), steps_per_generation=1, entropy_coef=0.0
        ),
        accelerator=_OneProcess(),
        model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=(rule.constant or 1) / len(x.lengths),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=rule.importance_cap is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=rule.entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=rule.entropy_coef,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (x.logprobs, x.entropy, None),
        **settings,
    )
    mask = x.mask.long()
    inputs = {
        "prompt_ids": mask[:, :0],
        "prompt_mask": mask[:, :0],
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": x.advantages,
        "ref_per_token_logps": x.ref,
        "num_items_in_batch": mask.sum(),
    }
    if batch.old_logprobs is not None:
        inputs["old_per_token_logps"] = x.old
    if rule.importance_cap is not None:
        # The trainer makes these where it samples, out of reach of a call.
        inputs["importance_sampling_ratio"] = (x.old - x.rollout).exp().clamp(max=rule.importance_cap)
    return trl().trainer._compute_loss(trainer, None, inputs)


# ---- verl


@functools.cache
def verl():
    """verl's modules, or a skipped test. verl imports Ray, which computes nothing here: an empty module does."""
    stand_in = types.ModuleType("ray")
    stand_in.ObjectRef = object
    stand_in.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    try:
        import ray  # noqa: F401
    except ImportError:
        sys.modules["ray"] = stand_in
    try:
        from verl.trainer.ppo import core_algos, rollout_corr_helper
        from verl.utils import torch_functional
        from verl.workers.config import ActorConfig
    except ImportError as error:
        pytest.skip(f"verl cannot be imported ({error}): pip install --no-deps {VERL_PACKAGES}")
    finally:
        if sys.modules.get("ray") is stand_in:
            del sys.modules["ray"]
    return types.SimpleNamespace(
        core=core_algos, correction=rollout_corr_helper, functional=torch_functional, config=ActorConfig
    )


NEVER = 1e9  # above exp(20), the largest ratio of verl
REDUCTIONS = {
    "sequence_mean": "seq-mean-token-mean",
    "token_mean": "token-mean",
    "constant": "seq-mean-token-sum-norm",
}


def verl_settings(rule: LossRule) -> dict[str, object]:
    """What of ActorConfig says the same as a rule; ``loss_mode`` is of its ``policy_loss``."""
    if rule.ratio == "sequence":
        raise NotOffered("gradient of a sequence ratio through all tokens")
    if rule.ratio == "sequence_token" and (rule.clip_dual is not None or rule.objective == "cispo"):
        raise NotOffered("a sequence ratio with dual clip or cispo")
    mode = "cispo" if rule.objective == "cispo" else {"token": "vanilla", "sequence_token": "gspo"}[rule.ratio]
    return {
        "loss_mode": mode,
        "loss_agg_mode": REDUCTIONS[rule.reduce],
        "clip_ratio_low": rule.clip_low,
        "clip_ratio_high": rule.clip_high,
        "clip_ratio_c": rule.clip_dual or NEVER,
    }


class _Verl:
    """A batch in verl's hands: each term of the loss with the mapping of its denominators."""

    def __init__(self, batch: Batch, logits: Tensor, rule: LossRule):
        z = logits / rule.temperature
        functional = verl().functional
        entropy = functional.entropy_from_logits(z)
        self.x = Padded(batch, logits, functional.logprobs_from_logits(z[None], batch.labels[None])[0], entropy)
        self.rule = rule
        filled, responses = int(self.x.mask.any(1).sum()), len(self.x.mask)
        self.factor = filled / responses if rule.reduce == "sequence_mean" else 1.0
        self.scale = rule.constant / filled if rule.reduce == "constant" else None

    def aggregate(self, values: Tensor) -> Tensor:
        mode = REDUCTIONS[self.rule.reduce]
        return self.factor * verl().core.agg_loss(values, self.x.mask, mode, loss_scale_factor=self.scale)

    def policy(self) -> Tensor:
        settings = verl_settings(self.rule)
        loss = verl().core.get_policy_loss_fn(settings.pop("loss_mode"))
        mode = settings.pop("loss_agg_mode")
        config = verl().config(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)
        config.global_batch_info["loss_scale_factor"] = self.scale
        weights = None
        if self.rule.importance_cap is not None:
            weights, _ = verl().correction.compute_rollout_correction_weights(
                self.x.old - self.x.rollout, self.x.mask, rollout_is_threshold=self.rule.importance_cap
            )
        value, _ = loss(
            old_log_prob=self.x.old,
            log_prob=self.x.logprobs,
            advantages=self.x.advantages,
            response_mask=self.x.mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=weights,
        )
        return self.factor * value

    def regularisers(self) -> Tensor:
        rule, total = self.rule, self.x.logprobs.new_zeros(())
        if rule.kl_coef > 0:
            kl = verl().core.kl_penalty(self.x.logprobs, self.x.ref, rule.kl)
            total = total + rule.kl_coef * self.aggregate(kl)
        return total - rule.entropy_coef * self.aggregate(self.x.entropy) if rule.entropy_coef else total


def verl_loss(batch: Batch, logits: Tensor, rule: LossRule) -> Tensor:
    """Policy loss, KL and entropy term, summed as verl's ``ppo_loss`` does.

    Args:
        batch: the rest of the arguments.
        logits: [N, V], with gradient.
        rule: what to compute.

    Raises:
        NotOffered: verl has no such loss.
    """
    terms = _Verl(batch, logits, rule)
    return terms.policy() + terms.regularisers()


def both_loss(batch: Batch, logits: Tensor, rule: LossRule) -> Tensor:
    """TRL's policy loss with verl's KL and entropy terms: for a loss that only TRL has with a KL that only verl has."""
    plain = dataclasses.replace(rule, kl_coef=0.0, entropy_coef=0.0)
    return trl_loss(batch, logits, plain) + _Verl(batch, logits, rule).regularisers()


def offers(rule: LossRule) -> dict[str, Callable[[Batch, Tensor, LossRule], Tensor]]:
    """The peers that have the loss of a rule, by name; both together only where neither has it alone."""
    found: dict[str, Callable[[Batch, Tensor, LossRule], Tensor]] = {}
    for name, settings, loss in (("TRL", trl_settings, trl_loss), ("verl", verl_settings, verl_loss)):
        try:
            settings(rule)
        except NotOffered:
            continue
        found[name] = loss
    if not found:
        trl_settings(dataclasses.replace(rule, kl_coef=0.0, entropy_coef=0.0))
        found["TRL + verl"] = both_loss
    return found
