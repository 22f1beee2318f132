"""The policy loss: from logits, labels and credit to a scalar, its gradient and the usual metrics."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from torch import Tensor

from capo import ops
from capo.credit import Credit, _one_of
from capo.ops import CHUNK_BYTES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Objective = Literal["clip", "cispo"]
Ratio = Literal["token", "sequence", "sequence_token"]
Reduce = Literal["sequence_mean", "token_mean", "constant"]
Kl = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class LossRule:
    """How log-probabilities and advantages become a loss; ``LossRule.preset("paper")`` has the paper's settings.

    The loss of token t, with ``rho = exp(logp - old_logp)``, A its advantage and H the entropy of its distribution::

        -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A) + kl_coef * KL - entropy_coef * H

    Args:
        clip_low, clip_high: width of the clip range on either side of 1. A ratio exactly on the edge is not clipped.
        clip_dual: where A < 0 the first term is at most ``-clip_dual * A`` (dual clip; above 1); None: off.
        ratio: ``token``: rho as above; ``sequence``: every token of a response has the ratio exp(mean of logp -
            old_logp over the response), and the gradient goes through all of them (GSPO); ``sequence_token``: the same
            value, but the gradient of a token's loss goes through that token alone (GSPO-token).
        reduce: ``sequence_mean``: mean over the tokens of each response, then over responses (the paper);
            ``token_mean``: mean over all tokens (DAPO); ``constant``: sum over tokens / ``constant`` (Dr. GRPO).
        constant: the divisor of ``reduce="constant"``, e.g. the number of tokens of the whole update.
        kl_coef, kl: weight and estimator of the KL term against ``ref_logprobs``, with d = logp - ref_logp. ``k1``: d;
            ``k2``: d^2 / 2; ``k3``: exp(-d) + d - 1.
        entropy_coef: weight of the entropy bonus.
        temperature: logits are divided by it.
        objective: ``clip``: as above; ``cispo``: the first term is ``-detach(clip(rho, ...)) * A * logp``.
        importance_cap: the first term is multiplied by ``min(exp(old_logp - rollout_logp), importance_cap)``, without
            gradient (truncated importance correction for sampler/trainer mismatch); None: off.

    |logp - old_logp| and |logp - ref_logp| inside an exponential are limited to 20, with gradient 0 beyond.

    Raises:
        ValueError: unknown name, number out of range, or options that contradict each other.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float | None = None
    ratio: Ratio = "token"
    reduce: Reduce = "sequence_mean"
    constant: float | None = None
    kl_coef: float = 0.0
    kl: Kl = "k3"
    entropy_coef: float = 0.0
    temperature: float = 1.0
    objective: Objective = "clip"
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        for name, names in (("ratio", Ratio), ("reduce", Reduce), ("kl", Kl), ("objective", Objective)):
            _one_of("LossRule", name, getattr(self, name), get_args(names))
        for name in ("clip_low", "clip_high", "kl_coef"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"LossRule: {name} must be finite and at least 0, got {value!r}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"LossRule: entropy_coef must be finite, got {self.entropy_coef!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"LossRule: temperature must be finite and above 0, got {self.temperature!r}")
        if self.clip_dual is not None and not (math.isfinite(self.clip_dual) and self.clip_dual > 1):
            raise ValueError(f"LossRule: clip_dual must be finite and above 1, or None, got {self.clip_dual!r}")
        if self.clip_dual is not None and self.objective == "cispo":
            raise ValueError("LossRule: clip_dual has no meaning with objective='cispo'; leave it None")
        if (self.constant is not None) != (self.reduce == "constant"):
            raise ValueError(
                f"LossRule: reduce='constant' and constant=<number> belong together, "
                f"got reduce={self.reduce!r} with constant={self.constant!r}"
            )
        for name in ("constant", "importance_cap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"LossRule: {name} must be finite and above 0, or None, got {value!r}")

    @classmethod
    def preset(cls, name: str, **changes) -> LossRule:
        """Published settings by name, with fields changed on request.

        ``paper`` (CAPO: sequence mean, clip 0.2, KL 0.01), ``grpo`` (the same without KL), ``dapo`` (token mean, clip
        0.2/0.28), ``gspo`` (sequence ratio, clip 3e-4/4e-4), ``cispo`` (token mean, ratio at most 5, no lower bound).
        Dr. GRPO is ``LossRule(reduce="constant", constant=...)``.
        """
        _one_of("LossRule.preset", "name", name, tuple(_PRESETS))
        return dataclasses.replace(cls(**_PRESETS[name]), **changes)


_PRESETS: dict[str, dict] = {
    "paper": {"kl_coef": 0.01},
    "grpo": {},
    "dapo": {"reduce": "token_mean", "clip_high": 0.28},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"objective": "cispo", "reduce": "token_mean", "clip_low": 1.0, "clip_high": 4.0},
}


class PolicyLoss(NamedTuple):
    """What a policy loss returns; all but ``loss`` is detached."""

    loss: Tensor  # scalar, differentiable
    logprobs: Tensor  # [N] float32; 0 where the token is dead
    entropy: Tensor  # [N] float32, in nats; 0 where the token is dead
    clip_fraction: Tensor  # scalar: share of the unmasked tokens whose ratio was clipped
    kl: Tensor  # scalar: mean KL estimate over the unmasked tokens; 0 if kl_coef is 0


def policy_loss(
    logits: Tensor,
    labels: Tensor,
    credit: Credit | Tensor,
    old_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    rule: LossRule = LossRule(),
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    inplace: bool = False,
    rows: Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy loss of packed responses, with the gradient of the logits made in the same pass.

    Equals, for the default rule::

        logp = torch.log_softmax(logits.float() / temperature, -1).gather(-1, labels[:, None])[:, 0]
        rho = torch.exp(logp - old_logprobs)
        loss = -torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
        torch.stack([part.mean() for part in loss.split(lengths)]).mean()

    (``capo.reference.policy_loss`` is the definition of all options). A token is dead if it is masked, or if its
    advantage is 0 and the rule has neither KL nor entropy term (with a sequence ratio: if that holds for its whole
    response): its logits are not read, its gradient is exactly 0, and it still counts in the denominators unless it is
    masked. What stands in a masked row has no influence, NaN included. Bitwise equal from run to run; a row's result
    does not depend on the rest of the batch or on the number of threads.

    With ``rows`` the logits of dead tokens need not be made: loss, metrics and the gradient of each row have the bits that
    all logits give::

        rows = capo.live_rows(credit, rule, mask)
        loss = capo.policy_loss(head(hidden[rows]), labels, credit, old_logprobs, cu_seqlens, rule, mask=mask, rows=rows)

    Args:
        logits: [N, V] float32, bfloat16 or float16, one row for every response token, made by the position before it;
            any row stride, last dimension contiguous.
        labels: [N] int64, the sampled token ids.
        credit: a ``Credit``, or advantages [N] float.
        old_logprobs: [N] float, log-probabilities under the policy that is the denominator of the ratio; None:
            on-policy, ratio 1.
        cu_seqlens: [B + 1] int32 or int64, cumulative response lengths.
        rule: the formula.
        ref_logprobs: [N] float, under the reference policy; needed if ``rule.kl_coef`` is above 0, else not read.
        mask: [N] bool (or 0/1), True for the tokens that count; None: all.
        rollout_logprobs: [N] float, as the sampler reported them; needed if ``rule.importance_cap`` is set.
        inplace: write the gradient over ``logits``; they must not be used afterwards, nor by their own backward.
        rows: [n] int64, rising: ``logits`` are [n, V], and their row i is that of token ``rows[i]``. All other tokens count
            as dead. For ``ratio="token"`` only. None: there is a row for every token.

    Returns:
        PolicyLoss: ``loss`` is differentiable with respect to ``logits`` only; ``logprobs`` and ``entropy`` are [N].

    Raises:
        ValueError: shapes, dtypes, devices, labels or mask values that do not fit, named.
    """
    advantages, of_groups = (None, credit) if isinstance(credit, Credit) else (credit, None)
    return PolicyLoss(
        *ops.policy_loss(
            logits, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs, inplace,
            of_groups, rows,
        )
    )  # fmt: skip


def live_rows(credit: Credit | Tensor, rule: LossRule = LossRule(), mask: Tensor | None = None) -> Tensor:
    """The tokens that can have a gradient: those whose logits ``policy_loss(..., rows=...)`` needs. int64 [n]

    Equals, for a rule without KL and entropy terms::

        ((advantages != 0) & mask).nonzero()[:, 0]

    On a GPU it waits for their number.

    Args:
        credit, rule, mask: as of ``policy_loss``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named; a ratio of whole responses.
    """
    advantages = credit.advantages() if isinstance(credit, Credit) else credit
    return ops.live_rows(advantages, rule, mask)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    credit: Credit | Tensor,
    old_logprobs: Tensor | None,
    cu_seqlens: Tensor,
    rule: LossRule = LossRule(),
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    temperature: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    group: ProcessGroup | None = None,
    num_live: int | None = None,
) -> PolicyLoss:
    """``policy_loss`` of the logits ``hidden @ weight.T + bias``, which never exist as a whole.

    Equals::

        capo.policy_loss(torch.nn.functional.linear(hidden, weight, bias), labels, credit, ...)

    The logits are made and used up in chunks of rows. Rows of dead tokens (see ``policy_loss``) are left out of all three
    matrix products, rows without a gradient because they were clipped out of the last two. The gradients are made in the
    forward; that of ``weight`` is summed in float32. The loss and the gradient of each row of ``hidden`` are bitwise the
    same for any ``chunk_bytes`` and whatever else is in the batch. The C++ backend keeps the memory of a large gradient of
    ``weight`` and takes it again for the next one, once no tensor has it.

    Args:
        hidden: [N, H] float32, bfloat16 or float16: one row for every response token, of the position before it.
        weight: [V, H], of the same dtype (under autocast all are cast).
        labels, credit, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs: as of ``policy_loss``.
        bias: [V], or None.
        temperature: [N] float, above 0: one for every row instead of ``rule.temperature``, which must be 1 then.
        softcap: logits z become ``softcap * tanh(z / softcap)``, before the temperature; None: off.
        vocab_size: rows of ``weight`` from here on are padding: no probability, gradient 0; None: there are none.
        chunk_bytes: memory for the logits of a chunk, in bytes; at least 256 rows are taken. The C++ backend keeps it from
            one call to the next.
        group: process group over whose ranks ``weight`` (and ``bias``) are split by rows, in the order of the ranks. All
            other arguments are the same on all ranks; ``vocab_size`` counts the rows of all. The loss and the gradient
            of ``hidden`` are whole on each rank.
        num_live: no more tokens than this are live (say those of the mask, counted on the host); None: any number can be. On
            a GPU the products are then those of cuBLAS, of so many rows, faster than those that ask the device how many
            there are. If more are live the results are NaN there, and an error on the CPU.

    Returns:
        PolicyLoss: ``loss`` is differentiable with respect to ``hidden``, ``weight`` and ``bias``; those that do not
        require a gradient cost nothing.

    Raises:
        ValueError: shapes, dtypes, devices, labels or mask values that do not fit, named.
    """
    advantages = ops.credit(credit, hidden.shape[0]) if isinstance(credit, Credit) else credit
    return PolicyLoss(
        *ops.linear_policy_loss(
            hidden, weight, labels, advantages, old_logprobs, cu_seqlens, rule, ref_logprobs, mask, rollout_logprobs,
            bias, temperature, softcap, vocab_size, chunk_bytes, group, num_live,
        )
    )  # fmt: skip


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    group: ProcessGroup | None = None,
    num_live: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``logprobs`` of the logits ``hidden @ weight.T + bias``, which never exist as a whole; no gradient. [N], [N]

    Equals::

        capo.logprobs(torch.nn.functional.linear(hidden, weight, bias), labels, temperature, mask)

    Args:
        hidden, weight, bias, softcap, vocab_size, chunk_bytes, group: as of ``linear_policy_loss``.
        num_live: no more rows than this are read; as of ``linear_policy_loss``.
        labels: [N] int64.
        temperature: logits are divided by it; above 0; one for all rows, or [N] float.
        mask: [N] bool, False for rows that are not read and get 0; None: all are read.

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit, named.
    """
    return ops.linear_logprobs(
        hidden, weight, labels, temperature, mask, bias, softcap, vocab_size, chunk_bytes, group, num_live
    )


def logprobs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each row, without gradient, reading the logits once. [N], [N]

    Equals::

        logp = torch.log_softmax(logits.float() / temperature, -1)
        logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    Args:
        logits: [N, V] float32, bfloat16 or float16; any row stride, last dimension contiguous.
        labels: [N] int64.
        temperature: logits are divided by it; above 0.
        mask: [N] bool, False for rows that are not read and get 0; None: all are read.

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit, named.
    """
    return ops.logprobs(logits, labels, temperature, mask)
