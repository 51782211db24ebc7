"""Claims, publishing and recovery, on files that tell who staged them, and where."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from driver import watched
from pyspark.sql import SparkSession

import etl

OCTOBER, NOVEMBER = "songplays/year=2018/month=10", "songplays/year=2018/month=11"
RECORDS = "_records/events/year=2018/month=11"
OLD = [f"{of}/part-run0-0.parquet" for of in (OCTOBER, NOVEMBER, "users", RECORDS)]
OLD += ["_records/_manifest-run0.json"]
FOLDERS = (NOVEMBER, "users", "songs/year=2001", RECORDS)
NEW = [*(f"{of}/part-0.parquet" for of in FOLDERS), "_records/_manifest-{}.json"]
NEVER = ["users/_temporary/0/part-0.parquet"]
CLAIM = ["_alive", "_owner.json"]
STAGED = [name.format("run1") for name in NEW]
TARGETS = {name: name.replace("part-", "part-run1-") for name in STAGED}
FOREIGN = {"README.md", "users/notes.txt", "podcasts/part-0.parquet"}
OLD_ROWS = {f"run0 {name}" for name in OLD}
ROWS = {run: {f"{run} {of.format(run)}" for of in NEW} for run in ("run1", "run2")}


def folder_of(lake: etl.Lake) -> Path:
    """A lake's folder."""
    return Path(lake.root[len("file://") :])


def fill(folder: Path, run_id: str, *names: str) -> None:
    """Makes files of a run."""
    for name in names:
        path = folder / name.format(run_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{run_id} {name.format(run_id)}")


def files_of(lake: etl.Lake, below: str = "") -> set[str]:
    """The names of a lake's files."""
    paths = filter(Path.is_file, (folder_of(lake) / below).rglob("*"))
    return {path.relative_to(folder_of(lake)).as_posix() for path in paths}


def rows_of(lake: etl.Lake) -> set[str]:
    """The rows in the tables, records and manifest, and the names of staged files."""
    names = {of for top in (*etl.TABLES, "_records") for of in files_of(lake, top)}
    names = {of for of in names if of.endswith((".parquet", ".json"))}
    rows = {(folder_of(lake) / name).read_text() for name in names}
    return rows | files_of(lake, "_staging")


def renew(lake: etl.Lake) -> None:
    """Leaves a lake nothing but its first tables and foreign files."""
    shutil.rmtree(folder_of(lake), ignore_errors=True)
    fill(folder_of(lake), "run0", *OLD, *FOREIGN)


@pytest.fixture
def lake(spark: SparkSession, tmp_path: Path, monkeypatch: Any) -> etl.Lake:
    """A lake that has tables and foreign files, and no task of Spark's."""
    monkeypatch.setattr(etl, "LATE_TASKS", 0)
    lake = etl.open_lake(spark, f"file://{tmp_path}/a lake é %41 0")
    renew(lake)
    return lake


def start(lake: etl.Lake, run_id: str = "next", break_lock: bool = False) -> None:
    """A run that stages nothing."""
    with etl.claimed(lake, run_id, break_lock):
        pass


def publish(lake: etl.Lake, run_id: str = "run1") -> None:
    """A run that replaces all tables."""
    with etl.claimed(lake, run_id) as staging:
        fill(folder_of(lake) / staging, run_id, *NEW, *NEVER)
        old = [of for name in (*etl.TABLES, "_records") for of in lake.files(name)]
        etl.publish(lake, staging, old)


def error_of(action: Callable[..., None], *arguments: Any) -> str:
    """The message of the error that an action raises; empty if it raises none."""
    try:
        action(*arguments)
    except Exception as error:  # noqa: BLE001
        return etl.explain(error)
    return ""


def age(lake: etl.Lake, seconds: float = 100) -> None:
    """Makes the claims of a lake that many seconds old."""
    for path in folder_of(lake).glob("_staging/*/_alive"):
        os.utime(path, (time.time() - seconds,) * 2)


def kill_publish(lake: etl.Lake, moved: int, deleted: int = 0, copied: int = 0) -> None:
    """Leaves what a killed run leaves: moved files, some with a copy, and deletions."""
    folder, staging = folder_of(lake), folder_of(lake) / "_staging/run1"
    fill(staging, "run1", *NEW, *NEVER, *CLAIM)
    journal = json.dumps({"staged": TARGETS, "replaced": OLD})
    (staging / "_journal.json").write_text(journal)
    for name in STAGED[:moved]:
        os.renames(staging / name, folder / TARGETS[name])
    fill(staging, "run1", *NEW[:copied])
    for name in OLD[:deleted]:
        (folder / name).unlink()
    age(lake)


def before(wanted: int | str, text: str, action: Callable[[], Any]) -> Any:
    """What acts before the call of a number, or of a method, on a path with a text."""
    return lambda n, at, method, path: (
        action() if at == "before" and wanted in (n, method) and text in path else None
    )


def test_publish_replaces_the_tables_and_no_other_file(lake: etl.Lake) -> None:
    publish(lake)
    assert rows_of(lake) == ROWS["run1"]
    assert files_of(lake) == FOREIGN | set(TARGETS.values())
    folders = filter(Path.is_dir, folder_of(lake).rglob("*"))
    assert all(any(folder.iterdir()) for folder in folders)


def test_reader_in_a_loop_never_sees_fewer_rows(lake: etl.Lake) -> None:
    """The files are many, so that the reader comes in between."""
    folder, looks = folder_of(lake), []
    months = [f"songplays/year=2018/month={n}/part-{{}}.parquet" for n in range(60)]
    fill(folder, "run0", *months)
    old = [name for name in lake.files("songplays") if "run0" in name]
    with ThreadPoolExecutor() as pool, etl.claimed(lake, "run1") as staging:
        fill(folder / staging, "run1", *months)
        publishing = pool.submit(etl.publish, lake, staging, old)
        while not publishing.done():
            found = list(folder.glob("songplays/*/*/*.parquet"))
            with suppress(FileNotFoundError):  # The reader lists again.
                looks.append({path.parent.name for path in found if path.read_text()})
    publishing.result()
    assert all(look >= {f"month={n}" for n in range(60)} for look in looks)
    assert len(looks) > 5


@pytest.mark.parametrize(
    ("method", "action", "reason"),
    [
        ("rename", lambda: os.kill(os.getpid(), signal.SIGINT), "interrupted"),
        ("rename", lambda: False, "/users/part-run1-0.parquet: can't be renamed"),
        ("delete", lambda: False, "/users/part-run0-0.parquet can't be deleted"),
    ],
)
def test_publishing_that_is_cut_off_is_finished_by_the_next_start(
    method: str, action: Callable[[], Any], reason: str, lake: etl.Lake
) -> None:
    """Hadoop's local file system returns False where it fails, and raises nothing."""
    watch = before(method, "/users/part-", action)
    message = error_of(publish, watched(lake, watch))
    assert "the next start of etl.py finishes it: " in message and reason in message
    assert not list(folder_of(lake).glob("_staging/run1/_[ao]*"))
    start(lake)
    assert rows_of(lake) == ROWS["run1"]


def long(*values: Any) -> list[Any]:
    """Parameters of the long tests."""
    tuples = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*value, marks=pytest.mark.long) for value in tuples]


