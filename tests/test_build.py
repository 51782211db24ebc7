"""The five tables as built from tiny inputs. Every expectation is written by hand."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import etl

Record = dict[str, Any]

# 2018-11-02 01:25:34.796 UTC
TS = 1541121934796
# Of Spark SQL: select xxhash64(1541121934796L, '39', 38L, 0L), and so on. Ids in lakes
# out there depend on them: they never change.
ID_OF_ITEM_0 = -1658796301634869044
ID_OF_ITEM_1 = 3799911967345452762
ID_WITHOUT_ITEM = -5979574363072718564


def song(**fields: Any) -> Record:
    """A song record, complete but for what is given."""
    defaults = {
        "song_id": "S1",
        "title": "Hello",
        "artist_id": "A1",
        "artist_name": "Adele",
        "artist_location": "London",
        "artist_latitude": 51.5,
        "artist_longitude": -0.1,
        "duration": 295.5,
        "year": 2015,
    }
    return {**defaults, **fields}


def event(**fields: Any) -> Record:
    """A log event, a play of song(), complete but for what is given."""
    defaults = {
        "ts": TS,
        "userId": "39",
        "sessionId": 38,
        "itemInSession": 0,
        "page": "NextSong",
        "song": "Hello",
        "artist": "Adele",
        "length": 295.5,
        "level": "free",
        "location": "Reno, NV",
        "userAgent": "Firefox",
        "firstName": "Ann",
        "lastName": "Lee",
        "gender": "F",
    }
    return {**defaults, **fields}


NULL_SONG = dict.fromkeys(song())
NULL_EVENT = dict.fromkeys(event())
KEYLESS_SONGS = [
    song(**{key: value})
    for key in ("song_id", "artist_id")
    for value in (None, "", " ")
]
LOGGED_OUT = [event(userId=user_id, page="Home") for user_id in (None, "", " ")]


def songs(spark: SparkSession, *records: Record) -> DataFrame:
    """A frame of song records, a null row among them."""
    return spark.createDataFrame([NULL_SONG, *records], etl.SONG_SCHEMA)


def events(spark: SparkSession, *records: Record) -> DataFrame:
    """A frame of log events, a null row among them."""
    return spark.createDataFrame([NULL_EVENT, *records], etl.EVENT_SCHEMA)


def songplays(spark: SparkSession, *records: Record) -> DataFrame:
    """The plays of log events, of a catalogue with one song."""
    return etl.build_songplays(events(spark, *records), songs(spark, song()))


def utc(*parts: int) -> datetime:
    """A point of time in UTC."""
    return datetime(*parts, tzinfo=timezone.utc)


def rows(frame: DataFrame) -> list[tuple[Any, ...]]:
    """A frame's rows in a stable order, with points of time in UTC."""
    # pyspark.testing's assertDataFrameEqual needs pandas in Spark 3.5.
    found = (
        tuple(v.astimezone(timezone.utc) if isinstance(v, datetime) else v for v in row)
        for row in frame.collect()
    )
    return sorted(found, key=repr)


@pytest.fixture(scope="module", params=[1, -1], ids=["in order", "reversed"])
def order(request: pytest.FixtureRequest) -> int:
    """The step that slices the input rows: no result may depend on their order."""
    return request.param


# --- Columns --------------------------------------------------------------------------

COLUMNS = {
    "songs": "song_id:string,title:string,artist_id:string,year:int,duration:double",
    "artists": "artist_id:string,name:string,location:string,latitude:double,"
    "longitude:double",
    "users": "user_id:string,first_name:string,last_name:string,gender:string,"
    "level:string",
    "time": "start_time:timestamp,hour:int,day:int,week:int,month:int,year:int,"
    "weekday:int",
    "songplays": "songplay_id:bigint,start_time:timestamp,user_id:string,level:string,"
    "song_id:string,artist_id:string,session_id:bigint,location:string,"
    "user_agent:string,year:int,month:int",
}


def test_columns_have_their_names_order_and_types(spark: SparkSession) -> None:
    plays = songplays(spark)
    built = {
        "songs": etl.build_songs(songs(spark)),
        "artists": etl.build_artists(songs(spark)),
        "users": etl.build_users(events(spark)),
        "time": etl.build_time(plays),
        "songplays": plays,
    }
    found = {table: frame.schema.simpleString() for table, frame in built.items()}
    assert found == {table: f"struct<{columns}>" for table, columns in COLUMNS.items()}


# --- Songs ----------------------------------------------------------------------------

