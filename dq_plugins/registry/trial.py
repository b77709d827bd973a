"""Loading plugins of others in a process of its own: one that blocks, exits or crashes is found out, and no harm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from queue import Empty, Queue
from threading import Thread

from dq_plugins.registry.plugin import Plugin

PATIENCE_S = 60.0
_CHILD = """
import json, os, sys
sys.path[:], targets = json.loads(sys.argv[1])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a module prints must not mix with the answers
from dq_plugins.registry.plugin import NOT_LOADED, Plugin
for kind, name, target in targets:
    plugin = Plugin(kind, name, target)
    try:
        plugin.load()
    except BaseException as error:
        plugin.failure = plugin.failure or f"loading {target} raised {type(error).__name__}"
    print(json.dumps(plugin.failure), file=answers, flush=True)
os._exit(0)
"""


def try_loading(plugins: Sequence[Plugin], seconds: float = PATIENCE_S) -> None:
    """Note in every plugin whether it loads, or why not (`Plugin.failure`); none of their code runs in this process.

    Args:
        plugins: to try, in order.
        seconds: that one may take.
    """
    left = list(plugins)
    while left:
        left = left[_try(left, seconds) :]


def _try(plugins: Sequence[Plugin], seconds: float) -> int:
    """Number of plugins that one process has answered for; the last of them may have brought it down."""
    asked = json.dumps([sys.path, [(each.kind, each.name, each.target) for each in plugins]])
    child = subprocess.Popen([sys.executable, "-c", _CHILD, asked], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    answers: Queue[bytes] = Queue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            answers.put(line)
        answers.put(b"")

    Thread(target=read, daemon=True).start()
    try:
        for number, plugin in enumerate(plugins, 1):
            try:
                answer = answers.get(timeout=seconds)
            except Empty:
                plugin.failure = f"loading {plugin.target} did not end within {seconds:g} s"
                return number
            if not answer:
                plugin.failure = f"loading {plugin.target} ended the process, with status {child.wait()}"
                return number
            plugin.failure = json.loads(answer)
            plugin.loads = not plugin.failure
    finally:
        child.kill()
        child.wait()
    return len(plugins)
