"""CAPO against GRPO inside TRL, on the built-in task: equal steps, models, prompts and seeds; only the credit differs.

    python examples/trl/compare.py --seeds 0 1 2

trains one run after the other and writes ``comparison.csv``, ``comparison.md`` and ``comparison.png`` into the output
folder. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from capo.checkpoint import write_text
from capo.config import TrainConfig, load_config
from capo.data import ArithmeticTask
from capo.evaluate import accuracy, write_comparison
from capo.integrations.trl import CapoConfig, CapoGRPOTrainer
from capo.judges.scripted import ScriptedJudge
from capo.models import build_model, load_warm_start, stream, warm_start
from capo.verify import Outcome, Verifier

SETTINGS = Path(__file__).parents[1] / "arithmetic" / "capo.yaml"
MINIBATCHES = 2  # optimiser steps of an update, as in `capo train`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["capo", "grpo"], choices=["capo", "grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="each has its own task and model")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("runs/trl-comparison"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)

    curves = {}
    for seed in args.seeds:
        for method in args.methods:
            file = args.output / f"{method}-{seed}.csv"
            if not file.exists():
                began = time.process_time()
                curve, used = run(method, seed, args.updates, args.output)
                write_text(file, "".join(f"{update},{value}\n" for update, value in curve.items()))
                print(
                    f"{method} {seed}: {curve[args.updates]:.3f}, {used:.0f} of {time.process_time() - began:.0f} CPU s"
                )
            rows = [line.split(",") for line in file.read_text().splitlines()]
            curves[method, seed] = {int(update): float(value) for update, value in rows}

    table = write_comparison(curves, args.output, f"TRL's GRPO trainer, {len(args.seeds)} seeds")
    print(f"\n{table}\nfiles in {args.output}")


def run(method: str, seed: int, updates: int, output: Path) -> tuple[dict[int, float], float]:
    """One run; returns held-out greedy accuracy by update, and the CPU seconds of TRL's training loop."""
    settings = load_config(
        SETTINGS,
        [f"seeds.{name}={seed}" for name in ("data", "warm_start", "rl")]
        + [f"warm_start.cache={output.parent / 'warm-starts'}"],
    )
    task = ArithmeticTask(settings.task, stream(seed, "task"))
    model = build_model(settings.model, task, stream(seed, "weights"))
    if not load_warm_start(model, settings):
        warm_start(model, task, settings)
    held_out = task.problems(
        settings.task.held_out, torch.Generator().manual_seed(stream(seed, "held out")), held_out=True
    )
    problems = task.problems(settings.prompts * updates, torch.Generator().manual_seed(stream(seed, "prompts")))
    rows = [{"prompt": p.question, "solution": p.solution, "answer": p.answer} for p in problems]

    def verified(completions, answer, completion_ids, **columns):
        """1 right, 0 wrong, None undecided; a response that was cut off is wrong."""
        outcomes = Verifier().verify(completions, answer)
        return [
            (0.0 if ids[-1] != task.eos_id else None if outcome is Outcome.UNDECIDED else outcome.reward)
            for ids, outcome in zip(completion_ids, outcomes, strict=True)
        ]

    curve = {0: accuracy(model, task, held_out)}

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            update, rest = divmod(state.global_step, MINIBATCHES)
            if rest == 0 and update % 10 == 0:
                curve[update] = accuracy(trainer.model, task, held_out)

    trainer = CapoGRPOTrainer(
        model=model,
        reward_funcs=verified,
        judge=ScriptedJudge(
            task.check,
            false_alarm=settings.judge.false_alarm,
            missed=settings.judge.missed,
            seed=stream(seed, "judge"),
        ),
        args=trl_settings(settings, method, seed, updates, output, task),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(task),
        callbacks=[Evaluate()],
    )
    began = time.process_time()
    trainer.train()
    return curve, time.process_time() - began


def trl_settings(
    settings: TrainConfig, method: str, seed: int, updates: int, output: Path, task: ArithmeticTask
) -> CapoConfig:
    """The settings of examples/arithmetic in TRL's words."""
    return CapoConfig(
        output_dir=str(output / f"{method}-{seed}"),
        # P = 0 is TRL's own trainer, bit for bit.
        capo_process_weight=None if method == "capo" else 0.0,
        capo_num_votes=settings.judge.num_votes,
        num_generations=settings.group_size,
        per_device_train_batch_size=settings.prompts * settings.group_size // MINIBATCHES,
        steps_per_generation=MINIBATCHES,
        gradient_accumulation_steps=1,
        max_steps=updates * MINIBATCHES,
        max_completion_length=task.response_length,
        loss_type="grpo",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=settings.max_grad_norm,
        temperature=settings.temperature,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=10 * MINIBATCHES,
        report_to=[],
        disable_tqdm=True,
    )


def tokenizer(task: ArithmeticTask) -> PreTrainedTokenizerFast:
    """The task's tokens, one a character and one for a blank line, as a fast tokenizer."""
    newlines = "ĊĊ"  # as byte-level vocabularies write a blank line
    tokens = [task.decode([id_]).replace("\n\n", newlines) for id_ in range(task.eos_id)]
    vocabulary = {token: id_ for id_, token in enumerate([*tokens, "<eos>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex(f"{newlines}|."), "isolated"),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )


if __name__ == "__main__":
    main()
