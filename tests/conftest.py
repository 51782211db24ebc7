"""What all the tests share: the repository's root and one Spark session."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from s3_server import Server, running_server

import etl

# The optimizing compiler doesn't pay off: without it the tests take half the CPU time.
# (Its own code cache, of 48 MB, is too small for a whole run.)
QUICK_JAVA = (
    "--driver-java-options '-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m'"
)


def wait_for_archive(archive: Path) -> None:
    """Waits until Java has written its archive, whose first bytes come last."""
    deadline, start = time.monotonic() + 120, b""
    while not any(start):
        assert time.monotonic() < deadline
        time.sleep(1)
        with suppress(FileNotFoundError), archive.open("rb") as file:
            start = file.read(4)


@pytest.fixture(scope="session", autouse=True)
def class_archive(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Spares every run of the tests a quarter of its time, but the first on a machine."""
    option = etl.archive_option()
    if "ArchiveClassesAtExit" in option:
        lake = tmp_path_factory.mktemp("archive") / "lake"
        line = [sys.executable, str(ROOT / "etl.py"), "--config", os.devnull]
        run_quickly([*line, "--output", str(lake)]).check_returncode()
        wait_for_archive(Path(shlex.split(option)[-1].partition("=")[2]))


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """The job's own session, on two cores, with settings that suit tiny tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv(
            "PYSPARK_SUBMIT_ARGS", f"--master local[2] {QUICK_JAVA} pyspark-shell"
        )
        session = etl.start_spark(etl.parse_settings(["--config", os.devnull]))
    session.conf.set("spark.sql.shuffle.partitions", 2)
    yield session
    session.stop()


def by_file(records: DataFrame, folder: Path) -> dict[str, list[Row]]:
    """Records as read from a folder, by the path of their file from there."""
    files = records.sparkSession.read.option("recursiveFileLookup", True)
    path = F.col("_metadata.file_path")
    names = files.format("binaryFile").load(etl.literal(etl.to_uri(str(folder))))
    name_of = dict(names.select(F.xxhash64(path), path).collect())
    found: dict[str, list[Row]] = {}
    for row in records.orderBy("raw", *records.columns[1:2]).collect():
        name = name_of[row.file_id]
        assert row.source_file == (name if row.reason else None)
        name = unquote(name)
        assert name.startswith(f"file:{folder}/")
        found.setdefault(name[len(f"file:{folder}/") :], []).append(row)
    return found


def run_command(
    line: list[str], cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command line, with more variables in its environment."""
    return subprocess.run(
        line,
        cwd=cwd,
        env={**os.environ, **environ},
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_quickly(line: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line of the job, on a JVM that suits tiny tables."""
    options = os.environ.get("PYSPARK_SUBMIT_ARGS", f"{QUICK_JAVA} pyspark-shell")
    return run_command(line, **{"PYSPARK_SUBMIT_ARGS": options, **environ})


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marker known."""
    config.addinivalue_line("markers", "long: takes minutes; run with pytest -m long")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leaves out the long tests, unless markers are chosen on the command line."""
    if not config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The S3 server."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def sample_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The lake made of data_sample by the command, without a flag and far from UTC, and
    what the command printed."""
    cwd = tmp_path_factory.mktemp("sample")
    (cwd / "dl.cfg").touch()  # it is read instead of one beside etl.py
    done = run_command(
        [sys.executable, str(ROOT / "etl.py")],
        cwd,
        TZ="America/Los_Angeles",
        PYSPARK_SUBMIT_ARGS=f"{QUICK_JAVA} pyspark-shell",
    )
    return cwd / "lake", done
