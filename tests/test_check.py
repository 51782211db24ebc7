"""The checks before publishing, on tiny lakes written by hand."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

import etl

Lake = dict[str, list[tuple[Any, ...]]]  # rows by folder

OCTOBER = datetime(2018, 10, 31, 23, 59, 59, 999000, timezone.utc)
NOVEMBER = datetime(2018, 11, 2, 1, 25, 34, 796000, timezone.utc)

STRING, INSTANT = pa.string(), pa.timestamp("us", "UTC")
# The primary key comes first.
COLUMNS = {
    "songplays": {
        "songplay_id": pa.int64(),
        "start_time": INSTANT,
        "user_id": STRING,
        "song_id": STRING,
        "artist_id": STRING,
    },
    "users": {"user_id": STRING, "level": STRING},
    "songs": {"song_id": STRING, "artist_id": STRING},
    "artists": {"artist_id": STRING, "name": STRING},
    "time": {"start_time": INSTANT, "hour": pa.int32()},
}
# The folder of each table where a test spoils a row.
LAST = {
    "songplays": "songplays/year=2018/month=11",
    "users": "users",
    "songs": "songs/year=2001",
    "artists": "artists",
    "time": "time/year=2018/month=11",
}


@pytest.fixture
def lake() -> Lake:
    """A lake that passes every check."""
    return {
        "songplays/year=2018/month=10": [(-1, OCTOBER, "8", "S1", "A1")],
        "songplays/year=2018/month=11": [
            (2, NOVEMBER, "8", "S1", "A1"),
            (3, NOVEMBER, "9", "S2", "A2"),
        ],
        "users": [("8", "free"), ("9", None)],
        "songs/year=0": [("S1", "A1")],
        "songs/year=2001": [("S2", "A2"), ("S3", "A2")],
        "artists": [("A1", "Adele"), ("A2", "Band"), ("A3", "Band"), ("A4", None)],
        "time/year=2018/month=10": [(OCTOBER, 23)],
        "time/year=2018/month=11": [(NOVEMBER, 1)],
    }


def check(spark: SparkSession, lake: Lake, folder: Path) -> dict[str, dict[str, int]]:
    """What etl.check_tables finds in a lake, once it is written to Parquet files."""
    for name, rows in lake.items():
        columns = COLUMNS[name.split("/")[0]]
        records = [dict(zip(columns, row)) for row in rows]
        (folder / name).mkdir(parents=True)
        table = pa.Table.from_pylist(records, pa.schema(columns))
        pq.write_table(table, folder / name / "part-0.parquet")
    return etl.check_tables(spark, str(folder))


def fails(spark: SparkSession, lake: Lake, folder: Path, *words: str) -> None:
    """Asserts that the check fails with a message that has these words in this order."""
    with pytest.raises(etl.RunError, match=".*".join(rf"\b{w}\b" for w in words)):
        check(spark, lake, folder)


def test_a_good_lake_passes_with_its_counts(
    spark: SparkSession, lake: Lake, tmp_path: Path
) -> None:
    found = check(spark, lake, tmp_path)
    assert found["rows"] == {
        "songplays": 3,
        "users": 2,
        "songs": 3,
        "artists": 4,
        "time": 2,
    }
    plays_with = {"users": 3, "songs": 3, "artists": 3, "time": 3}
    assert {table: found["plays_with"][table] for table in plays_with} == plays_with


def test_a_play_needs_no_song_and_no_artist(
    spark: SparkSession, lake: Lake, tmp_path: Path
) -> None:
    lake[LAST["songplays"]] = [
        (2, NOVEMBER, "8", None, "A2"),
        (3, NOVEMBER, "9", None, None),
    ]
    plays_with = check(spark, lake, tmp_path)["plays_with"]
    assert (plays_with["songs"], plays_with["artists"]) == (1, 2)


@pytest.mark.parametrize("table", COLUMNS)
def test_an_empty_table_fails(
    spark: SparkSession, lake: Lake, tmp_path: Path, table: str
) -> None:
    others = {name: rows for name, rows in lake.items() if name.split("/")[0] != table}
    fails(spark, {**others, LAST[table]: []}, tmp_path, table, "no rows")


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("songplays", (-1, NOVEMBER, "9", "S2", "A2")),
        ("users", ("9", "paid")),
        ("songs", ("S1", "A2")),
        ("artists", ("A4", "Adele")),
        ("time", (OCTOBER, 1)),
    ],
)
def test_a_repeated_primary_key_fails(
    spark: SparkSession, lake: Lake, tmp_path: Path, table: str, row: tuple[Any, ...]
) -> None:
    lake[LAST[table]].append(row)
    key = next(iter(COLUMNS[table]))
    fails(spark, lake, tmp_path, table, key, "twice")


@pytest.mark.parametrize("table", COLUMNS)
def test_a_missing_primary_key_fails(
    spark: SparkSession, lake: Lake, tmp_path: Path, table: str
) -> None:
    lake[LAST[table]].append((None, *lake[LAST[table]][0][1:]))
    key = next(iter(COLUMNS[table]))
    fails(spark, lake, tmp_path, table, "without", key)


YEAR_1999 = datetime(1999, 1, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("holder", "row", "words"),
    [
        ("songplays", (4, YEAR_1999, "9", "S2", "A2"), ("start_time 1999", "time")),
        ("songplays", (4, NOVEMBER, "77", "S2", "A2"), ("user_id 77", "users")),
        ("songplays", (4, NOVEMBER, "9", "S77", "A2"), ("song_id S77", "songs")),
        ("songplays", (4, NOVEMBER, "9", "S2", "A77"), ("artist_id A77", "artists")),
        ("songs", ("S4", "A77"), ("artist_id A77", "artists")),
    ],
    ids=["start_time", "user_id", "song_id", "artist_id", "artist_id of a song"],
)
def test_a_foreign_key_that_finds_no_row_fails(
    spark: SparkSession,
    lake: Lake,
    tmp_path: Path,
    holder: str,
    row: tuple[Any, ...],
    words: tuple[str, str],
) -> None:
    lake[LAST[holder]].append(row)
    fails(spark, lake, tmp_path, holder, *words)


Build = Callable[..., DataFrame]


def loses_an_event(build: Build) -> Build:
    return lambda events, *of: build(events.where("userId = '8'"), *of)


def repeats_events(build: Build) -> Build:
    return lambda events, *of: build(events.unionAll(events), *of)


def keeps(condition: str) -> Callable[[Build], Build]:
    return lambda build: lambda *of: build(*of).where(condition)


@pytest.mark.parametrize(
    ("table", "fault", "line"),
    [
        ("songplays", loses_an_event, "songplays holds 2 plays, not 3"),
        ("songplays", repeats_events, "songplays holds 6 plays, not 3"),
        ("songplays", keeps("user_id = '8'"), "songplays has 1 rows, not 2"),
        ("songs", keeps("song_id = 'S1'"), "songs has 1 rows, not 2"),
    ],
)
def test_a_table_without_exactly_what_the_input_has_fails(
    table: str,
    fault: Callable[[Build], Build],
    line: str,
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    song = '{{"song_id": "S{0}", "artist_id": "A{0}", "artist_name": "N{0}"}}\n'
    play = '{{"page": "NextSong", "ts": 1, "userId": "{}", "sessionId": 1}}\n'
    for folder, record, keys in (("song", song, "12"), ("log", play, "889")):
        (tmp_path / f"{folder}_data").mkdir()
        records = "".join(map(record.format, keys))
        (tmp_path / f"{folder}_data" / "a.json").write_text(records)
    build = f"build_{table}"
    monkeypatch.setattr(etl, build, fault(getattr(etl, build)))
    flags = [f"--input={tmp_path}", f"--output={tmp_path / 'lake'}"]
    assert etl.main(["--config=/dev/null", *flags]) == 1
    assert re.search(f"check failed: {line} as in the input", capsys.readouterr().err)
    assert not (tmp_path / "lake" / "songs").exists()


SAMPLE = ["--config=/dev/null", "--max-rejected=1"]


def test_leftover_of_a_dead_task_is_not_published(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = etl.write_table

    def leave(rows: DataFrame, table: str, folder: str) -> float:
        seconds = real(rows, table, folder)
        left = Path(folder[len("file://") :], table, "_temporary", "0")
        left.mkdir(parents=True)
        (left / "part-0-left.parquet").touch()
        return seconds

    monkeypatch.setattr(etl, "write_table", leave)
    assert etl.main([*SAMPLE, f"--output={tmp_path / 'lake'}"]) == 0
    assert list(tmp_path.rglob("part-0*.parquet"))
    assert not list(tmp_path.rglob("*left.parquet"))


def test_staged_files_that_are_not_found_fail(
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(etl.LocalFiles, "sizes", lambda files, folder: {})
    assert etl.main([*SAMPLE, f"--output={tmp_path / 'lake'}"]) == 1
    line = "check failed: files of table songplays are not in file:///"
    assert line in capsys.readouterr().err
    assert not (tmp_path / "lake" / "songplays").exists()


class Silent:
    """An observation of which Spark never hears."""

    @property
    def get(self) -> dict[str, int]:
        threading.Event().wait()
        return {}


@pytest.mark.parametrize("counts", [Silent(), SimpleNamespace(get={})])
def test_plays_that_spark_has_not_counted_fail(counts: Any) -> None:
    with pytest.raises(etl.RunError, match="how many plays"):
        etl.observed(counts, patience=0.1)
