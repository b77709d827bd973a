"""Read changed files of every kind for as long as you like: ``make fuzz``, or ``python tests/fuzz --count 100000``.

Nothing but a `DQError` may come of it: no other exception, no hang, no memory that grows. ``--engine atheris`` lets the
coverage of the readers steer the changes (``pip install atheris``; Linux, Python 3.11 to 3.13).
"""

from __future__ import annotations

import argparse
import logging
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import torch
from readers import Reader, readers

from dq_plugins.errors import DQError

SECONDS = 20
"""More computing time than this is a hang, whatever else the machine does."""
WAITING = 300
"""So is a longer wait than this."""
MEMORY = 6 << 30
"""Address space: what claims more than it has meets a `MemoryError`."""


class Hang(BaseException):
    """A reader took too long."""


def _hang(signum: int, frame: FrameType | None) -> None:
    raise Hang(f"computes more than {SECONDS} s" if signum == signal.SIGPROF else f"waits more than {WAITING} s")


def attempt(reader: Reader, rng: Random) -> str:
    """Change the file and read it: ``"read"``, ``"refused"``, or what went wrong."""
    reader.change(rng)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITING)
    try:
        reader.read()
    except DQError:
        return "refused"
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "dq_" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(error).__name__} at {where}: {str(error)[:120]}"
    except Hang as error:
        return f"hang: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return "read"


def mutate(found: dict[str, Reader], count: int, seed: int) -> int:
    """Changes by chance, the same for the same seed; gives the number of failures."""
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in found}
    examples: dict[str, tuple[str, int]] = {}
    names, start = list(found), time.monotonic()
    first = 0
    for i in range(count):
        name = names[i % len(names)]
        outcome = attempt(found[name], Random(f"{seed} {i}"))
        outcomes[name][outcome if outcome in ("read", "refused") else "failed"] += 1
        if outcome not in ("read", "refused") and outcome not in examples:
            examples[outcome] = (name, i)
            print(f"{name}, change {i}: {outcome}", flush=True)
        if i == min(1000, count - 1):
            first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    last = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, counts in outcomes.items():
        print(f"{name:22} {counts['refused']:7} refused {counts['read']:7} read {counts['failed']:5} failed")
    failed = sum(counts["failed"] for counts in outcomes.values())
    print(
        f"{count} changes, {failed} failures of {len(examples)} kinds, {time.monotonic() - start:.0f} s; most memory "
        f"{last >> 10} MiB, {first >> 10} MiB of it after the first thousand"
    )
    return failed


def steer(found: dict[str, Reader], count: int) -> None:
    """Changes that coverage steers."""
    import atheris  # type: ignore[import-not-found]

    class Bytes(Random):
        """Chance that is read from the fuzzer's input."""

        def __init__(self, data: bytes) -> None:
            super().__init__(0)
            self.source = atheris.FuzzedDataProvider(data)

        def getrandbits(self, k: int) -> int:
            return self.source.ConsumeIntInRange(0, (1 << k) - 1) if k < 64 else super().getrandbits(k)

        def random(self) -> float:
            return self.getrandbits(32) / 2**32

    names = list(found)

    def one(data: bytes) -> None:
        rng = Bytes(data)
        outcome = attempt(found[names[rng.randrange(len(names))]], rng)
        if outcome not in ("read", "refused"):
            raise RuntimeError(outcome)

    atheris.Setup([sys.argv[0], f"-runs={count}", "-max_len=256", "-rss_limit_mb=6000"], one)
    atheris.Fuzz()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("chance", "atheris"), default="chance")
    parser.add_argument("--only", help="one kind of file")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for each in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(each, _hang)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        if args.engine == "atheris":
            import atheris  # type: ignore[import-not-found]

            steered = [f"dq_plugins.{each}" for each in ("artifact", "plan", "calibration")]
            with atheris.instrument_imports(include=steered):
                import dq_plugins.plan  # noqa: F401
        found = readers(Path(folder))
        if args.only:
            found = {args.only: found[args.only]}
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        if args.engine == "atheris":
            steer(found, args.count)
            return 0
        return 1 if mutate(found, args.count, args.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
