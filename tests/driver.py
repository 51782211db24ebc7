"""Runs the job with a signal at the first call of a method of Hadoop's file system on a
path with a text: python tests/driver.py SIGKILL before delete /songs/ [flags]"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from itertools import count
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).parents[1]))

import etl


def watched(lake: etl.Lake, watch: Callable[[int, str, str, str], Any]) -> etl.Lake:
    """A lake whose file-system calls `watch` sees: number, "before" or "after", method,
    first path. What it answers before a call, but None, comes in place of the call."""
    numbers = count(1)  # next() on it is atomic.

    class Watched:
        def __getattr__(self, method: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                number, path = next(numbers), str(arguments[0])
                answer = watch(number, "before", method, path)
                if answer is None:
                    answer = getattr(lake.fs, method)(*arguments)
                    watch(number, "after", method, path)
                return answer

            return call

    return dataclasses.replace(lake, fs=Watched())


if __name__ == "__main__":
    name, *event, text = sys.argv[1:5]
    wanted, first, open_lake = signal.Signals[name], threading.Lock(), etl.open_lake

    def strike(_: int, moment: str, method: str, path: str) -> None:
        """Sends SIGTERM to this process, another signal to its whole group."""
        if [moment, method] == event and text in path and first.acquire(False):
            os.kill(os.getpid() if wanted == signal.SIGTERM else 0, wanted)

    etl.open_lake = lambda *arguments: watched(open_lake(*arguments), strike)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(etl.main(sys.argv[5:]))
