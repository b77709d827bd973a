"""``dq-plugins completion``: a script that lets a shell complete commands, arguments and names."""

from __future__ import annotations

import argparse

from dq_plugins.errors import require

HELP = "Print a completion script for a shell."
EXAMPLE = """\
dq-plugins completion bash > ~/.local/share/bash-completion/completions/dq-plugins
dq-plugins completion zsh > ~/.zfunc/_dq-plugins
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")


def run(args: argparse.Namespace) -> int:
    require("shtab", "completion", "write completion scripts")
    import shtab

    print(shtab.complete(args.whole(), shell=args.shell))
    return 0
