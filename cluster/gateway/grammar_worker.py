"""The process that tries grammars out for a gateway, and nothing else.

Its argument is the processor time for one grammar in seconds; wall-clock time would depend on
what else runs. It reads JSON lines ``[kind, spec]`` and answers each with a line that holds what
is wrong, or "". A grammar that takes more time or memory than is allowed ends the process. It
also ends with its standard input, so it does not outlive the gateway.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
import time

from instance.model.grammar_text import check
from instance.request import Grammar, GrammarKind

MEMORY_BYTES = 2 << 30


def _limit(kind: int, value: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # not every system has every limit
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def main(cpu_seconds: int) -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin:
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu_seconds)
        kind, spec = json.loads(line)
        print(json.dumps(check(Grammar(GrammarKind(kind), spec))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
