"""What the tests share: the repository's root, one Spark, the command, its tables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable
from urllib.parse import unquote

import pyarrow.dataset as ds
import pytest
from pyspark.sql import DataFrame, Row, SparkSession

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import etl

# Tiny tables need few tasks and no optimizing compiler, whose absence halves the tests'
# CPU time. (The code cache that Java chooses without it is too small for a whole run.)
# Spark forgets what it compiled for a run before the next one, unless it may keep more.
QUICK_SPARK = (
    "--master local[2] --conf spark.sql.shuffle.partitions=2 "
    "--conf spark.sql.codegen.cache.maxEntries=2000 --driver-java-options "
    "'-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m' pyspark-shell"
)
# A line that the job prints before its last one.
STEP = re.compile(
    r"Sparkify ETL: .* -> .*|[\d,]+ files: .*|All files are read, .*|"
    r"(\d/5|Register) .*\. +\d+ s"
)
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """A session of the job's own, on a Spark that the job has started for S3, too."""
    flags = ["--config", os.devnull, "--output", "s3a://any-bucket/lake"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_SUBMIT_ARGS", QUICK_SPARK)
        session = etl.start_spark(etl.parse_settings(flags), {})
    yield session
    session.stop()


def run_command(line: Sequence[str], cwd: Path | None = None, **environ: str) -> Done:
    """Runs a command line, with more variables in its environment."""
    env = {**os.environ, **environ}
    return subprocess.run(
        line, cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=600
    )


def run_etl(*flags: str, **environ: str) -> Done:
    """Runs `python etl.py` here, in a process and on a Spark of its own."""
    line = [sys.executable, str(ROOT / "etl.py"), *flags]
    return run_command(line, PYSPARK_SUBMIT_ARGS=QUICK_SPARK, **environ)


def error_in(printed: str) -> str:
    """The line that tells an error, the last one; any others are the job's steps."""
    *steps, line = printed.splitlines()
    assert line.startswith("etl.py: error: ")
    assert [of for of in steps if not STEP.fullmatch(of)] == []
    return line


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command with some flags and a dl.cfg, which has to end with a code, and
    gives its error. Wrong settings, code 2, are told before any step and file."""

    def fail(code: int, *flags: str, config: str = "") -> str:
        Path("dl.cfg").write_text(config, encoding="utf-8", errors="surrogateescape")
        before = sorted(Path().rglob("*"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JAVA_HOME", os.devnull)  # No Spark can be started.
            assert etl.main(flags) == code
        printed = capsys.readouterr()
        line = error_in(printed.err)
        assert printed.out == ""
        if code == 2:
            assert (printed.err, sorted(Path().rglob("*"))) == (f"{line}\n", before)
        return line

    return fail


def read_files(
    spark: SparkSession, folder: Path, files: Mapping[str, str | bytes], kind: str
) -> DataFrame:
    """The records of songs' or events' files, by their paths, which it writes."""
    for name, content in files.items():
        path = folder / etl.SOURCES[kind] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    place = etl.to_uri(f"{folder}/{etl.SOURCES[kind]}")
    texts = etl.read_texts(etl.open_files(spark, place), place)
    records = etl.read_records(kind, texts)
    return records.drop(*etl.MONTH) if kind == "events" else records


def by_file(records: DataFrame, folder: Path) -> dict[str, list[Row]]:
    """Records as read from a folder, by the path of their file from there."""
    found: dict[str, list[Row]] = {}
    for row in records.collect():
        _, _, name = unquote(row.source_file).partition("_data/")
        found.setdefault(name, []).append(row)
    return found


def read_table(lake: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a table in the order of its key, with its folders as columns."""
    files = list(map(str, (lake / table).rglob("*.parquet")))
    assert files, f"{lake}/{table} has no files"
    data = ds.dataset(files, partitioning="hive", partition_base_dir=f"{lake}/{table}")
    rows = data.to_table().to_pylist()
    return sorted(rows, key=lambda row: row[etl.TABLES[table].key])


def pytest_configure(config: pytest.Config) -> None:
    """Leaves out the long tests, unless markers are chosen on the command line."""
    config.addinivalue_line("markers", "long: takes minutes; run with pytest -m long")
    config.option.markexpr = config.option.markexpr or "not long"
