"""The claim, publishing and recovery, on files that are Parquet by name only: each holds
one row, which tells who has staged the file, and where."""

from __future__ import annotations

import itertools
import json
import os
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
OTHERS = ["_reports/{}.json", "_rejected/{}/part-0.json"]  # They are published, too.
NEVER = ["users/_temporary/0/part-0.parquet"]
STAGED = [name.format("run1") for name in (*NEW, *OTHERS)]
TARGETS = {name: name.replace("part-", "part-run1-") for name in STAGED}
FOREIGN = {"README.md", "users/notes.txt", "podcasts/part-0.parquet"}
OLD_ROWS = {f"run0 {name}" for name in OLD}
ROWS = {run: {f"{run} {of.format(run)}" for of in NEW} for run in ("run1", "run2")}
MakeLake = Callable[[], etl.Lake]


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
    names = {
        of for folder in (*etl.TABLES, "_records") for of in files_of(lake, folder)
    }
    names = {of for of in names if of.endswith((".parquet", ".json"))}
    rows = {(folder_of(lake) / name).read_text() for name in names}
    return rows | files_of(lake, "_staging")


@pytest.fixture
def new_lake(spark: SparkSession, tmp_path_factory: Any) -> MakeLake:
    """Makes a lake that has tables and foreign files, each time another one."""

    def make() -> etl.Lake:
        folder = tmp_path_factory.mktemp("a lake é %41 ")
        fill(folder, "run0", *OLD, *FOREIGN)
        return etl.open_lake(spark, f"file://{folder}")

    return make


@pytest.fixture
def lake(new_lake: MakeLake) -> etl.Lake:
    """A lake that has tables and foreign files."""
    return new_lake()


def start(lake: etl.Lake, run_id: str = "next", break_lock: bool = False) -> None:
    """A run that stages nothing."""
    with etl.claimed(lake, run_id, break_lock):
        pass


def publish(lake: etl.Lake, run_id: str = "run1", break_lock: bool = False) -> None:
    """A run that replaces all tables."""
    with etl.claimed(lake, run_id, break_lock) as staging:
        fill(folder_of(lake) / staging, run_id, *NEW, *OTHERS, *NEVER)
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
    """Leaves what a run leaves that was killed when it had moved some of its files, the
    first of which are still at their source, too, and deleted some replaced ones."""
    folder, staging = folder_of(lake), folder_of(lake) / "_staging/run1"
    fill(staging, "run1", *NEW, *OTHERS, *NEVER, "_alive", "_owner.json")
    journal = json.dumps({"staged": TARGETS, "replaced": OLD})
    (staging / "_journal.json").write_text(journal)
    for name in STAGED[:moved]:
        (folder / TARGETS[name]).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).rename(folder / TARGETS[name])
    fill(staging, "run1", *NEW[:copied])
    for name in OLD[:deleted]:
        (folder / name).unlink()
    age(lake)


def before(wanted: int | str, text: str, action: Callable[[], Any]) -> Any:
    """What watches a lake and acts before the call of a number, or before each call of a
    method, on a path that has a text in it."""
    return lambda number, moment, method, path: (
        action()
        if moment == "before" and wanted in (number, method) and text in path
        else None
    )


def test_publish_replaces_the_tables_and_no_other_file(lake: etl.Lake) -> None:
    publish(lake)
    assert rows_of(lake) == ROWS["run1"]
    assert files_of(lake) == FOREIGN | set(TARGETS.values())
    folders = filter(Path.is_dir, folder_of(lake).rglob("*"))
    assert [folder for folder in folders if not any(folder.iterdir())] == []


def test_empty_output_outlives_a_failure(spark: SparkSession, tmp_path: Path) -> None:
    lake = etl.open_lake(spark, f"file://{tmp_path}")
    with suppress(ZeroDivisionError), etl.claimed(lake, "run1"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


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


def test_replaced_file_that_stays_goes_at_the_next_start(lake: etl.Lake) -> None:
    """Hadoop's local file system returns False for it and raises nothing."""
    watch = before("delete", "/users/part-run0", lambda: False)
    message = error_of(publish, watched(lake, watch))
    assert "users/part-run0-0.parquet" in message and "the next start" in message
    start(lake)
    assert rows_of(lake) == ROWS["run1"]


def long(*values: Any) -> list[Any]:
    """Parameters of the long tests."""
    tuples = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*value, marks=pytest.mark.long) for value in tuples]


def fail(lake: etl.Lake) -> None:
    """Raises an IOException of Hadoop's, that the lake's folder is not empty."""
    lake.fs.delete(lake.path(""), False)


def faulty(lake: etl.Lake, n: int, mode: str, struck: list[str]) -> etl.Lake:
    """A lake whose n-th file-system call fails: "once" isn't made, "late" is made; from
    "down" on, none is made, which leaves what a kill leaves. Tells the calls it struck."""

    def strike(number: int, moment: str, method: str, path: str) -> None:
        hit = number >= n if mode == "down" else number == n
        if hit and moment == ("after" if mode == "late" else "before"):
            struck.append(f"{method} {path}")
            fail(lake)

    return watched(lake, strike)


@pytest.mark.parametrize("mode", ["down", *long("once", "late")])
@pytest.mark.parametrize("action", ["publish", "recover", *long("break lock")])
def test_fault_at_any_call_leaves_old_or_new_tables_to_the_next_start(
    action: str, mode: str, new_lake: MakeLake
) -> None:
    for n in itertools.count(1):
        lake, struck = new_lake(), []
        bad_lake = faulty(lake, n, mode, struck)
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


