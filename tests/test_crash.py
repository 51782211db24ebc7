"""Whole runs that fail, are interrupted, stopped or killed: no reader misses a row."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import QUICK_SPARK, ROOT, read_table
from makers import TS, play, song, write_input
from pyspark.sql import SparkSession
from test_publish import faulty, long

import etl

Rows = dict[str, list[dict[str, Any]]]
MONTH = 30 * 24 * 3600 * 1000  # ms
# A song's year, a month's plays and a user go, another song and user come.
INPUTS = {
    "old": (
        [song(), song(song_id="S2", artist_id="A2", artist_name="Abba", year=1977)],
        [play(), play(ts=TS - MONTH, userId="40", artist="Abba")],
    ),
    "new": (
        [song(), song(song_id="S3", artist_id="A3", artist_name="Air", year=1998)],
        [play(), play(ts=TS + 1, userId="41", artist="Air"), '{"page": "NextSong"}'],
    ),
}


def flags_for(source: Path, lake: Path) -> list[str]:
    """The command line of a run."""
    flags = {"config": os.devnull, "input": source, "output": lake, "max-rejected": 1}
    return [f"--{name}={value}" for name, value in flags.items()]


def run(source: Path, lake: Path) -> None:
    """A whole run in this process."""
    etl.run(etl.parse_settings(flags_for(source, lake)))


def rows_of(lake: Path) -> Rows:
    """The rows that a reader of a lake's tables finds."""
    return {table: read_table(lake, table) for table in etl.TABLES}


def holds(seen: Rows, rows: Rows) -> bool:
    """Whether a reader sees all of these rows."""
    return all(row in seen[table] for table in rows for row in rows[table])


