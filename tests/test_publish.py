"""Publishing, recovery and the lock, on files that are Parquet files by name only."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
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


def hold(lake: Path, run_id: str, *, by_force: bool = False) -> Any:
    """Holds a lake's lock."""
    return etl.hold_lock(etl.LocalFiles(str(lake)), run_id, str(lake), by_force)


def assert_published(lake: Path, tables: set[str]) -> None:
    """A lake has these tables, what is foreign, and nothing of a run that failed."""
    assert files_of(lake) == tables | FOREIGN
    empty = [
        path for path in lake.rglob("*") if path.is_dir() and not any(path.iterdir())
    ]
    assert empty == []
    assert all((lake / name).read_text() == name for name in tables)


class FailingFiles:
    """A lake's files of which the n-th change, and those that follow it as long as the
    connection is down, fail."""

    def __init__(self, files: etl.Files, fails_at: int, comes_back: bool) -> None:
        self.files, self.fails_at, self.comes_back = files, fails_at, comes_back
        self.calls = 0

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self.count()
            self.files.delete([name])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.count()
            return getattr(self.files, name)(*arguments)

        return call

    def count(self) -> None:
        self.calls += 1
        down = self.calls >= self.fails_at
        if self.calls == self.fails_at or (down and not self.comes_back):
            raise OSError("connection lost")


@pytest.fixture(params=["local", "hadoop"])
def files_at(
    request: pytest.FixtureRequest, spark: SparkSession
) -> Callable[[Path], etl.Files]:
    """What makes a lake's files of its folder, by Python and by Hadoop."""
    if request.param == "local":
        return lambda lake: etl.LocalFiles(str(lake))
    return lambda lake: etl.HadoopFiles(spark, f"file://{lake}")


def publish(files: Any) -> None:
    """Publishes what is staged."""
    etl.publish(files, "run1", sorted(NEW), tuple(etl.TABLES))


def test_publish_replaces_the_tables_and_leaves_foreign_files(
    files_at: Callable[[Path], etl.Files], lake: Path
) -> None:
    publish(files_at(lake))
    assert_published(lake, NEW)


@pytest.mark.parametrize("comes_back", [True, False])
def test_failure_of_any_file_system_call_loses_nothing(
    files_at: Callable[[Path], etl.Files], tmp_path: Path, comes_back: bool
) -> None:
    outcomes = []
    for n in range(1, 1000):
        lake = tmp_path / f"lake{n}"
        fill(lake, OLD | FOREIGN)
        fill(lake / "_staging" / "run1", NEW)
        try:
            publish(FailingFiles(files_at(lake), n, comes_back))
        except (OSError, etl.RunError) as error:
            message = str(error)
        else:
            break
        seen = tables_of(lake)
        assert OLD <= seen or NEW <= seen, (n, message)
        if "as they were" in message or isinstance(message, OSError):
            assert seen == OLD, (n, message)
        etl.recover(files_at(lake))
        if tables_of(lake) == OLD:
            assert_published(lake, OLD)
        else:
            assert_published(lake, NEW)
        outcomes.append(tables_of(lake) == NEW)
    assert_published(lake, NEW)
    assert n > 20  # calls of a publish
    assert {True, False} == set(outcomes)


def test_staged_files_without_a_journal_are_deleted(
    files_at: Callable[[Path], etl.Files], lake: Path
) -> None:
    etl.recover(files_at(lake))
    assert_published(lake, OLD)


def test_recovery_without_anything_to_recover_changes_nothing(
    files_at: Callable[[Path], etl.Files], tmp_path: Path
) -> None:
    fill(tmp_path, OLD | FOREIGN)
    etl.recover(files_at(tmp_path))
    assert_published(tmp_path, OLD)


def test_lock_is_there_while_it_is_held_only(tmp_path: Path) -> None:
    with hold(tmp_path / "lake", "run1"):
        held = json.loads((tmp_path / "lake" / "_lock").read_text())
        assert (held["run"], held["pid"]) == ("run1", os.getpid())
    assert not (tmp_path / "lake").exists()


def test_file_that_cannot_be_written_whole_is_named_and_deleted(tmp_path: Path) -> None:
    files = etl.LocalFiles(str(tmp_path / "lake"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/lake/_lock'"):
            files.create("_lock", "two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(tmp_path) == set()


def test_second_run_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    with hold(tmp_path, "run1"):
        with pytest.raises(etl.RunError) as caught, hold(tmp_path, "run2"):
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
        "system": etl.this_system(),
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
    with hold(tmp_path, "run2"):
        assert json.loads((tmp_path / "_lock").read_text())["run"] == "run2"


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "elsewhere", "system": "elsewhere"},
        {"system": f"{socket.gethostname()} before-its-last-start pid:[1]"},
        {"system": None},
    ],
    ids=["another host", "another start or container", "an older version"],
)
def test_other_locks_are_taken_over_by_flag_only(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_lock(tmp_path, **changes)
    assert_taken_over_by_flag_only(tmp_path)


def test_unreadable_lock_is_taken_over_by_flag_only(tmp_path: Path) -> None:
    (tmp_path / "_lock").write_text("")
    assert_taken_over_by_flag_only(tmp_path)


def assert_taken_over_by_flag_only(lake: Path) -> None:
    """A lock is respected without --break-lock."""
    refused = pytest.raises(etl.RunError, match="--break-lock")
    with refused, hold(lake, "run2"):
        pass
    with hold(lake, "run3", by_force=True):
        assert json.loads((lake / "_lock").read_text())["run"] == "run3"
    assert files_of(lake) == set()


@pytest.mark.skipif(os.getuid() != 0, reason="needs a process of another user")
def test_lock_of_another_users_live_run_is_respected(tmp_path: Path) -> None:
    write_lock(tmp_path, pid=os.getpid(), process_start=etl.process_start(os.getpid()))
    lock = etl.read_lock(etl.LocalFiles(str(tmp_path)))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # an unprivileged process, which can't send the lock's holder a signal
        try:
            os.setuid(65534)
            os.write(writer, b"dead" if etl.is_dead(lock) else b"live")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    assert os.read(reader, 4) == b"live"


def test_lock_of_a_process_that_cannot_be_seen_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etl, "process_start", lambda pid: "unknown")
    write_lock(tmp_path)
    assert_taken_over_by_flag_only(tmp_path)


def test_run_that_lost_its_lock_publishes_nothing(lake: Path) -> None:
    write_lock(lake, run="run2")
    with pytest.raises(etl.RunError, match="as they were: run run2 has taken over"):
        publish(etl.LocalFiles(str(lake)))
    assert tables_of(lake) == OLD


def test_run_that_lost_its_lock_undoes_nothing(lake: Path) -> None:
    guard, thieves = threading.Lock(), ["run2"]

    class Robbed(etl.LocalFiles):
        def move(self, source: str, target: str) -> None:
            with guard:
                if target != "_journal.json" and thieves:
                    write_lock(lake, run=thieves.pop())
                    etl.recover(etl.LocalFiles(str(lake)))
            super().move(source, target)

    with pytest.raises(etl.RunError, match="run run2 has taken over"):
        publish(Robbed(str(lake)))
    assert tables_of(lake) == NEW
