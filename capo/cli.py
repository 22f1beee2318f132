"""The command ``capo``. Heavy modules are imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from capo.errors import UsageError

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

    report()


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
        from capo.train import TrainingError
        from capo.train import train as run
    except ModuleNotFoundError as error:
        raise UsageError(f"capo train needs {error.name}: pip install 'capo[train]'") from None
    try:
        result = run(settings, resume=resume)
    except (CheckpointError, TrainingError, OSError) as error:
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
    if result.stopped:
        typer.echo(f"stopped by a signal; go on with: {again}")


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
