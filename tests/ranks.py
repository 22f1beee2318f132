"""One process of test_distributed: python tests/ranks.py RANK WORLD FOLDER

Runs every scenario and, on rank 0, writes loss and gradients of each to FOLDER/<scenario>.safetensors.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from causal_lms import TEMPERATURE, Case, build
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import capo
from capo import LossRule, PolicyInputs

# Responses of each micro-batch of each rank: of unequal numbers and lengths, together one batch.
SPLITS = {
    "whole": [[[0, 1, 2, 3]], [[4, 5]]],
    "accumulated": [[[0, 1], [2, 3]], [[4], [5]]],
}
RULES = {
    "sequence_mean": LossRule(kl_coef=0.05, entropy_coef=0.01, temperature=TEMPERATURE),
    "token_mean": LossRule(reduce="token_mean", temperature=TEMPERATURE),
    "constant": LossRule(reduce="constant", constant=40.0, temperature=TEMPERATURE),
    "gspo": LossRule.preset("gspo", clip_low=0.02, clip_high=0.03, temperature=TEMPERATURE),
}


@dataclass(frozen=True)
class Scenario:
    """How the batch is computed; ``wrap``: none, ddp, fsdp, fsdp-head (the head is a group of its own)."""

    wrap: str
    rule: str = "sequence_mean"
    split: str = "whole"
    kind: str = "qwen2-tied"
    checkpointing: bool = False
    precision: str = "float32"  # autocast, or mixed: bfloat16 weights while they compute
    dead_rank: bool = False


SCENARIOS = {
    **{f"ddp-{rule}": Scenario("ddp", rule) for rule in RULES},
    **{f"fsdp-{rule}": Scenario("fsdp", rule) for rule in RULES},
    "ddp-accumulated": Scenario("ddp", split="accumulated"),
    "ddp-accumulated-tokens": Scenario("ddp", "token_mean", "accumulated"),
    "fsdp-accumulated": Scenario("fsdp", split="accumulated"),
    "fsdp-untied": Scenario("fsdp", kind="llama"),
    "fsdp-head": Scenario("fsdp-head", kind="llama"),
    "ddp-checkpointing": Scenario("ddp", checkpointing=True),
    "fsdp-checkpointing": Scenario("fsdp", checkpointing=True),
    "ddp-autocast": Scenario("ddp", precision="autocast"),
    "fsdp-mixed": Scenario("fsdp", precision="mixed"),
    "ddp-dead-rank": Scenario("ddp", "token_mean", dead_rank=True),
    "fsdp-dead-rank": Scenario("fsdp", "token_mean", dead_rank=True),
}


def whole_batch(dead_rank):
    case = Case(prompts=(3, 5, 1, 4, 2, 3), responses=(6, 2, 4, 7, 3, 5))
    if dead_rank:  # nothing on the second rank has a gradient
        case.advantages[19:] = 0
    return case


def compute(scenario: Scenario, rank: int | None, group) -> dict[str, torch.Tensor] | None:
    """Loss and gradients; ``rank`` None: the whole batch in this process."""
    model = build(scenario.kind).train()
    whole, rule = whole_batch(scenario.dead_rank), RULES[scenario.rule]
    values = whole.values(model)
    if scenario.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [list(range(6))] if rank is None else SPLITS[scenario.split][rank]
    cases = [whole.select(rows) for rows in batches]
    wrapped = wrap(model, scenario, group) if rank is not None else model
    shares = capo.loss_shares(rule, [(case.cu_seqlens, case.mask) for case, _ in cases], group)
    total = torch.zeros(())
    precision = torch.autocast("cpu", torch.bfloat16, enabled=scenario.precision == "autocast")
    with capo.patch_causal_lm(model):
        for number, ((case, tokens), share) in enumerate(zip(cases, shares, strict=True)):
            inputs = PolicyInputs(case.response_mask, rule=rule, **{k: v[tokens] for k, v in values.items()})
            with synchronised(wrapped, number == len(cases) - 1):
                with precision:
                    loss = wrapped(case.input_ids, **case.model_inputs(), capo=inputs).loss * share
                loss.backward()
            total += loss.detach()
    if rank is not None:
        dist.all_reduce(total, dist.ReduceOp.SUM)
        total /= dist.get_world_size()
    return {"loss": total, **{name: full(p.grad) for name, p in model.named_parameters()}}


def wrap(model, scenario, group):
    if scenario.wrap == "ddp":
        return DistributedDataParallel(model, process_group=group)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mp_policy": policy} if scenario.precision == "mixed" else {}
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    if scenario.wrap == "fsdp-head":
        fully_shard(model.lm_head, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@contextlib.contextmanager
def synchronised(model, last):
    """Gradients cross processes with the last micro-batch only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield


def full(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for name, scenario in SCENARIOS.items():
        result = compute(scenario, rank, dist.group.WORLD)
        if rank == 0:
            save_file({key: value.contiguous() for key, value in result.items()}, folder / f"{name}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