# (records of one song_id, the row wanted without its song_id)
SONG_CASES = {
    "is its only record": ([song()], ("Hello", "A1", 2015, 295.5)),
    "year 0 stays 0": ([song(year=0)], ("Hello", "A1", 0, 295.5)),
    "no year is year 0": ([song(year=None)], ("Hello", "A1", 0, 295.5)),
    "blank title is null": ([song(title=" ")], (None, "A1", 2015, 295.5)),
    "same record twice is one row": ([song(), song()], ("Hello", "A1", 2015, 295.5)),
    "known year beats year 0": (
        [song(title="A", year=0), song(title="B")],
        ("B", "A1", 2015, 295.5),
    ),
    "known duration beats none": (
        [song(title="A", duration=None), song(title="B")],
        ("B", "A1", 2015, 295.5),
    ),
    "title beats an empty one": (
        [song(title="", artist_id="A0"), song()],
        ("Hello", "A1", 2015, 295.5),
    ),
    "of equals the first in order, whole": (
        [song(title="B", artist_id="A1", year=1), song(title="A", artist_id="A2")],
        ("A", "A2", 2015, 295.5),
    ),
}


@pytest.fixture(scope="module")
def built_songs(spark: SparkSession, order: int) -> list[tuple[Any, ...]]:
    """The songs of all cases, built at once: a case's name is its song_id."""
    cases = SONG_CASES.items()
    records = [{**r, "song_id": name} for name, (case, _) in cases for r in case]
    records += KEYLESS_SONGS
    return rows(etl.build_songs(songs(spark, *records[::order])))


@pytest.mark.parametrize("case", SONG_CASES)
def test_a_song(built_songs: list[tuple[Any, ...]], case: str) -> None:
    assert [row[1:] for row in built_songs if row[0] == case] == [SONG_CASES[case][1]]


def test_songs_have_both_keys(built_songs: list[tuple[Any, ...]]) -> None:
    assert {row[0] for row in built_songs} == set(SONG_CASES)


# --- Artists --------------------------------------------------------------------------


def artist(
    name: str | None,
    location: str | None,
    latitude: float | None = 1.0,
    longitude: float | None = 2.0,
) -> Record:
    """A song record of an artist."""
    return song(
        artist_name=name,
        artist_location=location,
        artist_latitude=latitude,
        artist_longitude=longitude,
    )


# (records of one artist_id, the row wanted without its artist_id)
ARTIST_CASES = {
    "is its only record": ([artist("Abe", "Rome")], ("Abe", "Rome", 1.0, 2.0)),
    "same record twice is one row": (
        [artist("Abe", "Rome"), artist("Abe", "Rome")],
        ("Abe", "Rome", 1.0, 2.0),
    ),
    "empty strings are null": ([artist("", "")], (None, None, 1.0, 2.0)),
    "most complete beats shortest name": (
        [artist("Abe", None), artist("Abraham", "Rome")],
        ("Abraham", "Rome", 1.0, 2.0),
    ),
    "less incomplete beats shortest name": (
        [artist("Abe", None, None), artist("Abraham", "Rome", None)],
        ("Abraham", "Rome", None, 2.0),
    ),
    "missing latitude counts as a gap": (
        [artist("Abe", "Rome", None), artist("Abraham", "Rome")],
        ("Abraham", "Rome", 1.0, 2.0),
    ),
    "missing longitude counts as a gap": (
        [artist("Abe", "Rome", 1.0, None), artist("Abraham", "Rome")],
        ("Abraham", "Rome", 1.0, 2.0),
    ),
    "empty string counts as a gap": (
        [artist("Abe", ""), artist("Abraham", "Rome")],
        ("Abraham", "Rome", 1.0, 2.0),
    ),
    "missing name is not the shortest": (
        [artist(None, "Rome"), artist("Abe", None)],
        ("Abe", None, 1.0, 2.0),
    ),
    "of equally complete the shortest name": (
        [artist("Abraham", "Rome"), artist("Zed", "Rome")],
        ("Zed", "Rome", 1.0, 2.0),
    ),
    "of equal length the first in alphabetical order, whole": (
        [artist("Bob", "Athens", 3.0), artist("Abe", "Rome", 4.0)],
        ("Abe", "Rome", 4.0, 2.0),
    ),
    "of equal names the first location": (
        [artist("Abe", "Rome", 3.0), artist("Abe", "Athens", 4.0)],
        ("Abe", "Athens", 4.0, 2.0),
    ),
}


