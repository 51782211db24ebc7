"""What all the tests share: the repository's root, one Spark, one S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow.dataset as ds
import pytest
from pyspark.sql import DataFrame, Row, SparkSession

if TYPE_CHECKING:
    from s3_server import Server

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import etl

# Tiny tables need few tasks and no optimizing compiler, whose absence halves the tests'
# CPU time. (The code cache that Java chooses without it is too small for a whole run.)
QUICK_SPARK = (
    "--master local[2] --conf spark.sql.shuffle.partitions=2 --driver-java-options "
    "'-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m' pyspark-shell"
)


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """A session of the job's own, on a Spark that the job has started for S3, too."""
    flags = ["--config", os.devnull, "--output", "s3a://any-bucket/lake"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_SUBMIT_ARGS", QUICK_SPARK)
        session = etl.start_spark(etl.parse_settings(flags), {})
    yield session
    session.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The S3 server."""
    from s3_server import running_server  # Importing moto takes seconds.

    with running_server() as server:
        yield server


def run_command(
    line: Sequence[str], cwd: Path | None = None, **environ: str
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


def run_etl(
    *flags: str, cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python etl.py` in a process of its own, on a Spark that suits tiny tables.

    The dl.cfg of cwd is read, if cwd is given and has one, but never the repository's.
    """
    own_config = cwd is not None and (cwd / "dl.cfg").exists()
    config = () if own_config else ("--config", os.devnull)
    line = [sys.executable, str(ROOT / "etl.py"), *config, *flags]
    return run_command(line, cwd, **{"PYSPARK_SUBMIT_ARGS": QUICK_SPARK, **environ})


def read_files(
    spark: SparkSession, folder: Path, files: Mapping[str, str | bytes], kind: str
) -> DataFrame:
    """The records of some songs' or events' files, by their paths, which are written."""
    for name, content in files.items():
        path = folder / etl.SOURCES[kind] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(data)
    place = etl.to_uri(f"{folder}/{etl.SOURCES[kind]}")
    records = etl.read_records(kind, etl.open_files(spark, place), place)
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
