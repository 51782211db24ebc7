"""The five tables as built from tiny inputs. Every expectation is written by hand."""

from __future__ import annotations

from datetime import datetime, timezone
from functools import partial
from typing import Any

import pytest
from makers import TS, Record, play, song
from pyspark.sql import DataFrame, SparkSession

import etl

# Of Spark SQL: select xxhash64(1541121934796L, '39', 38L, 0L), and so on. Ids in lakes
# out there depend on them: they never change.
ID_OF_ITEM_0 = -1658796301634869044
ID_OF_ITEM_1 = 3799911967345452762
ID_WITHOUT_ITEM = -5979574363072718564


def songs(spark: SparkSession, *records: Record) -> DataFrame:
    """A frame of song records, a null row among them."""
    return spark.createDataFrame([dict.fromkeys(song()), *records], etl.SONG_SCHEMA)


def events(spark: SparkSession, *records: Record) -> DataFrame:
    """A frame of log events, a null row among them."""
    return spark.createDataFrame([dict.fromkeys(play()), *records], etl.EVENT_SCHEMA)


def songplays(spark: SparkSession, *records: Record) -> DataFrame:
    """The plays of log events, of a catalogue with one song."""
    return etl.build_songplays(events(spark, *records), songs(spark, song()))


utc = partial(datetime, tzinfo=timezone.utc)


def rows(frame: DataFrame) -> list[tuple[Any, ...]]:
    """A frame's rows in a stable order, with points of time in UTC."""
    # pyspark.testing's assertDataFrameEqual needs pandas in Spark 3.5.
    found = (
        tuple(v.astimezone(timezone.utc) if isinstance(v, datetime) else v for v in row)
        for row in frame.collect()
    )
    return sorted(found, key=repr)


# The step that slices the input rows: no result may depend on their order.
both_orders = pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])

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


@pytest.mark.parametrize("table", COLUMNS)
def test_columns_have_their_names_order_and_types(
    table: str, spark: SparkSession
) -> None:
    catalogue, logs = songs(spark), events(spark)
    takes = {"songplays": (logs, catalogue), "users": (logs,), "time": (logs,)}
    built = getattr(etl, f"build_{table}")(*takes.get(table, (catalogue,)))
    assert built.schema.simpleString() == f"struct<{COLUMNS[table]}>"


# Each case has the records of one key and the row that is wanted without its key.
HELLO, OTHER = ("Hello", "A1", 2015, 295.5), song(title="A", artist_id="A2")
SONG_CASES = {
    "same record twice is one row": ([song(), song()], HELLO),
    "year 0 stays 0": ([song(year=0)], ("Hello", "A1", 0, 295.5)),
    "no year is year 0": ([song(year=None)], ("Hello", "A1", 0, 295.5)),
    "no title is null": ([song(title=None)], (None, "A1", 2015, 295.5)),
    "known year beats year 0": ([song(title="A", year=0), song()], HELLO),
    "known duration beats none": ([song(title="A", duration=None), song()], HELLO),
    "title beats none": ([song(title=None, artist_id="A0"), song()], HELLO),
    "first in order, whole": ([song(year=1), OTHER], ("A", "A2", 2015, 295.5)),
}

# An artist's name, location, latitude and longitude, in the records and in the row.
ABE, ABRAHAM = ("Abe", "Rome", 1.0, 2.0), ("Abraham", "Rome", 1.0, 2.0)
GAP, GAPS = ("Abraham", "Rome", None, 2.0), ("Zed", None, None, None)
NOWHERE, NAMELESS = ("Abe", None, 1.0, 2.0), (None, "Rome", 1.0, 2.0)
ATHENS = ("Abe", "Athens", 4.0, 2.0)
ARTIST_CASES = {
    "same record twice is one row": ([ABE, ABE], ABE),
    "no name, no location": ([(None, None, 1.0, 2.0)], (None, None, 1.0, 2.0)),
    "no location is a gap": ([NOWHERE, ABRAHAM], ABRAHAM),
    "no latitude is a gap": ([("Abe", "Rome", None, 2.0), ABRAHAM], ABRAHAM),
    "no longitude is a gap": ([("Abe", "Rome", 1.0, None), ABRAHAM], ABRAHAM),
    "of fewer gaps beats shorter name": ([("Abe", None, None, 2.0), GAP], GAP),
    "a name beats none, as complete": ([(None, "Athens", 1.0, 2.0), NOWHERE], NOWHERE),
    "a name beats none, however complete": ([NAMELESS, GAPS], GAPS),
    "shortest name": ([ABRAHAM, ("Zed", "Rome", 1.0, 2.0)], ("Zed", "Rome", 1.0, 2.0)),
    "first in alphabetical order, whole": ([("Bob", "Athens", 3.0, 2.0), ABE], ABE),
    "of equal names the first location": ([("Abe", "Rome", 3.0, 2.0), ATHENS], ATHENS),
}
FIELDS = ("artist_name", "artist_location", "artist_latitude", "artist_longitude")
ARTISTS = {
    case: ([song(**dict(zip(FIELDS, record))) for record in records], row)
    for case, (records, row) in ARTIST_CASES.items()
}


