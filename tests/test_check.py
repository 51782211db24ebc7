"""The checks before publishing: a broken key or a lost row is found and named."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from makers import play, song, write_input
from pyspark.sql import SparkSession

import etl

Lake = dict[str, list[tuple[Any, ...]]]  # rows by folder

OCTOBER = datetime(2018, 10, 31, 23, 59, 59, 999000, timezone.utc)
NOVEMBER = datetime(2018, 11, 2, 1, 25, 34, 796000, timezone.utc)

# The columns that the checks need; the primary key comes first.
COLUMNS = {
    "songplays": ("songplay_id", "start_time", "user_id", "song_id", "artist_id"),
    "users": ("user_id", "level"),
    "songs": ("song_id", "artist_id"),
    "artists": ("artist_id", "name"),
    "time": ("start_time", "hour"),
}
TYPES = {"songplay_id": pa.int64(), "hour": pa.int32()}
TYPES["start_time"] = pa.timestamp("us", "UTC")
PLAYS, SONGS = "songplays/year=2018/month=11", "songs/year=2001"
GOOD: Lake = {
    "songplays/year=2018/month=10": [(-1, OCTOBER, "8", "S1", "A1")],
    PLAYS: [(2, NOVEMBER, "8", "S1", "A1"), (3, NOVEMBER, "9", None, None)],
    "users": [("8", "free"), ("9", None)],
    "songs/year=0": [("S1", "A1")],
    SONGS: [("S2", "A2"), ("S3", "A2")],
    "artists": [("A1", "Adele"), ("A2", "Band"), ("A3", "Band"), ("A4", None)],
    "time/year=2018/month=10": [(OCTOBER, 23)],
    "time/year=2018/month=11": [(NOVEMBER, 1)],
}


def check(spark: SparkSession, lake: Lake, folder: Path) -> dict[str, int]:
    """What etl.check_tables finds in a lake, once it is written to Parquet files."""
    for name, rows in lake.items():
        columns = COLUMNS[name.split("/")[0]]
        schema = pa.schema([(of, TYPES.get(of, pa.string())) for of in columns])
        records = [dict(zip(columns, row)) for row in rows]
        (folder / name).mkdir(parents=True)
        file = folder / name / "part-0.parquet"
        pq.write_table(pa.Table.from_pylist(records, schema), file)
    place = etl.literal(etl.to_uri(str(folder)))
    tables = {name: spark.read.parquet(f"{place}/{name}") for name in etl.TABLES}
    counts = etl.check_tables(tables)
    return {name: of["rows"] for name, of in counts.items()}


def test_a_good_lake_passes_with_its_rows(spark: SparkSession, tmp_path: Path) -> None:
    rows = {"songplays": 3, "users": 2, "songs": 3, "artists": 4, "time": 2}
    assert check(spark, GOOD, tmp_path / "with [odd] {name}*") == rows


OLD = datetime(1999, 1, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("folder", "row", "error"),
    [
        (PLAYS, (-1, NOVEMBER, "9", "S2", "A2"), r"songplays\b.*\bsongplay_id"),
        ("users", ("9", "paid"), r"users\b.*\buser_id"),
        (SONGS, ("S1", "A2"), r"songs\b.*\bsong_id"),
        ("artists", ("A4", "Adele"), r"artists\b.*\bartist_id"),
        ("time/year=2018/month=11", (OCTOBER, 1), r"time\b.*\bstart_time"),
        (PLAYS, (None, NOVEMBER, "9", "S2", "A2"), r"songplays\b.*\bsongplay_id"),
        ("artists", (None, "Adele"), r"artists\b.*\bartist_id"),
        (PLAYS, (4, OLD, "9", "S2", "A2"), "songplays: .*start_time 1999"),
        (PLAYS, (4, NOVEMBER, "77", "S2", "A2"), r"songplays.*user_id 77\b"),
        (PLAYS, (4, NOVEMBER, "9", "S77", "A2"), r"songplays.*song_id S77\b"),
        (PLAYS, (4, NOVEMBER, "9", "S2", "A77"), r"songplays.*artist_id A77\b"),
        (SONGS, ("S4", "A77"), r"songs.*artist_id A77\b"),
    ],
)
def test_a_key_that_is_repeated_missing_or_lost_is_named(
    folder: str, row: tuple[Any, ...], error: str, spark: SparkSession, tmp_path: Path
) -> None:
    with pytest.raises(etl.RunError, match=f"^check failed: {error}"):
        check(spark, {**GOOD, folder: [*GOOD[folder], row]}, tmp_path)


@pytest.mark.parametrize(
    ("table", "kept"), [("songplays", "session_id = 1"), ("songs", "song_id = 'S1'")]
)
def test_a_table_that_lacks_a_row_of_the_input_is_not_published(
    table: str,
    kept: str,
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plays = [play(sessionId=1), play(sessionId=1), play(sessionId=2, song="Other")]
    source = write_input(tmp_path, [song(), song(), song(song_id="S2")], plays)
    build = getattr(etl, f"build_{table}")
    monkeypatch.setattr(etl, f"build_{table}", lambda *of: build(*of).where(kept))
    flags = [f"--input={source}", f"--output={tmp_path / 'lake'}"]
    assert etl.main(["--config", os.devnull, *flags]) == 1
    assert "error: check failed: " in capsys.readouterr().err
    assert not list((tmp_path / "lake").glob("*"))
