"""The judge of a training run and how its votes count, for the trainers whose hooks are named by CAPO_CREDIT.

POLICY=Qwen/Qwen3-4B JUDGE=Qwen/Qwen3-32B JUDGE_URL=http://localhost:8001/v1 CAPO_CREDIT=step_credit.credit

with this folder on PYTHONPATH; the judge is served by, for example, ``vllm serve Qwen/Qwen3-32B --port 8001``.
"""

import os

from transformers import AutoTokenizer

import capo
from capo.judges.openai import OpenAIJudge


def credit() -> capo.StepCredit:
    judge = OpenAIJudge(os.environ["JUDGE_URL"], os.environ["JUDGE"])
    tokenizer = AutoTokenizer.from_pretrained(os.environ["POLICY"])
    return capo.StepCredit(judge, capo.TokenBytes.from_tokenizer(tokenizer), num_votes=5)
