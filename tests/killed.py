"""Runs the job and kills its whole process group at a chosen step.

    python tests/killed.py LOG STEP [flags of etl.py]

LOG gets a line for each step that begins: `NAME N`, the N-th step of that name, with the
file or table. STEP is such a `NAME N`, or empty. Steps are the file-system calls of
recovery, publishing and report, and the writing and checking of tables.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).parents[1]))

import etl

counts: Counter[str] = Counter()
lock = Lock()


def reach(log: str, fatal: str, name: str, what: str) -> None:
    """Logs a step; kills if it is the fatal one."""
    with lock:
        counts[name] += 1
        step = f"{name} {counts[name]}"
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{step}  {what}\n")
        if step == fatal:
            os.killpg(0, signal.SIGKILL)


class Watched:
    """A lake's files, each call on which is a step, and so is each file that it deletes."""

    def __init__(self, files: etl.Files, reached: Callable[[str, str], None]) -> None:
        self.files, self.reached = files, reached

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self.reached("delete", name)
            self.files.delete([name])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.reached(name, arguments[0])
            result = getattr(self.files, name)(*arguments)
            self.reached(f"{name}-done", arguments[0])
            return result

        return call


def main(log: str, fatal: str, *flags: str) -> int:
    """Runs the job with its steps watched; writes what recovery left into LOG.json."""

    def reached(name: str, what: str) -> None:
        reach(log, fatal, name, what)

    def watch(name: str, subject: int) -> None:
        real = getattr(etl, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            what = str(arguments[subject]).rpartition("/")[2]
            reached(name, what)
            result = real(*arguments, **named)
            reached(f"{name}-done", what)
            return result

        setattr(etl, name, watched)

    lake_files, recover = etl.lake_files, etl.recover

    def watched_recover(files: Watched) -> None:
        recover(files)
        left = {table: sorted(files.files.sizes(table)) for table in etl.TABLES}
        Path(f"{log}.json").write_text(json.dumps(left), encoding="utf-8")

    etl.lake_files = lambda settings: Watched(lake_files(settings), reached)
    etl.recover = watched_recover
    watch("write_table", 1)
    watch("check_tables", 1)
    return etl.main(flags)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
