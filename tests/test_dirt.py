"""Reading dirty input: no record is lost, and none is loaded wrong without a word."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Optional

import pytest
from conftest import by_file
from pyspark.sql import DataFrame, Row, SparkSession

import etl

Record = tuple[str, Optional[str]]
NOT_JSON, WRONG_TYPE = "not JSON", "value of the wrong type"

# --- record_splitter ------------------------------------------------------------------


def split(content: str | bytes) -> list[Record]:
    """What the splitter finds, for records whose known columns are `a` and `b`."""
    if isinstance(content, str):
        content = content.encode()
    return etl.record_splitter(["a", "b"])(content)


@pytest.mark.parametrize(
    ("content", "records"),
    [
        pytest.param('{"a": 1}', ['{"a": 1}'], id="one object"),
        pytest.param('{"a": 1}\n{"a": 2}\n', ['{"a": 1}', '{"a": 2}'], id="lines"),
        pytest.param(
            '{\n  "a": 1\n}\n{\n  "a": 2\n}\n',
            ['{\n  "a": 1\n}', '{\n  "a": 2\n}'],
            id="pretty-printed, one after another",
        ),
        pytest.param(
            '{\n  "a": 1\n}{\n  "a": 2\n}',
            ['{\n  "a": 1\n}', '{\n  "a": 2\n}'],
            id="pretty-printed without a line end between",
        ),
        pytest.param(
            '{"a": 1} {"a": 2}{"a": 3}',
            ['{"a": 1}', '{"a": 2}', '{"a": 3}'],
            id="several on a line",
        ),
        pytest.param(
            '{"a": 1} {\n"a": 2}\n{"a": 3}',
            ['{"a": 1}', '{\n"a": 2}', '{"a": 3}'],
            id="one begins on the line where another ends",
        ),
        pytest.param('{"a": 1}\r{"a": 2}\r', ['{"a": 1}', '{"a": 2}'], id="lone CR"),
        pytest.param('{"a": 1}\r\n{"a": 2}\r\n', ['{"a": 1}', '{"a": 2}'], id="CRLF"),
        pytest.param(
            '{\r\n"a": 1\r\n}\r\n', ['{\n"a": 1\n}'], id="pretty-printed with CRLF"
        ),
        pytest.param('\ufeff{"a": 1}', ['{"a": 1}'], id="byte order mark at the start"),
        pytest.param(
            '{"a": 1}\n\ufeff{"a": 2}\n\ufeff',
            ['{"a": 1}', '{"a": 2}'],
            id="byte order mark in mid-file and at the end",
        ),
        pytest.param(
            '\n \n{"a": 1}\n\n\t\n\r\n{"a": 2}\n\n',
            ['{"a": 1}', '{"a": 2}'],
            id="blank lines",
        ),
        pytest.param(
            '{\n\n  "a": 1\n\n}', ['{\n\n  "a": 1\n\n}'], id="blank line in an object"
        ),
        pytest.param(
            '[{"a": 1}, {"a": 2}]', ['{"a": 1}', '{"a": 2}'], id="array on a line"
        ),
        pytest.param(
            '[\n{"a": 1},\n{"a": 2}\n]\n',
            ['{"a": 1}', '{"a": 2}'],
            id="array of a line an object",
        ),
        pytest.param(
            '[\n  {\n    "a": 1\n  },\n  {\n    "a": 2\n  }\n]',
            ['{"a": 1}', '{"a": 2}'],
            id="pretty-printed array",
        ),
        pytest.param(
            '{"a": 1}\n[{"a": 2}]\n[{"a": 3}]',
            ['{"a": 1}', '{"a": 2}', '{"a": 3}'],
            id="arrays among the lines",
        ),
        pytest.param('[{"a": "é"}]', ['{"a": "\\u00e9"}'], id="array with an accent"),
        pytest.param(
            '{"a": "} { ] [ \\" \\\\"} {"a": 2}',
            ['{"a": "} { ] [ \\" \\\\"}', '{"a": 2}'],
            id="braces, quotes and escapes in a string",
        ),
        pytest.param(
            '{"c": {"x": [1]}}', ['{"c": {"x": [1]}}'], id="nested in unknown column"
        ),
        pytest.param(
            '{"c": {"a": {}}}',
            ['{"c": {"a": {}}}'],
            id="nested below an unknown column",
        ),
        pytest.param(b"", [], id="nothing"),
        pytest.param("\ufeff \r\n\t", [], id="only blanks"),
    ],
)
def test_splitter_finds_each_object(content: str | bytes, records: list[str]) -> None:
    assert split(content) == [(raw, None) for raw in records]


@pytest.mark.parametrize(
    ("content", "records"),
    [
        pytest.param(
            '-- rotated --\n{"a": 1}\nfoo\nbar',
            [
                ("-- rotated --", NOT_JSON),
                ('{"a": 1}', None),
                ("foo", NOT_JSON),
                ("bar", NOT_JSON),
            ],
            id="garbage lines, each of its own",
        ),
        pytest.param(
            '{"a": 1\n{"a": 2}\n{"a',
            [('{"a": 1', NOT_JSON), ('{"a": 2}', None), ('{"a', NOT_JSON)],
            id="lines cut off in the middle and at the end",
        ),
        pytest.param(
            '{"a": "x\n{"a": 2} {"a": 3}',
            [('{"a": "x', NOT_JSON), ('{"a": 2}', None), ('{"a": 3}', None)],
            id="line cut off in a string, before several objects on a line",
        ),
        pytest.param(
            '{\n  "a": 1,\n  "b": 2',
            [('{\n  "a": 1,\n  "b": 2', NOT_JSON)],
            id="pretty-printed, cut off at the end, is one",
        ),
        pytest.param(
            '{\n  "a": 1,\n{\n  "a": 2\n}\nfoo',
            [('{\n  "a": 1,', NOT_JSON), ('{\n  "a": 2\n}', None), ("foo", NOT_JSON)],
            id="pretty-printed, cut off in the middle, is one",
        ),
        pytest.param(
            '{\n  "a": 1,\n{"a": 2}',
            [('{\n  "a": 1,', NOT_JSON), ('{"a": 2}', None)],
            id="pretty-printed, cut off before a line",
        ),
        pytest.param(
            '[{"a": "\\ud800"}]',
            [('{"a": "\\ud800"}', None)],
            id="array of an object with half a surrogate pair",
        ),
        pytest.param(
            b'[{"a": "\xff"}]',
            [('[{"a": "\\xff"}]', "not UTF-8")],
            id="array with invalid UTF-8",
        ),
        pytest.param(
            '{"a": "' + "x" * 200_000 + '"}{"a": 2}',
            [('{"a": "' + "x" * 200_000 + '"}', None), ('{"a": 2}', None)],
            id="long object before another",
        ),
        pytest.param(
            '{\n  "a": 1,\n  {"a": 2}',
            [('{\n  "a": 1,', NOT_JSON), ('{"a": 2}', None)],
            id="pretty-printed, cut off before an indented line",
        ),
        pytest.param(
            '{"a": 1} foo\n{"a": 2}',
            [('{"a": 1} foo', NOT_JSON), ('{"a": 2}', None)],
            id="object with trailing garbage is one",
        ),
        pytest.param(
            '{"a": 1}foo{"a": 2}',
            [('{"a": 1}foo{"a": 2}', NOT_JSON)],
            id="objects with garbage between are one",
        ),
        pytest.param(
            '{"a": 1}{"a": 2',
            [('{"a": 1}', None), ('{"a": 2', NOT_JSON)],
            id="second object of a line cut off",
        ),
        pytest.param(
            '{"a": 1}\n}\n', [('{"a": 1}', None), ("}", NOT_JSON)], id="a brace more"
        ),
        pytest.param(
            '{"a": "\t"}\n{"a": 1}',
            [('{"a": "\t"}', NOT_JSON), ('{"a": 1}', None)],
            id="control character in a string",
        ),
        pytest.param(
            '{"a": 1}\0\n{"a": "\0"}\n{"a": 2}',
            [('{"a": 1}\0', NOT_JSON), ('{"a": "\0"}', NOT_JSON), ('{"a": 2}', None)],
            id="NUL bytes",
        ),
        pytest.param(
            b'{"a": "\xff"}\n{"a": 1}',
            [('{"a": "\\xff"}', "not UTF-8"), ('{"a": 1}', None)],
            id="invalid UTF-8",
        ),
        pytest.param(
            b'\xff\xfe{\0"\0a',
            [('\\xff\\xfe{\0"\0a', "not UTF-8")],
            id="UTF-16",
        ),
        pytest.param(
            "[1, 2]\n12",
            [("[1, 2]", "not a JSON object"), ("12", "not a JSON object")],
            id="JSON of another kind",
        ),
        pytest.param("[]", [("[]", "not a JSON object")], id="empty array"),
        pytest.param(
            '[{"a": 1}, 2]',
            [('[{"a": 1}, 2]', "not a JSON object")],
            id="array not only of objects",
        ),
        pytest.param(
            '[{"a": 1},\n{"a": 2}',
            [('[{"a": 1},', NOT_JSON), ('{"a": 2}', None)],
            id="array cut off",
        ),
        pytest.param(
            '{"a": {"x": 1}}\n{"b": [1]}\n{"a": {}}',
            [
                ('{"a": {"x": 1}}', WRONG_TYPE),
                ('{"b": [1]}', WRONG_TYPE),
                ('{"a": {}}', WRONG_TYPE),
            ],
            id="nested in a known column",
        ),
        pytest.param(
            '[{"a": [1]}, {"a": 1}]',
            [('{"a": [1]}', WRONG_TYPE), ('{"a": 1}', None)],
            id="nested in an array's object",
        ),
    ],
)
def test_splitter_keeps_what_is_bad(
    content: str | bytes, records: list[Record]
) -> None:
    assert split(content) == records


def test_splitter_rejects_null() -> None:
    ((raw, problem),) = split("null")
    assert raw == "null"
    assert problem


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"c":['])
def test_splitter_survives_deep_nesting(opening: str) -> None:
    deep = opening * 100_000
    assert split(f'{deep}\n{{"a": 1}}') == [(deep, NOT_JSON), ('{"a": 1}', None)]


def test_splitter_unpacks_gzip() -> None:
    assert split(gzip.compress(b'{"a": 1}\nfoo')) == [
        ('{"a": 1}', None),
        ("foo", NOT_JSON),
    ]


# --- read_records ---------------------------------------------------------------------


def to_json(values: dict[str, str | None]) -> str:
    """An object on one line, of values that are JSON text; a None is left out."""
    pairs = (f'"{key}": {value}' for key, value in values.items() if value is not None)
    return "{" + ", ".join(pairs) + "}"


def song(**changes: str | None) -> str:
    """A song that is good but for the changes."""
    return to_json({"song_id": '"SO1"', "artist_id": '"AR1"', **changes})


def play(**changes: str | None) -> str:
    """A play that is good but for the changes."""
    keys = {"page": '"NextSong"', "ts": "1541106106796", "userId": '"8"'}
    return to_json({**keys, "sessionId": "139", "itemInSession": "0", **changes})


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    """Writes files, by their paths below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def read(
    spark: SparkSession,
    folder: Path,
    files: dict[str, str | bytes],
    source: etl.Source,
) -> DataFrame:
    """The records of some files, which are written first."""
    write(folder, files)
    return etl.read_records(spark, etl.to_uri(str(folder)), source).rows


