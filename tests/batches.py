"""Random batches for tests: packed responses, steps, votes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import capo


@dataclasses.dataclass
class Batch:
    """Arguments of ``capo.policy_loss``, by name, but for the rule."""

    logits: Tensor
    labels: Tensor
    credit: Tensor
    old_logprobs: Tensor | None
    cu_seqlens: Tensor
    ref_logprobs: Tensor | None
    mask: Tensor | None
    rollout_logprobs: Tensor | None

    def to(self, device) -> Batch:
        return Batch(*(None if x is None else x.to(device) for x in self.values()))

    def values(self):
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def replace(self, **changes) -> Batch:
        return dataclasses.replace(self, **changes)

    def double(self) -> Batch:
        return Batch(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in self.values()))


def lengths_to_cu(lengths) -> Tensor:
    return torch.tensor([0, *torch.as_tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def random_batch(lengths=(5, 1, 0, 9, 4), vocab=257, dtype=torch.float32, seed=0, spread=2.0) -> Batch:
    """Off-policy batch with masked tokens and tokens of advantage 0."""
    g = torch.Generator().manual_seed(seed)
    cu_seqlens = lengths_to_cu(lengths)
    n = int(cu_seqlens[-1])
    logits = (spread * torch.randn(n, vocab, generator=g)).to(dtype)
    labels = torch.randint(0, vocab, (n,), generator=g)
    logp = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    advantages = torch.randn(n, generator=g) * (torch.rand(n, generator=g) > 0.25)

    def near(spread):
        return logp + spread * torch.randn(n, generator=g)

    return Batch(
        logits, labels, advantages, near(0.3), cu_seqlens, near(0.3), torch.rand(n, generator=g) > 0.2, near(0.3)
    )


def run(batch: Batch, rule: capo.LossRule, **options) -> tuple[capo.PolicyLoss, Tensor]:
    """``capo.policy_loss`` and the gradient of the logits."""
    logits = batch.logits.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
    out = capo.policy_loss(rule=rule, **{**vars(batch), "logits": logits}, **options)
    out.loss.backward()
    return out, logits.grad


def reference(batch: Batch, rule: capo.LossRule) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same by ``capo.reference`` and autograd, in the batch's own precision."""
    logits = batch.logits.detach().clone().requires_grad_(True)
    rest = batch.labels, batch.credit, batch.old_logprobs, batch.cu_seqlens, rule
    out = capo.reference.policy_loss_terms(logits, *rest, batch.ref_logprobs, batch.mask, batch.rollout_logprobs)
    if out[0].requires_grad:
        out[0].backward()
    grad = torch.zeros_like(logits) if logits.grad is None else logits.grad
    return tuple(x.detach() for x in out), grad


def closed_form_gradient(batch: Batch, rule: capo.LossRule) -> Tensor:
    """The gradient by ``capo.reference.policy_loss_gradient``, in the batch's own precision."""
    return capo.reference.policy_loss_gradient(
        batch.logits, batch.labels, batch.credit, batch.old_logprobs, batch.cu_seqlens, rule, batch.ref_logprobs,
        batch.mask, batch.rollout_logprobs,
    )  # fmt: skip


def slopes(batch: Batch, rule: capo.LossRule) -> Tensor:
    """Size of d loss / d logp and d loss / d entropy of each row, on the scale of the logits. [N]"""
    live = capo.reference._Live(
        batch.logits, batch.labels, batch.credit, batch.old_logprobs, batch.cu_seqlens, rule, batch.ref_logprobs,
        batch.mask, batch.rollout_logprobs,
    )  # fmt: skip
    g, h = live.slopes(rule)
    return live.scatter((g.abs() + h.abs()) / rule.temperature)


def random_credit(seed=0, num_responses=6, num_votes=3, rule=None, num_groups=2) -> capo.Credit:
    """Steps with gaps, empty steps, responses without steps or tokens, abstentions, groups out of order."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    starts, ends, counts, lengths = [], [], [], []
    token = 0
    for _ in range(num_responses):
        first = token
        number = draw(0, 5)
        for _ in range(number):
            token += draw(0, 2)
            starts.append(token)
            token += draw(0, 5)
            ends.append(token)
        token += draw(0, 3)
        counts.append(number)
        lengths.append(token - first)
    steps = capo.Steps(
        torch.tensor(starts, dtype=torch.int64), torch.tensor(ends, dtype=torch.int64), lengths_to_cu(counts)
    )
    return capo.Credit(
        torch.randint(0, 2, (num_responses,), generator=g).float(),
        torch.randint(-1, 2, (len(starts), num_votes), generator=g, dtype=torch.int8),
        steps,
        lengths_to_cu(lengths),
        torch.randint(0, num_groups, (num_responses,), generator=g) * 17 - 3,
        rule or capo.CreditRule(),
    )


def credit_to(credit: capo.Credit, device, cu_seqlens: Tensor | None = None) -> capo.Credit:
    """The credit on a device, with other ``cu_seqlens`` if there are some."""
    return capo.Credit(
        credit.outcomes.to(device), credit.votes.to(device), credit.steps.to(device),
        credit.cu_seqlens.to(device) if cu_seqlens is None else cu_seqlens, credit.groups.to(device), credit.rule,
    )  # fmt: skip
