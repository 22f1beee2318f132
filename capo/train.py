"""The training loop: sample, verify, judge, vote, credit, loss, step; then log, evaluate, save.

It reads from top to bottom in the order it runs; what it calls are functions of their own files. Random numbers come
from streams named by seed, purpose and update (`capo.models.stream`), so that a resumed run needs no random state.

Dimension key: B responses of one update, N packed response tokens, M steps, K critiques.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from capo import checkpoint, critique, rundir
from capo.config import TrainConfig
from capo.credit import Credit
from capo.data import DELIMITER, ArithmeticTask, Problem
from capo.errors import UsageError, VerifierError
from capo.evaluate import accuracy, plot_curves, response_texts
from capo.judges import JudgeError, JudgeRequest
from capo.judges.canaries import ask_canaries, make_canaries
from capo.judges.make import closing, make_judge
from capo.judges.voting import Votes, collect
from capo.learn import Batch, learn, response_logprobs
from capo.metrics import (
    MetricsLog,
    alarms,
    judge_metrics,
    outcome_metrics,
    read_metrics,
    response_metrics,
    verifier_metrics,
)
from capo.models import build_model, load_warm_start, stream, warm_start
from capo.progress import Stage, stage
from capo.rollout import Engine, RolloutError, Rollouts, Sampling, TransformersEngine, mismatch
from capo.samples import rows_of_group
from capo.steps import segment, step_texts
from capo.verify import Outcome, Verifier

BETAS = (0.9, 0.95)  # of AdamW
TELLING = 20  # outcomes; a share of fewer says little


class TrainingError(Exception):
    """Training cannot go on."""


class Assessment(NamedTuple):
    """What verifier and judge say of some responses."""

    outcomes: Tensor  # [B]
    requests: list[JudgeRequest]  # each response, cut into steps
    votes: Votes
    seconds: float


class Result(NamedTuple):
    """How a run ended."""

    run_dir: Path
    update: int  # updates done, those of earlier parts of the run included
    before: float | None  # held-out greedy accuracy of the warm-started model; None if stopped before that
    after: float | None  # of the last evaluation
    stopped: bool  # by a signal


def train(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> Result:
    """Run a whole training: warm start, RL updates, evaluation, checkpoints, learning curve.

    The first SIGINT or SIGTERM ends it after the update at work, with a checkpoint; the second one at once.

    Args:
        config: all settings.
        resume: go on from the latest checkpoint of the run folder; on a CPU, with the same number of threads, the result
            is bitwise that of a run without interruption.
        console: where progress is shown; None: standard error.

    Raises:
        UsageError: the run folder is in use, not writable, or does not fit the request; a device, judge or sampling engine
            that cannot work. Nothing has run by then.
        TrainingError: too many updates in a row with a loss or gradient that is NaN or Inf, or log-probabilities of sampler
            and trainer that are too far apart.
        capo.rollout.RolloutError: no response can be used.
        VerifierError: the verifier does not work.
        capo.checkpoint.CheckpointError: the checkpoint to resume from is damaged.
        OSError: a checkpoint cannot be written; earlier ones are intact.
    """
    console = console or Console(stderr=True)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rundir.check(config, resume)
    try:
        with rundir.stop_on_signal() as stop:
            run = _Run(config, resume, console, stop)
            with closing(run.judge), run.verifier, rundir.lock(config.run_dir):
                rundir.check(config, resume)  # again, now that nobody else can write there
                return run.train()
    except BlockingIOError:
        raise UsageError(f"{config.run_dir}: another run is at work in this folder") from None


class _Run:
    """One run: what it is made of, and the loop."""

    def __init__(self, config: TrainConfig, resume: bool, console: Console, stop: threading.Event) -> None:
        self.config, self.resume, self.console, self.stop = config, resume, console, stop
        self.folder = config.run_dir
        self.checkpoints = self.folder / "checkpoints"
        device = _device("device", config.device)
        if config.judge.kind == "transformers":
            _device("judge.transformers.device", config.judge.transformers.device)
        self.task = ArithmeticTask(config.task, stream(config.seeds.data, "task"))
        held_out = torch.Generator().manual_seed(stream(config.seeds.data, "held out"))
        self.held_out = self.task.problems(config.task.held_out, held_out, held_out=True)
        self.judge = make_judge(config.judge, self.task.check, stream(config.seeds.rl, "judge"))
        self.verifier = Verifier(engine="plain")  # the task's answers are digits
        self.model = build_model(config.model, self.task, stream(config.seeds.warm_start, "weights"))
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay
        )
        self.reference: Any = None  # the warm-started model, where the loss has a KL term
        self.warned: set[str] = set()
        self.state: dict[str, Any] = {"update": 0, "num_tokens": 0, "bad_in_row": 0, "bad_updates": 0}

    def train(self) -> Result:
        # What cannot work fails here, before the warm start.
        if self.config.warm_start.cache is not None:
            rundir.make_folder("warm_start.cache", Path(self.config.warm_start.cache))
        with contextlib.closing(build_engine(self.model, self.task, self.config)) as engine:
            self._try_judge()
            if not self._start():
                return Result(self.folder, 0, None, None, stopped=True)
            return self._loop(engine)

    def _try_judge(self) -> None:
        """Ask a judge that is a model about one solution, if the run will need it."""
        config = self.config.judge
        if config.kind == "scripted" or config.num_votes == 0 or self.config.credit_rule().process_weight == 0:
            return
        try:
            ((reply,),) = self.judge.critique([_solved(self.held_out[0])], 1)
        except JudgeError as error:
            raise UsageError(f"judge.kind={config.kind}: {error}") from None
        if reply.state == "failed":
            raise UsageError(
                f"judge.kind={config.kind}: {self.judge!r} gives no reply to a first question: {reply.error}"
            )

    def _loop(self, engine: Engine) -> Result:
        config, state = self.config, self.state
        first = state["update"] + 1
        with stage(self.console, config.method, config.updates, done=first - 1) as show:
            for update in range(first, config.updates + 1):
                try:
                    metrics = self._update(update, engine)
                except (JudgeError, VerifierError) as error:
                    self._save()  # the weights are those of the update before
                    raise TrainingError(f"{error}. The run is saved; go on with --resume") from None
                stopping = self.stop.is_set()
                last = stopping or update == config.updates
                if last or update % config.eval_every == 0:
                    metrics["eval/accuracy"] = state["accuracy"] = self._accuracy()
                self.log.write({"step": update, **metrics})
                self._warn(update, metrics)
                if last or update % config.save_every == 0:
                    self._save()
                _show(show, update, metrics, state["accuracy"])
                if state["bad_in_row"] >= config.max_bad_updates:
                    raise TrainingError(
                        f"{state['bad_in_row']} updates in a row had a loss or gradient that is NaN or Inf; they were "
                        f"skipped, the weights are finite. Lower learning_rate ({config.learning_rate:g})"
                    )
                if stopping:
                    break
        curve = [(row["step"], row["eval/accuracy"]) for row in read_metrics(self.log.path) if "eval/accuracy" in row]
        plot_curves({config.method: curve}, self.folder / "curve.png", "Learning curve")
        stopped = state["update"] < config.updates
        return Result(self.folder, state["update"], state["accuracy_before"], state["accuracy"], stopped)

    def _accuracy(self) -> float:
        return accuracy(self.model, self.task, self.held_out, self.verifier)

    def _start(self) -> bool:
        """Bring model, optimiser and log to where the loop begins; False if stopped by a signal."""
        config = self.config
        start = self.folder / "start"
        if self.resume:
            latest = checkpoint.checkpoint_path(self.checkpoints, checkpoint.saved_updates(self.checkpoints)[-1])
            try:
                self.state = checkpoint.load(latest, self.model, self.optimizer)
            except checkpoint.CheckpointError as error:
                raise checkpoint.CheckpointError(f"{error}; remove {latest} to resume from the one before") from None
        else:
            checkpoint.write_text(self.folder / "config.yaml", config.to_yaml())
            if not self._warm_start():
                return False
            shutil.rmtree(start, ignore_errors=True)  # of a run that ended before its first checkpoint
            checkpoint.save(start, self.model, None, {})
            self.state["accuracy_before"] = self.state["accuracy"] = self._accuracy()
        if config.loss.kl_coef > 0:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
            checkpoint.load(start, self.reference, None)
        last = self.state["update"] if self.resume else -1
        self.log = MetricsLog(self.folder / "metrics.jsonl", last, self.console)
        self.samples = MetricsLog(self.folder / "samples.jsonl", last, self.console)
        if not self.resume:
            self.log.write({"step": 0, "eval/accuracy": self.state["accuracy"]})
            self._save()
        return True

    def _warm_start(self) -> bool:
        if load_warm_start(self.model, self.config):
            print("warm start: from the cache", file=self.console.file)
            return True
        with stage(self.console, "warm start", self.config.warm_start.steps) as show:

            def on_step(step: int, loss: float) -> None:
                show(step, f"loss {loss:.3f}")
                if self.stop.is_set():
                    raise _Stopped

            try:
                warm_start(self.model, self.task, self.config, on_step)
            except _Stopped:
                return False
            except FloatingPointError as error:
                raise TrainingError(str(error)) from None
        return True

    def _warn(self, update: int, metrics: dict[str, Any]) -> None:
        """Say what looks wrong with the judge, each thing once."""
        for name, words in alarms(metrics).items():
            if name not in self.warned:
                self.warned.add(name)
                print(f"warning: update {update}: {words}", file=self.console.file)

    def _save(self) -> None:
        path = checkpoint.checkpoint_path(self.checkpoints, self.state["update"])
        checkpoint.save(path, self.model, self.optimizer, self.state)
        checkpoint.prune(self.checkpoints, self.config.keep_checkpoints)

    def _update(self, update: int, engine: Engine) -> dict[str, Any]:
        """One update: collect responses, learn from them. Returns the metrics."""
        config, state = self.config, self.state
        began = time.perf_counter()
        batch, metrics = self._collect(update, engine)
        collected = time.perf_counter()
        rate = config.learning_rate * min(1.0, update / max(1, config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        learnt, finite = learn(self.model, self.optimizer, batch, config)
        ended = time.perf_counter()
        state["update"] = update
        state["num_tokens"] += batch.rollouts.prompt_mask.sum().item() + len(batch.rollouts.token_ids)
        state["bad_in_row"] = 0 if finite else state["bad_in_row"] + 1
        state["bad_updates"] += not finite
        return {
            **learnt,
            **metrics,
            "learning_rate": rate,
            "num_tokens": state["num_tokens"],
            "capo/bad_updates": state["bad_updates"],
            "step_time": ended - began,
            "capo/time/learn": ended - collected,
        }

    def _collect(self, update: int, engine: Engine) -> tuple[Batch, dict[str, Any]]:
        """Sample, verify, judge, vote: all that the loss needs."""
        config, task = self.config, self.task
        began = time.perf_counter()
        engine.sync()
        synced = time.perf_counter()
        prompts = torch.Generator().manual_seed(stream(config.seeds.rl, "prompts", update))
        problems = task.problems(config.prompts, prompts)
        verified = self.verifier.counts, self.verifier.seconds
        parts, pending = [], []
        size = config.prompts // config.rollout.chunks
        # What is sampled is judged while more is sampled. Seeds depend on the chunk, not on who is quicker.
        with ThreadPoolExecutor(1, thread_name_prefix="capo assess") as assessor:
            canaries = assessor.submit(self._ask_canaries, update)
            for chunk in range(config.rollout.chunks):
                asked = problems[chunk * size :][:size]
                seed = stream(config.seeds.rl, "sample", update, *([chunk] if chunk else []))
                part = engine.sample([task.encode(problem.question) for problem in asked], config.group_size, seed)
                parts.append(part)
                # In a copy of the context: the choice of a backend holds there, too.
                pending.append(assessor.submit(contextvars.copy_context().run, self._assess, part, asked))
            sampled = time.perf_counter()
            known = canaries.result()
            assessed = [future.result() for future in pending]
        judged = time.perf_counter()
        rollouts = Rollouts.concat(parts, [size] * len(parts))
        outcomes = torch.cat([part.outcomes for part in assessed])
        self._check_outcomes(outcomes, verified[0])
        requests = [request for part in assessed for request in part.requests]
        votes = Votes.concat([part.votes for part in assessed])
        steps = segment(rollouts.token_ids, rollouts.cu_seqlens, task.token_bytes, DELIMITER)
        table = critique.vote_table(
            [[reply.critique for reply in row] for row in votes.replies],
            [len(request.steps) for request in requests],
            config.judge.num_votes,
            config.judge.quorum,
        )

        credit = Credit(
            outcomes=outcomes,
            votes=table.to(outcomes.device),
            steps=steps,
            cu_seqlens=rollouts.cu_seqlens,
            groups=rollouts.prompt_index,
            rule=config.credit_rule(),
        )
        # Over the whole update at once: minibatches and micro-batches may then be cut anywhere.
        advantages = credit.advantages()
        old_logprobs, entropy = response_logprobs(self.model, rollouts, config)
        difference = mismatch(old_logprobs, rollouts.logprobs, config.loss.importance_cap)
        self._check_mismatch(difference["sampling/sampling_logp_difference/mean"])
        ref_logprobs = response_logprobs(self.reference, rollouts, config)[0] if self.reference is not None else None
        if update % config.eval_every == 0 or update == config.updates:
            for row in rows_of_group(
                update, 0, problems[0].question, rollouts.token_ids, credit, advantages, votes, task.token_bytes
            ):
                self.samples.write(row)
        metrics = {
            **outcome_metrics(outcomes, rollouts.prompt_index),
            **judge_metrics(credit, votes, config.judge.quorum),
            **known,
            **response_metrics(credit, requests),
            **verifier_metrics(self.verifier, *verified),
            "entropy": entropy.mean().item(),
            "completions/mean_length": rollouts.cu_seqlens.diff().double().mean().item(),
            "completions/clipped_ratio": rollouts.truncated.double().mean().item(),
            **difference,
            **{f"capo/dropped/{reason}": count for reason, count in rollouts.dropped.items()},
            "capo/dead_tokens": (advantages == 0).double().mean().item(),
            "capo/max_advantage": advantages.abs().max().item(),
            "capo/time/sync": synced - began,
            "capo/time/sample": sampled - synced,
            "capo/time/judge": sum(part.seconds for part in assessed),
            "capo/time/judge_wait": judged - sampled,
        }
        return Batch(rollouts, advantages, old_logprobs, ref_logprobs), metrics

    def _assess(self, rollouts: Rollouts, problems: list[Problem]) -> Assessment:
        """Verify and judge some responses; runs beside the sampling of others."""
        began = time.perf_counter()
        task, config = self.task, self.config
        asked = [problems[index] for index in rollouts.prompt_index.tolist()]  # one per response
        outcomes = verify(self.verifier, task, rollouts, asked)
        steps = segment(rollouts.token_ids, rollouts.cu_seqlens, task.token_bytes, DELIMITER)
        texts = step_texts(rollouts.token_ids, steps, task.token_bytes)
        requests = [JudgeRequest(p.question, p.solution, tuple(t)) for p, t in zip(asked, texts, strict=True)]
        votes = collect(
            self.judge,
            requests,
            config.judge.num_votes,
            config.credit_rule(),
            outcomes.tolist(),
            rollouts.prompt_index.tolist(),
            adaptive=config.judge.adaptive,
            quorum=config.judge.quorum,
        )
        return Assessment(outcomes, requests, votes, time.perf_counter() - began)

    def _ask_canaries(self, update: int) -> dict[str, float | None]:
        """Have responses judged whose wrong steps are known. Returns the metrics."""
        config, seed = self.config.judge, stream(self.config.seeds.rl, "canaries", update)
        if not config.canaries:
            return {}
        problems = self.task.problems(config.canaries, torch.Generator().manual_seed(seed))
        canaries = make_canaries([_solved(problem) for problem in problems], self.task.check, Random(seed))
        vote = self.config.credit_rule().vote
        return ask_canaries(self.judge, canaries, config.num_votes, vote, config.quorum, config.min_canaries)

    def _check_outcomes(self, outcomes: Tensor, before: Counter[str]) -> None:
        undecided, total, limit = int(outcomes.isnan().sum()), len(outcomes), self.config.max_undecided
        if undecided > limit * total and limit < 1 and (total >= TELLING or undecided == total):
            reasons = {name.removeprefix("undecided/"): n for name, n in (self.verifier.counts - before).most_common()
                       if name.startswith("undecided/")}  # fmt: skip
            raise VerifierError(
                f"{undecided} of the {total} outcomes of an update are undecided, more than max_undecided={limit:g} allows: "
                + ", ".join(f"{name} {number}" for name, number in reasons.items())
            )

    def _check_mismatch(self, mean: float) -> None:
        limit = self.config.rollout.max_mismatch
        if not mean <= limit:
            raise TrainingError(
                f"log-probabilities of sampler and trainer differ by {mean:.3g} in the mean, more than "
                f"rollout.max_mismatch={limit:g}: the engine {self.config.rollout.engine} does not sample from the policy"
            )


def _solved(problem: Problem) -> JudgeRequest:
    """The reference solution as a response to judge."""
    return JudgeRequest(problem.question, problem.solution, tuple(problem.solution.split(DELIMITER)))


def build_engine(model: Any, task: ArithmeticTask, config: TrainConfig) -> Engine:
    """The sampling engine that the configuration names.

    Raises:
        UsageError: it cannot run here, or the model has not the context asked for.
    """
    try:
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens or task.response_length,
            eos_id=task.eos_id,
            temperature=config.temperature,
            context=config.rollout.context,
            num_tokens=task.vocab_size,
        )
        if config.rollout.engine == "transformers":
            return TransformersEngine(model, sampling)
        from capo.rollout_vllm import VllmEngine

        return VllmEngine(model, sampling, cache_gib=config.rollout.cache_gib, dtype=config.rollout.dtype)
    except (ValueError, RolloutError) as error:
        raise UsageError(f"rollout.engine={config.rollout.engine}: {error}") from None


def verify(verifier: Verifier, task: ArithmeticTask, rollouts: Rollouts, problems: list[Problem]) -> Tensor:
    """Outcomes: 1 right, 0 wrong, NaN undecided. A truncated response is wrong: its answer may lack digits. [B]"""
    texts = response_texts(task, rollouts.token_ids, rollouts.cu_seqlens)
    outcomes = verifier.verify(texts, [problem.answer for problem in problems])
    rewards = torch.tensor([outcome.reward for outcome in outcomes], device=rollouts.truncated.device)
    return torch.where(rollouts.truncated, Outcome.WRONG.reward, rewards)


class _Stopped(Exception):
    """A signal asked the warm start to end."""


def _device(setting: str, name: str) -> str:
    """The device that a setting asks for; UsageError if it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        number, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
        if not torch.cuda.is_available() or number >= count:
            raise UsageError(
                f"{setting}={name}, but PyTorch sees {count or 'no'} GPU{'s' * (count > 1)}; choose {setting}=cpu"
            )
    return name


def _show(show: Stage, update: int, metrics: dict[str, Any], accuracy: float) -> None:
    reward = "undecided" if metrics["reward"] is None else f"{metrics['reward']:.2f}"
    show(update, f"reward {reward} held-out accuracy {accuracy:.3f}")
