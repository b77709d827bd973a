"""The command line: one sub-command per module in `dq_plugins.commands`.

Each has ``HELP``, ``EXAMPLE``, ``add_arguments(parser)`` and ``run(args)``, which prints and returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from dq_plugins import __version__
from dq_plugins.errors import DQError, close_matches

COMMANDS = (
    "demo", "quantize", "recipes", "record", "plan", "apply", "evaluate", "report", "diff", "gate", "export", "inspect",
    "list", "check", "sign", "completion",
)  # fmt: skip
DESCRIPTION = "Quantize diffusion models to 8 bits and below: through torchao, for Brevitas and diffusers."
FIRST = """\
where to start:
  dq-plugins demo                                    a bundled denoiser, end to end, with a report (minutes)
  dq-plugins quantize digits --recipe fast --out q/  a pipeline: digits, emoji, a folder, or a name of the hub
  dq-plugins recipes                                 which recipe does what

`dq-plugins COMMAND --help` has all options, their defaults and an example."""
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps examples as they are written, and tells every default but those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool | list):
            return action.help
        return super()._get_help_string(action)


class UsageError(DQError):
    """A command line that cannot be run; the message names the command."""


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument with the one sentence about it, not with all that could be given."""

    def error(self, message: str) -> NoReturn:  # noqa: D102  argparse calls it
        raise UsageError(f"{self.prog}: {message}\n`{self.prog} --help` tells what it takes.")


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The argument parser.

    Args:
        only: build the arguments of this sub-command only, so that starting one command imports one module.
    """
    parser = Parser(prog="dq-plugins", description=DESCRIPTION, epilog=FIRST, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        if only is not None and name != only:
            subparsers.add_parser(name, add_help=False)
            continue
        module = importlib.import_module(f"dq_plugins.commands.{name}")
        sub = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog="example:\n" + textwrap.indent(textwrap.dedent(module.EXAMPLE).strip(), "  "),
            formatter_class=HelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run, parser=sub, whole=build_parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments; those that are wrong raise `UsageError`, with a message of the very sub-command."""
    known = [argument for argument in argv[:1] if argument in COMMANDS]
    parser = build_parser(*known)
    if argv and not known and not argv[0].startswith("-"):
        hint = close_matches(argv[0], COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        parser.error(f"there is no command {argv[0]!r}{hint}")
    args, rest = parser.parse_known_args(argv)
    if rest:
        args.parser.error(
            f"unrecognized arguments: {' '.join(rest)}{''.join(_hint(args.parser, each) for each in rest)}"
        )
    return args


def _hint(parser: argparse.ArgumentParser, argument: str) -> str:
    """What an argument that ``parser`` does not take may have meant."""
    if argument.startswith("-"):
        return close_matches(argument, list(parser._option_string_actions))
    taking = [action for action in parser._actions if action.option_strings and argument in (action.choices or ())]
    return f"; did you mean '{taking[0].option_strings[-1]} {argument}'?" if taking else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 on success, 1 when a check found something, 2 on an error, 130 when interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(argv)
    except UsageError as error:
        print(error, file=sys.stderr)
        return EXIT_ERROR
    try:
        status = int(args.run(args) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `dq-plugins ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (DQError, OSError) as error:
        print(f"dq-plugins {args.command}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        from dq_plugins.commands.kept import last_words

        print(f"\ndq-plugins {args.command}: interrupted; {last_words(args)}", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
