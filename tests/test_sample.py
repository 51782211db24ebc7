"""The lake made of data_sample, as other tools than Spark read it. Every expected value
was counted or looked up in data_sample by hand."""

from __future__ import annotations

import os
import shutil
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import QUICK_SPARK, ROOT, read_table, run_command
from pyspark.sql import SparkSession
from test_build import COLUMNS

import etl

Tables = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lake, made without a flag, far from UTC, and where é isn't in the locale."""
    home = tmp_path_factory.mktemp("home") / "é"
    shutil.copytree(ROOT / "data_sample", home / "data_sample")
    shutil.copy(ROOT / "etl.py", home)
    (song,) = home.rglob("TRAABLH128FE049695.json")
    song.rename(song.with_name("Žofie.json"))
    environ = {"TZ": "America/Los_Angeles", "LC_ALL": "C"}
    line = [sys.executable, str(home / "etl.py")]
    done = run_command(line, home, PYSPARK_SUBMIT_ARGS=QUICK_SPARK, **environ)
    assert done.returncode == 0, done.stderr
    return home / "lake"


@pytest.fixture(scope="module")
def tables(lake: Path) -> Tables:
    """The rows of the five tables."""
    return {table: read_table(lake, table) for table in etl.TABLES}


# Spark's names of the types in the files, where they differ.
TYPES = {"int64": "bigint", "int32": "int", "timestamp[us, tz=UTC]": "timestamp"}


@pytest.mark.parametrize("table", COLUMNS)
def test_files_are_snappy_and_have_exactly_the_columns(table: str, lake: Path) -> None:
    folders = tuple(f"{name}:" for name in etl.TABLES[table].folders)
    wanted = [of for of in COLUMNS[table].split(",") if not of.startswith(folders)]
    files = [pq.ParquetFile(path) for path in (lake / table).rglob("*.parquet")]
    assert files
    for file in files:
        types = [(of.name, str(of.type)) for of in file.schema_arrow]
        assert [f"{name}:{TYPES.get(of, of)}" for name, of in types] == wanted
        chunks = file.metadata.row_group(0).to_dict()["columns"]
        assert {of["compression"] for of in chunks} == {"SNAPPY"}


def test_files_are_few_and_lie_in_the_folders_of_their_table(lake: Path) -> None:
    files = [path.relative_to(lake) for path in lake.rglob("*") if path.is_file()]
    found = [str(path.parent) for path in files if path.parts[0] in etl.TABLES]
    years = {folder for folder in found if folder.startswith("songs/year=")}
    assert {"songs/year=0", "songs/year=1958", "songs/year=2010"} < years
    assert len(years) == 39
    month = "year=2018/month=11"
    others = ["artists", f"songplays/{month}", f"time/{month}", "users"]
    assert sorted(found) == sorted([*years, *others])
    others = ["_records", "_rejected", "_reports"]
    assert {path.parts[0] for path in files} == {*etl.TABLES, *others}


def at(ms: int) -> datetime:
    """The moment of a ts of the log."""
    return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(milliseconds=ms)


def test_tables_have_the_rows_counted_by_hand(tables: Tables) -> None:
    wanted = {"songplays": 744, "users": 23, "songs": 70, "artists": 44, "time": 743}
    assert {table: len(rows) for table, rows in tables.items()} == wanted
    plays = tables["songplays"]
    assert sum(play["song_id"] is not None for play in plays) == 99
    assert sum(play["artist_id"] is not None for play in plays) == 440


