"""The tables by their names: --database with the Derby catalog of a laptop."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK_SPARK, ROOT, read_table, run_command, run_etl
from makers import play, song, write_input

# Runs the job several times on a session of its own and keeps what the catalog then has.
DRIVER = """
import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from makers import play, song, write_input
from pyspark.sql import SparkSession
import etl

spark = SparkSession.builder.enableHiveSupport().getOrCreate()
found = {}

def look(step, code=0, printed=""):
    tables = {}
    for name, table in etl.TABLES.items():
        full = f"sparkify.{name}"
        spark.catalog.refreshTable(full)
        facts = spark.sql(f"DESCRIBE EXTENDED {full}").collect()
        folders = spark.sql(f"SHOW PARTITIONS {full}").collect() if table.folders else []
        tables[name] = {
            "facts": {row.col_name: row.data_type for row in facts},
            "partitions": sorted(row[0] for row in folders),
            "rows": [row.asDict() for row in spark.table(full).collect()],
        }
    files = [*map(str, Path("lake").rglob("*.parquet"))]
    found[step] = {"code": code, "printed": printed, "tables": tables, "files": files}

def run(step, lake, *times):
    write_input(Path("in"), [song()], [play(ts=ts) for ts in times])
    flags = ["--input=in", f"--output={lake}", "--database=sparkify"]
    with redirect_stderr(StringIO()) as printed:
        code = etl.main(flags)
    look(step, code, printed.getvalue())

"""
STEPS = """
run("november", "lake", 1541121934796)
run("december", "lake", 1543713934796)
run("moved", "other lake", 1541121934796)
spark.sql("DROP TABLE sparkify.users")
spark.sql("CREATE TABLE sparkify.users (mine INT) STORED AS PARQUET")
spark.sql("INSERT INTO sparkify.users VALUES (7)")
run("managed", "lake", 1541121934796)
"""


def drive(folder: Path, steps: str) -> dict[str, Any]:
    """What the driver has found after each of some steps, in a process of its own."""
    code = f"{DRIVER}{steps}\nPath('found.json').write_text(json.dumps(found, default=str))"
    environ = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "PYSPARK_SUBMIT_ARGS": QUICK_SPARK}
    done = run_command([sys.executable, "-c", code], folder, **environ)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the driver runs."""
    return tmp_path_factory.mktemp("catalog")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What the catalog has after each run."""
    return drive(folder, STEPS)


def partitions(found: dict[str, Any], step: str) -> dict[str, list[str]]:
    """The partitions of each table after a step."""
    return {name: of["partitions"] for name, of in found[step]["tables"].items()}


def test_tables_are_external_ones_of_hives_own_format(
    found: dict[str, Any], folder: Path
) -> None:
    assert found["november"]["code"] == 0, found["november"]["printed"]
    for name, table in found["november"]["tables"].items():
        facts = table["facts"]
        assert facts["Type"] == "EXTERNAL"
        assert facts["Provider"] == "hive"
        assert facts["Serde Library"].endswith(".ParquetHiveSerDe")
        assert facts["Location"] == f"file:{folder}/lake/{name}"
    songplays = found["november"]["tables"]["songplays"]
    columns = [" ".join(of) for of in songplays["facts"].items() if of[0].islower()]
    assert ", ".join(columns[:11]) == (
        "songplay_id bigint, start_time timestamp, user_id string, level string, "
        "song_id string, artist_id string, session_id bigint, location string, "
        "user_agent string, year int, month int"
    )
    (row,) = songplays["rows"]
    assert (row["song_id"], row["year"], row["month"]) == ("S1", 2018, 11)


def test_partitions_follow_the_lake(found: dict[str, Any]) -> None:
    for step, month in {"november": 11, "december": 12}.items():
        folders = [f"year=2018/month={month}"]
        wanted = {"songplays": folders, "time": folders, "songs": ["year=2015"]}
        assert partitions(found, step) == {"users": [], "artists": [], **wanted}
        (row,) = found[step]["tables"]["songplays"]["rows"]
        assert row["month"] == month


def test_lake_that_moved_moves_the_tables_and_keeps_the_old_files(
    found: dict[str, Any], folder: Path
) -> None:
    for name, table in found["moved"]["tables"].items():
        assert table["facts"]["Location"] == f"file:{folder}/other lake/{name}"
        assert len(table["rows"]) == 1
    assert partitions(found, "moved")["time"] == ["year=2018/month=11"]
    assert found["moved"]["files"] == found["december"]["files"]


def test_managed_table_of_that_name_is_an_error_that_leaves_it_and_publishes(
    found: dict[str, Any], folder: Path
) -> None:
    managed = found["managed"]
    assert managed["code"] == 1
    assert re.search("error: .*sparkify.*users.* external", managed["printed"])
    assert managed["tables"]["users"]["rows"] == [{"mine": 7}]
    assert managed["tables"]["users"]["facts"]["Type"] == "MANAGED"
    assert [row["month"] for row in read_table(folder / "lake", "songplays")] == [11]
    assert len([*folder.glob("lake/_reports/2*")]) == 3


@pytest.mark.long
def test_later_session_finds_by_name_what_the_command_has_registered(
    tmp_path: Path,
) -> None:
    write_input(tmp_path / "in", [song()], [play()])
    (tmp_path / "dl.cfg").write_text("[LAKE]\nINPUT = in\nDATABASE = sparkify\n")
    done = run_etl(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = drive(tmp_path, "look('later')")
    assert partitions(found, "later")["songplays"] == ["year=2018/month=11"]
    assert [len(of["rows"]) for of in found["later"]["tables"].values()] == [1] * 5
