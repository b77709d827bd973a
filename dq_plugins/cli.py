"""The command line: one sub-command per module in `dq_plugins.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Sequence

from dq_plugins.errors import DQError

COMMANDS = (
    "demo", "list", "check", "inspect", "record", "plan", "apply", "quantize", "evaluate", "report", "diff",
)  # fmt: skip
EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The argument parser.

    Args:
        only: build the arguments of this sub-command only, so that starting one command imports one module.
    """
    parser = argparse.ArgumentParser(
        prog="dq-plugins",
        description="Quantization passes for diffusion models. Each command's --help has an example.",
    )
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
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 on success, 1 when a check found something, 2 on an error, 130 when interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    only = argv[0] if argv and argv[0] in COMMANDS else None
    args = build_parser(only).parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except DQError as error:
        print(f"dq-plugins {args.command}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(
            f"\ndq-plugins {args.command}: interrupted; the same command resumes where it can",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
