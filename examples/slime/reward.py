"""A reward function for slime that has the judge read a response while it is verified."""

import asyncio

from capo.integrations.slime import judge


async def reward(args, sample, **kwargs):
    score, _ = await asyncio.gather(verify(sample), judge(sample))
    return score


async def verify(sample) -> float:
    return float(str(sample.label) in sample.response.rsplit("\n", 1)[-1])
