"""The command ``capo``. Heavy modules are imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import sys

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
