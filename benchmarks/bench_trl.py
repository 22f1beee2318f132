"""What step-level credit costs in a step of TRL's GRPO trainer, and what capo's linear loss saves there.

    python benchmarks/bench_trl.py [--responses 64] [--tokens 1024] [--hidden 64] [--layers 2] [--steps 3]
    python benchmarks/bench_trl.py --loss [--responses 8] [--tokens 256] [--vocab 151936] [--live 1.0] [--type dapo]

The first: the model is so small that the rest of the step is quick. It writes responses of the full length, and the judge hands out
recorded critiques. Counted as shaping is all that the adapter does and TRL does not: steps, their texts, requests, votes,
advantages, metrics. Prints CPU time of one thread, in which other work on the machine does not count.

The second: forward, loss and backward of a batch with a vocabulary of realistic size, by TRL and with
``capo_linear_loss=True``. CPU time of one thread, medians of interleaved rounds in one process; the rise of the resident
set during a call, each in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import trl
from datasets import Dataset
from memory import rise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer
from variants import Timed

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
    parser.add_argument("--responses", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--loss", action="store_true", help="the loss, with and without capo_linear_loss")
    parser.add_argument("--vocab", type=int, default=151_936, help="of --loss")
    parser.add_argument("--live", type=float, default=1.0, help="share of the responses with an advantage, of --loss")
    parser.add_argument("--type", default="dapo", help="TRL's loss_type, of --loss")
    parser.add_argument("--memory", choices=["trl", "capo"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.responses = args.responses or (8 if args.loss else 64)
    args.tokens = args.tokens or (256 if args.loss else 1024)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            print(loss_memory(args, folder))
        elif args.loss:
            compare_losses(args, folder)
        else:
            time_shaping(args, folder)


def make_trainer(args, folder: str, kind=CapoGRPOTrainer, vocab: int | None = None, **options):
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab or eos + 1,
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
        **options,
    )
    return kind(
        model=model,
        reward_funcs=lambda completions, **columns: [float(len(completion) % 2) for completion in completions],
        judge=Recorded(),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": f"{i} + {i} = "} for i in range(64)]),
        processing_class=tokenizer,
    )


def time_shaping(args, folder: str) -> None:
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
    trainer = make_trainer(args, folder, Timed)
    steps: list[float] = []
    for _ in range(args.steps):
        began = time.process_time()
        trainer.train()
        steps.append(time.process_time() - began)
    found = statistics.median(shaping), statistics.median(steps)
    print(
        f"{args.responses} x {args.tokens} tokens, {args.layers} layers of {args.hidden}, medians of {args.steps} steps"
    )
    print(f"shaping {1e3 * found[0]:.1f} ms of a step of {found[1]:.2f} s: {100 * found[0] / found[1]:.2f} %")


def loss_step(args, folder: str, linear: bool, responses: int):
    """A function that runs forward, loss and backward, and gives the loss."""
    trainer = make_trainer(args, folder, vocab=args.vocab, capo_linear_loss=linear, loss_type=args.type)
    trainer.model.train()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.current_gradient_accumulation_steps = 1
    g = torch.Generator().manual_seed(1)
    shape = args.responses, args.tokens
    live = torch.arange(args.responses) < round(args.live * args.responses)
    ones = torch.ones(shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": torch.randint(0, args.vocab, (args.responses, 16), generator=g),
        "prompt_mask": ones[:, :1].expand(-1, 16).contiguous(),
        "completion_ids": torch.randint(0, args.vocab, shape, generator=g),
        "completion_mask": ones,
        "advantages": torch.randn(shape, generator=g) * live[:, None],
        "num_items_in_batch": ones.sum(),
    }
    inputs = {name: x if x.dim() == 0 else x[:responses] for name, x in inputs.items()}

    def call() -> float:
        trainer.model.zero_grad(set_to_none=False)
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        return float(loss.detach())

    return call


def compare_losses(args, folder: str) -> None:
    calls = {
        "trl": loss_step(args, folder, False, args.responses),
        "capo": loss_step(args, folder, True, args.responses),
    }
    losses = {name: call() for name, call in calls.items()}  # and warm-up
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.steps):
        for name, call in calls.items():
            began = time.process_time()
            call()
            times[name].append(time.process_time() - began)
    command = [sys.executable, *sys.argv, "--memory"]
    used = {
        name: int(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout.split()[-1])
        for name in calls
    }
    print(
        f"TRL {trl.__version__}, {args.type}, {args.responses} x {args.tokens} tokens, vocabulary {args.vocab}, "
        f"{args.layers} layers of {args.hidden}, live {args.live}, medians of {args.steps} calls"
    )
    for name in calls:
        print(
            f"{name}: {statistics.median(times[name]):.2f} s of CPU time, {used[name] / 1e6:.0f} MB, loss {losses[name]:.7f}"
        )


def loss_memory(args, folder: str) -> int:
    """Bytes that a call of one of them takes, when gradients and libraries are there."""
    linear = args.memory == "capo"
    torch.manual_seed(0)
    loss_step(args, folder, linear, 1)()
    call = loss_step(args, folder, linear, args.responses)
    return rise(Timed(call))


if __name__ == "__main__":
    main()