# By the song file's content: the values that are loaded.
GOOD_SONGS: dict[str, dict[str, object]] = {
    song(): {"song_id": "SO1", "artist_id": "AR1", "title": None, "year": None},
    song(title='"T"', year="0", duration="1.5"): {
        "title": "T",
        "year": 0,
        "duration": 1.5,
    },
    song(artist_name="112", title="404"): {"artist_name": "112", "title": "404"},
    song(artist_name="true"): {"artist_name": "true"},
    song(duration="200"): {"duration": 200.0},
    song(duration="99999999999999999999999"): {"duration": 1e23},
    song(title="99999999999999999999999"): {"title": "99999999999999999999999"},
    song(title='"} { ] [ \\" \\\\ \\/ \\u00e9"'): {"title": '} { ] [ " \\ / é'},
    song(title='"é \ufffd"'): {"title": "é \ufffd"},
    song(title=f'"{"x" * 100_000}"'): {"title": "x" * 100_000},
    song(unknown='{"a": ["}"]}', title='"T"'): {"title": "T"},
    song(unknown="1e400", year="1999"): {"year": 1999},
    f"\ufeff{song(title='1')}": {"title": "1"},
    f"  {song(title='2')}\t": {"title": "2"},
}


# By the song file's content, which is one bad record: its reason.
BAD_SONGS = {
    song(song_id=None): "no song_id",
    song(song_id="null"): "no song_id",
    song(song_id='" "'): "no song_id",
    "{}": "no song_id",
    song(artist_id=None): "no artist_id",
    song(artist_id='""'): "no artist_id",
    song(duration='"long"'): WRONG_TYPE,
    song(duration='"200"'): WRONG_TYPE,
    song(duration="true"): WRONG_TYPE,
    song(year="1999.5"): WRONG_TYPE,
    song(year="3000000000"): WRONG_TYPE,
    song(year="99999999999999999999999"): WRONG_TYPE,
    song(artist_latitude='"NaN"'): WRONG_TYPE,
    song(title='{"text": "T"}'): WRONG_TYPE,
    song(title='["T"]'): WRONG_TYPE,
    song(artist_latitude="1e400"): "number out of range",
    song(artist_longitude="-1e400"): "number out of range",
    song(duration="NaN"): NOT_JSON,
    song(unknown="NaN"): NOT_JSON,
    song(unknown="Infinity"): NOT_JSON,
    song(unknown="01"): NOT_JSON,
    song()[:-1]: NOT_JSON,
    song()[:-1] + ",}": NOT_JSON,
    song() + " foo": NOT_JSON,
    song()[:-1].replace(", ", ",\n  ").replace("{", "{\n  "): NOT_JSON,
    "foo": NOT_JSON,
    "{song_id: 1}": NOT_JSON,
    song(unknown="[" * 2000 + "]" * 2000): NOT_JSON,
    "[]": "not a JSON object",
    "12": "not a JSON object",
}


