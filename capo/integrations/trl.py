"""Step-level credit in TRL's GRPO trainer.

    from capo.integrations.trl import CapoConfig, CapoGRPOTrainer

    trainer = CapoGRPOTrainer(model, reward_funcs=accuracy, judge=judge, args=CapoConfig("out"), train_dataset=data)

Reward functions say what an answer is worth, as always; the judge names wrong steps, at the same time. Their votes turn
TRL's one advantage a response into one a token. All else is TRL's own.

Dimension key: B responses of this process, A of all processes, T columns, N packed tokens, M steps, K critiques.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from capo import critique
from capo.credit import Credit, CreditRule
from capo.judges import JudgeReply, JudgeRequest
from capo.losses import LossRule
from capo.patch import PolicyInputs, patch_causal_lm
from capo.shaping import Rows, check_replies, question_text
from capo.split_groups import MOMENTS, gathered_advantages, response_moments, without_steps
from capo.steps import Steps, TokenBytes, segment, step_texts

OLDEST = (0, 26)

try:
    import trl
except ImportError as error:
    raise ImportError("capo.integrations.trl needs TRL: pip install 'capo[trl]'") from error
if tuple(map(int, trl.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(f"capo.integrations.trl needs trl>=0.26 for advantages of tokens; this is {trl.__version__}")
try:
    from trl import GRPOConfig, GRPOTrainer
except RuntimeError as error:  # how TRL's lazy modules report what they could not import
    import transformers

    raise ImportError(
        f"TRL {trl.__version__} cannot be imported with transformers {transformers.__version__} (trl<0.29 needs "
        f"transformers<5): {error}"
    ) from error

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
_REFERENCE_COLUMNS = ("solution", "answer")
_LOGPROB_ARGUMENTS = (
    "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss",
)  # fmt: skip


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CapoConfig(GRPOConfig):
    """`trl.GRPOConfig` with the settings of step-level credit; their names begin with ``capo_``.

    Raises:
        ValueError: a setting out of range, or one of TRL's that does not go with advantages of tokens, with the reason.
    """

    capo_rule: str = _option("capo", "Preset of capo.CreditRule that uses steps: capo, vppo, fapo, papo, grpo_process.")
    capo_vote: str | None = _option(
        None, "majority, strict_majority, intersection, union or average; default: the rule's."
    )
    capo_outcome_weight: float | None = _option(None, "C, the weight of the reward; default: the rule's.")
    capo_process_weight: float | None = _option(
        None, "P, the weight of the steps; default: the rule's. 0: TRL's own advantages, and the judge is not asked."
    )
    capo_normalize: str | None = _option(None, "Over what rewards are normalised; default: the rule's.")
    capo_std_floor: float | None = _option(None, "The std is at least this; default: the rule's.")
    capo_clamp: float | None = _option(None, "Advantages are clamped to [-clamp, clamp]; default: the rule's.")
    capo_base: str = _option(
        "rule",
        "rule: the rule's advantages (the paper), and TRL's own in groups without a valid critique. host: TRL's own "
        "advantages plus what the critiques change under the rule, for settings such as scale_rewards=none.",
    )
    capo_num_votes: int = _option(5, "K, critiques of each response.")
    capo_delimiter: str = _option("\n\n", "What separates steps.")
    capo_max_steps: int | None = _option(None, "At most this many steps per response; the last takes in the rest.")
    capo_question: str | None = _option(None, "Dataset column with the question for the judge; default: the prompt.")
    capo_reference: str | None = _option(
        None, "Dataset column with a reference solution or answer for the judge; default: solution or answer, if any."
    )
    capo_linear_loss: bool = _option(
        False,
        "Log-probabilities and their gradients by capo's linear loss, from hidden states in chunks: no logits of whole "
        "batches. TRL's loss, whatever its type, is made of them as always.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _Settings.of(self)


_DEFAULTS: dict[str, Any] = {
    option.name: option.default for option in dataclasses.fields(CapoConfig) if option.name.startswith("capo_")
}


@dataclass(frozen=True)
class _Settings:
    """The ``capo_`` settings, checked."""

    rule: CreditRule
    base: str
    num_votes: int
    delimiter: str
    max_steps: int | None
    question: str | None
    reference: str | None
    linear_loss: bool

    @property
    def active(self) -> bool:
        return self.rule.process_weight > 0

    @classmethod
    def of(cls, args: Any) -> _Settings:
        """Those of a `CapoConfig`, or the defaults with any other configuration of TRL's kind."""
        given = {name.removeprefix("capo_"): getattr(args, name, default) for name, default in _DEFAULTS.items()}
        names = ("vote", "outcome_weight", "process_weight", "normalize", "std_floor", "clamp")
        changes = {name: value for name in names if (value := given.pop(name)) is not None}
        preset = given["rule"]
        given["rule"] = CreditRule.preset(preset, **changes)
        settings = cls(**given)
        if settings.base not in ("rule", "host"):
            raise ValueError(f"capo_base must be rule or host, got {settings.base!r}")
        if not 1 <= settings.num_votes <= 127:
            raise ValueError(f"capo_num_votes must be in 1..127, got {settings.num_votes!r}")
        if not settings.delimiter:
            raise ValueError("capo_delimiter must not be empty")
        if settings.max_steps is not None and settings.max_steps < 1:
            raise ValueError(f"capo_max_steps must be at least 1, got {settings.max_steps!r}")
        if settings.linear_loss:
            _refuse_linear_loss(args)
        if settings.active:
            settings._refuse(args)
        elif changes.get("process_weight") != 0:
            raise ValueError(
                f"capo_rule={preset!r} looks at outcomes only: the trainer would run TRL's own advantages. Choose a rule "
                "that uses steps (capo, vppo, fapo, papo, grpo_process), or say so by capo_process_weight=0"
            )
        return settings

    def _refuse(self, args: Any) -> None:
        """Refuse settings of TRL that drop, or give another meaning to, advantages of tokens."""
        # Before TRL 0.29 sapo takes one advantage a response, and has this method.
        known = [kind for kind in LOSS_TYPES if kind != "sapo" or not hasattr(GRPOTrainer, "get_sapo_token_loss")]
        reasons = {
            "use_liger_kernel": "Liger's fused loss takes one advantage a response and is silently wrong with more"
            if _liger_loss(args)
            else None,
            "importance_sampling_level": "one ratio a response gives all of its tokens the same gradient, in which the "
            "advantages of steps are averaged away; use importance_sampling_level=token"
            if args.importance_sampling_level != "token"
            else None,
            "off_policy_mask_threshold": "the mask keeps or drops whole responses by their advantage; with advantages of "
            "tokens it would cut responses apart"
            if getattr(args, "off_policy_mask_threshold", None) is not None
            else None,
            "loss_type": f"checked with {', '.join(known)} only" if args.loss_type not in known else None,
        }
        if self.base == "rule":
            ignored = "capo_base=rule normalises rewards itself and would ignore this; use capo_base=host"
            if args.scale_rewards != "group":
                reasons["scale_rewards"] = ignored
            if getattr(args, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
                reasons["multi_objective_aggregation"] = ignored
        for name, reason in reasons.items():
            if reason is not None:
                raise ValueError(f"{name}={getattr(args, name, True)!r} does not go with step-level credit: {reason}")


def _liger_loss(args: Any) -> bool:
    """Whether TRL would compute its loss by Liger's kernel."""
    return getattr(args, "use_liger_loss", False) or (
        getattr(args, "use_liger_kernel", False) and hasattr(GRPOTrainer, "compute_liger_loss")
    )


def _refuse_linear_loss(args: Any) -> None:
    """Refuse settings of TRL that capo_linear_loss cannot follow."""
    no_entropy = "entropies have no gradient there"
    reasons = {
        "use_liger_kernel": "Liger makes the loss from hidden states by itself" if _liger_loss(args) else None,
        "entropy_coef": no_entropy if getattr(args, "entropy_coef", 0.0) else None,
        "use_adaptive_entropy": no_entropy if getattr(args, "use_adaptive_entropy", False) else None,
        "cast_lm_head_to_fp32": "the head is multiplied in its own type, and summed in float32"
        if getattr(args, "cast_lm_head_to_fp32", False)
        else None,
        "deepspeed": "not checked with sharded weights" if getattr(args, "deepspeed", None) else None,
        "fsdp": "not checked with sharded weights" if getattr(args, "fsdp", None) else None,
    }
    for name, reason in reasons.items():
        if reason is not None:
            raise ValueError(f"{name}={getattr(args, name, True)!r} does not go with capo_linear_loss=True: {reason}")


@dataclass(frozen=True, eq=False)
class _Judged:
    """Responses as they were generated, with their critiques and rewards."""

    token_ids: Tensor  # [N]
    cu_seqlens: Tensor  # [B + 1]
    steps: Steps
    replies: list[list[JudgeReply]]
    rewards: Tensor  # [A], the weighted sum of the reward functions; NaN where none had an answer
    seconds: float  # spent in waiting for the judge


class CapoMixin:
    """What `capo_trainer` puts before a GRPO trainer: the judge beside the reward functions, advantages of tokens.

    Args:
        judge: critiques responses, see `capo.judges.Judge`; its ``critique`` may also be ``async def``. It runs in a thread
            (an ``async`` one on an event loop of its own) while the reward functions run.
        token_bytes: the bytes of every token id; None takes those of the trainer's tokenizer.
        args, kwargs: those of the trainer.

    Raises:
        ValueError: settings that do not go together, see `CapoConfig`; no judge.
    """

    def __init__(self, *args: Any, judge: Any = None, token_bytes: TokenBytes | None = None, **kwargs: Any) -> None:
        config = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments.get("args")
        if config is not None:  # before a model is loaded
            _check_judge(_Settings.of(config), judge)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.capo_settings = _Settings.of(trainer.args)
        _check_judge(self.capo_settings, judge)
        self.capo_judge = judge
        self._capo_loop = _Loop()
        self._capo_judged: _Judged | None = None
        if self.capo_settings.active:
            self._capo_check_loss()
            self.capo_token_bytes = token_bytes or _token_bytes(trainer)
        if self.capo_settings.linear_loss:
            self._capo_check_linear_loss()

    def _capo_check_loss(self) -> None:
        """Libraries such as Unsloth put their own loss into TRL's class, with columns that are not those of the batch."""
        for name in ("compute_loss", "_compute_loss"):
            module = getattr(super(), name).__func__.__module__
            if module.split(".")[0] != "trl" and not getattr(self, "capo_token_advantages", False):
                raise ValueError(
                    f"{name} of this trainer comes from {module}, not from TRL: it may drop or misplace advantages of "
                    "tokens. If it takes inputs['advantages'] of shape [B, T], column for column those of "
                    "completion_ids, set capo_token_advantages = True in the class"
                )

    def _capo_check_linear_loss(self) -> None:
        trainer: Any = self
        method = "_get_per_token_logps_and_entropies"
        reasons = {
            "its log-probabilities are those of another class": getattr(super(), method).__func__
            is not getattr(GRPOTrainer, method),
            "router losses of mixtures of experts come from TRL's own forward": getattr(
                trainer, "aux_loss_enabled", False
            ),
            "models with images are not supported": getattr(trainer, "_is_vlm", False),
            "not checked with sharded weights": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(f"capo_linear_loss=True does not go with this trainer: {reason}")
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                try:
                    patch_causal_lm(trainer.accelerator.unwrap_model(model)).remove()
                except ValueError as error:
                    raise ValueError(f"capo_linear_loss=True does not go with this model: {error}") from error

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, ...]:
        """Those of the completions, [B, T]; with ``capo_linear_loss`` 0 at padding."""
        trainer: Any = super()
        if not self.capo_settings.linear_loss:
            return trainer._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        call = inspect.signature(trainer._get_per_token_logps_and_entropies)
        given = call.bind(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs).arguments
        size = given.get("batch_size") or len(input_ids)
        unknown = [name for name, value in given.items() if value is not None and name not in _LOGPROB_ARGUMENTS]
        if unknown:
            raise ValueError(f"capo_linear_loss=True does not go with {', '.join(unknown)} of the batch")
        temperature = self.temperature  # type: ignore[attr-defined]
        accelerator = self.accelerator  # type: ignore[attr-defined]
        mask = attention_mask[:, -logits_to_keep:].bool()
        found = []
        with patch_causal_lm(accelerator.unwrap_model(model)):
            for ids, attention, response in zip(
                input_ids.split(size), attention_mask.split(size), mask.split(size), strict=True
            ):
                rule = LossRule(temperature=temperature)
                inputs = PolicyInputs(response, rule=rule, differentiable=torch.is_grad_enabled())
                with accelerator.autocast():
                    found.append(model(input_ids=ids, attention_mask=attention, capo=inputs))
        padded = [
            torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(values))
            for values in zip(*found, strict=True)
        ]
        entropies = padded[1] if given.get("compute_entropy", False) else None
        return (padded[0], entropies, *[None] * ("compute_aux_loss" in call.parameters))

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        trainer: Any = super()
        if not (self.capo_settings.active and self.model.training):  # type: ignore[attr-defined]
            return trainer._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        settings = self.capo_settings
        token_ids = torch.tensor([id_ for ids in completion_ids_list for id_ in ids], dtype=torch.int64)
        cu_seqlens = torch.tensor([0, *map(len, completion_ids_list)]).cumsum(0)
        steps = segment(token_ids, cu_seqlens, self.capo_token_bytes, settings.delimiter, max_steps=settings.max_steps)
        requests = [
            JudgeRequest(question, reference, tuple(texts))
            for question, reference, texts in zip(
                _questions(inputs, prompts, settings.question),
                _references(inputs, settings.reference),
                step_texts(token_ids, steps, self.capo_token_bytes),
                strict=True,
            )
        ]
        waiting = self._capo_loop.start(self.capo_judge.critique, requests, settings.num_votes)
        try:
            per_function = trainer._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except BaseException:
            waiting.cancel()
            raise
        began = time.perf_counter()
        replies = waiting.result()
        seconds = time.perf_counter() - began
        check_replies(replies, len(requests), settings.num_votes)
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(1)  # type: ignore[attr-defined]
        rewards = torch.where(per_function.isnan().all(1), torch.nan, rewards)
        self._capo_judged = _Judged(token_ids, cu_seqlens, steps, replies, rewards, seconds)
        self._capo_log_flags(replies, steps)
        return per_function

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._capo_judged = None
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        judged, self._capo_judged = self._capo_judged, None
        if judged is not None:
            output["advantages"] = self._capo_advantages(output, judged)
        return output

    def _capo_advantages(self, output: dict[str, Any], judged: _Judged) -> Tensor:
        """Advantages [B, T], or the host's own [B] where no group has a valid critique."""
        began = time.perf_counter()
        trainer: Any = self
        settings, host = self.capo_settings, output["advantages"]
        device = host.device
        inside = _completions(output, judged)
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        rows = Rows(mask[inside].bool(), judged.cu_seqlens.to(device))
        found = judged.steps.to(device)
        steps = rows.steps(found.starts, found.ends, found.cu_steps)
        counts = steps.cu_steps.diff()
        critiques = [[reply.critique for reply in row] for row in judged.replies]
        votes = critique.vote_table(critiques, counts.tolist(), settings.num_votes).to(device)
        size = len(rows)
        rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
        everyone = torch.arange(size * processes, device=device) // trainer.num_generations
        own = slice(rank * size, (rank + 1) * size)
        credit = Credit(judged.rewards[own].to(device), votes, steps, rows.cu_seqlens, everyone[own], settings.rule)
        heard = torch.tensor([any(c is not None for c in row) for row in critiques], device=device)

        split = processes > 1 and size % trainer.num_generations != 0
        values, heard = self._capo_split(credit, heard, everyone) if split else (_values(credit, settings), heard)
        groups, index = everyone.unique(return_inverse=True)
        of_rows = index if split else index[own]
        judged_groups = torch.zeros_like(groups, dtype=torch.bool).index_fill(0, of_rows[heard], True)
        shaped = judged_groups[index[own]]  # [B]
        if settings.base == "host":
            unchanged = host.repeat_interleave(rows.cu_seqlens.diff())
            values = torch.where(values == 0, unchanged, unchanged + values)
        packed = rows.unpack(values)
        result = torch.zeros_like(mask, dtype=torch.float32).masked_scatter_(inside, packed)
        result = torch.where(shaped[:, None], result, host[:, None] * mask.bool())
        self._capo_log(credit, judged, shaped, result, mask, time.perf_counter() - began)
        return result if bool(shaped.any()) else host

    def _capo_split(self, credit: Credit, heard: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the tokens, and who was heard on all processes, where groups reach over processes. [N], [A]"""
        trainer: Any = self
        variants = [credit] if self.capo_settings.base == "rule" else [credit, without_steps(credit)]
        sent = torch.cat([heard[:, None].double(), *map(response_moments, variants)], 1)
        received = trainer.accelerator.gather(sent)  # [A, 1 + 5] or [A, 1 + 10]
        parts = [
            gathered_advantages(variant, received[:, 1 + MOMENTS * i : 1 + MOMENTS * (i + 1)], groups)
            for i, variant in enumerate(variants)
        ]
        return parts[0] if len(parts) == 1 else parts[0] - parts[1], received[:, 0].bool()

    def _capo_log(
        self, credit: Credit, judged: _Judged, shaped: Tensor, advantages: Tensor, mask: Tensor, seconds: float
    ) -> None:
        """Metrics over all processes, under ``capo/``."""
        trainer: Any = self
        flat = [reply for row in judged.replies for reply in row]
        states = [reply.state for reply in flat]
        of_steps = credit.outcomes.repeat_interleave(credit.steps.cu_steps.diff())
        votes, live = credit.votes, mask.bool()
        shared = critique.agreement(votes)
        pairs = int(((votes >= 0).sum(1) >= 2).sum())
        sums = {
            "right": votes[of_steps > 0],
            "wrong": votes[of_steps <= 0],
        }
        local = {
            **{f"flags/{name}": int((part == 1).sum()) for name, part in sums.items()},
            **{f"votes/{name}": int((part >= 0).sum()) for name, part in sums.items()},
            "agreeing": (shared.agreement or 0.0) * pairs,
            "pairs": pairs,
            "invalid": states.count("invalid"),
            "failed": states.count("failed"),
            "judge_tokens": sum(reply.prompt_tokens + reply.completion_tokens for reply in flat),
            "tokens": len(judged.token_ids),
            "undecided": int(credit.outcomes.isnan().sum()),
            "dead": int((advantages[live] == 0).sum()),
            "live": int(live.sum()),
            "host": int((~shaped).sum()),
            "responses": len(shaped),
            "waited": judged.seconds,
            "shaping": seconds,
            "largest": float(advantages[live].abs().max()) if bool(live.any()) else 0.0,
        }
        sent = torch.tensor([list(local.values())], dtype=torch.float64, device=advantages.device)
        received = trainer.accelerator.gather(sent)
        total = dict(zip(local, received.sum(0).tolist(), strict=True))
        largest = dict(zip(local, received.amax(0).tolist(), strict=True))

        def share(part: str, whole: str) -> float:
            return total[part] / total[whole] if total[whole] else float("nan")

        metrics = {
            "flag_rate/right": share("flags/right", "votes/right"),
            "flag_rate/wrong": share("flags/wrong", "votes/wrong"),
            "vote_agreement": share("agreeing", "pairs"),
            "critiques/invalid": total["invalid"],
            "critiques/failed": total["failed"],
            "judge_tokens_per_token": share("judge_tokens", "tokens"),
            "undecided": total["undecided"],
            "dead_tokens": share("dead", "live"),
            "host_advantages": share("host", "responses"),
            "max_advantage": largest["largest"],
            "time/judge": largest["waited"],
            "time/shape": largest["shaping"],
        }
        for name, value in metrics.items():
            trainer._metrics["train"][f"capo/{name}"].append(value)

    def _capo_log_flags(self, replies: list[list[JudgeReply]], steps: Steps) -> None:
        """A column of TRL's table of completions (TRL 1.0 and later): the share of critiques against each step."""
        log = getattr(self, "_log_completion_extra", None)
        if log is None or not getattr(self, "log_completions", False):
            return
        lines = []
        for row, count in zip(replies, steps.cu_steps.diff().tolist(), strict=True):
            heard = [reply.critique for reply in row if reply.critique is not None]
            against = [sum(step in one.flagged for one in heard) for step in range(count)]
            lines.append(", ".join(f"{step}: {votes}/{len(heard)}" for step, votes in enumerate(against) if votes))
        log("capo_flagged", lines)


def capo_trainer(base: type) -> type:
    """`CapoMixin` before a GRPO trainer of your own, or a patched one.

    Args:
        base: a subclass of `trl.GRPOTrainer`, or a class that behaves like one.

    Raises:
        ValueError: the base has not the methods that step-level credit hooks into, or computes its loss by a method of its
            own. Set ``capo_token_advantages = True`` in a class whose loss takes advantages [B, T] as well as [B].
    """
    for name in ("_generate_and_score_completions", "_calculate_rewards", "_compute_loss"):
        if not hasattr(base, name):
            raise ValueError(f"{base.__name__} has no {name}: it is no GRPO trainer of TRL 0.26 or later")
    for name in ("compute_loss", "_compute_loss"):
        own = getattr(base, name) is not getattr(GRPOTrainer, name)
        if own and not getattr(base, "capo_token_advantages", False):
            raise ValueError(
                f"{base.__name__} has a {name} of its own, which may drop or misplace advantages of tokens. If it takes "
                "inputs['advantages'] of shape [B, T] as well as [B], set capo_token_advantages = True in it"
            )
    return type(f"Capo{base.__name__}", (CapoMixin, base), {"__doc__": CapoMixin.__doc__, "__module__": __name__})


CapoGRPOTrainer: Any = capo_trainer(GRPOTrainer)


class _Loop:
    """Runs a function beside this thread; one that is ``async def``, on an event loop that lives as long as the trainer."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, function: Any, *args: Any) -> Future:
        if inspect.iscoroutinefunction(function):
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="capo judge", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(function(*args), self._loop)
        future: Future = Future()
        future.set_running_or_notify_cancel()  # cannot be interrupted; cancelled means that nobody waits for it

        def run() -> None:
            try:
                future.set_result(function(*args))
            except BaseException as error:  # noqa: BLE001, raised again where the result is asked for
                future.set_exception(error)

        threading.Thread(target=run, name="capo judge", daemon=True).start()
        return future


def _values(credit: Credit, settings: _Settings) -> Tensor:
    """Advantages of the tokens, or what the votes change in them. [N]"""
    if settings.base == "rule":
        return credit.advantages()
    return credit.advantages() - without_steps(credit).advantages()


def _completions(output: dict[str, Any], judged: _Judged) -> Tensor:
    """Where the judged tokens are in the padded completions. bool [B, T]"""
    ids = output["completion_ids"]
    lengths = judged.cu_seqlens.diff().to(ids.device)
    fits = len(ids) == len(lengths)
    if fits:
        inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        fits = torch.equal(ids[inside], judged.token_ids.to(ids))
    if not fits:
        raise ValueError(
            "the trainer changed its completions after they were rewarded; their critiques no longer fit. A base class "
            "that replaces or reorders rows (a replay buffer, for one) does not go with step-level credit"
        )
    return inside


def _check_judge(settings: _Settings, judge: Any) -> None:
    if settings.active and not callable(getattr(judge, "critique", None)):
        raise ValueError(
            f"judge must have a method critique(requests, num_votes), see capo.judges.Judge, got {judge!r:.80}; without "
            "one set capo_process_weight=0"
        )


def _token_bytes(trainer: Any) -> TokenBytes:
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    ends: set[int] = set()
    generation = getattr(trainer.accelerator.unwrap_model(trainer.model), "generation_config", None)
    for ids in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
        ends.update([] if ids is None else ids if isinstance(ids, list) else [ids])
    return TokenBytes.from_tokenizer(tokenizer, eos_ids=sorted(ends))


def _questions(inputs: Sequence[dict[str, Any]], prompts: Sequence[Any], column: str | None) -> list[str]:
    if column is None:
        return [question_text(prompt) for prompt in prompts]
    return [str(value) for value in _column(inputs, column, "capo_question")]


def _references(inputs: Sequence[dict[str, Any]], column: str | None) -> list[str | None]:
    if column is None:
        column = next((name for name in _REFERENCE_COLUMNS if inputs and name in inputs[0]), None)
        if column is None:
            return [None] * len(inputs)
    return [None if value is None else str(value) for value in _column(inputs, column, "capo_reference")]


def _column(inputs: Sequence[dict[str, Any]], column: str, option: str) -> list[Any]:
    for row in inputs:
        if column not in row:
            raise ValueError(f"{option}={column!r}: the dataset has no such column, only {', '.join(row)}")
    return [row[column] for row in inputs]
