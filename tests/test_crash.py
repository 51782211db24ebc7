"""Runs that are killed, whole process group, at every kind of step: no row is lost."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from conftest import QUICK_JAVA, ROOT
from s3_server import (
    REAL_SERVER,
    Server,
    download,
    new_bucket,
    no_aws_settings,
    objects,
    put,
)

TABLES = ("songplays", "users", "songs", "artists", "time")
Rows = dict[str, "Counter[str]"]
Files = dict[str, list[str]]


def song(number: int, year: int, title: str = "T") -> str:
    """A song record."""
    return (
        f'{{"song_id": "SO{number}", "title": "{title}", "artist_id": "AR{number}", '
        f'"artist_name": "A{number}", "year": {year}, "duration": 100.5}}'
    )


def play(ts: int, user: int, number: int) -> str:
    """A log event that plays a song."""
    return (
        f'{{"page": "NextSong", "ts": {ts}, "userId": "{user}", "sessionId": 1, '
        f'"itemInSession": 0, "song": "T", "artist": "A{number}", "level": "free"}}'
    )


OCTOBER, NOVEMBER = 1539000000000, 1542000000000
OLD = {
    "song_data/a.json": f"{song(1, 1999)}\n{song(2, 2001)}",
    "log_data/a.json": "\n".join(
        [play(OCTOBER, 1, 1), play(OCTOBER + 1, 2, 2), play(NOVEMBER, 1, 2)]
    ),
}
# A song's year, a month's plays and a user are gone, another song and user have come.
NEW = {
    "song_data/a.json": f"{song(2, 2001, 'Tea')}\n{song(3, 2010)}",
    "log_data/a.json": "\n".join(
        [play(NOVEMBER, 1, 2), play(NOVEMBER + 5, 3, 3), '{"page": "NextSong"}']
    ),
}
FOREIGN = {"README.md": b"mine", "songs/notes.txt": b"mine", "podcasts/a.parquet": b""}


@dataclass(frozen=True)
class Lake:
    """A lake on local disk, or below a prefix of a bucket."""

    uri: str
    flags: list[str]
    server: Server | None

    def files(self, with_foreign: bool = False) -> set[str]:
        """The paths of all files from the lake's root."""
        if self.server:
            bucket, _, prefix = self.uri[len("s3a://") :].partition("/")
            keys = objects(self.server, bucket)
            found = {k[len(prefix) + 1 :] for k in keys if k.startswith(f"{prefix}/")}
        else:
            root = Path(self.uri)
            files = filter(Path.is_file, root.rglob("*"))
            found = {path.relative_to(root).as_posix() for path in files}
        return found if with_foreign else found - set(FOREIGN)

    def fetch(self, folder: Path) -> Path:
        """A local copy."""
        if not self.server:
            return Path(shutil.copytree(self.uri, folder))
        bucket, _, prefix = self.uri[len("s3a://") :].partition("/")
        return download(self.server, bucket, f"{prefix}/", folder)

    def add(self, source: Path) -> None:
        """Copies a folder's files into the lake."""
        if not self.server:
            shutil.copytree(source, self.uri, dirs_exist_ok=True)
            return
        bucket, _, prefix = self.uri[len("s3a://") :].partition("/")
        for path in filter(Path.is_file, source.rglob("*")):
            name = path.relative_to(source).as_posix()
            put(self.server, bucket, f"{prefix}/{name}", path.read_bytes())


def read_rows(folder: Path) -> Rows:
    """The rows that a reader sees in the tables' Parquet files."""
    rows = {}
    for table in TABLES:
        files = [str(path) for path in (folder / table).rglob("*.parquet")]
        read = ds.dataset(
            files, partitioning="hive", partition_base_dir=str(folder / table)
        )
        rows[table] = Counter(map(repr, read.to_table().to_pylist()))
    return rows


def holds(seen: Rows, rows: Rows) -> bool:
    """Whether a reader sees all of these rows."""
    return all(not rows[table] - seen[table] for table in TABLES)