@pytest.fixture(scope="module")
def songs(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Row]]:
    """The records of all good and bad songs, by their content, each in its own file."""
    folder = tmp_path_factory.mktemp("songs")
    contents = [*GOOD_SONGS, *BAD_SONGS]
    files: dict[str, str | bytes] = {
        f"{n}.json": content for n, content in enumerate(contents)
    }
    found = by_file(read(spark, folder, files, etl.SOURCES["songs"]), folder)
    return {content: found[f"{n}.json"] for n, content in enumerate(contents)}


def shorten(content: str) -> str:
    """A test's id, of the content of a file."""
    return content.encode("unicode_escape").decode()[:90]


@pytest.mark.parametrize("content", GOOD_SONGS, ids=shorten)
def test_good_song_is_loaded(content: str, songs: dict[str, list[Row]]) -> None:
    (row,) = songs[content]
    assert (row.reason, row.raw) == (None, None)
    assert {name: row[name] for name in GOOD_SONGS[content]} == GOOD_SONGS[content]


@pytest.mark.parametrize("content", BAD_SONGS, ids=shorten)
def test_bad_song_is_rejected_with_its_text(
    content: str, songs: dict[str, list[Row]]
) -> None:
    (row,) = songs[content]
    assert (row.reason, row.raw) == (BAD_SONGS[content], content)