def test_ctrl_c_while_moving_is_made_good_by_the_next_start(lake: etl.Lake) -> None:
    ctrl_c = partial(os.kill, os.getpid(), signal.SIGINT)
    watch = before("rename", "/users/part-0", ctrl_c)
    message = error_of(publish, watched(lake, watch))
    assert "the next start of etl.py finishes it" in message
    assert not list(folder_of(lake).glob("_staging/run1/_[ao]*"))
    start(lake)
    assert rows_of(lake) == ROWS["run1"]


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
def test_run_stopped_at_any_call_and_taken_over_changes_nothing_any_more(
    new_lake: MakeLake,
) -> None:
    for n in itertools.count(1):
        lake, found = new_lake(), set()
        watch = before(n, "", partial(take_over, lake, found))
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
    ("deleted", "damaged", "length"),
    [
        (9, "users/part-run1-0.parquet", None),
        (0, "_staging/run1/_journal.json", 0),
        (0, "_staging/run1/_journal.json", 50),
    ],
)
def test_recovery_that_is_stuck_deletes_nothing_until_the_lock_is_broken(
    deleted: int, damaged: str, length: int | None, lake: etl.Lake
) -> None:
    """A file that was moved is lost after all deletions, or the journal is cut off."""
    kill_publish(lake, moved=9, deleted=deleted)
    path = folder_of(lake) / damaged
    path.unlink() if length is None else os.truncate(path, length)
    found = files_of(lake)
    message = error_of(start, lake)
    assert damaged.split("run1/")[-1] in message and "--break-lock" in message
    assert files_of(lake) == found - {"_staging/run1/_owner.json"}
    publish(lake, "run2", break_lock=True)
    assert rows_of(lake) == ROWS["run2"]


def test_broken_lock_leaves_no_manifest_of_a_journal_that_it_discards(
    lake: etl.Lake,
) -> None:
    """Else a next run that is cut off, too, would pass for one with nothing new."""
    kill_publish(lake, moved=2)
    (folder_of(lake) / TARGETS[STAGED[0]]).unlink()
    start(lake, "run2", break_lock=True)
    assert not [of for of in files_of(lake, "_records") if "_manifest-" in of]


@pytest.mark.parametrize(
    ("moved", "lost", "rows"),
    [
        (9, ["_reports/run1.json", "_rejected/run1/part-run1-0.json"], ROWS["run1"]),
        (0, [f"_staging/run1/{NEW[0]}"], OLD_ROWS),
    ],
)
def test_lost_files_that_do_not_stop_recovery(
    moved: int, lost: list[str], rows: set[str], lake: etl.Lake
) -> None:
    """A journal of lost files is void while none is in place."""
    kill_publish(lake, moved, deleted=moved)
    for name in lost:
        (folder_of(lake) / name).unlink()
    start(lake)
    assert rows_of(lake) == rows


@pytest.mark.parametrize("answer", [None, False, "error"])
def test_file_that_is_both_staged_and_in_place_is_published_once(
    answer: Any, lake: etl.Lake
) -> None:
    """S3A copies and then deletes, and may be killed between. HDFS refuses to rename onto
    a file by False, S3A by an error."""
    kill_publish(lake, moved=len(NEW), copied=len(NEW))
    rename = partial(fail, lake) if answer == "error" else lambda: answer
    start(watched(lake, before("rename", "/part-0.parquet", rename)))
    assert rows_of(lake) == ROWS["run1"]


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
    [
        (["_owner.json", "_alive", "users/part-0.parquet"], 100, False),
        (["_owner.json", "_alive", "users/part-0.parquet"], 0, True),
        (["_alive", "users/part-0.parquet"], 0, False),
        (["_alive"], 0, False),
    ],
)
def test_dead_or_broken_claim_is_cleared_away_wherever_it_ran(
    names: list[str], seconds: float, break_lock: bool, lake: etl.Lake
) -> None:
    fill(folder_of(lake) / "_staging/elsewhere", "run0", *names)
    age(lake, seconds)
    with etl.claimed(lake, "run2", break_lock):
        assert [of.name for of in folder_of(lake).glob("_staging/*")] == ["run2"]
    assert files_of(lake) == {*OLD, *FOREIGN}


def test_heartbeat_renews_a_claim_but_none_that_is_taken_over(
    lake: etl.Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def enter(stack: ExitStack, lake: etl.Lake, run_id: str, inside: list[str]) -> None:
    """Claims a lake as long as the stack lives; tells by a list when it may go on."""
    with suppress(Exception):  # A claim may go while another run reads it.
        stack.enter_context(etl.claimed(lake, run_id))
        inside.append(run_id)


def test_of_two_runs_in_the_same_second_one_at_most_goes_on(lake: etl.Lake) -> None:
    both = threading.Barrier(2, timeout=60)

    def run(run_id: str, inside: list[str]) -> None:
        with ExitStack() as stack:
            both.wait()
            enter(stack, lake, run_id, inside)
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        for n in range(20):
            inside: list[str] = []
            list(pool.map(run, ("run1", "run2"), (inside, inside)))
            assert len(inside) < 2, n
            start(lake)
            assert rows_of(lake) == OLD_ROWS, n
