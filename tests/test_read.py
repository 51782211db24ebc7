"""Reading dirty input: no record is lost, and none is loaded wrong without a word."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Optional, Union

import pytest
from conftest import by_file, read_files
from makers import Record, play, song, to_json
from pyspark.sql import Row, SparkSession

Content = Union[str, bytes]
NOT_JSON, WRONG_TYPE, NOT_UTF8 = "not JSON", "value of the wrong type", "not UTF-8"
SMALL = 2**20  # bytes of a local file that is read whole


def line(record: Record, **texts: str | None) -> str:
    """A record on one line with values given as JSON text; None leaves the key out."""
    values = {
        key: json.dumps(value, ensure_ascii=False) for key, value in record.items()
    }
    pairs = {**values, **texts}.items()
    return (
        "{" + ", ".join(f'"{k}": {text}' for k, text in pairs if text is not None) + "}"
    )


# --- Records --------------------------------------------------------------------------

Values = tuple[dict[str, Optional[str]], Record]
# Each case has values as JSON text and as they are loaded.
GOOD_SONGS: dict[str, Values] = {
    "complete": ({}, {}),
    "without year": ({"year": None}, {"year": None}),
    "null title": ({"title": "null"}, {"title": None}),
    "empty title": ({"title": '""'}, {"title": None}),
    "blank title": ({"title": '"  "'}, {"title": None}),
    "title in blanks": ({"title": '" T "'}, {"title": " T "}),
    "year 0": ({"year": "0"}, {"year": 0}),
    "number as text": ({"artist_name": "112"}, {"artist_name": "112"}),
    "fraction as text": ({"title": "-1.5"}, {"title": "-1.5"}),
    "large number as text": ({"title": "9" * 23}, {"title": "9" * 23}),
    "true as text": ({"title": "true"}, {"title": "true"}),
    "object as text": ({"title": '{"a": [1]}'}, {"title": '{"a":[1]}'}),
    "array as text": ({"title": '["T"]'}, {"title": '["T"]'}),
    "whole number as double": ({"duration": "200"}, {"duration": 200.0}),
    "large number as double": ({"duration": "1" + "0" * 23}, {"duration": 1e23}),
    "escapes and braces": (
        {"title": r'"} { ] [ \" \\ \/ \u00e9}{"'},
        {"title": '} { ] [ " \\ / é}{'},
    ),
    "replacement character": ({"title": '"é \ufffd 😀"'}, {"title": "é \ufffd 😀"}),
    "long text": ({"title": f'"{"x" * 100_000}"'}, {"title": "x" * 100_000}),
    "unknown object": ({"unknown": '{"title": ["}", {"year": {}}]}'}, {}),
    "unknown array": ({"unknown": '[{"title": 1}, [], {}]'}, {}),
    "unknown large number": ({"unknown": "1e400"}, {}),
}
BAD_SONGS = {
    line(song(), song_id=None): "no song_id",
    line(song(), song_id="null"): "no song_id",
    line(song(), song_id='" "'): "no song_id",
    "{}": "no song_id",
    line(song(), artist_id=None): "no artist_id",
    line(song(), artist_id='""'): "no artist_id",
    line(song(), duration='"long"'): WRONG_TYPE,
    line(song(), duration='"200"'): WRONG_TYPE,
    line(song(), duration="true"): WRONG_TYPE,
    line(song(), duration="{}"): WRONG_TYPE,
    line(song(), year="1999.5"): WRONG_TYPE,
    line(song(), year="3000000000"): WRONG_TYPE,
    line(song(), year="9" * 23): WRONG_TYPE,
    line(song(), artist_latitude='"NaN"'): WRONG_TYPE,
    line(song(), artist_latitude="1e400"): "number out of range",
    line(song(), artist_longitude="-1e400"): "number out of range",
    line(song(), duration="NaN"): NOT_JSON,
    line(song(), unknown="NaN"): NOT_JSON,
    line(song(), unknown="Infinity"): NOT_JSON,
    line(song(), unknown="01"): NOT_JSON,
    line(song(), unknown="[" * 2000 + "]" * 2000): NOT_JSON,
    line(song(), title='"a\tb"'): NOT_JSON,
    line(song())[:-1]: NOT_JSON,
    line(song())[:-1] + ",}": NOT_JSON,
    line(song()) + " foo": NOT_JSON,
    line(song()) + "}": NOT_JSON,
    line(song()) + "]} foo": NOT_JSON,
    line(song()) + "\0": NOT_JSON,
    line(song())[1:]: NOT_JSON,
    "{song_id: 1}": NOT_JSON,
    "{'song_id': 1}": NOT_JSON,
    "foo": NOT_JSON,
    "12": WRONG_TYPE,
}
NO_KEYS = dict.fromkeys(("ts", "userId", "sessionId"))
GOOD_EVENTS: dict[str, Values] = {
    "complete": ({}, {}),
    "number as user": ({"userId": "91"}, {"userId": "91"}),
    "number as artist": ({"artist": "112"}, {"artist": "112"}),
    "first ts": ({"ts": "0"}, {"ts": 0}),
    "last ts": ({"ts": "253402300799999"}, {"ts": 253402300799999}),
    "without item": ({"itemInSession": None}, {"itemInSession": None}),
    "number in exponents": ({"length": "1e2"}, {"length": 100.0}),
    "page of nobody": (
        {"page": '"Home"', "userId": '""'},
        {"page": "Home", "userId": None},
    ),
    "page without keys": ({"page": '"Home"', **NO_KEYS}, {"page": "Home", **NO_KEYS}),
}
BAD_EVENTS = {
    line(play(), ts=None): "play without ts",
    line(play(), ts="null"): "play without ts",
    line(play(), userId=None): "play without userId",
    line(play(), userId='" "'): "play without userId",
    line(play(), sessionId=None): "play without sessionId",
    line(play(), ts="-1"): "ts out of range",
    line(play(), ts="253402300800000"): "ts out of range",
    line(play(), ts="253402300800000", page='"Home"'): "ts out of range",
    line(play(), ts="9" * 23): WRONG_TYPE,
    line(play(), ts="1541106106796.5"): WRONG_TYPE,
    line(play(), ts='"1541106106796"'): WRONG_TYPE,
    line(play(), sessionId='"139"'): WRONG_TYPE,
    line(play(), length='{"seconds": 1}'): WRONG_TYPE,
    line(play(), length="1e400"): "number out of range",
    line(play(), page=None): "no page",
    line(play(), page='" "'): "no page",
    "-- rotated --": NOT_JSON,
    line(play())[:40]: NOT_JSON,
}


@pytest.mark.parametrize("way", ["whole", "by line"])
@pytest.mark.parametrize(
    ("record", "good", "bad", "kind", "name"),
    [
        (song(), GOOD_SONGS, BAD_SONGS, "songs", "artist_location"),
        (play(), GOOD_EVENTS, BAD_EVENTS, "events", "location"),
    ],
    ids=["songs", "events"],
)
def test_a_record_is_loaded_as_it_is_or_rejected_with_its_reason_and_text(
    record: Record,
    good: dict[str, Values],
    bad: dict[str, str],
    kind: str,
    name: str,
    way: str,
    spark: SparkSession,
    tmp_path: Path,
) -> None:
    # The name of a good case is in one of its fields.
    texts = [line(record, **{name: f'"{case}"'}, **good[case][0]) for case in good]
    texts += bad
    alone = {f"{n}.json": text for n, text in enumerate(texts)}
    together = {"all.json.gz": gzip.compress("\n".join(texts).encode())}
    files = alone if way == "whole" else together
    rows = read_files(spark, tmp_path, files, kind).drop("source_file").collect()
    loaded = {row[name]: row.asDict() for row in rows if row.reason is None}
    none = {"reason": None, "raw": None}
    assert loaded == {
        case: {**record, name: case, **good[case][1], **none} for case in good
    }
    assert {row.raw: row.reason for row in rows if row.reason is not None} == bad
    assert len(rows) == len(good) + len(bad)


# --- Files ----------------------------------------------------------------------------


def titled(title: str) -> str:
    """A song record of that title."""
    return to_json(song(title=title))


A, B, C = map(titled, "ABC")
LATIN = B.encode().replace(b"London", b"Orl\xe9ans")
NESTED = line(song(title="A"), unknown='[{"a": 1}, {"song_id": "S", "artist_id": "A"}]')
PRETTY = json.dumps(song(title="P"), indent=2)
# By the file's name: its content; the titles that are loaded; reason and text of the rest.
FILES: dict[str, tuple[Content, str, list[tuple[str, str]]]] = {
    "lines.json": (f"{A}\n{B}\n", "AB", []),
    "no-end.json": (f"{A}\n{B}", "AB", []),
    "crlf.json": (f"{A}\r\n{B}\r\n", "AB", []),
    "cr.json": (f"{A}\r{B}\r", "AB", []),
    "blank.json": (f"\n \n\t\r\n  {A}\t \n\n", "A", []),
    "bom.json": (f"\ufeff{A}\n\ufeff{B}\n\ufeff", "AB", []),
    "one-line.json": (f"{A}{B} {C}", "ABC", []),
    "array.json": (f"[{A}, {B}]", "AB", []),
    "array-of-lines.json": (f"[\n{A},\n{B}\n]\n", "AB", []),
    "arrays.json": (f"{A}\n[{B}]\n[{C}]", "ABC", []),
    "array-of-one.json": (f"\ufeff[{A}]", "A", []),
    "array-with-a-bad-one.json": (
        f'[{A}, {{"a":1}}, {B}]',
        "AB",
        [("no song_id", '{"a":1}')],
    ),
    "array-cut-off.json": (f"[{A},\n{B[:-9]}", "A", [(NOT_JSON, B[:-9])]),
    "array-line-cut-off.json": (f"[{A}, {B}, {C[:99]}", "AB", [(NOT_JSON, C[:99])]),
    "pretty-array.json": (
        json.dumps([song(title="A"), song(title="B")], indent=1),
        "AB",
        [],
    ),
    "array-nested.json": (f"[{NESTED}, {B}]", "AB", []),
    "pretty-nested.json": (json.dumps(json.loads(NESTED), indent=2), "A", []),
    "pretty.json": (f"{PRETTY}\n{PRETTY}\n", "PP", []),
    "pretty-crlf.json": (f"{PRETTY}\n{PRETTY}\n".replace("\n", "\r\n"), "PP", []),
    "pretty-and-blank.json": (PRETTY.replace("\n", "\n\n"), "P", []),
    "pretty-side-by-side.json": (PRETTY * 2, "PP", []),
    "pretty-cut-off.json": (f"{PRETTY}\n{PRETTY[:40]}", "P", [(NOT_JSON, PRETTY[:40])]),
    "pretty-cut-off-first.json": (
        f"{PRETTY[:40]}\n{PRETTY}",
        "P",
        [(NOT_JSON, PRETTY[:40])],
    ),
    "cut/off/in/the/middle.json": (
        f"{A[:20]}\n{B}\nfoo\n{C}\n{A[:-2]}",
        "BC",
        [(NOT_JSON, "foo"), (NOT_JSON, A[:20]), (NOT_JSON, A[:-2])],
    ),
    "garbage-after-one.json": (f"{A}\nfoo", "A", [(NOT_JSON, "foo")]),
    "garbage-before-one.json": (
        f"-- rotated --\n{A}",
        "A",
        [(NOT_JSON, "-- rotated --")],
    ),
    "second-cut-off.json": (f"{A}{B[:-9]}", "A", [(NOT_JSON, B[:-9])]),
    "latin.json": (
        A.encode() + b"\n" + LATIN,
        "A",
        [(NOT_UTF8, LATIN.decode("latin-1"))],
    ),
    "packed.json.gz": (gzip.compress(f"{A}\n{B}\r\n\n[{C}]".encode()), "ABC", []),
    "packed-latin.json.gz": (
        gzip.compress(A.encode() + b"\n" + LATIN),
        "A",
        [(NOT_UTF8, LATIN.decode("latin-1"))],
    ),
    "packed-cut-off.json.gz": (
        gzip.compress(f"{A[:9]}\n{B}{C}".encode()),
        "BC",
        [(NOT_JSON, A[:9])],
    ),
    "space and%20 100% a+b=c #1 é.json": (A, "A", []),
    "year=5/[a]/{b}/c*/d?/e^/1.json": (f"{A}\n{B[:-1]}", "A", [(NOT_JSON, B[:-1])]),
    "empty.json": ("", "", []),
    "empty-array.json": ("[]\n", "", []),
}
IGNORED = ["a.txt", "a.jsonl", "ajson", "a.json.bak", "a.json.bz2"]
IGNORED += [f"{name}.json" for name in ("_a", ".a", "_b/a", ".b/a")]


@pytest.fixture(scope="module")
def records(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Row]]:
    """The records of FILES by file, with other files around, all below an odd folder."""
    folder = tmp_path_factory.mktemp("odd") / "100% [a-z] {b,c} d* #1+é=%20"
    files = {name: content for name, (content, _, _) in FILES.items()}
    files.update(dict.fromkeys(IGNORED, A))
    return by_file(read_files(spark, folder, files, "songs"), folder)


@pytest.mark.parametrize("name", FILES)
def test_records_of_a_file_are_loaded_or_rejected(
    name: str, records: dict[str, list[Row]]
) -> None:
    _, titles, rejected = FILES[name]
    rows = records.get(name, [])
    bad = [(row.reason, row.raw) for row in rows if row.reason is not None]
    assert sorted(row.title for row in rows if row.reason is None) == list(titles)
    assert sorted(bad) == sorted(rejected)


def test_files_of_other_names_are_ignored(records: dict[str, list[Row]]) -> None:
    assert set(records) == set(FILES) - {"empty.json", "empty-array.json"}


@pytest.mark.parametrize("name", ["large.json", "packed.json.gz"])
def test_pretty_printing_is_rejected_line_by_line_where_a_file_is_not_read_whole(
    name: str, spark: SparkSession, tmp_path: Path
) -> None:
    content = f"{PRETTY}\n{A}\n".encode()
    blank = b" " * SMALL
    packed = gzip.compress(content) if name.endswith("gz") else content + blank
    rows = read_files(spark, tmp_path, {name: packed}, "songs").collect()
    lines = [text.strip(" ,") for text in PRETTY.split("\n")]
    rejected = [(row.reason, row.raw) for row in rows if row.reason is not None]
    assert sorted(rejected) == sorted((NOT_JSON, text) for text in lines)
    assert [row.title for row in rows if row.reason is None] == ["A"]


def test_a_record_cut_between_two_tasks_is_read_once(
    spark: SparkSession, tmp_path: Path
) -> None:
    # Each line has another length, so that the cuts are anywhere, between CR and LF, too.
    ids = [f"S{n}{'x' * (n % 97)}" for n in range(5000)]
    texts = [to_json(song(song_id=song_id, title="é" * 9)) for song_id in ids]
    session = spark.newSession()
    session.conf.set("spark.sql.files.maxPartitionBytes", "64kB")
    files = {"a.json": "\r\n".join(texts)}
    found = read_files(session, tmp_path, files, "songs")
    assert found.rdd.getNumPartitions() > 15
    assert sorted(row.song_id for row in found.collect()) == sorted(ids)
    assert found.where("reason IS NOT NULL").count() == 0


def test_a_large_gz_with_its_last_line_cut_off_is_read_by_line(
    spark: SparkSession, tmp_path: Path
) -> None:
    # Noise that gzip can't make small.
    noise = random.Random(1)
    texts = [
        to_json(song(song_id=f"S{n}", title=noise.randbytes(200).hex()))
        for n in range(9000)
    ]
    packed = gzip.compress("\n".join(texts)[:-9].encode())
    assert len(packed) > 1.5 * SMALL
    session = spark.newSession()
    # Reading a file of this size whole is an error now.
    session.conf.set("spark.sql.sources.binaryFile.maxLength", SMALL)
    files = {"a.json.gz": packed}
    rows = read_files(session, tmp_path, files, "songs").collect()
    assert [row.raw for row in rows if row.reason] == [texts[-1][:-9]]
    loaded = sorted(row.song_id for row in rows if not row.reason)
    assert loaded == sorted(f"S{n}" for n in range(8999))


def test_a_gz_without_its_end_is_an_error_that_names_it(
    spark: SparkSession, tmp_path: Path
) -> None:
    files = {"broken.json.gz": gzip.compress(A.encode())[:-12]}
    with pytest.raises(Exception, match=r"broken\.json\.gz"):
        read_files(spark, tmp_path, files, "songs").collect()


def test_dirt_takes_no_second_pass_and_no_python(
    spark: SparkSession, tmp_path: Path
) -> None:
    nested = line(song(), unknown='{"a": [{"b": 1}]}')
    files = {"a.json": f"{nested}\n[{A}]", "b.json.gz": gzip.compress(b"foo")}
    spark.sparkContext.setJobGroup("reading", "")
    found = read_files(spark, tmp_path, files, "songs")
    jobs = spark.sparkContext.statusTracker().getJobIdsForGroup("reading")
    assert not list(jobs)
    plan = found._jdf.queryExecution().executedPlan().toString()
    assert plan.count("FileScan") == 2  # small files, large files
    assert "Python" not in plan
    assert found.count() == 3