# By the event, on a line of its own: the reason, None where it is good.
EVENTS = {
    play(): None,
    play(userId="91"): None,
    play(ts="0"): None,
    play(ts="253402300799999"): None,
    play(itemInSession=None): None,
    play(song="null", artist="112", length="1e2"): None,
    to_json({"page": '"Home"'}): None,
    to_json({"page": '"Home"', "userId": '""', "sessionId": "null"}): None,
    play(ts=None): "play without ts",
    play(ts="null"): "play without ts",
    play(userId=None): "play without userId",
    play(userId='""'): "play without userId",
    play(sessionId=None): "play without sessionId",
    play(ts="-1"): "ts out of range",
    play(ts="253402300800000"): "ts out of range",
    play(ts="253402300800000", page='"Home"'): "ts out of range",
    play(ts="99999999999999999999999"): WRONG_TYPE,
    play(ts="1541106106796.5"): WRONG_TYPE,
    play(ts='"1541106106796"'): WRONG_TYPE,
    play(sessionId='"139"'): WRONG_TYPE,
    play(length='{"seconds": 1}'): WRONG_TYPE,
    play(length="1e400"): "number out of range",
    play(page=None): "no page",
    play(page='" "'): "no page",
    "-- rotated --": NOT_JSON,
    "{'page': 1": NOT_JSON,
    play()[:40]: NOT_JSON,
}