@pytest.fixture(scope="module")
def built_artists(spark: SparkSession, order: int) -> list[tuple[Any, ...]]:
    """The artists of all cases, built at once: a case's name is its artist_id."""
    cases = ARTIST_CASES.items()
    records = [{**r, "artist_id": name} for name, (case, _) in cases for r in case]
    records += KEYLESS_SONGS
    return rows(etl.build_artists(songs(spark, *records[::order])))


@pytest.mark.parametrize("case", ARTIST_CASES)
def test_an_artist(built_artists: list[tuple[Any, ...]], case: str) -> None:
    assert [row[1:] for row in built_artists if row[0] == case] == [
        ARTIST_CASES[case][1]
    ]


def test_artists_are_those_of_songs_with_both_keys(
    built_artists: list[tuple[Any, ...]],
) -> None:
    assert {row[0] for row in built_artists} == set(ARTIST_CASES)


# --- Users ----------------------------------------------------------------------------

# (events of one user, the row wanted without its user_id)
USER_CASES = {
    "is the only event's": ([event()], ("Ann", "Lee", "F", "free")),
    "seen on another page only": ([event(page="Home")], ("Ann", "Lee", "F", "free")),
    "an upgrade counts at once": (
        [event(ts=1), event(ts=2, page="Submit Upgrade", level="paid")],
        ("Ann", "Lee", "F", "paid"),
    ),
    "a downgrade counts at once": (
        [event(ts=1, level="paid"), event(ts=2, page="Submit Downgrade")],
        ("Ann", "Lee", "F", "free"),
    ),
    "all attributes are the latest event's": (
        [
            event(ts=1, firstName="Zoe", lastName="Zen", gender="M", level="paid"),
            event(ts=2),
        ],
        ("Ann", "Lee", "F", "free"),
    ),
    "of one instant the highest item upgrades": (
        [event(itemInSession=1), event(itemInSession=2, level="paid")],
        ("Ann", "Lee", "F", "paid"),
    ),
    "of one instant the highest item downgrades": (
        [event(itemInSession=1, level="paid"), event(itemInSession=2)],
        ("Ann", "Lee", "F", "free"),
    ),
    "of one instant the item decides before the session": (
        [
            event(itemInSession=2, sessionId=1),
            event(itemInSession=1, sessionId=2, level="paid"),
        ],
        ("Ann", "Lee", "F", "free"),
    ),
    "the time decides before the item": (
        [event(ts=1, itemInSession=2, level="paid"), event(ts=2, itemInSession=1)],
        ("Ann", "Lee", "F", "free"),
    ),
    "an event without a time is not the latest": (
        [event(ts=None, itemInSession=9, level="paid"), event(ts=1)],
        ("Ann", "Lee", "F", "free"),
    ),
    "empty strings are null": (
        [event(firstName="", lastName=" ", gender="", level="")],
        (None, None, None, None),
    ),
}


@pytest.fixture(scope="module")
def built_users(spark: SparkSession, order: int) -> list[tuple[Any, ...]]:
    """The users of all cases, built at once: a case's name is its user id."""
    cases = USER_CASES.items()
    records = [{**r, "userId": name} for name, (case, _) in cases for r in case]
    records += LOGGED_OUT
    return rows(etl.build_users(events(spark, *records[::order])))


@pytest.mark.parametrize("case", USER_CASES)
def test_a_user(built_users: list[tuple[Any, ...]], case: str) -> None:
    assert [row[1:] for row in built_users if row[0] == case] == [USER_CASES[case][1]]


def test_logged_out_events_give_no_user(built_users: list[tuple[Any, ...]]) -> None:
    assert {row[0] for row in built_users} == set(USER_CASES)


# --- Time -----------------------------------------------------------------------------


def test_each_start_time_is_one_row_in_utc_with_iso_week_and_sunday_as_weekday_1(
    spark: SparkSession,
) -> None:
    millis = [
        1541121934796,  # Friday 2018-11-02
        1541121934796,
        1541121934797,
        1546300799999,  # Monday 2018-12-31, in week 1 of 2019
        1609590600000,  # Saturday 2021-01-02, in week 53 of 2020
        1609632000000,  # Sunday 2021-01-03, in week 53 of 2020
    ]
    plays = spark.createDataFrame([(ts,) for ts in (*millis, None)], "ts bigint")
    plays = plays.select(F.timestamp_millis("ts").alias("start_time"))
    assert rows(etl.build_time(plays)) == [
        (utc(2018, 11, 2, 1, 25, 34, 796000), 1, 2, 44, 11, 2018, 6),
        (utc(2018, 11, 2, 1, 25, 34, 797000), 1, 2, 44, 11, 2018, 6),
        (utc(2018, 12, 31, 23, 59, 59, 999000), 23, 31, 1, 12, 2018, 2),
        (utc(2021, 1, 2, 12, 30), 12, 2, 53, 1, 2021, 7),
        (utc(2021, 1, 3), 0, 3, 53, 1, 2021, 1),
    ]


