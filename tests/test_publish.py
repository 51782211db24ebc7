"""Publishing, recovery and the lock, on files that are Parquet files by name only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

import etl

OLD = {
    "songplays/year=2018/month=10/part-0-old.snappy.parquet",
    "songplays/year=2018/month=11/part-0-old.snappy.parquet",
    "users/part-0-old.snappy.parquet",
    "songs/year=1999/part-0-old.snappy.parquet",
    "artists/part-0-old.snappy.parquet",
    "time/year=2018/month=10/part-0-old.snappy.parquet",
}
NEW = {
    "songplays/year=2018/month=11/part-0-new.snappy.parquet",
    "users/part-0-new.snappy.parquet",
    "users/part-1-new.snappy.parquet",
    "songs/year=2001/part-0-new.snappy.parquet",
    "artists/part-0-new.snappy.parquet",
    "time/year=2018/month=11/part-0-new.snappy.parquet",
}
FOREIGN = {"README.md", "users/notes.txt", "podcasts/part-0-old.snappy.parquet"}


def fill(folder: Path, names: set[str]) -> None:
    """Makes files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files_of(lake: Path) -> set[str]:
    """What files a lake has, by their paths from there."""
    return {
        path.relative_to(lake).as_posix() for path in lake.rglob("*") if path.is_file()
    }


def tables_of(lake: Path) -> set[str]:
    """What files readers of the five tables see."""
    return {
        name
        for name in files_of(lake)
        if name.split("/")[0] in etl.TABLES and name.endswith(".parquet")
    }


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """A lake with published, staged and foreign files."""
    lake = tmp_path / "a lake"
    fill(lake, OLD | FOREIGN)
    fill(lake / "_staging" / "run1", NEW)
    return lake


def settings_of(lake: Path, *flags: str) -> etl.Settings:
    """The settings of a run that writes to a lake."""
    return etl.parse_settings(["--output", str(lake), *flags])


def assert_published(lake: Path, tables: set[str]) -> None:
    """A lake has these tables, what is foreign, and nothing of a run that failed."""
    assert files_of(lake) == tables | FOREIGN
    empty = [
        path for path in lake.rglob("*") if path.is_dir() and not any(path.iterdir())
    ]
    assert empty == []
    assert all((lake / name).read_text() == name for name in tables)


class FailingCalls:
    """Hadoop file systems of which the n-th call, counted over all, and the calls that
    follow it fail as long as the connection is down."""

    def __init__(self, fails_at: int, comes_back: bool) -> None:
        self.calls, self.fails_at, self.comes_back = 0, fails_at, comes_back
        self.real = etl.hadoop_path

    def hadoop_path(self, spark: SparkSession, uri: str) -> tuple[Any, Any]:
        files, path = self.real(spark, uri)
        return Failing(files, self), path

    def count(self) -> None:
        self.calls += 1
        down = self.calls >= self.fails_at
        if self.calls == self.fails_at or (down and not self.comes_back):
            raise OSError("connection lost")


class Failing:
    """A Hadoop file system whose calls are counted, and may fail."""

    def __init__(self, files: Any, calls: FailingCalls) -> None:
        self.files, self.calls = files, calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.count()
            return getattr(self.files, name)(*arguments)

        return call


def test_publish_replaces_the_tables_and_leaves_foreign_files(
    spark: SparkSession, lake: Path
) -> None:
    etl.publish(spark, f"file://{lake}", "run1")
    assert_published(lake, NEW)


@pytest.mark.parametrize("comes_back", [True, False])
def test_failure_of_any_file_system_call_loses_nothing(
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    comes_back: bool,
) -> None:
    outcomes = []
    for n in range(1, 1000):
        lake = tmp_path / f"lake{n}"
        fill(lake, OLD | FOREIGN)
        fill(lake / "_staging" / "run1", NEW)
        calls = FailingCalls(n, comes_back)
        with monkeypatch.context() as patch:
            patch.setattr(etl, "hadoop_path", calls.hadoop_path)
            try:
                etl.publish(spark, f"file://{lake}", "run1")
            except (OSError, etl.RunError) as error:
                message = str(error)
            else:
                break
        seen = tables_of(lake)
        assert OLD <= seen or NEW <= seen, (n, message)
        if "as they were" in message or isinstance(message, OSError):
            assert seen == OLD, (n, message)
        etl.recover(spark, settings_of(lake))
        if tables_of(lake) == OLD:
            assert_published(lake, OLD)
        else:
            assert_published(lake, NEW)
        outcomes.append(tables_of(lake) == NEW)
    assert_published(lake, NEW)
    assert n > 40  # calls of a publish
    assert {True, False} == set(outcomes)


def test_staged_files_without_a_journal_are_deleted(
    spark: SparkSession, lake: Path
) -> None:
    etl.recover(spark, settings_of(lake))
    assert_published(lake, OLD)


def test_recovery_without_anything_to_recover_changes_nothing(
    spark: SparkSession, tmp_path: Path
) -> None:
    fill(tmp_path, OLD | FOREIGN)
    etl.recover(spark, settings_of(tmp_path))
    assert_published(tmp_path, OLD)


def test_lock_is_there_while_it_is_held_only(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "lake")
    with etl.hold_lock(settings, "run1"):
        held = json.loads((tmp_path / "lake" / "_lock").read_text())
        assert (held["run"], held["pid"]) == ("run1", os.getpid())
    assert not (tmp_path / "lake").exists()


def test_second_run_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with etl.hold_lock(settings, "run1"):
        with pytest.raises(etl.RunError) as caught, etl.hold_lock(settings, "run2"):
            pass
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
        assert json.loads((tmp_path / "_lock").read_text())["run"] == "run1"
    assert files_of(tmp_path) == set()


def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write_lock(lake: Path, **changes: Any) -> None:
    """The lock of a run that was killed on this host, but for the changes."""
    lock = {
        "run": "killed",
        "host": socket.gethostname(),
        "pid": dead_pid(),
        "process_start": "1",
        "started": "2018-11-30T00:00:00+00:00",
    }
    (lake / "_lock").write_text(json.dumps({**lock, **changes}))


@pytest.mark.parametrize(
    "changes",
    [{}, {"pid": os.getpid()}],
    ids=["process has ended", "its number is another process's"],
)
def test_lock_of_a_killed_run_on_this_host_is_taken_over(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_lock(tmp_path, **changes)
    with etl.hold_lock(settings_of(tmp_path), "run2"):
        assert json.loads((tmp_path / "_lock").read_text())["run"] == "run2"


@pytest.mark.parametrize("content", [None, ""], ids=["another host's", "unreadable"])
def test_other_locks_are_taken_over_by_flag_only(
    tmp_path: Path, content: str | None
) -> None:
    write_lock(tmp_path, host="elsewhere")
    if content is not None:
        (tmp_path / "_lock").write_text(content)
    refused = pytest.raises(etl.RunError, match="--break-lock")
    with refused, etl.hold_lock(settings_of(tmp_path), "run2"):
        pass
    with etl.hold_lock(settings_of(tmp_path, "--break-lock"), "run3"):
        assert json.loads((tmp_path / "_lock").read_text())["run"] == "run3"
    assert files_of(tmp_path) == set()
