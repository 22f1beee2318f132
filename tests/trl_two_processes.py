"""Started by torchrun with two processes: one TRL step each with groups that reach over both; see test_trl.py."""

import dataclasses
import gc
import json
import sys
from pathlib import Path

import torch
from test_trl import Spy, config, judge, make

import capo

folder = Path(sys.argv[1])
for base in ("rule", "host"):
    args = config(folder, max_steps=1, per_device_train_batch_size=6, capo_base=base)
    who, failed = judge(false_alarm=0.3, missed=0.3, failed=0.2), []

    class Counting:
        def critique(self, requests, num_votes, who=who, failed=failed):
            replies = who.critique(requests, num_votes)
            failed.extend(reply for row in replies for reply in row if reply.state == "failed")
            return replies

    trainer = make(args, Counting())
    spy = Spy(trainer)
    credits = []
    original = trainer._capo_split

    def keep(credit, heard, groups, original=original, credits=credits):
        credits.append(credit)
        return original(credit, heard, groups)

    trainer._capo_split = keep
    trainer.train()
    (batch,), (credit,) = spy.generated, credits
    rank = trainer.accelerator.process_index

    # All of it in one process: the pieces of both, put together by hand.
    pieces = [None, None]
    torch.distributed.all_gather_object(pieces, (credit, batch["completion_mask"], len(failed)))
    tokens = [int(piece.cu_seqlens[-1]) for piece, *_ in pieces]
    steps = [len(piece.steps.starts) for piece, *_ in pieces]
    first, second = (piece for piece, *_ in pieces)
    joined = dataclasses.replace(
        first,
        outcomes=torch.cat([first.outcomes, second.outcomes]),
        votes=torch.cat([first.votes, second.votes]),
        steps=capo.Steps(
            torch.cat([first.steps.starts, second.steps.starts + tokens[0]]),
            torch.cat([first.steps.ends, second.steps.ends + tokens[0]]),
            torch.cat([first.steps.cu_steps, second.steps.cu_steps[1:] + steps[0]]),
        ),
        cu_seqlens=torch.cat([first.cu_seqlens, second.cu_seqlens[1:] + tokens[0]]),
        groups=torch.cat([first.groups, second.groups]),
    )
    width = max(mask.shape[1] for _, mask, _ in pieces)
    masks = torch.cat([torch.nn.functional.pad(mask, (0, width - mask.shape[1])) for _, mask, _ in pieces]).bool()
    without = dataclasses.replace(joined, rule=dataclasses.replace(joined.rule, process_weight=0.0))

    def padded(values, masks=masks):
        return torch.zeros(masks.shape, dtype=values.dtype).masked_scatter(masks, values)

    def truth(credit):
        parts = credit.steps.starts, credit.steps.ends, credit.steps.cu_steps, credit.cu_seqlens, credit.groups
        return capo.reference.token_advantages(credit.outcomes, credit.votes, *parts, credit.rule)

    host = torch.zeros(len(masks))
    if base == "host":
        rewards = joined.outcomes.view(-1, 4)
        host = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    spread = host[:, None] * masks
    change = joined.advantages() - without.advantages() if base == "host" else joined.advantages()
    exact = truth(joined) - truth(without) if base == "host" else truth(joined)
    mine = torch.nn.functional.pad(batch["advantages"], (0, width - batch["advantages"].shape[1]))
    mask = torch.nn.functional.pad(batch["completion_mask"], (0, width - batch["completion_mask"].shape[1]))
    result = {"advantages": mine, "mask": mask, "whole": spread + padded(change), "truth": spread + padded(exact)}
    result["failed"] = sum(count for *_, count in pieces)
    torch.save(result, folder / f"{base}-{rank}.pt")
    if rank == 0:
        log = next(row for row in trainer.state.log_history if "capo/max_advantage" in row)
        (folder / f"{base}-log.json").write_text(json.dumps(log))


del trainer, spy, original, keep  # a process group that lives until the interpreter ends may abort it there
gc.collect()
torch.distributed.destroy_process_group()
