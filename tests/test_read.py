"""Reading dirty input: no record is lost, and none is loaded wrong without a word."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Optional

import pytest
from conftest import by_file, read_files
from makers import Record, play, song, to_json
from pyspark.sql import Row, SparkSession

NOT_JSON, WRONG_TYPE, NOT_UTF8 = "not JSON", "value of the wrong type", "not UTF-8"


def line(record: Record, **texts: str | None) -> str:
    """A record on one line with values given as JSON text; None leaves the key out."""
    values = {key: json.dumps(of, ensure_ascii=False) for key, of in record.items()}
    pairs = {**values, **texts}.items()
    return "{" + ", ".join(f'"{k}": {of}' for k, of in pairs if of is not None) + "}"


Values = tuple[dict[str, Optional[str]], Record]
# Each case has values as JSON text and as they are loaded.
GOOD_SONGS: dict[str, Values] = {
    "complete": ({}, {}),
    "without year": ({"year": None}, {"year": None}),
    "null title": ({"title": "null"}, {"title": None}),
    "empty title": ({"title": '""'}, {"title": None}),
    "blank title": ({"title": '"  "'}, {"title": None}),
    "title in blanks": ({"title": '" T "'}, {"title": " T "}),
    "number as text": ({"artist_name": "112"}, {"artist_name": "112"}),
    "large number as text": ({"title": "9" * 23}, {"title": "9" * 23}),
    "object as text": ({"title": '{"a": [1]}'}, {"title": '{"a":[1]}'}),
    "large number as double": ({"duration": "1" + "0" * 23}, {"duration": 1e23}),
    "escapes": ({"title": r'"}{ ][ \" \\ \/ \u00e9{"'}, {"title": '}{ ][ " \\ / é{'}),
    "replacement character": ({"title": '"é \ufffd 😀"'}, {"title": "é \ufffd 😀"}),
    "long text": ({"title": f'"{"x" * 100_000}"'}, {"title": "x" * 100_000}),
    "unknown object": ({"unknown": '{"title": ["}", {"year": {}}]}'}, {}),
    "unknown large number": ({"unknown": "1e400"}, {}),
}
BAD_SONGS = {
    line(song(), song_id=None): "no song_id",
    line(song(), song_id="null"): "no song_id",
    line(song(), song_id='" "'): "no song_id",
    line(song(), artist_id=None): "no artist_id",
    line(song(), duration='"200"'): WRONG_TYPE,
    line(song(), year="1999.5"): WRONG_TYPE,
    line(song(), year="3000000000"): WRONG_TYPE,
    line(song(), artist_latitude='"NaN"'): WRONG_TYPE,
    line(song(), artist_latitude="1e400"): "number out of range",
    line(song(), artist_longitude="-1e400"): "number out of range",
    line(song(), unknown="NaN"): NOT_JSON,
    line(song(), unknown="[" * 2000 + "]" * 2000): NOT_JSON,
    line(song(), title='"a\tb"'): NOT_JSON,
    line(song())[:-1]: NOT_JSON,
    line(song())[:-1] + ",}": NOT_JSON,
    line(song()) + " foo": NOT_JSON,
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
    "first ts": ({"ts": "0"}, {"ts": 0}),
    "last ts": ({"ts": "253402300799999"}, {"ts": 253402300799999}),
    "without item": ({"itemInSession": None}, {"itemInSession": None}),
    "nobody's": ({"page": '"Home"', "userId": '""'}, {"page": "Home", "userId": None}),
    "page without keys": ({"page": '"Home"', **NO_KEYS}, {"page": "Home", **NO_KEYS}),
}
BAD_EVENTS = {
    line(play(), ts=None): "play without ts",
    line(play(), userId=None): "play without userId",
    line(play(), userId='" "'): "play without userId",
    line(play(), sessionId=None): "play without sessionId",
    line(play(), ts="-1"): "ts out of range",
    line(play(), ts="253402300800000"): "ts out of range",
    line(play(), ts="253402300800000", page='"Home"'): "ts out of range",
    line(play(), ts="9" * 23): WRONG_TYPE,
    line(play(), ts="1541106106796.5"): WRONG_TYPE,
    line(play(), ts='"1541106106796"'): WRONG_TYPE,
    line(play(), length="1e400"): "number out of range",
    line(play(), page=None): "no page",
}
CASES = {"songs": (song(), GOOD_SONGS, BAD_SONGS)}
CASES["events"] = (play(), GOOD_EVENTS, BAD_EVENTS)


@pytest.mark.parametrize("way", ["whole", "by line"])
@pytest.mark.parametrize("kind", CASES)
def test_a_record_is_loaded_as_it_is_or_rejected_with_its_reason_and_text(
    kind: str, way: str, spark: SparkSession, tmp_path: Path
) -> None:
    record, good, bad = CASES[kind]
    # The name of a good case is in one of its fields.
    name = "artist_location" if kind == "songs" else "location"
    texts = [line(record, **{name: f'"{case}"'}, **good[case][0]) for case in good]
    texts += bad
    alone = {f"{n}.json": text for n, text in enumerate(texts)}
    together = {"all.json.gz": gzip.compress("\n".join(texts).encode())}
    files = alone if way == "whole" else together
    rows = read_files(spark, tmp_path, files, kind).drop("source_file").collect()
    loaded = {row[name]: row.asDict() for row in rows if row.reason is None}
    wanted = {**record, "reason": None, "raw": None}
    assert loaded == {of: {**wanted, name: of, **good[of][1]} for of in good}
    assert {row.raw: row.reason for row in rows if row.reason is not None} == bad
    assert len(rows) == len(good) + len(bad)


A, B, C = (to_json(song(title=title)) for title in "ABC")
LATIN = B.encode().replace(b"London", b"Orl\xe9ans")
NOT_LATIN = {LATIN.decode("latin-1"): NOT_UTF8}
NESTED = line(song(title="A"), unknown='[{"a": 1}, {"song_id": "S", "artist_id": "A"}]')
PRETTY = json.dumps(song(title="P"), indent=2)
PRETTY_NESTED = json.dumps(json.loads(NESTED), indent=2)
CUT, BITS = PRETTY[:40], dict.fromkeys((A[:9], "foo", A[:-2]), NOT_JSON)
PRETTY_ARRAY = json.dumps([song(title="A"), song(title="B")], indent=1)
# By a file's name: its content, which is packed for a .gz; the titles that are loaded;
# the texts of the rest with their reasons.
FILES: dict[str, tuple[str | bytes, str, dict[str, str]]] = {
    "lines.json": (f"{A}\n{B}\n", "AB", {}),
    "crlf.json": (f"{A}\r\n{B}\r\n", "AB", {}),
    "cr.json": (f"{A}\r{B}\r", "AB", {}),
    "blank.json": (f"\n \n\t\r\n  {A}\t \n\n", "A", {}),
    "bom.json": (f"\ufeff{A}\n{C[:9]}\n\ufeff{B}\n\ufeff", "AB", {C[:9]: NOT_JSON}),
    "one-line.json": (f"{A}{B} {C}", "ABC", {}),
    "one-line-bom.json": (f"{A}\ufeff{B} \ufeff{C}", "ABC", {}),
    "array-of-lines.json": (f"[\n{A},\n{B}\n]\n", "AB", {}),
    "arrays.json": (f"{A}\n[{B}]\n[{C}]", "ABC", {}),
    "array-of-one.json": (f"\ufeff[{A}]", "A", {}),
    "array-of-other-and-one.json": (f"[1, {A}]", "A", {"1": WRONG_TYPE}),
    "array-with-bad.json": (f"[{A}, {{}}, {B}]", "AB", {"{}": "no song_id"}),
    "array-cut-off.json": (f"[{A},\n{B[:-9]}", "A", {B[:-9]: NOT_JSON}),
    "array-line-cut-off.json": (f"[{A}, {B}, {C[:99]}", "AB", {C[:99]: NOT_JSON}),
    "pretty-array.json": (PRETTY_ARRAY, "AB", {}),
    "array-nested.json": (f"[{NESTED}, {B}]", "AB", {}),
    "pretty-nested.json": (PRETTY_NESTED, "A", {}),
    "pretty.json": (f"{PRETTY}\n{PRETTY}\n", "PP", {}),
    "pretty-crlf.json": (f"{PRETTY}\n{PRETTY}\n".replace("\n", "\r\n"), "PP", {}),
    "pretty-and-blank.json": (PRETTY.replace("\n", "\n\n"), "P", {}),
    "pretty-side-by-side.json": (PRETTY * 2, "PP", {}),
    "pretty-cut-off.json": (f"{PRETTY_NESTED}\n{CUT}", "A", {CUT: NOT_JSON}),
    "pretty-cut-off-first.json": (f"{CUT}\n{PRETTY}", "P", {CUT: NOT_JSON}),
    "cut/off/in/the/middle.json": (f"{A[:9]}\n{B}\nfoo\n{C}\n{A[:-2]}", "BC", BITS),
    "garbage-after-one.json": (f"{A}\nfoo", "A", {"foo": NOT_JSON}),
    "garbage-before-one.json": (f"-- foo --\n{A}", "A", {"-- foo --": NOT_JSON}),
    "second-cut-off.json": (f"{A}{B[:-9]}", "A", {B[:-9]: NOT_JSON}),
    "latin.json": (A.encode() + b"\n" + LATIN, "A", NOT_LATIN),
    "packed.json.gz": (f"{A}\n{B}\r\n\n[{C}]", "ABC", {}),
    "packed-latin.json.gz": (A.encode() + b"\n" + LATIN, "A", NOT_LATIN),
    "packed-cut-off.json.gz": (f"{B}{C}\n{A[:-9]}", "BC", {A[:-9]: NOT_JSON}),
    "space and%20 100% a+b=c #1 é.json": (A, "A", {}),
    "20:15:00\n.json": (A, "A", {}),
    "year=5/[a]/{b}/c*/d?/e^/1.json": (f"{A}\n{B[:-1]}", "A", {B[:-1]: NOT_JSON}),
    "empty.json": ("", "", {}),
    "empty-array.json": ("[]\n", "", {}),
}
IGNORED = ["a.txt", "a.jsonl", "ajson", "a.json.bak", "a.json.bz2"]
IGNORED += [f"{name}.json" for name in ("_a", ".a", "_b/a", ".b/a")]


def outcome(rows: list[Row]) -> tuple[str, list[tuple[str, str]]]:
    """The titles of the good records; the texts of the bad ones with their reasons."""
    titles = sorted(row.title for row in rows if row.reason is None)
    bad = sorted((row.raw, row.reason) for row in rows if row.reason is not None)
    return "".join(titles), bad


def test_records_of_a_file_are_loaded_or_rejected_and_other_files_ignored(
    spark: SparkSession, tmp_path: Path
) -> None:
    files = dict.fromkeys(IGNORED, A.encode())
    for name, (content, _, _) in FILES.items():
        data = content.encode() if isinstance(content, str) else content
        files[name] = gzip.compress(data) if name.endswith("gz") else data
    folder = tmp_path / "100% [a-z] {b,c} d* #1+é=%20"
    found = by_file(read_files(spark, folder, files, "songs"), folder)
    wanted = {name: (of[1], sorted(of[2].items())) for name, of in FILES.items()}
    outcomes = {name: outcome(found.get(name, [])) for name in {*FILES, *found}}
    assert outcomes == wanted


def test_pretty_printing_is_rejected_by_line_where_a_file_is_not_read_whole(
    spark: SparkSession, tmp_path: Path
) -> None:
    small = f"{PRETTY}\n{A}\n".encode()
    noise = random.Random(1).randbytes(2**20).hex()  # gzip can't make it small.
    large = small + to_json(song(title=noise)).encode()
    packed = {"a.json.gz": gzip.compress(small), "b.json.gz": gzip.compress(large)}
    session = spark.newSession()
    # Reading a file of more bytes whole is an error now.
    session.conf.set("spark.sql.sources.binaryFile.maxLength", 99)
    files = {"c.json": large, **packed}
    found = by_file(read_files(session, tmp_path, files, "songs"), tmp_path)
    bad = sorted((text.strip(" ,"), NOT_JSON) for text in PRETTY.split("\n"))
    assert outcome(found["a.json.gz"]) == ("A", bad)
    both = ("".join(sorted(["A", noise])), bad)
    assert outcome(found["b.json.gz"]) == outcome(found["c.json"]) == both


def test_a_record_cut_between_two_tasks_is_read_once(
    spark: SparkSession, tmp_path: Path
) -> None:
    # Lines of many lengths are cut anywhere, between CR and LF, too.
    ids = [f"S{n}{'x' * (n % 97)}" for n in range(5000)]
    texts = [to_json(song(song_id=song_id, title="é" * 9)) for song_id in ids]
    session = spark.newSession()
    session.conf.set("spark.sql.files.maxPartitionBytes", "64kB")
    found = read_files(session, tmp_path, {"a.json": "\r\n".join(texts)}, "songs")
    assert found.rdd.getNumPartitions() > 15
    read = sorted((row.song_id or "", row.reason) for row in found.collect())
    assert read == [(song_id, None) for song_id in sorted(ids)]


def test_dirt_takes_no_second_pass_and_no_python(
    spark: SparkSession, tmp_path: Path
) -> None:
    files = {"a.json": f"{NESTED}\n[{A}]", "b.json.gz": gzip.compress(b"foo")}
    spark.sparkContext.setJobGroup("reading", "")
    found = read_files(spark, tmp_path, files, "songs")
    assert not [*spark.sparkContext.statusTracker().getJobIdsForGroup("reading")]
    plan = found._jdf.queryExecution().executedPlan().toString()
    assert plan.count("FileScan") == 2  # small files, large files
    assert "Python" not in plan
