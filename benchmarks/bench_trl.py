"""What step-level credit costs in a step of TRL's GRPO trainer, with critiques that are already there.

    python benchmarks/bench_trl.py [--responses 64] [--tokens 1024] [--hidden 64] [--layers 2] [--steps 3]

The model is so small that the rest of the step is quick. It writes responses of the full length, and the judge hands out
recorded critiques. Counted as shaping is all that the adapter does and TRL does not: steps, their texts, requests, votes,
advantages, metrics. Prints CPU time of one thread, in which other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer

from capo.critique import Critique
from capo.integrations.trl import CapoConfig, CapoGRPOTrainer
from capo.judges import JudgeReply

NEWLINES = "ĊĊ"  # as byte-level vocabularies write a blank line


class Recorded:
    """Critiques that cost nothing: every third step is wrong, say all."""

    def critique(self, requests, num_votes):
        return [
            [JudgeReply("recorded", Critique(False, tuple(range(0, len(request.steps), 3))), None)] * num_votes
            for request in requests
        ]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """All bytes, a blank line and EOS: 258 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id_ for id_, token in enumerate([*alphabet, NEWLINES, "<eos>"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", model_input_names=names
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=eos + 1,
            hidden_size=args.hidden,
            intermediate_size=2 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=args.tokens + 64,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )
    shaping: list[float] = []

    class Timed(CapoGRPOTrainer):  # type: ignore[misc, valid-type]
        """Adds up the adapter's own time: of its methods, less that of TRL's inside them."""

        def _calculate_rewards(self, *given):
            began = time.thread_time()
            result = super()._calculate_rewards(*given)
            shaping.append(time.thread_time() - began - inside.pop())
            return result

        def _capo_advantages(self, *given):
            began = time.thread_time()
            result = super()._capo_advantages(*given)
            shaping[-1] += time.thread_time() - began
            return result

    inside: list[float] = []
    original = GRPOTrainer._calculate_rewards

    def timed_rewards(self, *given):
        began = time.thread_time()
        result = original(self, *given)
        inside.append(time.thread_time() - began)
        return result

    GRPOTrainer._calculate_rewards = timed_rewards
    steps: list[float] = []

    def reward(completions, **columns):
        return [float(len(completion) % 2) for completion in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = CapoConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=args.responses,
            num_generations=8,
            max_completion_length=args.tokens,
            generation_kwargs={"min_new_tokens": args.tokens},
            max_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Timed(
            model=model,
            reward_funcs=reward,
            judge=Recorded(),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": f"{i} + {i} = "} for i in range(64)]),
            processing_class=tokenizer,
        )
        for _ in range(args.steps):
            began = time.process_time()
            trainer.train()
            steps.append(time.process_time() - began)
    found = statistics.median(shaping), statistics.median(steps)
    print(
        f"{args.responses} x {args.tokens} tokens, {args.layers} layers of {args.hidden}, medians of {args.steps} steps"
    )
    print(f"shaping {1e3 * found[0]:.1f} ms of a step of {found[1]:.2f} s: {100 * found[0] / found[1]:.2f} %")


if __name__ == "__main__":
    main()