def event(ts: int | None, item: int, level: str = "free", **changes: Any) -> Record:
    """A log event of Ann Lee."""
    return play(ts=ts, itemInSession=item, level=level, **changes)


FREE, PAID = ("Ann", "Lee", "F", "free"), ("Ann", "Lee", "F", "paid")
ZOE = {"firstName": "Zoe", "lastName": "Zen", "gender": "M"}
UNKNOWN = dict.fromkeys((*ZOE, "level"))
USER_CASES = {
    "seen on another page only": ([play(page="Home")], FREE),
    "an upgrade counts at once": ([event(1, 0), event(2, 0, "paid", page="Up")], PAID),
    "all are the latest event's": ([event(1, 0, "paid", **ZOE), event(2, 0)], FREE),
    "upgrade by the item, at one time": ([event(1, 1), event(1, 2, "paid")], PAID),
    "downgrade by the item, at one time": ([event(1, 1, "paid"), event(1, 2)], FREE),
    "item before session": ([event(1, 2), event(1, 0, "paid", sessionId=39)], FREE),
    "the time decides before the item": ([event(1, 2, "paid"), event(2, 1)], FREE),
    "no time is not the latest": ([event(None, 9, "paid"), event(1, 0)], FREE),
    "no attributes at last": ([event(1, 0), play(**UNKNOWN)], (None, None, None, None)),
}
KEYLESS = [song(song_id=None), song(artist_id=None)]
CASES: dict[str, Any] = {
    "songs": (songs, "song_id", SONG_CASES, KEYLESS),
    "artists": (songs, "artist_id", ARTISTS, KEYLESS),
    "users": (events, "userId", USER_CASES, [play(userId=None, page="Home")]),
}


@both_orders
@pytest.mark.parametrize("table", CASES)
def test_records_of_one_key_are_one_row_and_those_without_are_none(
    table: str, order: int, spark: SparkSession
) -> None:
    frame, key, cases, keyless = CASES[table]
    named = [{**of, key: name} for name, case in cases.items() for of in case[0]]
    found = getattr(etl, f"build_{table}")(frame(spark, *(named + keyless)[::order]))
    wanted = [(name, *row) for name, (_, row) in cases.items()]
    assert rows(found) == sorted(wanted, key=repr)


def test_each_start_time_is_one_row_in_utc_with_iso_week_and_sunday_as_weekday_1(
    spark: SparkSession,
) -> None:
    millis = [TS, TS, TS + 1, 1546300799999, 1609590600000, 1609632000000]
    plays = [play(ts=ts, itemInSession=item) for item, ts in enumerate(millis)]
    others = [play(ts=1, **of) for of in ({"page": "Home"}, {"userId": None})]
    assert rows(etl.build_time(events(spark, *plays, *others))) == [
        (utc(2018, 11, 2, 1, 25, 34, 796000), 1, 2, 44, 11, 2018, 6),  # Friday
        (utc(2018, 11, 2, 1, 25, 34, 797000), 1, 2, 44, 11, 2018, 6),
        (utc(2018, 12, 31, 23, 59, 59, 999000), 23, 31, 1, 12, 2018, 2),  # week of 2019
        (utc(2021, 1, 2, 12, 30), 12, 2, 53, 1, 2021, 7),  # Saturday, week of 2020
        (utc(2021, 1, 3), 0, 3, 53, 1, 2021, 1),  # Sunday, week of 2020
    ]


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
    ("X3", "Nameless", "A7", None, 300.0),
    (None, "Boo", "A9", "Ghost", 300.0),
    ("X5", "Boo", None, "Spook", 300.0),
]

