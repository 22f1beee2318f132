"""GSM8K as verl reads it: ``python examples/verl/make_gsm8k.py data/gsm8k``."""

import sys
from pathlib import Path

from datasets import load_dataset

FORMAT = 'Let\'s think step by step, with a blank line between steps, and give the final answer after "####".'


def row(example, index, split):
    """Question for the policy; its solution, for the judge, is in ``extra_info``."""
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{example['question']} {FORMAT}"}],
        "ability": "math",
        "reward_model": {
            "style": "rule",
            "ground_truth": example["answer"].rpartition("####")[2].strip().replace(",", ""),
        },
        "extra_info": {"split": split, "index": index, "question": example["question"], "answer": example["answer"]},
    }


def main(folder):
    """Write train.parquet and test.parquet."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, data in load_dataset("openai/gsm8k", "main").items():
        made = data.map(row, with_indices=True, fn_kwargs={"split": split}, remove_columns=data.column_names)
        made.to_parquet(f"{folder}/{split}.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:])
