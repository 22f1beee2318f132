"""The command ``capo``. Heavy modules are imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from capo.errors import UsageError, VerifierError
from capo.samples import Kind

app = typer.Typer(
    name="capo",
    help="Step-level credit assignment for LLM reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        import capo

        typer.echo(f"capo {capo.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


@app.command()
def doctor() -> None:
    """Show what this installation can do: backends, and why the others cannot run; optional packages."""
    from capo.doctor import report

    with _usage_errors(ValueError):
        report()


@app.command()
def score(
    rollouts: Path = typer.Argument(help="Rollouts, .jsonl or .parquet."),
    out: Path = typer.Option(help="The parquet file to write."),
    tokenizer: str = typer.Option(
        help="Folder, tokenizer.json, tiktoken file (.tiktoken, .model) or model name of the policy's tokenizer."
    ),
    critiques: Path | None = typer.Option(None, help="Critiques, .jsonl; rules that look at outcomes only need none."),
    rule: str = typer.Option(
        "capo", help="capo, grpo, dr_grpo, rloo, opo, grpo_process, vppo, fapo or papo; see capo.CreditRule."
    ),
    vote: str | None = typer.Option(
        None, help="majority, strict_majority, intersection, union or average; default: the rule's."
    ),
    outcome_weight: float | None = typer.Option(None, help="C, the weight of the outcome; default: the rule's."),
    process_weight: float | None = typer.Option(None, help="P, the weight of the steps; default: the rule's."),
    delimiter: str = typer.Option(r"\n\n", help=r"What separates steps; \n, \t, \r and \\ are understood."),
    num_votes: int | None = typer.Option(
        None, min=1, help="Votes of every step; missing ones abstain. Default: as many as the response has critiques."
    ),
    vocab_size: int | None = typer.Option(
        None, min=1, help="Width of the model's logits. Tiktoken files need it for the ids of special tokens."
    ),
    eos_id: list[int] | None = typer.Option(None, help="A token that ends responses; may be given several times."),
    tiktoken_pattern: str | None = typer.Option(
        None, help="Regular expression that splits text, for a tiktoken file and responses without token ids."
    ),
    summary: Path | None = typer.Option(None, help="Write the summary here as JSON, too."),
) -> None:
    r"""Turn a file of rollouts and a file of critiques into token advantages.

    Rollouts are JSON lines or parquet, one prompt with its responses, or one response, a row; critiques are JSON lines, one
    response a row. docs/score.md has all fields. For example

        rollouts.jsonl   {"prompt": "2 + 2?", "responses": [{"id": "a", "text": "2 + 2 = 5\n\nSo 5.", "outcome": 0}, ...]}

        critiques.jsonl  {"response_id": "a", "critiques": [{"flagged": [0]}, "Judgment: ... <incorrect_steps>0<...>", null]}

        capo score rollouts.jsonl --critiques critiques.jsonl --tokenizer ./model --out shaped.parquet

    writes a row for each response with its token ids, their advantages, its steps, weights and votes. Rows that cannot be
    used are listed with the reason in shaped.parquet.rejected.jsonl, and all others are scored.

    Exit code: 0 all rows were scored, 1 some were refused, 2 nothing was written.
    """
    from capo.scoreboard import progress_bar, table

    with _usage_errors(ImportError, OSError, ValueError, options=_SCORE_OPTIONS):
        from capo.credit import CreditRule
        from capo.score import InputError, score_file
        from capo.tokenizer import load_tokenizer

        given = {"vote": vote, "outcome_weight": outcome_weight, "process_weight": process_weight}
        credit_rule = CreditRule.preset(rule, **{name: value for name, value in given.items() if value is not None})
        loaded = load_tokenizer(tokenizer, num_tokens=vocab_size, eos_ids=eos_id, tiktoken_pattern=tiktoken_pattern)
    with _usage_errors(InputError, OSError, VerifierError), progress_bar(rollouts.name) as progress:
        result = score_file(
            rollouts,
            critiques,
            loaded,
            out,
            credit_rule,
            delimiter=_unescaped(delimiter),
            num_votes=num_votes,
            summary=summary,
            progress=progress,
        )
    for example in result.bad_row_examples:
        typer.echo(example, err=True)
    if result.bad_rows:
        typer.echo(f"{result.bad_rows} rows were refused, all listed in {out}.rejected.jsonl", err=True)
    typer.echo(table(result), nl=False)
    raise typer.Exit(1 if result.bad_rows else 0)


@app.command()
def judge(
    data: Annotated[Path, typer.Argument(help="Labelled responses, .jsonl, such as examples/judge/arithmetic.jsonl.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the section judge.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file as for capo train; its section judge is used.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for judge.csv, judge.png and replies.jsonl.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many responses.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Responses per call of the judge.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the judge's sampling, and of its prompts.")] = 0,
) -> None:
    """Check a judge on responses whose wrong steps are known, before any training trusts it.

    A line of DATA has a problem, its steps and a label, the number of the first wrong step or -1 (ProcessBench's form), or
    wrong, the list of all wrong steps; a reference is optional. For example

        capo judge examples/judge/arithmetic.jsonl num_votes=8 false_alarm=0.1 missed=0.2 --out checked

        capo judge data.jsonl kind=openai openai.url=http://localhost:8000/v1 openai.model=qwen num_votes=8

    shows precision, recall and first-error F1 for each number of votes and vote rule, what did not parse, how far votes
    agree, tokens and time. docs/judges.md explains them. The scripted judge knows the labels and errs at the rates given.

    Exit code: 0 done, 1 the judge failed, 2 the data or the settings are wrong.
    """
    from rich.console import Console

    from capo.config import load_config

    # The rest of the configuration is not used; method=grpo, so that any number of votes goes with it.
    settings = load_config(
        config, ["method=grpo", *(f"judge.{override.removeprefix('judge.')}" for override in overrides or [])]
    ).judge
    if settings.num_votes < 1:
        raise UsageError("capo judge needs votes: num_votes must be at least 1")
    if out is not None:
        from capo.rundir import make_folder

        make_folder("--out", out)

    from capo.judges import JudgeError
    from capo.judges.check import check, known_wrong, load, plot, table, write_csv, write_replies
    from capo.judges.make import closing, make_judge
    from capo.progress import stage

    labelled = load(data)[:limit]
    engine = make_judge(settings, known_wrong(labelled), seed)
    try:
        with (
            closing(engine),
            stage(Console(stderr=True), "judging", len(labelled)) as show,
        ):
            report, replies = check(engine, labelled, settings.num_votes, batch=batch, on_batch=show)
    except JudgeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(*table(report), sep="\n")
    if out is not None:
        with _usage_errors(OSError, ImportError):
            write_csv(report, out / "judge.csv")
            write_replies(labelled, replies, out / "replies.jsonl")
            plot(report, out / "judge.png")
        typer.echo(f"table, plot, replies: {out}")


# What the library calls an argument -> the option of `capo score` that sets it.
_SCORE_OPTIONS = {
    "CreditRule.preset: name": "--rule",
    "CreditRule: vote": "--vote",
    "CreditRule: outcome_weight": "--outcome-weight",
    "CreditRule: process_weight": "--process-weight",
    "TokenBytes: num_tokens": "--vocab-size",
    "TokenBytes: eos_ids": "--eos-id",
}


@contextlib.contextmanager
def _usage_errors(*kinds: type[Exception], options: Mapping[str, str] | None = None) -> Iterator[None]:
    """Errors of these kinds, as `UsageError`; with the names of options, where they begin with those of arguments."""
    try:
        yield
    except kinds as error:
        text = str(error)
        for argument, option in (options or {}).items():
            text = f"{option}{text.removeprefix(argument)}" if text.startswith(f"{argument} ") else text
        raise UsageError(text) from error


def _unescaped(text: str) -> str:
    named = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: named[match[1]], text)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file with the settings, such as examples/arithmetic/capo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print all settings as YAML and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint in the output.")] = False,
) -> None:
    """Train a policy with step-level credit, or with one of the rules it is compared with.

    A first run, a minute or two on a CPU: a tiny model learns chains of arithmetic. A scripted judge, which errs on
    every fifth step, says which steps were wrong.

        capo train examples/arithmetic/capo.yaml

        capo train examples/arithmetic/capo.yaml method=grpo seeds.rl=1 output=runs/grpo-1

    --dry-run prints all settings, each with its meaning. Ctrl-C saves and stops.
    """
    from capo.config import load_config

    settings = load_config(config, overrides or [])
    if dry_run:
        typer.echo(settings.to_yaml(), nl=False)
        return
    try:
        from capo.checkpoint import CheckpointError
        from capo.rollout import RolloutError
        from capo.train import TrainingError
        from capo.train import train as run
    except ModuleNotFoundError as error:
        raise UsageError(f"capo train needs {error.name}: pip install 'capo[train]'") from None
    try:
        result = run(settings, resume=resume)
    except (CheckpointError, RolloutError, TrainingError, VerifierError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if result.before is None:
        typer.echo("stopped in the warm start; nothing is saved")
        return
    again = " ".join(["capo train", str(config), *(overrides or []), "--resume"])
    typer.echo(
        f"held-out greedy accuracy: {result.before:.3f} before, {result.after:.3f} after {result.update} updates"
    )
    typer.echo(f"metrics, learning curve, checkpoints: {result.run_dir}")
    typer.echo(
        f"to look at responses: capo view {result.run_dir / 'samples.jsonl'} --html {result.run_dir / 'samples.html'}"
    )
    if result.stopped:
        typer.echo(f"stopped by a signal; go on with: {again}")


@app.command()
def view(
    file: Path = typer.Argument(help="What `capo score` wrote (.parquet), or samples.jsonl of a training run."),
    tokenizer: str | None = typer.Option(None, help="The policy's tokenizer, as for `capo score`; parquet needs it."),
    rollouts: Path | None = typer.Option(None, help="The rollouts that were scored: shows the prompts."),
    critiques: Path | None = typer.Option(None, help="The critiques: shows what the judge wrote."),
    only: list[Kind] | None = typer.Option(None, help="Only responses that are so; several: any of them."),
    response: list[str] | None = typer.Option(None, help="Only this response; may be given several times."),
    most: int | None = typer.Option(None, min=1, help="Show at most so many responses. [default: 5, as HTML 200]"),
    html: Path | None = typer.Option(None, help="Write one HTML page instead: no script, needs no network."),
    vocab_size: int | None = typer.Option(None, min=1, help="As for `capo score`."),
) -> None:
    """Look at responses: their steps, the votes on each, the advantage of every token.

        capo view shaped.parquet --tokenizer ./model --only flagged

        capo view shaped.parquet --tokenizer ./model --rollouts rollouts.jsonl --critiques critiques.jsonl --html shaped.html

        capo view runs/arithmetic-capo/samples.jsonl --html run.html

    Blue text has an advantage above 0, red text one below.
    """
    from rich.console import Console

    from capo.samples import Sample, read_samples
    from capo.view import print_samples, to_html

    def wanted(sample: Sample) -> bool:
        return (not response or sample.id in response) and (not only or any(kind in only for kind in sample.kinds))

    with _usage_errors(ImportError, OSError, ValueError, options=_SCORE_OPTIONS):
        token_bytes = None
        if tokenizer is not None:
            from capo.tokenizer import load_tokenizer

            token_bytes = load_tokenizer(tokenizer, num_tokens=vocab_size).token_bytes
        limit = most or (5 if html is None else 200)
        samples = read_samples(file, token_bytes, rollouts=rollouts, critiques=critiques, wanted=wanted, most=limit)
        if not samples:
            raise UsageError(f"{file} has no such response")
        if html is not None:
            cut = f"cut off after {limit}, see --most" if len(samples) == limit else ""
            html.write_text(to_html(samples, file.name, cut), "utf-8")
            typer.echo(f"{len(samples)} responses: {html}")
            return
    print_samples(samples, Console() if sys.stdout.isatty() else Console(width=120), replies=bool(response))


@app.command(
    "trl",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def trl_command(context: typer.Context) -> None:
    """Train with TRL's GRPO trainer and step-level credit; options, YAML and launcher are those of ``trl grpo``.

        capo trl --config grpo.yaml --capo_judge my_lib.judge --num_processes 2

    See docs/trainers.md; ``capo trl --help`` lists all options.
    """
    try:
        from capo.integrations.trl_command import run as run_trl
    except ModuleNotFoundError as error:
        raise UsageError(f"capo trl needs {error.name}: pip install 'capo[trl]'") from None
    except ImportError as error:
        raise UsageError(str(error)) from error
    run_trl(context.args)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except UsageError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output is gone (``capo ... | head``); stdout must not be flushed again at exit.
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
