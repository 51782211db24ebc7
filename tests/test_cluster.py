"""The job on a Spark standalone cluster of this machine: a master and two workers."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import py4j as py4j_package
import pyspark
import pytest
from conftest import ROOT, run_command
from pyspark.sql import SparkSession
from s3_server import free_port

import etl

SPARK = Path(pyspark.__file__).parent
TABLES = ("songplays", "users", "songs", "artists", "time")


@dataclass(frozen=True)
class Cluster:
    """A standalone cluster: its master's URL and its workers' processes."""

    master: str
    workers: list[subprocess.Popen[bytes]]


def wait_for(log: Path, text: str) -> None:
    """Returns when a log has a text."""
    end = time.monotonic() + 60
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A master and two workers of a core each, with a process group for each."""
    port = free_port()
    master, processes = f"spark://127.0.0.1:{port}", []

    def start(name: str, *arguments: str) -> Path:
        log = tmp_path / f"{name}.log"
        kind = f"org.apache.spark.deploy.{name.split('-')[0]}"
        with log.open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [SPARK / "bin" / "spark-class", kind, *arguments],
                    env={
                        **os.environ,
                        "SPARK_HOME": str(SPARK),
                        "SPARK_LOCAL_IP": "127.0.0.1",
                        "SPARK_LOCAL_DIRS": str(tmp_path / f"{name}-local"),
                        "PYSPARK_PYTHON": sys.executable,
                    },
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return log

    host = ("--host", "127.0.0.1", "--webui-port", "0")
    try:
        log = start("master.Master", *host, "--port", str(port))
        wait_for(log, "New state: ALIVE")
        size = ("--cores", "1", "--memory", "1g")
        for number in (1, 2):
            folder = str(tmp_path / f"work{number}")
            log = start(
                f"worker.Worker-{number}", *host, *size, "--work-dir", folder, master
            )
            wait_for(log, "Successfully registered with master")
        yield Cluster(master, processes[1:])
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def submit(master: str, source: Path, lake: Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts the job by spark-submit; the log gets what it prints."""
    settings = {
        "spark.driver.host": "127.0.0.1",
        "spark.executor.memory": "800m",
        "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1",
        "spark.ui.enabled": "false",
    }
    conf = [f"--conf={key}={value}" for key, value in settings.items()]
    with log.open("wb") as output:
        return subprocess.Popen(
            [
                SPARK / "bin" / "spark-submit",
                f"--master={master}",
                *conf,
                ROOT / "etl.py",
                f"--input={source}",
                f"--output={lake}",
            ],
            env={**os.environ, "PYSPARK_PYTHON": sys.executable},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def files_of(lake: Path, table: str) -> str:
    """A table in DuckDB's SQL."""
    return f"read_parquet('{lake}/{table}/**/*.parquet')"


def differences(one: Path, other: Path, table: str) -> int:
    """How many rows of a table aren't in both lakes."""
    tables = files_of(one, table), files_of(other, table)
    rows = "(FROM {} EXCEPT ALL FROM {})"
    both = f"{rows.format(*tables)} UNION ALL {rows.format(*tables[::-1])}"
    return duckdb.sql(f"SELECT count(*) FROM ({both})").fetchall()[0][0]


@pytest.mark.long
def test_run_that_loses_a_worker_still_makes_the_right_tables(
    spark: SparkSession, cluster: Cluster, tmp_path: Path
) -> None:
    source, lake, log = tmp_path / "in", tmp_path / "lake", tmp_path / "job.log"
    maker = [sys.executable, ROOT / "tests" / "bench" / "make_data.py", source]
    size = ("--songs=300", "--events=100000", "--days=12", "--users=500")
    subprocess.run([*maker, *size], check=True)
    job = submit(cluster.master, source, lake, log)
    while job.poll() is None and not [*lake.glob("_staging/*/songplays/**/*.parquet")]:
        time.sleep(0.05)
    assert job.poll() is None, log.read_text()
    os.killpg(cluster.workers[0].pid, signal.SIGKILL)
    assert job.wait(timeout=600) == 0, log.read_text()
    print(log.read_text())
    assert re.search("Lost executor .* on 127.0.0.1", log.read_text())

    expected = tmp_path / "expected"
    assert etl.main([f"--input={source}", f"--output={expected}"]) == 0
    for table in TABLES:
        assert differences(lake, expected, table) == 0, table
    plays = duckdb.sql(f"SELECT count(*) FROM {files_of(lake, 'songplays')}")
    assert plays.fetchall()[0][0] > 50_000


def make_spark_home(folder: Path, master: str) -> Path:
    """A Spark home as EMR has it: jars and python side by side, settings in conf."""
    for name in ("bin", "jars"):
        (folder / name).symlink_to(SPARK / name)
    no_jars = shutil.ignore_patterns("jars", "__pycache__", "examples", "licenses")
    shutil.copytree(SPARK, folder / "python" / "pyspark", ignore=no_jars)
    (folder / "python" / "lib").mkdir()
    py4j = Path(py4j_package.__file__).parent
    version = importlib.metadata.version("py4j")
    target = folder / "python" / "lib" / f"py4j-{version}-src"
    shutil.make_archive(str(target), "zip", py4j.parent, py4j.name)
    (folder / "conf").mkdir()
    (folder / "conf" / "spark-defaults.conf").write_text(
        f"spark.master {master}\nspark.driver.host 127.0.0.1\n"
        "spark.executor.memory 800m\nspark.ui.enabled false\n"
    )
    return folder


@pytest.mark.long
def test_python_without_pyspark_runs_on_the_spark_home_and_its_master(
    sample_run: tuple[Path, subprocess.CompletedProcess[str]],
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    home = tmp_path / "spark home"
    home.mkdir()
    make_spark_home(home, cluster.master)
    done = run_command(
        # -S: without the packages that are installed
        [sys.executable, "-S", str(ROOT / "etl.py"), f"--output={tmp_path / 'lake'}"],
        tmp_path,
        SPARK_HOME=str(home),
        PYSPARK_PYTHON=sys.executable,
    )
    assert done.returncode == 0, done.stderr
    assert f"on {cluster.master}" in done.stderr
    for table in TABLES:
        assert differences(tmp_path / "lake", sample_run[0], table) == 0, table
