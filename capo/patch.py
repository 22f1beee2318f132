"""The policy loss inside causal language models of Hugging Face transformers: from hidden states, without logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from capo.credit import Credit
from capo.differentiable import differentiable_logprobs
from capo.losses import CHUNK_BYTES, LossRule, PolicyLoss, linear_logprobs, linear_policy_loss

# Classes whose forward is: base model, lm_head, and what `_logits_options` knows of.
_ARCHITECTURES = (
    "Gemma2ForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
_VALUES = ("credit", "old_logprobs", "ref_logprobs", "mask", "rollout_logprobs")


@dataclass(frozen=True, eq=False)
class PolicyInputs:
    """What the policy loss of a patched model takes beside the model's own arguments; see ``capo.policy_loss``.

    The response tokens are picked out of ``input_ids`` by ``response_mask``, in the order of memory, and lie packed from
    there on: N of them. The logits of a token are those of the position before it.

    Args:
        response_mask: bool (or 0/1), True at every token of a response: of the shape [B, T] of ``input_ids``, or [B, R]
            for the last R positions of it.
        credit: a ``Credit`` of the packed tokens, or advantages: [N], or of the shape of ``response_mask``. None: no loss;
            the model returns log-probabilities and entropies, [N] and [N], without gradient (``capo.linear_logprobs``).
        old_logprobs, ref_logprobs, rollout_logprobs: float, [N] or of the shape of ``response_mask``, or None.
        rule: the formula.
        mask: bool, [N] or of the shape of ``response_mask``, True for the response tokens that count; None: all.
        cu_seqlens: [number of responses + 1] int32 or int64, cumulative response lengths, where a row of ``input_ids``
            holds several responses; None: each row holds one.
        differentiable: without ``credit``: the log-probabilities have a gradient, for a loss that no ``LossRule`` has. The
            backward makes the logits again, chunk by chunk; entropies have no gradient, and ``mask`` must be None.
    """

    response_mask: Tensor
    credit: Credit | Tensor | None = None
    old_logprobs: Tensor | None = None
    rule: LossRule = field(default_factory=LossRule)
    ref_logprobs: Tensor | None = None
    mask: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    cu_seqlens: Tensor | None = None
    differentiable: bool = False

    def __post_init__(self) -> None:
        if self.differentiable and (self.credit is not None or self.mask is not None):
            raise ValueError(
                "differentiable=True returns the log-probabilities of all response tokens: no credit, no mask"
            )


class Patch(AbstractContextManager):
    """A patched model: ``remove()``, or the end of a ``with`` block, makes it what it was."""

    def __init__(self, modules: dict[nn.Module, Callable[..., Any]]):
        self._before = [(module, module.__dict__.get("forward")) for module in modules]
        for module, forward in modules.items():
            module.forward = forward

    def remove(self) -> None:
        """Put the model's own forward back; a second call does nothing."""
        for module, forward in self._before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._before = []

    def __exit__(self, *_: object) -> None:
        self.remove()


