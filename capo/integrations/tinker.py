"""Step-level credit in training loops on Tinker.

In a loop of your own, after ``assemble_training_data`` of the Tinker cookbook::

    data_D, metadata_D = assemble_training_data(trajectory_groups_P, compute_advantages(trajectory_groups_P))
    shape_data(credit, data_D, metadata_D, trajectory_groups_P)

In the cookbook's own loop, before it starts: ``capo.integrations.tinker.install(credit)``.

Layout C, shifted: a datum has one advantage a target token; position t belongs to token t + 1 of the sequence.

Read: tinker 0.38.0 (types/datum.py, types/tensor_data.py) and tinker-cookbook 0.6.1 (rl/data_processing.py, rl/train.py,
rl/types.py), both of PyPI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from capo.shaping import StepCredit

Texts = Callable[[Any, int], tuple[str, "str | None"]]


def shape_data(
    credit: StepCredit,
    data: Sequence[Any],
    metadata: Sequence[dict[str, int]],
    trajectory_groups: Sequence[Any],
    texts: Texts | None = None,
) -> dict[str, float]:
    """Put step-level credit into ``loss_fn_inputs["advantages"]`` of every datum.

    Args:
        credit: the judge, and how its votes count.
        data: ``tinker.Datum`` with ``target_tokens``, ``mask`` and ``advantages``.
        metadata: for each, ``group_idx`` and ``traj_idx``. The data of one trajectory are judged as one response.
        trajectory_groups: the groups, for rewards and questions.
        texts: of a group and the number of a trajectory in it, the question and a correct solution or answer (or None);
            by default the tokens of the first observation, and None.

    Returns:
        Metrics, see `StepCredit.take_metrics`.
    """
    if not credit.active or not data:
        return {}
    pieces: dict[tuple[int, int], list[Any]] = {}
    for datum, place in zip(data, metadata, strict=True):
        pieces.setdefault((place["group_idx"], place["traj_idx"]), []).append(datum)
    inputs = [[datum.loss_fn_inputs for datum in of_one] for of_one in pieces.values()]
    ids = [_joined(of_one, "target_tokens") for of_one in inputs]
    masks = [_joined(of_one, "mask") != 0 for of_one in inputs]
    host = [_joined(of_one, "advantages") for of_one in inputs]
    groups = [group for group, _ in pieces]
    totals = {group: trajectory_groups[group].get_total_rewards() for group in set(groups)}
    asked = [
        texts(trajectory_groups[group], number)
        if texts
        else (_question(credit, trajectory_groups[group], number), None)
        for group, number in pieces
    ]
    votes = credit.votes(ids, [question for question, _ in asked], [answer for _, answer in asked], masks)
    rewards = [totals[group][number] for group, number in pieces]
    shaped = credit.shape(host, rewards, votes, groups, masks)
    for of_one, before, after in zip(inputs, host, shaped, strict=True):
        if after is not before:
            start = 0
            for fields in of_one:
                old = fields["advantages"]
                size = len(old.to_torch())
                fields["advantages"] = type(old).from_torch(after[start : start + size].clone())
                start += size + 1
    return credit.take_metrics()


def install(credit: StepCredit, texts: Texts | None = None) -> None:
    """Let ``tinker_cookbook.rl.train`` assemble its training data with step-level credit, in this process."""
    from tinker_cookbook.rl import train

    assemble = getattr(train.assemble_training_data, "capo_host", train.assemble_training_data)

    def assemble_training_data(trajectory_groups_P: Any, *args: Any, **kwargs: Any) -> Any:
        data, metadata = assemble(trajectory_groups_P, *args, **kwargs)
        shape_data(credit, data, metadata, trajectory_groups_P, texts)
        return data, metadata

    assemble_training_data.capo_host = assemble  # type: ignore[attr-defined]
    train.assemble_training_data = assemble_training_data


def _joined(inputs: list[Any], name: str) -> Tensor:
    """The values of a trajectory's data end to end; a 0 after each keeps steps from reaching over."""
    return torch.cat([torch.nn.functional.pad(fields[name].to_torch(), (0, 1)) for fields in inputs])


def _question(credit: StepCredit, group: Any, number: int) -> str:
    transitions = group.trajectories_G[number].transitions
    return credit.text(transitions[0].ob.to_ints()) if transitions else ""
