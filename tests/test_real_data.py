"""A run on real input, against figures counted by a separate program.

SPARKIFY_DATA names the folder of song_data/, log_data/ and truth.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from pyspark.sql import SparkSession

import etl

DATA = os.environ.get("SPARKIFY_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="SPARKIFY_DATA isn't set")

# How to count each figure of truth.json, but for those of the report.
QUERIES = {
    "songs": "SELECT count(*) FROM songs",
    "artists": "SELECT count(*) FROM artists",
    "years": "SELECT count(DISTINCT year) FROM songs",
    "songs_year_0": "SELECT count(*) FROM songs WHERE year = 0",
    "songplays": "SELECT count(*) FROM songplays",
    "time": "SELECT count(*) FROM time",
    "users": "SELECT count(*) FROM users",
    "users_who_played": "SELECT count(DISTINCT user_id) FROM songplays",
    "users_paid": "SELECT count(*) FROM users WHERE level = 'paid'",
    "plays_with_song": "SELECT count(song_id) FROM songplays",
    "plays_with_artist": "SELECT count(artist_id) FROM songplays",
    "matched": "SELECT list_sort(list(DISTINCT title || ' / ' || name)) "
    "FROM songplays JOIN songs USING (song_id) "
    "JOIN artists ON artists.artist_id = songs.artist_id",
}


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    """The figures that the input must yield."""
    return json.loads(Path(DATA or "", "truth.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lake made of the input."""
    folder = tmp_path_factory.mktemp("real") / "lake"
    assert etl.main(["--input", str(DATA), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def db(lake: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with the five tables as views."""
    with duckdb.connect() as connection:
        for table in ("songplays", "users", "songs", "artists", "time"):
            connection.execute(
                f"CREATE VIEW {table} AS "
                f"FROM read_parquet('{lake}/{table}/**/*.parquet', hive_partitioning=true)"
            )
        yield connection


@pytest.mark.parametrize("figure", QUERIES)
def test_table_yields_the_figure(
    figure: str, truth: dict[str, Any], db: duckdb.DuckDBPyConnection
) -> None:
    assert db.execute(QUERIES[figure]).fetchall() == [(truth[figure],)]


def test_report_yields_the_records_read(truth: dict[str, Any], lake: Path) -> None:
    (report,) = (lake / "_reports").iterdir()
    records = json.loads(report.read_text(encoding="utf-8"))["records"]
    assert records == {
        "songs": {"read": truth["song_objects"], "rejected": {}},
        "events": {"read": truth["events"], "rejected": {}},
    }


def test_every_figure_is_compared(truth: dict[str, Any]) -> None:
    assert set(truth) == {*QUERIES, "what", "song_objects", "events"}
