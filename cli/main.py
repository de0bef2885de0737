"""`biorewards`: the entry point. It knows the commands by name and loads only the one that is called."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from biorewards import __version__

#: name -> (module that defines `command`, one line of help). The line lives here so that `--help` imports nothing.
COMMANDS = {
    "score": ("cli.score", "Score a folder of cell images with the seven verifiers."),
    "segment": ("cli.segment", "Find nuclei and cells; write label images and overlays."),
    "fit": ("cli.fit", "Make an assay from real images: statistics per class and an MoA classifier."),
    "convert": ("cli.convert", "Turn a generator's checkpoint into safetensors and JSON, once."),
    "generate": ("cli.generate", "Draw treated cells from untreated ones with a generative model."),
    "pretrain": ("cli.pretrain", "Train a CellFlux of your own on an image index."),
    "rl": ("cli.rl", "Post-train a flow generator with the verifiers as reward."),
    "best-of": ("cli.best_of", "Of N samples keep the one that the verifiers like best."),
    "audit": ("cli.audit", "Compare generative models with real images and with each other."),
    "validate": ("cli.validate", "Audit the verifiers themselves; a card for each."),
    "phantom": ("cli.phantom", "Draw a synthetic data set with exact masks."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Command names in the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None when there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is an error that names the nearest."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {name!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table above, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 --strict and some rows are bad, or `validate` found a failure, 2 wrong usage or "
    "unusable input, 130 interrupted.",
)
@click.version_option(__version__, prog_name="biorewards")
@click.option("--debug", is_flag=True, help="Show the traceback of an error (also: BIOREWARDS_DEBUG=1).")
def commands(debug: bool) -> None:
    """Biological verifiers for cell images: real or generated images in, seven scores out."""
    if debug:
        os.environ["BIOREWARDS_DEBUG"] = "1"


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; errors are printed as one line on stderr."""
    try:
        status = commands.main(args=args, prog_name="biorewards", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("BIOREWARDS_DEBUG", "0") not in ("", "0"):
            raise
        print(f"error: {error}", file=sys.stderr)
        print("(the traceback: biorewards --debug ...)", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