def faulty(lake: etl.Lake, n: int, mode: str, struck: list[str]) -> etl.Lake:
    """A lake whose n-th call fails: "once" before, "late" after, "down" to the end."""

    def strike(number: int, moment: str, method: str, path: str) -> None:
        hit = number >= n if mode == "down" else number == n
        if hit and moment == ("after" if mode == "late" else "before"):
            struck.append(f"{method} {path}")
            lake.fs.delete(lake.path(""), False)  # raises that it is not empty

    return watched(lake, strike)


@pytest.mark.parametrize("mode", ["down", *long("once", "late")])
@pytest.mark.parametrize("action", ["recover", *long("publish", "break lock")])
def test_fault_at_any_call_leaves_old_or_new_tables_to_the_next_start(
    action: str, mode: str, lake: etl.Lake
) -> None:
    for n in itertools.count(1):
        renew(lake)
        bad_lake = faulty(lake, n, mode, struck := [])
        if action == "publish":
            message = error_of(publish, bad_lake)
            becomes_new = not message or "the next start" in message
        else:
            kill_publish(lake, moved=1)
            message = error_of(start, bad_lake, "run2", action == "break lock")
            becomes_new = "discard" not in message
        assert "is not empty" in message or not message, struck
        assert rows_of(lake) >= OLD_ROWS or rows_of(lake) >= ROWS["run1"], struck
        age(lake)
        start(lake)
        assert rows_of(lake) == (ROWS["run1"] if becomes_new else OLD_ROWS), struck
        assert files_of(lake) >= FOREIGN
        if not struck:
            break
    assert becomes_new and n > 30


@pytest.mark.parametrize("method", ["create", "rename"])
def test_run_looks_twice_for_its_claim_before_moving(method: str, lake: Any) -> None:
    owner = folder_of(lake) / "_staging/run1/_owner.json"
    watch = before(method, "run1/_journal", owner.unlink)
    assert "has taken over" in error_of(publish, watched(lake, watch))
    assert rows_of(lake) >= OLD_ROWS and not rows_of(lake) & ROWS["run1"]


def take_over(lake: etl.Lake, found: set[str]) -> None:
    """A run that publishes when the claims that are there have expired."""
    found.update(files_of(lake))
    age(lake)
    publish(lake, "run2")