def files_of(lake: Path) -> set[str]:
    """The names of the tables' files."""
    files = (path for table in etl.TABLES for path in (lake / table).rglob("*.parquet"))
    return {path.relative_to(lake).as_posix() for path in files}


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the inputs, `old` and `new`, and of the lakes that runs make of them,
    `old lake` and `new lake`."""
    folder = tmp_path_factory.mktemp("made")
    for name, (songs, events) in INPUTS.items():
        run(write_input(folder / name, songs, events), folder / f"{name} lake")
        counts = {k: len(rows) for k, rows in rows_of(folder / f"{name} lake").items()}
        assert counts == dict.fromkeys(etl.TABLES, 2)
    return folder


@pytest.fixture
def lake(made: Path, tmp_path: Path) -> Path:
    """A lake of the old input."""
    return Path(shutil.copytree(made / "old lake", tmp_path / "lake"))


@pytest.fixture
def recover(spark: SparkSession, lake: Path) -> Any:
    """What a start does first that is told to break the lock."""

    def start() -> None:
        with etl.claimed(etl.open_lake(spark, f"file://{lake}"), "next", True):
            assert [path.name for path in (lake / "_staging").iterdir()] == ["next"]

    return start


@contextmanager
def job(flags: list[str], *driver: str) -> Iterator[subprocess.Popen[str]]:
    """A run of the command, or of the driver, in a process group of its own."""
    script = ["tests/driver.py", *driver] if driver else ["etl.py"]
    with subprocess.Popen(
        [sys.executable, *script, *flags],
        cwd=ROOT,
        env={**os.environ, "PYSPARK_SUBMIT_ARGS": QUICK_SPARK},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(lake: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    """Waits until a run has made a file."""
    deadline = time.monotonic() + 120
    while not any(lake.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def error_line(process: subprocess.Popen[str]) -> str:
    """The one line that a run prints that fails, beside its steps."""
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    (line,) = re.findall("^etl.py: error: .*", printed, re.MULTILINE)
    assert printed.endswith(f"{line}\n")
    return line


# --- Faults ---------------------------------------------------------------------------

open_lake = etl.open_lake


def open_faulty(n: int, mode: str, struck: list[str], *arguments: Any) -> etl.Lake:
    """A lake with a fault at its n-th file-system call."""
    return faulty(open_lake(*arguments), n, mode, struck)


@pytest.mark.parametrize(
    ("mode", "step"), [("once", 45), *long(("once", 9), ("down", 9))]
)
def test_run_with_a_fault_at_a_call_leaves_old_or_new_tables(
    mode: str, step: int, made: Path, lake: Path, recover: Any
) -> None:
    """The next run makes the new ones, which are the old ones of the next round. The runs
    but the first find their input's files changed, and publish months of them."""
    sources = itertools.cycle(["new", "old"])
    old = rows_of(lake)
    for n, source in zip(itertools.count(step // 2, step), sources):
        new, struck = rows_of(made / f"{source} lake"), []
        shutil.copytree(made / source, lake.parent / "in", dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch, suppress(Exception):
            patch.setattr(etl, "open_lake", partial(open_faulty, n, mode, struck))
            run(lake.parent / "in", lake)
        if not struck:
            break
        seen = rows_of(lake)
        assert holds(seen, old) or holds(seen, new), struck
        recover()
        assert rows_of(lake) in (old, new), struck
        run(lake.parent / "in", lake)
        assert rows_of(lake) == new, struck
        assert not (lake / "_staging").exists(), struck
        old = new
    assert rows_of(lake) == new and n > step


# --- Signals --------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [signal.SIGINT, *long(signal.SIGTERM)])
def test_interrupted_run_leaves_the_tables_as_they_were(
    wanted: signal.Signals, made: Path, lake: Path
) -> None:
    with job(flags_for(made / "new", lake)) as process:
        wait_for(lake, "_staging/*/_records", process)
        if wanted == signal.SIGINT:  # Ctrl-C reaches the whole process group.
            os.killpg(process.pid, wanted)
        else:
            process.send_signal(wanted)
        error_line(process)
    assert files_of(lake) == files_of(made / "old lake")
    assert not (lake / "_staging").exists()


@pytest.mark.long
def test_run_that_is_interrupted_while_it_publishes_finishes_that(
    made: Path, lake: Path
) -> None:
    driver = ("SIGTERM", "before", "rename", "/songplays/")
    with job(flags_for(made / "new", lake), *driver) as process:
        assert process.wait(120) == 0
    assert rows_of(lake) == rows_of(made / "new lake")
    assert not (lake / "_staging").exists()


@pytest.mark.parametrize("pause", [0.8, *long(0.4)])
def test_run_that_is_interrupted_ends_with_a_line_and_no_process(
    pause: float, made: Path, lake: Path, recover: Any
) -> None:
    """By Ctrl-C or SIGTERM at one moment after another of Spark's start."""
    for n in range(1, int(4 / pause)):
        with job(flags_for(made / "new", lake)) as process:
            time.sleep(pause * n)
            started = psutil.Process(process.pid).children(recursive=True)
            process.send_signal([signal.SIGINT, signal.SIGTERM][n % 2])
            moment = time.monotonic()
            assert "error: interrupted: " in error_line(process)
            assert time.monotonic() - moment < 5  # 3 s without other work
            assert psutil.wait_procs(started, timeout=30)[1] == []
        recover()
        assert files_of(lake) == files_of(made / "old lake")


def test_run_that_is_stopped_and_taken_over_publishes_nothing(
    made: Path, lake: Path
) -> None:
    driver = ("SIGSTOP", "before", "rename", "_journal")
    with job([*flags_for(made / "old", lake), "--full"], *driver) as process:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        with pytest.raises(etl.RunError, match=f"{process.pid}.* --break-lock"):
            run(made / "new", lake)
        (alive,) = lake.glob("_staging/*/_alive")
        os.utime(alive, (time.time() - 100,) * 2)
        run(made / "new", lake)
        files = files_of(lake)
        os.killpg(process.pid, signal.SIGCONT)
        assert "the next start" not in error_line(process)
    assert files_of(lake) == files
    assert rows_of(lake) == rows_of(made / "new lake")


JOURNAL = "_staging/*/_journal.json"


@pytest.mark.parametrize(
    ("driver", "reached", "state"),
    [
        (["after", "delete", "/lake/songs/"], JOURNAL, (True, True, True)),
        *long(
            ([], "_staging/*/_records/*/*.parquet", (False, False, False)),
            ([], "_staging/*/songplays/*/*/*.parquet", (False, False, False)),
            (["after", "rename", "_journal"], JOURNAL, (True, False, False)),
            (["after", "rename", "/songs/"], JOURNAL, (True, True, False)),
        ),
    ],
    ids=["delete", "read", "build", "journal", "move"],
)
def test_killed_run_loses_nothing(
    driver: list[str], reached: str, state: Any, made: Path, lake: Path, recover: Any
) -> None:
    """The state is whether there is a journal, whether the lake has new files, and whether
    it lacks old ones, when the whole process group is killed."""
    with job(
        flags_for(made / "new", lake), *driver and ["SIGKILL", *driver]
    ) as process:
        if not driver:
            wait_for(lake, reached, process)
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(120) == -signal.SIGKILL
    assert any(lake.glob(reached))
    new, old = files_of(lake), files_of(made / "old lake")
    has_journal = any(lake.glob(JOURNAL))
    assert (has_journal, bool(new - old), bool(old - new)) == state
    ends = [rows_of(made / "old lake"), rows_of(made / "new lake")]
    assert any(holds(rows_of(lake), rows) for rows in ends)
    recover()
    assert rows_of(lake) == ends[has_journal]
    run(made / "new", lake)
    assert rows_of(lake) == ends[True]
    assert not (lake / "_staging").exists()