SAFARI = (
    '"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_9_4) AppleWebKit/537.36 '
    '(KHTML, like Gecko) Chrome/36.0.1985.143 Safari/537.36"'
)
SONG, ARTIST = "SODYYCC12A7776C5A6", "ARDYYCC1187B76C5A6"
CHOIR, PLUM = "ARAWAXX1187BFB197D", "ARLOFBA1187B32932E"
MINA = (at(1543396732796), "91", "free", SONG, ARTIST, 901, "Kelp Harbor-Saltlick, OR")
BAILE = ("SOADCCO12AA9CB3C82", "Baile Del Paraguas", "ARADCCO1187BCB3C82", 262.16444)
# In the order of the key, which is not among the columns of songplays.
WHOLE_ROWS = {
    "songplays": [(*MINA, SAFARI, 2018, 11)],
    "songs": [(*BAILE, 1998)],
    "artists": [
        # over "Lantern Choir & Maude", whose place isn't known
        (CHOIR, "The Lantern Choir", "Wickham Deep, Wales", 52.4, -3.7),
        (ARTIST, "112", None, None, None),  # a number in the catalogue
        (PLUM, "Otto Plum", None, None, None),  # over the longer "Otto Plum & The Pits"
    ],
    "users": [  # as their latest event has them
        ("91", "Mina", "Brightwater", "F", "paid"),
        ("92", "Iva", "Thistlewood", "F", "paid"),
        ("93", "Žofie", "Jířová", "F", "free"),
    ],
    "time": [
        # Wednesday 00:07:01.281 in UTC, which in California is a Tuesday
        (at(1543363621281), 0, 28, 48, 4, 2018, 11),
    ],
}


@pytest.mark.parametrize("table", WHOLE_ROWS)
def test_rows_have_all_their_values_in_utc(table: str, tables: Tables) -> None:
    start, wanted = int(table == "songplays"), WHOLE_ROWS[table]
    rows = (tuple(row.values())[start:] for row in tables[table])
    assert [row for row in rows if row[0] in {row[0] for row in wanted}] == wanted


# By time and user of a play: its song_id and artist_id.
MATCHES = {
    (1543440120796, "92"): ("SOUTOOO12AF054AC6A", "ARUTOOO1187B54AC6A"),  # 180.5 s
    (1543440360796, "92"): ("SOFLSRR12A8E8C261B", "ARUTOOO1187B54AC6A"),  # 300.5 s
    (1543440600796, "92"): ("SOFLSRR12A8E8C261B", "ARUTOOO1187B54AC6A"),  # as near
    (1543439400796, "92"): ("SOZJGII12AB3E5B908", "ARZJGII1187BE5B908"),  # one title
    (1543439640796, "92"): ("SOKBKLL12A521D32B9", "ARKBKLL1187B1D32B9"),  # by two
    (1543439880796, "92"): (None, "ARMIAVG1187B1816A8"),  # but not by this artist
    (1543493400796, "93"): ("SOQDWUU12A2CC39FCC", "ARFLSRR1187B8C261B"),  # two artists
    (1543493640796, "93"): ("SOAWAXX12ACAFB197D", "ARQDWUU1187BC39FCC"),  # of one name
    (1543493880796, "93"): (None, None),  # of neither
    (1543494120796, "93"): (None, None),  # name in lower case
    (1543587000796, "94"): ("SOLOFBA12A6932932E", CHOIR),  # Lantern Choir
    (1543587200796, "94"): ("SOLOFBA12A6932932E", CHOIR),  # with Maude
    (1543587400796, "94"): ("SOWGJED12A076A0CDF", CHOIR),  # of both names
    (1543587600796, "94"): (None, CHOIR),  # not in the catalogue
    (1543587800796, "94"): ("SOGYNHG12AA5A18690", PLUM),
    (1543588000796, "94"): (None, PLUM),  # with The Pits
    (1543396732796, "91"): (SONG, ARTIST),  # artist "112"
    (1543396962796, "91"): (SONG, ARTIST),  # artist 112
}


def test_plays_find_their_song_and_artist(tables: Tables) -> None:
    matches = {(at(ms), user): ids for (ms, user), ids in MATCHES.items()}
    found = {
        (row["start_time"], row["user_id"]): (row["song_id"], row["artist_id"])
        for row in tables["songplays"]
    }
    assert {key: found[key] for key in matches} == matches


def test_a_second_run_leaves_the_same_rows_and_foreign_files_alone(
    lake: Path, tables: Tables, spark: SparkSession
) -> None:
    old = {path for table in etl.TABLES for path in (lake / table).rglob("*.parquet")}
    foreign = [lake / of for of in ("songs/year=2010/a.txt", "users/_notes", "a.txt")]
    for path in foreign:
        path.write_text("mine", encoding="utf-8")
    assert etl.main(["--config", os.devnull, f"--output={lake}"]) == 0
    assert {table: read_table(lake, table) for table in etl.TABLES} == tables
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in foreign)
