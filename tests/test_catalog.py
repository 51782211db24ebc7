"""The tables by their names: --database with the Derby catalog of a laptop."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from conftest import QUICK_SPARK, ROOT, read_table, run_command

# Runs the job several times and prints what the catalog has after each run; the first
# starts a Spark of its own, the others find a session that has Hive's catalog.
DRIVER = """
import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from makers import play, song, write_input
from pyspark.sql import SparkSession
import etl

found = {}

def look(step, code=0, printed=""):
    spark, tables = SparkSession.builder.enableHiveSupport().getOrCreate(), {}
    for name, table in etl.TABLES.items():
        full = f"`2018`.{name}"
        spark.catalog.refreshTable(full)
        facts = spark.sql(f"DESCRIBE EXTENDED {full}").collect()
        show = f"SHOW PARTITIONS {full}"
        folders = spark.sql(show).collect() if table.folders else []
        tables[name] = {
            "facts": {row.col_name: row.data_type for row in facts},
            "partitions": sorted(row[0] for row in folders),
            "rows": [row.asDict() for row in spark.table(full).collect()],
        }
    files = [*map(str, Path("lake").rglob("*.parquet"))]
    found[step] = {"code": code, "printed": printed, "tables": tables, "files": files}
    return spark

def run(step, lake, ts):
    write_input(Path("in"), [song()], [play(ts=ts)])
    flags = ["--input=in", f"--output={lake}", "--database=2018"]
    with redirect_stderr(StringIO()) as printed:
        code = etl.main(flags)
    return look(step, code, printed.getvalue())

run("november", "lake", 1541121934796).stop()
look("later")
run("december", "lake", 1543713934796)
spark = run("moved", "other lake", 1541121934796)
spark.sql("DROP TABLE `2018`.users")
spark.sql("CREATE TABLE `2018`.users (mine INT) STORED AS PARQUET")
spark.sql("INSERT INTO `2018`.users VALUES (7)")
run("managed", "lake", 1541121934796)
print(json.dumps(found, default=str))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the catalog has after each step, and the folder in which the driver ran."""
    folder = tmp_path_factory.mktemp("catalog")
    environ = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "PYSPARK_SUBMIT_ARGS": QUICK_SPARK}
    done = run_command([sys.executable, "-c", DRIVER], folder, **environ)
    assert done.returncode == 0, done.stderr
    return {"folder": folder, **json.loads(done.stdout.splitlines()[-1])}


def test_tables_are_external_ones_of_hives_own_format_that_a_later_session_finds(
    found: dict[str, Any],
) -> None:
    assert found["november"]["code"] == 0, found["november"]["printed"]
    for name, table in found["november"]["tables"].items():
        facts = table["facts"]
        assert (facts["Type"], facts["Provider"]) == ("EXTERNAL", "hive")
        assert facts["Serde Library"].endswith(".ParquetHiveSerDe")
        assert facts["Location"] == f"file:{found['folder']}/lake/{name}"
        assert len(table["rows"]) == 1
    songplays = found["november"]["tables"]["songplays"]
    columns = [" ".join(of) for of in songplays["facts"].items() if of[0].islower()]
    assert ", ".join(columns[:11]) == (
        "songplay_id bigint, start_time timestamp, user_id string, level string, "
        "song_id string, artist_id string, session_id bigint, location string, "
        "user_agent string, year int, month int"
    )
    (row,) = songplays["rows"]
    assert (row["song_id"], row["year"], row["month"]) == ("S1", 2018, 11)
    assert found["later"]["tables"] == found["november"]["tables"]


def test_partitions_follow_the_lake(found: dict[str, Any]) -> None:
    for step, month in {"november": 11, "december": 12}.items():
        folders = [f"year=2018/month={month}"]
        wanted = {"songplays": folders, "time": folders, "songs": ["year=2015"]}
        tables = found[step]["tables"]
        partitions = {name: of["partitions"] for name, of in tables.items()}
        assert partitions == {"users": [], "artists": [], **wanted}
        assert [row["month"] for row in tables["songplays"]["rows"]] == [month]


def test_lake_that_moved_moves_the_tables_and_keeps_the_old_files(
    found: dict[str, Any],
) -> None:
    tables = found["moved"]["tables"]
    for name, table in tables.items():
        assert table["facts"]["Location"] == f"file:{found['folder']}/other lake/{name}"
        assert len(table["rows"]) == 1
    assert tables["time"]["partitions"] == ["year=2018/month=11"]
    assert found["moved"]["files"] == found["december"]["files"]


def test_managed_table_of_that_name_is_an_error_that_leaves_it_and_publishes(
    found: dict[str, Any],
) -> None:
    managed = found["managed"]
    assert managed["code"] == 1
    assert re.search("error: .*2018.*users.* external", managed["printed"])
    assert managed["tables"]["users"]["rows"] == [{"mine": 7}]
    assert managed["tables"]["users"]["facts"]["Type"] == "MANAGED"
    lake = found["folder"] / "lake"
    assert [row["month"] for row in read_table(lake, "songplays")] == [11]
    assert len([*lake.glob("_reports/2*")]) == 3