# --- Songplays ------------------------------------------------------------------------

# song_id, title, artist_id, artist_name, duration
CATALOGUE = [
    ("S1", "Hello", "A1", "Adele", 300.0),
    ("S1", "Hello", "A1", "Adele", None),
    ("S2", "Hello", "A2", "Lionel", 300.0),
    ("S3", "Skyfall", "A1", "Adele", 300.0),
    # One song in several lengths.
    ("L1", "Long", "A3", "Band", None),
    ("L2", "Long", "A3", "Band", 300.0),
    ("L3", "Long", "A3", "Band", 200.0),
    ("L4", "Long", "A3", "Band", 100.0),
    ("L5", "Any length", "A3", "Band", None),
    # One artist with two names.
    ("K1", "One", "A4", "Kanye", 300.0),
    ("K2", "Two", "A4", "Ye", 300.0),
    # Two artists with one name.
    ("N1", "Lithium", "A5", "Nirvana", 300.0),
    ("N2", "Rainbow", "A6", "Nirvana", 300.0),
    ("N3", "Same", "A5", "Nirvana", 100.0),
    ("N4", "Same", "A6", "Nirvana", 300.0),
    ("N5", "Twin", "A6", "Nirvana", 300.0),
    ("N6", "Twin", "A5", "Nirvana", 300.0),
    # Incomplete ones.
    ("X1", None, "A1", "Adele", 300.0),
    ("X2", "", "A1", "Adele", 300.0),
    ("X3", "Nameless", "A7", None, 300.0),
    ("X4", "Nameless", "A8", "", 300.0),
    (None, "Boo", "A9", "Ghost", 300.0),
    ("X5", "Boo", "", "Spook", 300.0),
]

# (title, artist and length of a play, the song_id and artist_id wanted)
MATCH_CASES = {
    "title and artist": (("Hello", "Adele", 300.0), ("S1", "A1")),
    "same title by another artist": (("Hello", "Lionel", 300.0), ("S2", "A2")),
    "title alone": (("Hello", "Nobody", 300.0), (None, None)),
    "title without an artist": (("Hello", None, 300.0), (None, None)),
    "title of another artist": (("Skyfall", "Lionel", 300.0), (None, "A2")),
    "artist alone": (("Rumour", "Adele", 300.0), (None, "A1")),
    "artist without a title": ((None, "Adele", 300.0), (None, "A1")),
    "artist with an empty title": (("", "Adele", 300.0), (None, "A1")),
    "title in another case": (("hello", "Adele", 300.0), (None, "A1")),
    "artist in another case": (("Hello", "adele", 300.0), (None, None)),
    "neither title nor artist": ((None, None, 300.0), (None, None)),
    "one song, other length": (("Hello", "Adele", 1.0), ("S1", "A1")),
    "one song, no length": (("Hello", "Adele", None), ("S1", "A1")),
    "one song, no duration": (("Any length", "Band", 300.0), ("L5", "A3")),
    "nearest duration, shorter": (("Long", "Band", 219.0), ("L3", "A3")),
    "nearest duration, longer": (("Long", "Band", 180.0), ("L3", "A3")),
    "nearest duration, however far": (("Long", "Band", 999.0), ("L2", "A3")),
    "smallest song_id of as near": (("Long", "Band", 250.0), ("L2", "A3")),
    "smallest song_id without a length": (("Long", "Band", None), ("L1", "A3")),
    "artist's name on that song": (("One", "Kanye", 300.0), ("K1", "A4")),
    "artist's name on another song": (("One", "Ye", 300.0), ("K1", "A4")),
    "artist's second name alone": (("Three", "Ye", 300.0), (None, "A4")),
    "one namesake's song": (("Lithium", "Nirvana", 300.0), ("N1", "A5")),
    "both namesakes' song": (("Same", "Nirvana", 290.0), ("N4", "A6")),
    "both namesakes' song, as near": (("Twin", "Nirvana", 290.0), ("N5", "A6")),
    "namesakes alone": (("Polly", "Nirvana", 300.0), (None, None)),
    "no artist name": (("Nameless", None, 300.0), (None, None)),
    "empty artist name": (("Nameless", "", 300.0), (None, None)),
    "song record without song_id": (("Boo", "Ghost", 300.0), (None, None)),
    "song record without artist_id": (("Boo", "Spook", 300.0), (None, None)),
}


