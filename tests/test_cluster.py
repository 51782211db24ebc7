"""The job on a Spark that is given: a Spark home, a cluster on this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyspark
import pytest
from conftest import QUICK_SPARK, ROOT, read_table, run_command
from makers import play, song, write_input
from pyspark.sql import SparkSession

import etl

SPARK = Path(pyspark.__file__).parent


def test_python_without_pyspark_runs_on_the_spark_home(tmp_path: Path) -> None:
    home = tmp_path / "spark home"
    (home / "python").mkdir(parents=True)
    for name in ("bin", "jars", "python/lib"):
        (home / name).symlink_to(SPARK / name)
    (home / "python" / "pyspark").symlink_to(SPARK)
    write_input(tmp_path / "in", [song()], [play()])
    # -S: without the packages that are installed
    line = [sys.executable, "-S", "-W", "always", str(ROOT / "etl.py"), "--input=in"]
    environ = {"SPARK_HOME": str(home), "PYSPARK_SUBMIT_ARGS": QUICK_SPARK}
    done = run_command([*line, "--config", os.devnull], tmp_path, **environ)
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"(?i).*etl\.py.*warning.*", done.stderr)
    assert len(read_table(tmp_path / "lake", "songplays")) == 1


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The URL of a master of two workers with a core each; a worker's process group."""
    processes: list[subprocess.Popen[bytes]] = []
    environ = {"SPARK_HOME": str(SPARK), "SPARK_LOCAL_DIRS": str(tmp_path)}
    environ = {**os.environ, **environ, "PYSPARK_PYTHON": sys.executable}

    def start(kind: str, until: str, *arguments: str) -> str:
        log = tmp_path / f"process-{len(processes)}.log"
        line = [SPARK / "bin" / "spark-class", f"org.apache.spark.deploy.{kind}"]
        line += ["--host", "127.0.0.1", "--webui-port", "0", "--port", "0", *arguments]
        with log.open("wb") as to:
            job = subprocess.Popen(
                line, env=environ, stdout=to, stderr=to, start_new_session=True
            )
        processes.append(job)
        end = time.monotonic() + 60
        while not (found := re.search(until, log.read_text())):
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        return found[0]

    try:
        master = start("master.Master", "spark://127.0.0.1:[1-9][0-9]*")
        size = ("--cores", "1", "--memory", "1g", "--work-dir", str(tmp_path / "work"))
        for _ in range(2):
            start("worker.Worker", "registered with master", *size, master)
        yield master, processes[1].pid
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.long
def test_run_that_loses_a_worker_still_makes_the_right_tables(
    spark: SparkSession, cluster: tuple[str, int], tmp_path: Path
) -> None:
    plays = [play(itemInSession=number, ts=10**12 + number) for number in range(50_000)]
    write_input(tmp_path / "in", [song()], plays)
    master, worker = cluster
    line = [SPARK / "bin" / "spark-submit", f"--master={master}"]
    line += ["--conf=spark.driver.host=127.0.0.1", "--conf=spark.ui.enabled=false"]
    line += ["--conf=spark.sql.files.maxPartitionBytes=256k", "--executor-memory=800m"]
    flags = ["--config", os.devnull, f"--input={tmp_path}/in"]
    line += [ROOT / "etl.py", *flags, f"--output={tmp_path}/lake"]
    log, lake = tmp_path / "job.log", tmp_path / "lake"
    with log.open("wb") as output:
        job = subprocess.Popen(line, cwd=tmp_path, stdout=output, stderr=output)
    try:
        while not [*lake.glob("_staging/*/_records/events/**/*.parquet")]:
            assert job.poll() is None, log.read_text()
            time.sleep(0.05)
        os.killpg(worker, signal.SIGKILL)
        assert job.wait(timeout=600) == 0, log.read_text()
    finally:
        job.kill()
    assert re.search("Lost executor .* on 127.0.0.1", log.read_text())

    expected = tmp_path / "expected"
    etl.run(etl.parse_settings([*flags, f"--output={expected}"]))
    for table in etl.TABLES:
        assert read_table(lake, table) == read_table(expected, table), table
    assert len(read_table(lake, "songplays")) == 50_000
