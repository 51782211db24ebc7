"""The lake made of data_sample, as other tools than Spark read it.

Every expected value was counted or looked up in data_sample by hand.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

TABLES = ("songplays", "users", "songs", "artists", "time")


@pytest.fixture(scope="module")
def lake(sample_run: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """The lake's folder."""
    folder, done = sample_run
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def db(lake: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with the five tables as views; `ms` is start_time as in the log."""
    with duckdb.connect() as connection:
        for table in TABLES:
            ms = (
                ", epoch_ms(start_time) AS ms" if table in ("songplays", "time") else ""
            )
            connection.execute(
                f"CREATE VIEW {table} AS SELECT *{ms} "
                f"FROM read_parquet('{lake}/{table}/**/*.parquet', hive_partitioning=true)"
            )
        yield connection


def ask(db: duckdb.DuckDBPyConnection, query: str) -> list[tuple[Any, ...]]:
    """The rows that a query finds."""
    return db.execute(query).fetchall()


def play(db: duckdb.DuckDBPyConnection, ms: int, user_id: str) -> tuple[Any, ...]:
    """The song_id and artist_id of the only play of a user at a time of the log."""
    (found,) = ask(
        db,
        "SELECT song_id, artist_id FROM songplays "
        f"WHERE ms = {ms} AND user_id = '{user_id}'",
    )
    return found


# --- Format ---------------------------------------------------------------------------

INSTANT = "timestamp[us, tz=UTC]"
COLUMNS = {
    "songplays": [
        ("songplay_id", "int64"),
        ("start_time", INSTANT),
        ("user_id", "string"),
        ("level", "string"),
        ("song_id", "string"),
        ("artist_id", "string"),
        ("session_id", "int64"),
        ("location", "string"),
        ("user_agent", "string"),
    ],
    "users": [
        ("user_id", "string"),
        ("first_name", "string"),
        ("last_name", "string"),
        ("gender", "string"),
        ("level", "string"),
    ],
    "songs": [
        ("song_id", "string"),
        ("title", "string"),
        ("artist_id", "string"),
        ("duration", "double"),
    ],
    "artists": [
        ("artist_id", "string"),
        ("name", "string"),
        ("location", "string"),
        ("latitude", "double"),
        ("longitude", "double"),
    ],
    "time": [
        ("start_time", INSTANT),
        ("hour", "int32"),
        ("day", "int32"),
        ("week", "int32"),
        ("weekday", "int32"),
    ],
}


@pytest.mark.parametrize("table", TABLES)
def test_files_have_exactly_the_columns_of_the_contract(table: str, lake: Path) -> None:
    files = list((lake / table).rglob("*.parquet"))
    assert files
    for file in files:
        columns = [(column.name, str(column.type)) for column in pq.read_schema(file)]
        assert columns == COLUMNS[table]


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_compressed_with_snappy(table: str, lake: Path) -> None:
    for file in (lake / table).rglob("*.parquet"):
        row_group = pq.ParquetFile(file).metadata.row_group(0)
        codecs = {row_group.column(n).compression for n in range(row_group.num_columns)}
        assert codecs == {"SNAPPY"}


@pytest.mark.parametrize("table", ["songplays", "time"])
def test_timestamps_are_microseconds_adjusted_to_utc(table: str, lake: Path) -> None:
    (file,) = (lake / table).rglob("*.parquet")
    schema = pq.ParquetFile(file).schema
    start_time = schema.column(schema.names.index("start_time"))
    assert start_time.physical_type == "INT64"
    assert "isAdjustedToUTC=true, timeUnit=microseconds" in str(start_time.logical_type)


@pytest.mark.parametrize("table", ["songplays", "time"])
def test_plays_lie_in_folders_of_year_and_month(table: str, lake: Path) -> None:
    (file,) = (lake / table).rglob("*.parquet")
    assert file.parent == lake / table / "year=2018" / "month=11"


def test_songs_lie_in_folders_of_the_year(lake: Path) -> None:
    folders = {folder.name for folder in (lake / "songs").iterdir()}
    assert len(folders) == 39
    assert {"year=0", "year=1958", "year=2010"} < folders
    assert {file.parent.parent for file in lake.glob("songs/**/*.parquet")} == {
        lake / "songs"
    }


@pytest.mark.parametrize("table", ["users", "artists"])
def test_a_table_without_folders_is_one_file(table: str, lake: Path) -> None:
    (file,) = (lake / table).rglob("*")
    assert file.suffix == ".parquet"


# --- Keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "rows"),
    [("songplays", 744), ("users", 23), ("songs", 70), ("artists", 44), ("time", 743)],
)
def test_table_has_the_rows_counted_by_hand(
    table: str, rows: int, db: duckdb.DuckDBPyConnection
) -> None:
    assert ask(db, f"SELECT count(*) FROM {table}") == [(rows,)]


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("songplays", "songplay_id"),
        ("users", "user_id"),
        ("songs", "song_id"),
        ("artists", "artist_id"),
        ("time", "start_time"),
    ],
)
def test_primary_key_is_unique_and_never_null(
    table: str, key: str, db: duckdb.DuckDBPyConnection
) -> None:
    assert ask(
        db, f"SELECT count(*) - count(DISTINCT {key}), count(*) = 0 FROM {table}"
    ) == [(0, False)]


@pytest.mark.parametrize(
    ("table", "column", "owner"),
    [
        ("songplays", "user_id", "users"),
        ("songplays", "song_id", "songs"),
        ("songplays", "artist_id", "artists"),
        ("songplays", "start_time", "time"),
        ("songs", "artist_id", "artists"),
    ],
)
def test_foreign_key_finds_its_row(
    table: str, column: str, owner: str, db: duckdb.DuckDBPyConnection
) -> None:
    lost = f"{column} IS NOT NULL AND {column} NOT IN (SELECT {column} FROM {owner})"
    assert ask(
        db,
        f"SELECT count({column}) = 0, count(*) FILTER (WHERE {lost}) FROM {table}",
    ) == [(False, 0)]


def test_plays_know_their_song_and_artist(db: duckdb.DuckDBPyConnection) -> None:
    assert ask(db, "SELECT count(song_id), count(artist_id) FROM songplays") == [
        (99, 440)
    ]


# --- Values ---------------------------------------------------------------------------


def test_start_times_are_the_milliseconds_of_the_log(
    db: duckdb.DuckDBPyConnection,
) -> None:
    of_mina = ask(
        db, "SELECT epoch_us(start_time) FROM songplays WHERE user_id = '91' ORDER BY 1"
    )
    assert of_mina == [
        (1543396732796000,),
        (1543396962796000,),
        (1543397192796000,),
        (1543515131796000,),
        (1543563600796000,),
    ]
    assert ask(db, "SELECT min(ms) FROM time") == [(1543363621281,)]


@pytest.mark.parametrize(
    ("ms", "row"),
    [
        # Wednesday 2018-11-28 00:07:01.281 UTC, which in California is a Tuesday
        (1543363621281, (0, 28, 48, 11, 2018, 4)),
        # Wednesday 2018-11-28 09:18:52.796 UTC
        (1543396732796, (9, 28, 48, 11, 2018, 4)),
        # Friday 2018-11-30 17:56:13.623 UTC
        (1543600573623, (17, 30, 48, 11, 2018, 6)),
    ],
)
def test_time_is_split_in_utc(
    ms: int, row: tuple[int, ...], db: duckdb.DuckDBPyConnection
) -> None:
    columns = "hour, day, week, month, year, weekday"
    assert ask(db, f"SELECT {columns} FROM time WHERE ms = {ms}") == [row]


def test_play_has_all_its_values(db: duckdb.DuckDBPyConnection) -> None:
    columns = "ms, user_id, level, song_id, artist_id, session_id, location, user_agent"
    safari = (
        '"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_9_4) AppleWebKit/537.36 '
        '(KHTML, like Gecko) Chrome/36.0.1985.143 Safari/537.36"'
    )
    assert ask(
        db, f"SELECT {columns}, year, month FROM songplays WHERE ms = 1543396732796"
    ) == [
        (
            1543396732796,
            "91",
            "free",
            "SODYYCC12A7776C5A6",
            "ARDYYCC1187B76C5A6",
            901,
            "Kelp Harbor-Saltlick, OR",
            safari,
            2018,
            11,
        )
    ]


def test_song_has_all_its_values(db: duckdb.DuckDBPyConnection) -> None:
    columns = "song_id, title, artist_id, duration, year"
    assert ask(
        db, f"SELECT {columns} FROM songs WHERE song_id = 'SOADCCO12AA9CB3C82'"
    ) == [
        (
            "SOADCCO12AA9CB3C82",
            "Baile Del Paraguas",
            "ARADCCO1187BCB3C82",
            262.16444,
            1998,
        )
    ]


def test_play_delivered_twice_is_one_row(db: duckdb.DuckDBPyConnection) -> None:
    assert ask(
        db, "SELECT user_id, session_id FROM songplays WHERE ms = 1543535435874"
    ) == [("1", 29)]


def test_plays_of_one_moment_are_two_rows_and_one_time(
    db: duckdb.DuckDBPyConnection,
) -> None:
    assert ask(
        db, "SELECT user_id FROM songplays WHERE ms = 1543493640796 ORDER BY user_id"
    ) == [("93",), ("94",)]
    assert ask(db, "SELECT count(*) FROM time WHERE ms = 1543493640796") == [(1,)]


@pytest.mark.parametrize(
    ("ms", "song_id"),
    [
        (1543440120796, "SOUTOOO12AF054AC6A"),  # 181.0 s is near to 180.5
        (1543440360796, "SOFLSRR12A8E8C261B"),  # 299.0 s is near to 300.5
        (1543440600796, "SOFLSRR12A8E8C261B"),  # 240.5 s is as near to both
    ],
)
def test_of_two_songs_named_alike_the_nearest_in_length_wins(
    ms: int, song_id: str, db: duckdb.DuckDBPyConnection
) -> None:
    assert play(db, ms, "92") == (song_id, "ARUTOOO1187B54AC6A")


@pytest.mark.parametrize(
    ("ms", "song_id", "artist_id"),
    [
        (1543439400796, "SOZJGII12AB3E5B908", "ARZJGII1187BE5B908"),  # Syrup Society
        (1543439640796, "SOKBKLL12A521D32B9", "ARKBKLL1187B1D32B9"),  # Waffle Embargo
        (1543439880796, None, "ARMIAVG1187B1816A8"),  # Polite Volcano has no such song
    ],
)
def test_title_of_several_artists_is_told_apart_by_the_artist(
    ms: int, song_id: str | None, artist_id: str, db: duckdb.DuckDBPyConnection
) -> None:
    assert play(db, ms, "92") == (song_id, artist_id)


@pytest.mark.parametrize(
    ("ms", "song_id", "artist_id"),
    [
        (1543493400796, "SOQDWUU12A2CC39FCC", "ARFLSRR1187B8C261B"),  # Porch Light
        (1543493640796, "SOAWAXX12ACAFB197D", "ARQDWUU1187BC39FCC"),  # Fuse Box
        (1543493880796, None, None),  # Attic Noise is of neither
        (1543494120796, None, None),  # "juniper static" is another name
    ],
)
def test_two_artists_of_one_name_are_told_apart_by_the_song_alone(
    ms: int, song_id: str | None, artist_id: str | None, db: duckdb.DuckDBPyConnection
) -> None:
    assert play(db, ms, "93") == (song_id, artist_id)


@pytest.mark.parametrize(
    ("ms", "song_id", "artist_id"),
    [
        (1543587000796, "SOLOFBA12A6932932E", "ARAWAXX1187BFB197D"),  # Lantern Choir
        (1543587200796, "SOLOFBA12A6932932E", "ARAWAXX1187BFB197D"),  # with Maude
        (1543587400796, "SOWGJED12A076A0CDF", "ARAWAXX1187BFB197D"),  # of both
        (1543587600796, None, "ARAWAXX1187BFB197D"),  # with Maude, not in the catalogue
        (1543587800796, "SOGYNHG12AA5A18690", "ARLOFBA1187B32932E"),  # Otto Plum
        (1543588000796, None, "ARLOFBA1187B32932E"),  # with The Pits
    ],
)
def test_artist_is_found_by_any_of_the_names_in_the_catalogue(
    ms: int, song_id: str | None, artist_id: str, db: duckdb.DuckDBPyConnection
) -> None:
    assert play(db, ms, "94") == (song_id, artist_id)


@pytest.mark.parametrize(
    ("artist_id", "name", "location", "latitude", "longitude"),
    [
        # over "Lantern Choir & Maude", whose place isn't known
        ("ARAWAXX1187BFB197D", "The Lantern Choir", "Wickham Deep, Wales", 52.4, -3.7),
        # over "Otto Plum & The Pits", which is longer
        ("ARLOFBA1187B32932E", "Otto Plum", None, None, None),
        # the number 112 in the catalogue
        ("ARDYYCC1187B76C5A6", "112", None, None, None),
    ],
)
def test_artist_is_the_most_complete_of_the_records_and_then_the_shortest_named(
    artist_id: str,
    name: str,
    location: str | None,
    latitude: float | None,
    longitude: float | None,
    db: duckdb.DuckDBPyConnection,
) -> None:
    assert ask(db, f"SELECT * FROM artists WHERE artist_id = '{artist_id}'") == [
        (artist_id, name, location, latitude, longitude)
    ]


def test_artist_that_is_a_number_in_the_log_is_found(
    db: duckdb.DuckDBPyConnection,
) -> None:
    emergency_kazoo = ("SODYYCC12A7776C5A6", "ARDYYCC1187B76C5A6")
    assert play(db, 1543396732796, "91") == emergency_kazoo  # artist "112"
    assert play(db, 1543396962796, "91") == emergency_kazoo  # artist 112


def test_users_are_as_their_latest_event_has_them(
    db: duckdb.DuckDBPyConnection,
) -> None:
    assert ask(
        db, "SELECT * FROM users WHERE user_id IN ('91', '92', '93') ORDER BY user_id"
    ) == [
        ("91", "Mina", "Brightwater", "F", "paid"),
        ("92", "Iva", "Thistlewood", "F", "paid"),
        ("93", "Žofie", "Jířová", "F", "free"),
    ]
    # All that user 92 played came before the upgrade, at whose moment are three events.
    assert ask(db, "SELECT DISTINCT level FROM songplays WHERE user_id = '92'") == [
        ("free",)
    ]


def test_queries_of_the_readme_run_as_written(
    lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lake.parent)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    songs, artists, locations, hours = (
        duckdb.sql(query).fetchall()
        for query in re.findall(r"```sql\n(.*?)```", readme, re.DOTALL)
    )
    assert songs[0] == ("Dunk Me Twice", "The Biscuit Cartel", 15)
    assert [row[:2] for row in artists[:3]] == [
        ("The Biscuit Cartel", 76),
        ("Señora Tornado", 40),
        ("Admiral Otter", 32),
    ]
    assert len(locations) == 10
    assert sum(free + paid for _, free, paid in hours) == 744
