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
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from conftest import QUICK_SPARK, ROOT, read_table
from makers import TS, play, song, write_input
from pyspark.sql import SparkSession
from test_publish import faulty, long

import etl

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


def run(source: Path, lake: Path, *flags: str) -> dict[str, Any]:
    """The report of a whole run in this process."""
    return etl.run(etl.parse_settings([*flags_for(source, lake), *flags]))


def rows_of(lake: Path) -> dict[str, list[Any]]:
    """The rows that a reader of a lake's tables finds."""
    return {table: read_table(lake, table) for table in etl.TABLES}


def holds(seen: dict[str, list[Any]], rows: dict[str, list[Any]]) -> bool:
    """Whether a reader sees all of these rows."""
    return all(row in seen[table] for table in rows for row in rows[table])


def files_of(lake: Path) -> set[str]:
    """The names of the tables' files."""
    files = (path for table in etl.TABLES for path in (lake / table).rglob("*.parquet"))
    return {path.relative_to(lake).as_posix() for path in files}


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the inputs `old` and `new` and of their lakes, such as `old lake`."""
    folder = tmp_path_factory.mktemp("made")
    for name, (songs, events) in INPUTS.items():
        run(write_input(folder / name, songs, events), folder / f"{name} lake")
        assert [*map(len, rows_of(folder / f"{name} lake").values())] == [2] * 5
    return folder


@pytest.fixture
def lake(made: Path, tmp_path: Path) -> Path:
    """A lake of the old input."""
    return Path(shutil.copytree(made / "old lake", tmp_path / "lake"))


def recover(spark: SparkSession, lake: Path) -> None:
    """Does what a start does first that is told to break the lock."""
    with etl.claimed(etl.open_lake(spark, f"file://{lake}"), "next", True):
        assert [path.name for path in (lake / "_staging").iterdir()] == ["next"]


@contextmanager
def job(flags: list[str], *driver: str) -> Iterator[subprocess.Popen[str]]:
    """A run of the command, or of the driver, in a process group of its own."""
    script = ["tests/driver.py", *driver] if driver else ["etl.py"]
    with subprocess.Popen(
        [sys.executable, *script, *flags],
        cwd=ROOT,
        env={**os.environ, "PYSPARK_SUBMIT_ARGS": QUICK_SPARK},
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


@pytest.mark.parametrize(("mode", "step"), long(("once", 9), ("down", 9)))
def test_run_with_a_fault_at_a_call_leaves_old_or_new_tables(
    mode: str, step: int, made: Path, lake: Path, spark: SparkSession
) -> None:
    """The runs but the first find their input's files changed, and publish months."""
    old, sources = rows_of(lake), itertools.cycle(["new", "old"])
    for n, source in zip(itertools.count(step // 2, step), sources):
        new, struck = rows_of(made / f"{source} lake"), []
        shutil.copytree(made / source, lake.parent / "in", dirs_exist_ok=True)
        bad_lake = faulty(etl.open_lake(spark, f"file://{lake}"), n, mode, struck)
        with pytest.MonkeyPatch.context() as patch, suppress(Exception):
            patch.setattr(etl, "open_lake", Mock(return_value=bad_lake))
            run(lake.parent / "in", lake)
        if not struck:
            break
        seen = rows_of(lake)
        assert holds(seen, old) or holds(seen, new), struck
        recover(spark, lake)
        assert rows_of(lake) in (old, new), struck
        run(lake.parent / "in", lake)
        assert rows_of(lake) == new, struck
        assert not (lake / "_staging").exists(), struck
        old = new
    assert rows_of(lake) == new and n > step


@pytest.mark.parametrize("pause", [2.0, *long(0.4)])
def test_interrupted_run_ends_with_a_line_no_process_and_the_tables_as_they_were(
    pause: float, made: Path, lake: Path, spark: SparkSession
) -> None:
    """By Ctrl-C or SIGTERM, at moments of Spark's start and then amid the reading."""
    last = int(4 / pause)
    for n in range(1, last + 2):
        with job(flags_for(made / "new", lake)) as process:
            if n < last:
                time.sleep(pause * n)
            else:
                wait_for(lake, "_staging/*/_records", process)
            started = psutil.Process(process.pid).children(recursive=True)
            send = os.kill if n % 2 else os.killpg  # Ctrl-C reaches the whole group.
            send(process.pid, signal.SIGTERM if n % 2 else signal.SIGINT)
            moment = time.monotonic()
            assert "error: interrupted: " in error_line(process)
            assert time.monotonic() - moment < 5  # 3 s without other work
            assert psutil.wait_procs(started, timeout=30)[1] == []
        assert n < last or not (lake / "_staging").exists()
        recover(spark, lake)
        assert files_of(lake) == files_of(made / "old lake")


def test_run_stopped_and_taken_over_publishes_nothing(made: Path, lake: Path) -> None:
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


@pytest.mark.parametrize(
    ("moment", "state"),
    [
        ("SIGKILL after delete /lake/songs/", [True, True, True]),
        *long(
            ("_staging/*/_records/*/*.parquet", [False, False, False]),
            ("_staging/*/songplays/*/*/*.parquet", [False, False, False]),
            ("SIGKILL after rename _journal", [True, False, False]),
            ("SIGKILL after rename /songs/year=", [True, True, False]),
            ("SIGTERM before rename /songplays/", [False, True, True]),
        ),
    ],
)
def test_run_loses_nothing_when_killed_and_finishes_publishing_when_interrupted(
    moment: str, state: list[bool], made: Path, lake: Path, spark: SparkSession
) -> None:
    """The state: is there a journal, has the lake new files, does it lack old ones?"""
    driver = moment.split() if " " in moment else []
    with job(flags_for(made / "new", lake), *driver) as process:
        if not driver:
            wait_for(lake, moment, process)
            os.killpg(process.pid, signal.SIGKILL)
        is_killed = "SIGTERM" not in driver
        assert process.wait(120) == -signal.SIGKILL * is_killed
    assert (lake / "_staging").exists() == is_killed
    new, old = files_of(lake), files_of(made / "old lake")
    has_journal = any(lake.glob("_staging/*/_journal.json"))
    assert [has_journal, bool(new - old), bool(old - new)] == state
    ends = [rows_of(made / "old lake"), rows_of(made / "new lake")]
    assert any(holds(rows_of(lake), rows) for rows in ends)
    recover(spark, lake)
    assert rows_of(lake) == ends[any(state)]
    run(made / "new", lake)
    assert rows_of(lake) == ends[True]
    assert not (lake / "_staging").exists()