def patch_causal_lm(model: Any, *, vocab_size: int | None = None, chunk_bytes: int = CHUNK_BYTES) -> Patch:
    """Teach a causal language model to return the policy loss, computed from its hidden states.

    A call with ``capo=PolicyInputs(...)`` returns a ``PolicyLoss`` (without ``credit``: log-probabilities and entropies) and
    makes no logits; any other call is as before::

        with capo.patch_causal_lm(model):
            out = model(input_ids, attention_mask=mask, capo=capo.PolicyInputs(response_mask, credit, old_logprobs))
            out.loss.backward()

    equals, with the same packing::

        logits = model(input_ids, attention_mask=mask).logits[:, :-1][response_mask[:, 1:]]
        capo.policy_loss(logits, input_ids[response_mask], credit, old_logprobs, cu_seqlens).loss.backward()

    Softcap and scaling of logits are taken from the model's configuration. It works before or after wrapping in DDP,
    ``fully_shard`` or PEFT (the model itself is patched, adapters on its head are refused), with tied embeddings and
    gradient checkpointing.

    Args:
        model: Llama, Mistral, Qwen2, Qwen3, Gemma2 or Granite ``...ForCausalLM`` of transformers, or PEFT around one.
        vocab_size: rows of the head from here on are padding; None: there are none.
        chunk_bytes: memory for the logits of a chunk, see ``capo.linear_policy_loss``.

    Returns:
        Patch: to be removed, or used as a context manager.

    Raises:
        ValueError: the model is of another architecture, is patched already, or its head is not a plain linear layer.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    _check_architecture(model)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(
            f"patch_causal_lm: the head must be a torch.nn.Linear with a floating-point weight, got {type(head).__name__}; "
            "call capo.linear_policy_loss with the hidden states and a full weight instead"
        )
    patched = isinstance(head.forward, _HeadForward)
    if patched:
        raise ValueError("patch_causal_lm: the model is patched already; remove that patch first")
    options = {"vocab_size": vocab_size, "chunk_bytes": chunk_bytes}
    return Patch({model: _ModelForward(model, head), head: _HeadForward(model, head, options)})


class _ModelForward:
    """The forward of a patched model; an object and not a closure, so that a deep copy of the model is a model of its own."""

    def __init__(self, model: Any, head: Any):
        functools.update_wrapper(self, model.forward)  # transformers looks at the signature
        self.model, self.head, self.plain = model, head, model.forward

    def __call__(
        self, input_ids: Tensor | None = None, *args: Any, capo: PolicyInputs | None = None, **kwargs: Any
    ) -> Any:
        if capo is None:
            return self.plain(input_ids, *args, **kwargs)
        if args:
            raise TypeError("a patched model takes all arguments but input_ids by name when capo= is given")
        if not isinstance(capo, PolicyInputs):
            raise TypeError(f"capo must be a capo.PolicyInputs, got {type(capo).__name__}")
        for name in ("labels", "logits_to_keep"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} has no meaning together with capo=; leave it out")
        layout = _Layout(input_ids, kwargs.get("position_ids"), kwargs.get("attention_mask"), capo)
        hidden = self.model.base_model(input_ids=input_ids, **{**kwargs, "use_cache": False})[0]
        # The loss runs inside the call of the head, so that hooks which gather its weight (FSDP) have done so.
        return self.head(hidden.flatten(0, 1)[layout.rows], loss=layout)


class _HeadForward:
    """The forward of the head of a patched model."""

    def __init__(self, model: Any, head: Any, options: dict[str, Any]):
        functools.update_wrapper(self, head.forward)
        self.config, self.head, self.plain, self.options = model.config, head, head.forward, options

    def __call__(self, hidden: Tensor, loss: _Layout | None = None) -> Any:
        return self.plain(hidden) if loss is None else loss(hidden, self.head, self.config, self.options)


class _Layout:
    """The response tokens of a batch, packed, and the rows of the flattened hidden states that predict them."""

    def __init__(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs: PolicyInputs,
    ):
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            raise ValueError("capo= needs input_ids [B, T]: the labels are taken from them")
        self.inputs = inputs
        self.shape = inputs.response_mask.shape
        batch, width = input_ids.shape
        if len(self.shape) != 2 or self.shape[0] != batch or self.shape[1] > width:
            raise ValueError(
                f"response_mask must be [{batch}, {width}], or [{batch}, R] for the last R positions, "
                f"got {list(self.shape)}"
            )
        self.mask = inputs.response_mask.to(input_ids.device) != 0
        response = nn.functional.pad(self.mask, (width - self.shape[1], 0))
        unpredicted = response & _starts(response, position_ids, attention_mask)
        if bool(unpredicted.any()):
            row, column = unpredicted.nonzero()[0].tolist()
            raise ValueError(
                f"response_mask: the token in row {row}, column {column} is the first of its sequence: nothing predicts it"
            )
        tokens = response.flatten().nonzero()[:, 0]
        self.rows = tokens - 1
        self.labels = input_ids.flatten()[tokens]
        given = inputs.cu_seqlens
        self.cu_seqlens = nn.functional.pad(response.sum(1).cumsum(0), (1, 0)) if given is None else given

    def __call__(
        self, hidden: Tensor, head: nn.Linear, config: Any, options: dict[str, Any]
    ) -> PolicyLoss | tuple[Tensor, Tensor]:
        rule = self.inputs.rule
        scaling = getattr(config, "logits_scaling", None)  # of Granite
        if scaling is not None:
            rule = dataclasses.replace(rule, temperature=rule.temperature * scaling)
        softcap = getattr(config, "final_logit_softcapping", None)  # of Gemma2
        options = {**options, "bias": head.bias, "softcap": softcap}
        values = {name: self._packed(name) for name in _VALUES}
        if self.inputs.differentiable:
            return differentiable_logprobs(hidden, head.weight, self.labels, rule.temperature, **options)
        if self.inputs.credit is None:
            return linear_logprobs(hidden, head.weight, self.labels, rule.temperature, values["mask"], **options)
        return linear_policy_loss(
            hidden, head.weight, self.labels, cu_seqlens=self.cu_seqlens, rule=rule, **values, **options
        )

    def _packed(self, name: str) -> Any:
        values = getattr(self.inputs, name)
        if not isinstance(values, Tensor) or values.dim() < 2:
            return values
        if values.shape != self.shape:
            raise ValueError(
                f"{name} must be [{len(self.labels)}] or {list(self.shape)} as response_mask, got {list(values.shape)}"
            )
        return values[self.mask]


def _starts(response: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Where a sequence starts, as far as can be seen: column 0, position 0, or behind padding. bool [B, T]"""
    starts = torch.zeros_like(response)
    starts[:, :1] = True
    if position_ids is not None:
        starts |= position_ids == 0
    if attention_mask is not None and attention_mask.shape == response.shape:
        starts[:, 1:] |= attention_mask[:, :-1] == 0
    return starts


def _check_architecture(model: Any) -> None:
    kind: Any = type(model)
    for cls in kind.__mro__:
        if cls.__name__ in _ARCHITECTURES and cls.__module__.startswith("transformers.models."):
            if kind.forward is cls.forward:
                return
            raise ValueError(
                f"patch_causal_lm: {kind.__name__} has a forward of its own; call capo.linear_policy_loss in it"
            )
    raise ValueError(
        f"patch_causal_lm: no patch for {kind.__name__}; there is one for {', '.join(_ARCHITECTURES)}. "
        "For others call capo.linear_policy_loss with the hidden states and the weight of the head"
    )
