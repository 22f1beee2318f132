"""Token ids -> steps on one core: the native module against the reference, with Qwen's vocabulary on GSM8K solutions.

    pytest benchmarks/bench_segment.py --benchmark-columns=min,median,iqr,rounds

With -s, tokens/s (median) are printed, too. Needs the packages dashscope (its qwen.tiktoken) and tiktoken, and the
file shared/data/gsm8k_solutions.jsonl in a folder above the repository.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from capo import TokenBytes, segment
from capo.steps import _Delimiter, _segment_reference

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# How Qwen splits text before merging bytes.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def qwen_file() -> Path:
    try:
        files = importlib.metadata.files("dashscope") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package dashscope for qwen.tiktoken")
    return Path(next(str(file.locate()) for file in files if file.name == "qwen.tiktoken"))


@pytest.fixture(scope="module")
def token_bytes(qwen_file: Path) -> TokenBytes:
    return TokenBytes.from_tiktoken_file(
        qwen_file, special_tokens=SPECIAL, eos_tokens=["<|im_end|>"], num_tokens=151936
    )


@pytest.fixture(scope="module")
def solutions(qwen_file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """5,276 solutions as ids [N] and cu_seqlens [B + 1]; their steps are lines, here a blank line apart."""
    tiktoken = pytest.importorskip("tiktoken")
    name = Path("shared", "data", "gsm8k_solutions.jsonl")
    path = next((folder / name for folder in Path(__file__).resolve().parents if (folder / name).exists()), None)
    if path is None:
        pytest.skip(f"needs {name} in a folder above the repository")
    ranks = {base64.b64decode(token): int(id_) for token, id_ in map(bytes.split, qwen_file.read_bytes().splitlines())}
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    texts = [r["text"].replace("\n", "\n\n") for line in path.open() for r in json.loads(line)["responses"]]
    ids = [[*encoding.encode_ordinary(text), special["<|im_end|>"]] for text in texts]
    cu_seqlens = torch.tensor([0, *map(len, ids)]).cumsum(0)
    return torch.tensor([id_ for response in ids for id_ in response]), cu_seqlens


def repeated(ids: torch.Tensor, cu_seqlens: torch.Tensor, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = cu_seqlens.diff().repeat(times)
    return ids.repeat(times), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


@pytest.mark.parametrize("name", ["native", "reference"])
def test_segment(benchmark, name, solutions, token_bytes):
    delimiter = _Delimiter("\n\n")
    expected = _segment_reference(*solutions, token_bytes, delimiter)
    if name == "native":
        pytest.importorskip("capo._native")
        ids, cu_seqlens = repeated(*solutions, 8)
        benchmark.pedantic(segment, (ids, cu_seqlens, token_bytes), {"num_threads": 1}, rounds=30, warmup_rounds=3)
        steps = segment(*solutions, token_bytes)
    else:
        ids, cu_seqlens = solutions
        steps = benchmark.pedantic(_segment_reference, (ids, cu_seqlens, token_bytes, delimiter), rounds=5)
    assert torch.equal(steps.starts, expected.starts) and torch.equal(steps.ends, expected.ends)
    rate = ids.numel() / benchmark.stats.stats.median / 1e6
    benchmark.extra_info |= {"tokens": ids.numel(), "million_tokens_per_second": round(rate, 1)}
    print(f"\n{name}: {rate:.1f} million tokens/s, {ids.numel():,} tokens, one core, median")
