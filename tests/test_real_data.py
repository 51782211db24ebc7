"""Runs on larger input: on made data against tests/bench's DuckDB; on real data, if
SPARKIFY_DATA names it, against the figures of its truth.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import duckdb
import pytest
from conftest import ROOT, run_command
from pyspark.sql import SparkSession
from test_crash import run

import etl

DATA, BENCH = os.environ.get("SPARKIFY_DATA", ""), ROOT / "tests" / "bench"

# How to count each figure of truth.json, but for those of the report.
QUERIES = {
    **{table: f"SELECT count(*) FROM {table}" for table in etl.TABLES},
    "years": "SELECT count(DISTINCT year) FROM songs",
    "songs_year_0": "SELECT count(*) FROM songs WHERE year = 0",
    "users_who_played": "SELECT count(DISTINCT user_id) FROM songplays",
    "users_paid": "SELECT count(*) FROM users WHERE level = 'paid'",
    "plays_with_song": "SELECT count(song_id) FROM songplays",
    "plays_with_artist": "SELECT count(artist_id) FROM songplays",
    "matched": "SELECT list_sort(list(DISTINCT title || ' / ' || name)) FROM songplays "
    "JOIN songs USING (song_id) JOIN artists ON artists.artist_id = songs.artist_id",
}


def parquet(lake: Path, table: str) -> str:
    """A table of a lake as DuckDB reads it."""
    return f"read_parquet('{lake}/{table}/**/*.parquet', hive_partitioning=true)"


@pytest.mark.skipif(not DATA, reason="SPARKIFY_DATA isn't set")
def test_real_data_yields_every_figure(spark: SparkSession, tmp_path: Path) -> None:
    truth = json.loads(Path(DATA, "truth.json").read_text(encoding="utf-8"))
    records = run(Path(DATA), tmp_path)["records"]
    with duckdb.connect() as db:
        for table in etl.TABLES:
            db.execute(f"CREATE VIEW {table} AS FROM {parquet(tmp_path, table)}")
        found = {of: db.sql(sql).fetchall()[0][0] for of, sql in QUERIES.items()}
    found["song_objects"], found["events"] = (of["read"] for of in records.values())
    assert {**found, "what": truth["what"]} == truth
    assert [kind["rejected"] for kind in records.values()] == [0, 0]


def test_made_data_yields_rows_of_duckdb(spark: SparkSession, tmp_path: Path) -> None:
    source, lake, other = (tmp_path / name for name in ("input", "lake", "other"))
    size = ["--songs", "500", "--events", "8000", "--days", "40"]
    for name, *arguments in (("make_data", *size), ("duckdb_etl", str(other))):
        line = [sys.executable, str(BENCH / f"{name}.py"), str(source), *arguments]
        run_command(line).check_returncode()
    run(source, lake)
    for table in etl.TABLES:
        theirs = duckdb.sql(f"FROM {parquet(other, table)}")
        ours = duckdb.sql(f"FROM {parquet(lake, table)}").select(*theirs.columns)
        assert ours.except_(theirs).fetchall() == theirs.except_(ours).fetchall() == []
        assert len(ours) == len(theirs) > 30
    found = duckdb.sql(f"FROM {parquet(lake, 'songplays')} WHERE song_id != ''")
    assert len(found) > 99