@pytest.fixture(scope="module")
def events(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The records of a file of all events, in no order."""
    folder = tmp_path_factory.mktemp("events")
    lines: dict[str, str | bytes] = {"all.json": "\n".join(EVENTS)}
    return read(spark, folder, lines, etl.SOURCES["events"]).collect()


def test_bad_events_of_a_file_are_rejected_with_their_text(events: list[Row]) -> None:
    rejected = {row.raw: row.reason for row in events if row.reason is not None}
    assert rejected == {line: why for line, why in EVENTS.items() if why is not None}


def test_good_events_of_a_file_are_loaded(events: list[Row]) -> None:
    loaded = [row for row in events if row.reason is None]
    assert len(loaded) == 8
    assert {row.raw for row in loaded} == {None}
    assert {row.userId for row in loaded} == {"8", "91", "", None}
    assert {row.ts for row in loaded} == {1541106106796, 0, 253402300799999, None}
    assert {row.artist for row in loaded} == {"112", None}
    assert {row.length for row in loaded} == {100.0, None}


def test_each_event_is_either_loaded_or_rejected(events: list[Row]) -> None:
    assert len(events) == 27


PRETTY = '{\n  "song_id": "SO1",\n  "artist_id": "AR1",\n  "title": "T"\n}\n'
# By the file's name: its content; the titles that are loaded; reason and text of the rest.
MIXED: dict[str, tuple[str | bytes, list[str], list[Record]]] = {
    "pretty.json": (
        PRETTY * 3 + PRETTY[:40],
        ["T", "T", "T"],
        [(NOT_JSON, PRETTY[:40])],
    ),
    "several.json": (song(title="1") + song(title="2"), ["1", "2"], []),
    "array.json": (f"[{song(title='1')},\n{song(title='2')}]", ["1", "2"], []),
    "cut/off/in/the/middle.json": (
        f"{song()[:20]}\n{song(title='1')}\nfoo\n{song(title='2')}\n{song()[:-2]}",
        ["1", "2"],
        [(NOT_JSON, "foo"), (NOT_JSON, song()[:20]), (NOT_JSON, song()[:-2])],
    ),
    "blank.json": (f"\n \n\t\r\n{song(title='1')}\n\n\ufeff\n", ["1"], []),
    "cr.json": (f"{song(title='1')}\r{song(title='2')}\r", ["1", "2"], []),
    "crlf.json": (f"{song(title='1')}\r\n{song(title='2')}\r\n", ["1", "2"], []),
    "bom.json": (f"\ufeff{song(title='1')}\n\ufeff{song(title='2')}", ["1", "2"], []),
    "utf-8.json": (
        song(title="1").encode()
        + b"\n"
        + song(title='"?"').encode().replace(b"?", b"\xe9"),
        ["1"],
        [("not UTF-8", song(title='"\\xe9"'))],
    ),
    "nul.json": (
        f"{song(title='1')}\n{song()}\0\n{song(title='2')}",
        ["1", "2"],
        [(NOT_JSON, song() + "\0")],
    ),
    "packed.json.gz": (
        gzip.compress(f"{song(title='1')}\n{song(title='2')}".encode()),
        ["1", "2"],
        [],
    ),
    "packed-and-bad.json.gz": (
        gzip.compress(f"{PRETTY}{song(title='1')}\nfoo".encode()),
        ["1", "T"],
        [(NOT_JSON, "foo")],
    ),
    "packed-without-saying-so.json": (
        gzip.compress(f"{PRETTY}foo".encode()),
        ["T"],
        [(NOT_JSON, "foo")],
    ),
    "space and%20 100% a+b=c #1 é.json": (
        f"{song(title='1')}\nfoo",
        ["1"],
        [(NOT_JSON, "foo")],
    ),
    "year=5/[a]/{b}/c*/d?/e^/1.json": (f"{PRETTY}foo", ["T"], [(NOT_JSON, "foo")]),
    "empty.json": ("", [], []),
}
IGNORED = ("a.txt", "a.json.bak", "a.jsonl", "ajson", "a.json.bz2", "README")


@pytest.fixture(scope="module")
def mixed(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Row]]:
    """The records of MIXED by file, with other files around, all below an odd folder."""
    folder = tmp_path_factory.mktemp("odd") / "100% [a-z] {b,c} d* #1+é=%20"
    files = {name: content for name, (content, _, _) in MIXED.items()}
    files.update(dict.fromkeys(IGNORED, song()))
    records = read(spark, folder, files, etl.SOURCES["songs"])
    return by_file(records, folder)


@pytest.mark.parametrize("name", MIXED)
def test_records_of_a_dirty_file_are_loaded_or_rejected(
    name: str, mixed: dict[str, list[Row]]
) -> None:
    _, titles, rejected = MIXED[name]
    rows = mixed.get(name, [])
    assert [row.title for row in rows if row.reason is None] == titles
    assert [(row.reason, row.raw) for row in rows if row.reason is not None] == rejected


def test_files_of_other_suffixes_are_ignored(mixed: dict[str, list[Row]]) -> None:
    assert set(mixed) == set(MIXED) - {"empty.json"}


def test_file_too_large_to_read_whole_is_read_right_line_by_line(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etl, "WHOLE_FILE_LIMIT", 100)
    large = f"{song(title='1')}\r\nfoo\n\n{song(title='2')}{song(title='3')}\n{PRETTY}"
    small = PRETTY  # of less than 100 bytes
    files: dict[str, str | bytes] = {"large.json": large, "small.json": small}
    records = read(spark, tmp_path, files, etl.SOURCES["songs"])
    rows = by_file(records, tmp_path)
    loaded = [row.title for row in rows["large.json"] if row.reason is None]
    rejected = {row.raw for row in rows["large.json"] if row.reason == NOT_JSON}
    assert sorted(loaded) == ["1", "2", "3"]
    lines_of_pretty = {'"song_id": "SO1",', '"artist_id": "AR1",', '"title": "T"'}
    assert rejected == {"foo", "{", *lines_of_pretty, "}"}
    assert len(rows["large.json"]) == 3 + 6
    assert [row.title for row in rows["small.json"]] == ["T"]


def test_clean_input_is_read_only_once_and_without_python(
    spark: SparkSession, tmp_path: Path
) -> None:
    files: dict[str, str | bytes] = {
        "a.json": f"{song(title='1')}\n{song(title='2')}\n",
        "b/c.json": f"\ufeff{song(song_id=None)}\r\n\r\n",
    }
    write(tmp_path, files)
    songs = etl.SOURCES["songs"]
    records = etl.read_records(spark, etl.to_uri(str(tmp_path)), songs)
    assert records.counts == {None: 2, "no song_id": 1}
    assert records.tally == 1  # both good ones have the same song_id
    shutil.rmtree(tmp_path)  # what is read is cached
    assert records.rows.count() == 3
    assert "EvalPython" not in records.rows._jdf.queryExecution().toString()