@pytest.mark.long
def test_run_that_is_stopped_and_taken_over_changes_nothing_more(lake: Any) -> None:
    for n in itertools.count(1):
        renew(lake)
        watch = before(n, "", partial(take_over, lake, found := set()))
        message = error_of(publish, watched(lake, watch))
        start(lake)
        if not found:
            break
        has_claim = "_staging/run1/_owner.json" in found
        begins = {"_staging/run1/_journal.json", "users/part-run1-0.parquet"}
        assert message or begins & found or not has_claim, n
        assert not ("taken over" in message and "the next start" in message)
        last = ["run2"] if message or has_claim else ["run1", "run2"]
        assert rows_of(lake) in [ROWS[run_id] for run_id in last], n
    assert rows_of(lake) == ROWS["run1"] and n > 30


@pytest.mark.parametrize(
    ("deleted", "damaged"),
    [(9, "users/part-run1-0.parquet"), (0, "_staging/run1/_journal.json")],
)
def test_recovery_that_is_stuck_deletes_nothing_until_the_lock_is_broken(
    deleted: int, damaged: str, lake: etl.Lake
) -> None:
    """A file that was moved is lost after all deletions, or the journal is cut off."""
    kill_publish(lake, moved=9, deleted=deleted)
    path = folder_of(lake) / damaged
    path.unlink() if deleted else os.truncate(path, 50)
    found = files_of(lake)
    message = error_of(start, lake)
    assert damaged.split("run1/")[-1] in message and "--break-lock" in message
    assert files_of(lake) == found - {"_staging/run1/_owner.json"}
    start(lake, "run2", break_lock=True)
    # With a manifest the next run would pass for one with nothing new.
    assert not [of for of in files_of(lake, "_records") if "_manifest-" in of]
    publish(lake, "run2")
    assert rows_of(lake) == ROWS["run2"]


@pytest.mark.parametrize(
    ("state", "lost", "rows"),
    [
        ({"moved": len(NEW), "copied": len(NEW)}, [], ROWS["run1"]),
        ({"moved": 0}, [f"_staging/run1/{NEW[0]}"], OLD_ROWS),
    ],
)
def test_recovery_is_not_stopped_by_files_that_are_there_twice_or_lost(
    state: dict[str, int], lost: list[str], rows: set[str], lake: etl.Lake
) -> None:
    """A killed S3A leaves a file twice; a journal is void while no file is in place."""
    kill_publish(lake, **state)
    for name in lost:
        (folder_of(lake) / name).unlink()
    start(watched(lake, before("rename", "/part-0.parquet", pytest.fail)))
    assert rows_of(lake) == rows


def test_live_claim_refuses_and_names_its_owner_and_the_way_on(lake: etl.Lake) -> None:
    with etl.claimed(lake, "run1") as staging:
        claim = files_of(lake, "_staging")
        owner = json.loads((folder_of(lake) / staging / "_owner.json").read_text())
        age(lake, 80)
        message = error_of(publish, lake, "run2")
        assert files_of(lake, "_staging") == claim
    assert {os.uname().nodename, os.getpid()} < set(owner.values())
    told = [*map(str, owner.values()), "90 s", "--break-lock"]
    assert [part for part in told if part not in message] == []
    assert files_of(lake) == {*OLD, *FOREIGN}


@pytest.mark.parametrize(
    ("names", "seconds", "break_lock"),
    [(CLAIM, 100, False), (CLAIM, 0, True), (["_alive"], 0, False)],
)
def test_dead_or_broken_claim_is_cleared_away_wherever_it_ran(
    names: list[str], seconds: float, break_lock: bool, lake: etl.Lake
) -> None:
    fill(folder_of(lake) / "_staging/elsewhere", "run0", *names, *NEW)
    age(lake, seconds)
    with etl.claimed(lake, "run2", break_lock):
        assert [of.name for of in folder_of(lake).glob("_staging/*")] == ["run2"]
    assert files_of(lake) == {*OLD, *FOREIGN}


def test_heartbeat_renews_a_claim_but_none_it_lost(lake: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(etl, "HEARTBEAT", 0.01)
    with etl.claimed(lake, "run1") as staging:
        age(lake)
        folder, deadline = folder_of(lake) / staging, time.monotonic() + 20
        while time.time() - (folder / "_alive").stat().st_mtime > 50:
            assert time.monotonic() < deadline
        (folder / "_owner.json").unlink()
        time.sleep(0.1)
        assert not (folder / "_owner.json").exists()
    assert files_of(lake) == {*OLD, *FOREIGN}


def test_of_two_runs_in_the_same_second_one_at_most_goes_on(lake: etl.Lake) -> None:
    both = threading.Barrier(2, timeout=60)

    def run(run_id: str, inside: list[str]) -> None:
        with ExitStack() as stack:
            both.wait()
            with suppress(Exception):  # A claim may go while another run reads it.
                stack.enter_context(etl.claimed(lake, run_id))
                inside.append(run_id)
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        for n in range(20):
            inside: list[str] = []
            list(pool.map(run, ("run1", "run2"), (inside, inside)))
            assert len(inside) < 2, n
            start(lake)
            assert rows_of(lake) == OLD_ROWS, n
