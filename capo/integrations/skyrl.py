"""Step-level credit in SkyRL.

    class Experiment(BasePPOExp):
        def get_generator(self, *args, **kwargs):
            return JudgedGenerator(super().get_generator(*args, **kwargs), credit)

        def get_trainer(self, *args, **kwargs):
            return with_credit(super().get_trainer(*args, **kwargs))

The generator asks the judge as soon as it has sampled, on its own event loop; the trainer estimates advantages as it is
configured to, and they are shaped after that. Rewards, their metrics and filters stay those of outcomes.

Layout A: the response window [B, R]. Rows end at its right edge: position R - n + t of a response of n tokens is its token t.

Read: skyrl 0.3.0 (PyPI): train/generators/base.py, train/trainer.py, train/dataset/preprocess.py.

Dimension key: B responses, R columns of the window.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from capo.shaping import CRITIC, KL_IN_REWARD, SEQUENCE_RATIO, StepCredit, question_text, refuse, setting

KEPT = 1 << 17  # judged responses that were not trained on yet; dynamic sampling drops some that never will be


class JudgedGenerator:
    """A SkyRL generator with a judge behind it; in all else the generator that it is given.

    Args:
        generator: any ``GeneratorInterface``.
        credit: the judge, and how its votes count.
        reference: of a row's ``env_extras``, a correct solution or answer, or None; by default the ``ground_truth`` of
            its ``reward_spec`` or ``reward_model``.
    """

    def __init__(
        self, generator: Any, credit: StepCredit, reference: Callable[[dict[str, Any]], str | None] | None = None
    ) -> None:
        self.generator, self.credit = generator, credit
        self.reference = reference or _ground_truth
        self._judged: OrderedDict[bytes, Tensor] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "generator":  # a copy in the making has no generator yet
            raise AttributeError(name)
        return getattr(self.generator, name)

    async def generate(self, input_batch: Any, **kwargs: Any) -> Any:
        """What the generator samples, unchanged, once the judge has read it; in evaluation the judge is not asked."""
        output = await self.generator.generate(input_batch, **kwargs)
        if not self.credit.active or setting(input_batch, "batch_metadata.training_phase") == "eval":
            return output
        prompts, responses = output["prompt_token_ids"], output["response_ids"]
        if len(responses) != len(input_batch["prompts"]):
            raise ValueError(
                f"{len(responses)} responses for {len(input_batch['prompts'])} prompts: step-wise trajectories do not go with "
                "step-level credit"
            )
        extras = input_batch.get("env_extras") or [{}] * len(responses)
        votes = await self.credit.votes_async(
            responses,
            [question_text(prompt) for prompt in input_batch["prompts"]],
            [self.reference(extra) for extra in extras],
            output["loss_masks"],
        )
        for prompt, response, of_response in zip(prompts, responses, votes, strict=True):
            self._judged[_key([*prompt, *response], len(response))] = of_response
        while len(self._judged) > KEPT:
            self._judged.popitem(last=False)
        return output

    def recall(self, sequences: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """The votes of responses, by what they say and what they answer; they are forgotten after this.

        Args:
            sequences: B 1-D tensors, prompt and response without padding.
            lengths: B lengths of the responses.

        Raises:
            ValueError: a response that was not judged.
        """
        keys = [_key(ids.tolist(), length) for ids, length in zip(sequences, lengths, strict=True)]
        unknown = next((row for row, key in enumerate(keys) if key not in self._judged), None)
        if unknown is not None:
            raise ValueError(
                f"row {unknown} was not judged when it was sampled: the trainer changed its tokens (merged turns, for one), or "
                "has another generator"
            )
        found = [self._judged[key] for key in keys]
        for key in set(keys):
            del self._judged[key]
        return found


def with_credit(trainer: Any) -> Any:
    """A SkyRL trainer (``RayPPOTrainer`` or a subclass) whose advantages are shaped; its generator is a `JudgedGenerator`.

    Raises:
        TypeError: another generator.
        ValueError: settings that do not go with step-level credit, with the reason.
    """
    generator, config = trainer.generator, trainer.cfg
    if not isinstance(generator, JudgedGenerator):
        raise TypeError(f"the trainer's generator must be a JudgedGenerator, got {type(generator).__name__}")
    credit, algorithm = generator.credit, setting(config, "trainer.algorithm")
    step_wise = setting(config, "generator.step_wise_trajectories", False)
    loss, estimator = setting(algorithm, "policy_loss_type"), setting(algorithm, "advantage_estimator")
    in_reward = setting(algorithm, "use_kl_in_reward", False)
    refuse(
        credit,
        generator__step_wise_trajectories=(
            step_wise,
            "only the reward of the last turn counts there, and is spread over all turns" if step_wise else None,
        ),
        trainer__algorithm__policy_loss_type=(loss, SEQUENCE_RATIO if loss == "gspo" else None),
        trainer__algorithm__advantage_estimator=(estimator, CRITIC if estimator == "gae" else None),
        trainer__algorithm__use_kl_in_reward=(
            in_reward,
            KL_IN_REWARD if in_reward and credit.base == "rule" else None,
        ),
    )
    estimate = trainer.compute_advantages_and_returns

    def compute_advantages_and_returns(data: Any) -> Any:
        data = estimate(data)
        if credit.active:
            data["advantages"] = _shaped(generator, data)
            trainer.all_metrics.update(credit.take_metrics())
        return data

    trainer.compute_advantages_and_returns = compute_advantages_and_returns
    return trainer


def _shaped(generator: JudgedGenerator, data: Any) -> Tensor:
    window, host = data["response_mask"].bool(), data["advantages"]
    lengths = window.sum(1).tolist()
    sequences = [ids[real] for ids, real in zip(data["sequences"], data["attention_mask"].bool(), strict=True)]
    votes = torch.zeros(window.shape, dtype=torch.int32)
    for row, of_response in enumerate(generator.recall(sequences, lengths)):
        votes[row, votes.shape[1] - len(of_response) :] = of_response
    outcomes = data["rewards"].sum(-1)
    mask = data["loss_mask"].bool() & window
    return generator.credit.shape(host, outcomes, votes.to(host.device), data.metadata["uids"], mask)


def _key(token_ids: Sequence[int], length: int) -> bytes:
    return hashlib.sha256(array("q", [length, *token_ids]).tobytes()).digest()


def _ground_truth(extras: dict[str, Any]) -> str | None:
    for name in ("reward_spec", "reward_model"):
        if (found := setting(extras, f"{name}.ground_truth")) is not None:
            return str(found)
    return None