@pytest.fixture(scope="module")
def matches(spark: SparkSession, order: int) -> list[tuple[Any, ...]]:
    """What the plays of all cases match, looked up at once: each play's location is the
    name of its case.
    """
    song_fields = ("song_id", "title", "artist_id", "artist_name", "duration")
    catalogue = [song(**dict(zip(song_fields, fields))) for fields in CATALOGUE]
    play_fields = ("song", "artist", "length")
    plays = [
        event(location=name, sessionId=number, **dict(zip(play_fields, fields)))
        for number, (name, (fields, _)) in enumerate(MATCH_CASES.items())
    ]
    found = etl.build_songplays(
        events(spark, *plays[::order]), songs(spark, *catalogue[::order])
    )
    return rows(found.select("location", "song_id", "artist_id"))


@pytest.mark.parametrize("case", MATCH_CASES)
def test_a_play_finds(matches: list[tuple[Any, ...]], case: str) -> None:
    assert [row[1:] for row in matches if row[0] == case] == [MATCH_CASES[case][1]]


def test_no_play_is_lost_or_multiplied(matches: list[tuple[Any, ...]]) -> None:
    assert sorted(row[0] for row in matches) == sorted(MATCH_CASES)


def test_a_play_is_a_row_with_its_month_in_utc(spark: SparkSession) -> None:
    plays = [
        event(),
        event(sessionId=1, itemInSession=1, ts=1546300799999, level="paid"),
        event(sessionId=2, itemInSession=1, ts=1546300800000, artist="Nobody"),
    ]
    found = {row[6]: row for row in rows(songplays(spark, *plays))}
    assert found[38] == (
        ID_OF_ITEM_0,
        utc(2018, 11, 2, 1, 25, 34, 796000),
        "39",
        "free",
        "S1",
        "A1",
        38,
        "Reno, NV",
        "Firefox",
        2018,
        11,
    )
    last, first = utc(2018, 12, 31, 23, 59, 59, 999000), utc(2019, 1, 1)
    place = ("Reno, NV", "Firefox")
    assert found[1][1:] == (last, "39", "paid", "S1", "A1", 1, *place, 2018, 12)
    assert found[2][1:] == (first, "39", "free", None, None, 2, *place, 2019, 1)
    assert len(found) == 3


def test_empty_strings_of_a_play_are_null(spark: SparkSession) -> None:
    found = songplays(spark, event(level="", location=" ", userAgent=""))
    assert rows(found.select("level", "location", "user_agent")) == [(None, None, None)]


def test_a_play_delivered_twice_is_one_row(spark: SparkSession) -> None:
    one, other = event(level="free", userAgent="B"), event(level="paid", userAgent="A")
    in_order = rows(songplays(spark, one, one, other))
    assert [(row[0], row[4]) for row in in_order] == [(ID_OF_ITEM_0, "S1")]
    assert (in_order[0][3], in_order[0][8]) in {("free", "B"), ("paid", "A")}
    assert in_order == rows(songplays(spark, other, one, one))


def test_plays_that_differ_in_one_key_are_rows_of_their_own(
    spark: SparkSession,
) -> None:
    keys = [{"ts": 1}, {"userId": "40"}, {"sessionId": 39}]
    items = [{"itemInSession": 1}, {"itemInSession": None}]
    plays = [event(), *(event(**other) for other in keys + items)]
    ids = [row.songplay_id for row in songplays(spark, *plays).collect()]
    assert len(ids) == len(set(ids)) == 6
    assert {ID_OF_ITEM_0, ID_OF_ITEM_1, ID_WITHOUT_ITEM} < set(ids)


def test_other_pages_and_events_without_keys_are_no_plays(spark: SparkSession) -> None:
    pages = [event(sessionId=1, page=page) for page in (None, "", "Home", "nextsong")]
    users = [event(sessionId=2, userId=user_id) for user_id in (None, "", " ")]
    others = [event(sessionId=3, ts=None), event(sessionId=None)]
    found = songplays(spark, *pages, *users, *others, event())
    assert rows(found.select("songplay_id")) == [(ID_OF_ITEM_0,)]