def run(
    source: Path,
    lake: Lake,
    folder: Path,
    step: str = "",
    seconds: float = 600,
    options: str = "",
    inside: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Runs the job, maybe inside another command, in a process group of its own that is
    killed at a step or after some seconds. The folder gets `steps` and `steps.json`."""
    options += f" {QUICK_JAVA}"
    folder.mkdir(exist_ok=True)
    log = folder / "steps"
    log.unlink(missing_ok=True)
    script = [str(ROOT / "tests" / "killed.py"), str(log), step]
    flags = [f"--input={source}", f"--output={lake.uri}", "--max-rejected=1"]
    with subprocess.Popen(
        [*inside, sys.executable, *script, *lake.flags, *flags],
        cwd=folder,
        env={**os.environ, "PYSPARK_SUBMIT_ARGS": f"{options} pyspark-shell"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
    return subprocess.CompletedProcess(step, process.returncode, printed)


def write_files(folder: Path, files: dict[str, str]) -> Path:
    """Makes text files below a folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@dataclass(frozen=True)
class World:
    """Where runs are killed: two inputs, the rows they yield, the old lake's files and
    the seconds of a run on the new input."""

    old: Path
    new: Path
    old_lake: Path
    old_rows: Rows
    new_rows: Rows
    seconds: float
    root: str
    flags: list[str]
    server: Server | None

    def lake(self, name: str) -> Lake:
        """A lake of a name."""
        return Lake(f"{self.root}/{name}", self.flags, self.server)

    def old_copy(self, name: str) -> Lake:
        """A new lake with the old tables, and files of others."""
        lake = self.lake(name)
        lake.add(self.old_lake)
        return lake


def make_world(folder: Path, root: str, flags: list[str], server: Any) -> World:
    """Runs the job on the old input, then on the new one."""
    old = write_files(folder / "old", OLD)
    new = write_files(folder / "new", NEW)
    lake = Lake(f"{root}/first", flags, server)
    done = run(old, lake, folder / "steps1")
    assert done.returncode == 0, done.stdout
    old_lake = lake.fetch(folder / "old lake")
    for name, content in FOREIGN.items():
        (old_lake / name).parent.mkdir(exist_ok=True)
        (old_lake / name).write_bytes(content)
    old_rows = read_rows(old_lake)
    began = time.monotonic()
    done = run(new, lake, folder / "steps2")
    assert done.returncode == 0, done.stdout
    seconds = time.monotonic() - began
    new_rows = read_rows(lake.fetch(folder / "new lake"))
    assert [sum(of.values()) for of in old_rows.values()] == [3, 2, 2, 2, 3]
    assert [sum(of.values()) for of in new_rows.values()] == [2, 2, 2, 2, 2]
    return World(old, new, old_lake, old_rows, new_rows, seconds, root, flags, server)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Lakes on local disk."""
    folder = tmp_path_factory.mktemp("local")
    return make_world(folder, str(folder / "lakes"), [], None)


@pytest.fixture(scope="module")
def s3(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Lakes in a bucket; the input is on local disk."""
    folder = tmp_path_factory.mktemp("s3")
    config = folder / "dl.cfg"
    config.write_text(server.config(), encoding="utf-8")
    with new_bucket(server) as bucket, no_aws_settings(folder):
        flags = [f"--config={config}"]
        yield make_world(folder, f"s3a://{bucket}/lakes", flags, server)


def long(*steps: str) -> list[Any]:
    """Steps of the long tests."""
    return [pytest.param(step, marks=pytest.mark.long) for step in steps]


def check_killed(world: World, steps: str, folder: Path) -> None:
    """Kills a run at a step, the next (if there is a `then`) in its recovery, and so on;
    lets one end. No reader ever misses a row, and the last run leaves nothing behind."""
    name = f"{steps.replace(' ', '-')}-{uuid.uuid4().hex[:6]}"
    lake, journal = world.old_copy(name), None
    outcome = []
    for number, step in enumerate(steps.split(" then ")):
        if step == "random":
            after = random.uniform(0.2, 1) * world.seconds
            print(f"killed after {after:.2f} s of {world.seconds:.2f}")
            killed = run(world.new, lake, folder / "killed", "", after)
        else:
            killed = run(world.new, lake, folder / "killed", step)
            assert killed.returncode == -signal.SIGKILL, killed.stdout
        copy = lake.fetch(folder / f"copy{number}")
        seen = read_rows(copy)
        assert holds(seen, world.old_rows) or holds(seen, world.new_rows), step
        if (copy / "_journal.json").exists():
            journal = json.loads((copy / "_journal.json").read_text())
        is_old, is_new = seen == world.old_rows, seen == world.new_rows
        outcome.append("old" if is_old else "new" if is_new else "both")
        left = [
            f for f in ("_staging", "_journal.json", "_lock") if (copy / f).exists()
        ]
        outcome[-1] += f" ({', '.join(left)})" if left else ""

    done = run(world.new, lake, folder / "rerun")
    assert done.returncode == 0, done.stdout
    recovered: Files = json.loads((folder / "rerun" / "steps.json").read_text())
    recovered_files = {
        f"{table}/{name}"
        for table, names in recovered.items()
        for name in names
        if f"{table}/{name}" not in FOREIGN
    }
    if (copy / "_journal.json").exists():
        staged = {n for n in journal["staged"] if not n.startswith("_")}
        assert recovered_files == staged
        assert "finished publishing" in done.stdout
        outcome.append("new")
    else:
        assert is_old or is_new
        published = {
            path.relative_to(copy).as_posix()
            for table in TABLES
            for path in (copy / table).rglob("*.parquet")
        }
        assert recovered_files == published
        assert ("deleted what" in done.stdout) == (copy / "_staging").exists()
        outcome.append("old" if is_old else "new")
    print(f"| {steps} | {' then '.join(outcome[:-1])} | {outcome[-1]} | new |")

    final = lake.fetch(folder / "final")
    assert read_rows(final) == world.new_rows
    left = lake.files(with_foreign=True)
    assert set(FOREIGN) < left
    assert {f.split("/")[0] for f in left - set(FOREIGN)} <= {
        *TABLES,
        "_reports",
        "_rejected",
    }
    folders = [path for path in final.rglob("*") if path.is_dir()]
    assert all(any(path.iterdir()) for path in folders)
    parquet = [name for name in left - set(FOREIGN) if name.endswith(".parquet")]
    assert len(parquet) == 6  # two of songs
    if world.server:
        bucket = lake.uri.split("/")[2]
        uploads = world.server.client().list_multipart_uploads(Bucket=bucket)
        assert not uploads.get("Uploads")
        assert not any(name.endswith("/") for name in left)  # a folder's marker


@pytest.mark.parametrize(
    "steps",
    [
        "move 4",
        "delete 3",
        *long(
            "create-done 1",  # of the lock
            *(f"write_table-done {n}" for n in (1, 4, 5)),
            "check_tables-done 1",
            *(f"create-done {n}" for n in (2, 3)),  # of report and journal
            *(f"move {n}" for n in (1, 2, 6, 9)),
            *(f"delete {n}" for n in (1, 5, 8)),
            *(f"delete_folder{when}" for when in (" 2", "-done 2")),
            "move 3 then move 2",
            "move 6 then delete 2",
            "delete 2 then delete 1 then delete 4",
            *["random"] * 3,
        ),
    ],
)
def test_local_run_killed_at_any_step_loses_nothing(
    steps: str, local: World, tmp_path: Path
) -> None:
    check_killed(local, steps, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "steps",
    [
        "create-done 1",
        "write_table-done 3",
        "check_tables-done 1",
        "create-done 3",
        *(f"move {n}" for n in (1, 3, 6)),
        *(f"delete {n}" for n in (1, 4)),
        "delete_folder 2",
        "delete 2 then delete 4",
        "random",
    ],
)
def test_s3_run_killed_at_any_step_loses_nothing(
    steps: str, s3: World, tmp_path: Path
) -> None:
    check_killed(s3, steps, tmp_path)


# --- Runs that fail -------------------------------------------------------------------


def check_failed(
    world: World, lake: Lake, done: Any, folder: Path, unfinished: bool = False
) -> str:
    """The one line of a run that failed, which has left the tables as they were, or with
    more rows where a publish is unfinished; a rerun makes the new tables."""
    assert done.returncode == 1, done.stdout
    (line,) = (n for n in done.stdout.splitlines() if n.startswith("etl.py: error: "))
    seen = read_rows(lake.fetch(folder / "after"))
    assert holds(seen, world.old_rows) if unfinished else seen == world.old_rows
    done = run(world.new, lake, folder / "rerun")
    assert done.returncode == 0, done.stdout
    assert read_rows(lake.fetch(folder / "final")) == world.new_rows
    assert {n.split("/")[0] for n in lake.files()} <= {*TABLES, "_reports", "_rejected"}
    return line


@pytest.mark.long
@pytest.mark.skipif(REAL_SERVER, reason="only moto's requests can be made to fail")
@pytest.mark.parametrize("fault", ["denied", "lost"])
@pytest.mark.parametrize(
    "where",
    ["_staging/.*/users/", "_journal.json", "lakes/[a-z]+-[0-9]/songs/year=2010"],
    ids=["staging", "journal", "move"],
)
def test_s3_that_fails_in_mid_run_leaves_the_tables_as_they_were(
    where: str, fault: str, s3: World, tmp_path: Path
) -> None:
    """A permission is revoked, or the connection is lost, from some object on."""
    lake = s3.old_copy(f"{fault}-{len(where) % 10}")
    down = threading.Event()

    def fails(request: dict[str, Any]) -> str | None:
        deletes = request["QUERY_STRING"].startswith("delete")
        writes = request["REQUEST_METHOD"] in ("PUT", "POST") and not deletes
        if writes and re.search(where, request["PATH_INFO"]):
            down.set()
        return fault if down.is_set() and (writes or fault == "lost") else None

    # Hadoop would try again for minutes.
    retries = "fs.s3a.retry.limit", "fs.s3a.attempts.maximum"
    options = " ".join(f"--conf spark.hadoop.{name}=1" for name in retries)
    s3.server.faults.append(fails)
    try:
        done = run(s3.new, lake, tmp_path / "failing", options=options)
    finally:
        s3.server.faults.clear()
    assert down.is_set()
    unfinished = fault == "lost" and "songs" in where  # nothing can be undone any more
    line = check_failed(s3, lake, done, tmp_path, unfinished)
    assert ("the next start of etl.py finishes it" in line) == unfinished
    print(line)


def test_full_disk_leaves_the_tables_as_they_were(local: World, tmp_path: Path) -> None:
    small, after = tmp_path / "small", tmp_path / "full"
    small.mkdir()
    script = f"""
        mount -t tmpfs -o size=80k none '{small}' || exit 77
        cp -r '{local.old_lake}/.' '{small}'
        "$@"
        code=$?
        cp -r '{small}' '{after}'
        exit $code"""
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh"]
    lake = Lake(str(small), [], None)
    done = run(local.new, lake, tmp_path / "failing", inside=inside)
    if done.returncode == 77:
        pytest.skip("no file system can be mounted here")
    line = check_failed(local, Lake(str(after), [], None), done, tmp_path)
    print(line)
    assert "No space left on device" in line


def test_write_that_fails_leaves_the_tables_as_they_were(
    local: World, tmp_path: Path
) -> None:
    lake = local.old_copy("failing")
    inside = ["sh", "-c", 'ulimit -f 1; "$@"', "sh"]  # files of 512 or 1,024 bytes
    done = run(local.new, lake, tmp_path / "failing", inside=inside)
    line = check_failed(local, lake, done, tmp_path)
    print(line)
    assert "File too large" in line


def test_second_run_at_once_is_told_of_the_first(local: World, tmp_path: Path) -> None:
    lake = local.old_copy("shared")
    flags = [f"--input={local.new}", f"--output={lake.uri}", "--max-rejected=1"]
    command = [sys.executable, str(ROOT / "etl.py"), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as first:
        while not Path(lake.uri, "_lock").exists() and first.poll() is None:
            time.sleep(0.01)
        second = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=60
        )
        assert first.poll() is None
        _, printed = first.communicate()
    assert (first.returncode, second.returncode) == (0, 1), printed
    (line,) = second.stderr.splitlines()
    assert f"process {first.pid} on {socket.gethostname()}, since 20" in line
    assert read_rows(Path(lake.uri)) == local.new_rows