# Title, artist and length of a play; song_id and artist_id that are wanted.
MATCH_CASES = {
    "title and artist": (("Hello", "Adele", 300.0), ("S1", "A1")),
    "same title by another artist": (("Hello", "Lionel", 300.0), ("S2", "A2")),
    "title alone": (("Hello", "Nobody", 300.0), (None, None)),
    "title without an artist": (("Hello", None, 300.0), (None, None)),
    "title of another artist": (("Skyfall", "Lionel", 300.0), (None, "A2")),
    "artist alone": (("Rumour", "Adele", 300.0), (None, "A1")),
    "artist without a title": ((None, "Adele", 300.0), (None, "A1")),
    "title in another case": (("hello", "Adele", 300.0), (None, "A1")),
    "artist in another case": (("Hello", "adele", 300.0), (None, None)),
    "one song, other length": (("Hello", "Adele", 1.0), ("S1", "A1")),
    "one song, no duration": (("Any length", "Band", 300.0), ("L5", "A3")),
    "nearest duration, shorter": (("Long", "Band", 219.0), ("L3", "A3")),
    "nearest duration, longer": (("Long", "Band", 180.0), ("L3", "A3")),
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
    "song record without song_id": (("Boo", "Ghost", 300.0), (None, None)),
    "song record without artist_id": (("Boo", "Spook", 300.0), (None, None)),
}


@both_orders
def test_a_play_finds_its_song_or_else_its_artist_and_is_always_one_row(
    order: int, spark: SparkSession
) -> None:
    song_fields = ("song_id", "title", "artist_id", "artist_name", "duration")
    catalogue = [song(**dict(zip(song_fields, fields))) for fields in CATALOGUE]
    play_fields = ("song", "artist", "length")
    # All are looked up at once: a play's location is the name of its case.
    plays = [
        play(location=name, sessionId=number, **dict(zip(play_fields, fields)))
        for number, (name, (fields, _)) in enumerate(MATCH_CASES.items())
    ]
    records = events(spark, *plays[::order]), songs(spark, *catalogue[::order])
    found = etl.build_songplays(*records).select("location", "song_id", "artist_id")
    wanted = [(name, *ids) for name, (_, ids) in MATCH_CASES.items()]
    assert rows(found) == sorted(wanted, key=repr)


def test_a_play_is_a_row_with_its_month_in_utc(spark: SparkSession) -> None:
    december = play(sessionId=1, ts=1546300799999, level="paid")
    january = play(sessionId=2, ts=1546300800000, artist="Nobody")
    found = {row[6]: row for row in rows(songplays(spark, play(), december, january))}
    time, place = utc(2018, 11, 2, 1, 25, 34, 796000), ("Reno, NV", "Firefox")
    last, first = utc(2018, 12, 31, 23, 59, 59, 999000), utc(2019, 1, 1)
    assert found == {
        38: (ID_OF_ITEM_0, time, "39", "free", "S1", "A1", 38, *place, 2018, 11),
        1: (found[1][0], last, "39", "paid", "S1", "A1", 1, *place, 2018, 12),
        2: (found[2][0], first, "39", "free", None, None, 2, *place, 2019, 1),
    }


def test_a_play_delivered_twice_is_one_row(spark: SparkSession) -> None:
    one, other = play(level="free", userAgent="B"), play(level="paid", userAgent="A")
    in_order = rows(songplays(spark, one, one, other))
    assert [(row[0], row[4]) for row in in_order] == [(ID_OF_ITEM_0, "S1")]
    assert (in_order[0][3], in_order[0][8]) in {("free", "B"), ("paid", "A")}
    assert in_order == rows(songplays(spark, other, one, one))


def test_plays_that_differ_in_one_key_are_rows_and_other_events_are_none(
    spark: SparkSession,
) -> None:
    items = [play(), play(itemInSession=1), play(itemInSession=None)]
    plays = [*items, play(ts=1), play(userId="40"), play(sessionId=39)]
    others = [play(sessionId=1, page=page) for page in (None, "Home", "nextsong")]
    others += [play(**{key: None}) for key in ("ts", "userId", "sessionId")]
    ids = [row.songplay_id for row in songplays(spark, *plays, *others).collect()]
    assert len(ids) == len(set(ids)) == 6
    assert {ID_OF_ITEM_0, ID_OF_ITEM_1, ID_WITHOUT_ITEM} < set(ids)
