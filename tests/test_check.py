"""The checks before publishing: a broken key or a lost row is found and named."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from makers import play, song, write_input
from pyspark.sql import SparkSession
from test_crash import run

import etl

OLD = datetime(1999, 1, 1, tzinfo=timezone.utc)
OCTOBER = datetime(2018, 10, 31, 23, 59, 59, 999000, timezone.utc)
NOVEMBER = datetime(2018, 11, 2, 1, 25, 34, 796000, timezone.utc)

# The columns that the checks need; the primary key comes first.
COLUMNS = {
    "songplays": "songplay_id long, start_time timestamp, user_id string, "
    "song_id string, artist_id string",
    "users": "user_id string, level string",
    "songs": "song_id string, artist_id string",
    "artists": "artist_id string, name string",
    "time": "start_time timestamp, hour int",
}
GOOD: dict[str, list[tuple[Any, ...]]] = {
    "songplays": [(-1, OCTOBER, "8", "S1", "A1"), (3, NOVEMBER, "9", None, None)],
    "users": [("8", "free"), ("9", None)],
    "songs": [("S1", "A1"), ("S2", "A2"), ("S3", "A2")],
    "artists": [("A1", "Adele"), ("A2", "Band"), ("A3", "Band"), ("A4", None)],
    "time": [(OCTOBER, 23), (NOVEMBER, 1)],
}


def check(spark: SparkSession, tables: dict[str, list[Any]]) -> dict[str, int]:
    """How many rows etl.check_tables finds in each table."""
    views = {of: spark.createDataFrame(tables[of], COLUMNS[of]) for of in tables}
    return {name: found["rows"] for name, found in etl.check_tables(views).items()}


def test_good_tables_pass_with_their_rows(spark: SparkSession) -> None:
    rows = {"songplays": 2, "users": 2, "songs": 3, "artists": 4, "time": 2}
    assert check(spark, GOOD) == rows


@pytest.mark.parametrize(
    ("table", "row", "error"),
    [
        ("songplays", (-1, NOVEMBER, "9", "S2", "A2"), r".*\bsongplay_id"),
        ("users", ("9", "paid"), r".*\buser_id"),
        ("songs", ("S1", "A2"), r".*\bsong_id"),
        ("artists", ("A4", "Adele"), r".*\bartist_id"),
        ("time", (OCTOBER, 1), r".*\bstart_time"),
        ("artists", (None, "Adele"), r".*\bartist_id"),
        ("songplays", (4, OLD, "9", "S2", "A2"), ".*start_time 1999"),
        ("songplays", (4, NOVEMBER, "77", "S2", "A2"), r".*user_id 77\b"),
        ("songplays", (4, NOVEMBER, "9", "S77", "A2"), r".*song_id S77\b"),
        ("songplays", (4, NOVEMBER, "9", "S2", "A77"), r".*artist_id A77\b"),
        ("songs", ("S4", "A77"), r".*artist_id A77\b"),
    ],
)
def test_key_that_is_repeated_missing_or_lost_is_named(
    table: str, row: tuple[Any, ...], error: str, spark: SparkSession
) -> None:
    with pytest.raises(etl.RunError, match=f"^check failed: {table}: {error}"):
        check(spark, {**GOOD, table: [*GOOD[table], row]})


@pytest.mark.parametrize(
    ("table", "kept"), [("songplays", "session_id = 1"), ("songs", "song_id = 'S1'")]
)
def test_table_that_lacks_a_row_of_the_input_is_not_published(
    table: str, kept: str, spark: SparkSession, tmp_path: Path
) -> None:
    plays = [play(sessionId=1), play(sessionId=1), play(sessionId=2, song="Other")]
    source = write_input(tmp_path, [song(), song(), song(song_id="S2")], plays)
    build = getattr(etl, f"build_{table}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(etl, f"build_{table}", lambda *of: build(*of).where(kept))
        with pytest.raises(etl.RunError, match=f"^check failed: {table}: "):
            run(source, tmp_path / "lake")
    assert list((tmp_path / "lake").iterdir()) == []
