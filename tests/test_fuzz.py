"""Fuzzed input, good and bad, against an oracle that knows only Python's json and the
README: each record is loaded right or rejected with its text, once."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable, NoReturn

import pytest
from conftest import by_file
from pyspark.sql import Row, SparkSession

import etl

BLANK = " \t\ufeff"
MAX_TS = 253402300799999
LIMIT = 2_000_000  # bytes; larger files aren't read whole


@dataclass(frozen=True)
class Source:
    """Songs or log events: how the job reads them, and what a good one is."""

    name: str
    read_as: etl.Source
    some_text: str  # a column of text that isn't a key
    types: dict[str, str]  # by column: text, real, or the bits of a whole number
    good: dict[str, str]  # JSON text by key


SOURCES = (
    Source(
        "song",
        etl.SOURCES["songs"],
        "title",
        {
            "song_id": "text",
            "title": "text",
            "artist_id": "text",
            "artist_name": "text",
            "artist_location": "text",
            "artist_latitude": "real",
            "artist_longitude": "real",
            "duration": "real",
            "year": "32",
        },
        {
            "num_songs": "1",
            "artist_id": '"AR1"',
            "artist_latitude": "40.71",
            "artist_longitude": "-74.0",
            "artist_location": '"New York, NY"',
            "artist_name": '"Admiral \\"O\\" Otter é"',
            "song_id": '"SO1"',
            "title": '"Low Tide"',
            "duration": "201.5",
            "year": "2009",
        },
    ),
    Source(
        "event",
        etl.SOURCES["events"],
        "song",
        {
            "ts": "64",
            "userId": "text",
            "sessionId": "64",
            "itemInSession": "64",
            "page": "text",
            "song": "text",
            "artist": "text",
            "length": "real",
            "level": "text",
            "location": "text",
            "userAgent": "text",
            "firstName": "text",
            "lastName": "text",
            "gender": "text",
        },
        {
            "artist": '"Admiral Otter"',
            "auth": '"Logged In"',
            "firstName": '"Mina\\u00e9"',
            "gender": '"F"',
            "itemInSession": "3",
            "lastName": '"Sol"',
            "length": "201.5",
            "level": '"paid"',
            "location": '"Lansing, MI"',
            "method": '"PUT"',
            "page": '"NextSong"',
            "registration": "1540000000000.0",
            "sessionId": "52",
            "song": '"Low Tide"',
            "status": "200",
            "ts": "1543392000123",
            "userAgent": '"\\"Mozilla/5.0 (X11; é)\\""',
            "userId": '"91"',
        },
    ),
)


def line(source: Source, **changes: str | None) -> str:
    """A good record on one line, but for the changes; a None leaves a key out."""
    pairs = {**source.good, **changes}.items()
    return "{" + ", ".join(f'"{k}": {v}' for k, v in pairs if v is not None) + "}"


# --- The oracle -----------------------------------------------------------------------

# ("loaded", a value for each column) or ("rejected", reason, raw)
Outcome = tuple[Any, ...]
# More digits or levels than some parser may take.
TOO_MUCH = re.compile(r'\d{1000}|(?:[\[{](?:"a":)?){300}')
REASONS = ("not JSON", "not a JSON object", "not UTF-8", "value of the wrong type")


class Whole(str):
    """A number without a fraction, as it is spelled."""


class Fraction(str):
    """Another number, as it is spelled."""


def refuse(constant: str) -> NoReturn:
    """Python's json takes NaN and Infinity; JSON doesn't."""
    raise ValueError(constant)


def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; under "" the keys that it has twice, which JSON lets mean anything."""
    found = dict(items)
    found[""] = {
        key for key, count in Counter(k for k, _ in items).items() if count > 1
    }
    return found


class WrongType(Exception):
    """A value of the wrong type."""


def load(value: Any, wanted: str) -> Any:
    """A value as a column of the wanted type has it. Raises WrongType."""
    if value is None:
        return None
    if wanted == "text":
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            return str(value)
    elif wanted == "real":
        if isinstance(value, (Whole, Fraction)):
            return float(value)
    elif isinstance(value, Whole):
        limit = 2 ** (int(wanted) - 1)
        if -limit <= int(value) < limit:
            return int(value)
    raise WrongType(value)


def lacks(source: Source, row: dict[str, Any]) -> str | None:
    """Why a record of right types is bad; None where it is good."""

    def blank(name: str) -> bool:
        return not (row[name] or "").strip(" ")

    if any(value in (float("inf"), -float("inf")) for value in row.values()):
        return "number out of range"
    if source.name == "song":
        names = [name for name in ("song_id", "artist_id") if blank(name)]
        return f"no {names[0]}" if names else None
    play = row["page"] == "NextSong"
    if blank("page"):
        return "no page"
    if play and row["ts"] is None:
        return "play without ts"
    if row["ts"] is not None and not 0 <= row["ts"] <= MAX_TS:
        return "ts out of range"
    if play and blank("userId"):
        return "play without userId"
    if play and row["sessionId"] is None:
        return "play without sessionId"
    return None


def judge(source: Source, text: str) -> set[Outcome]:
    """What may become of the text of one record: one outcome where that is documented."""
    raw = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if raw != text:
        return {("rejected", "not UTF-8", raw)}
    anyhow: set[Outcome] = {("rejected", reason, raw) for reason in REASONS}
    try:
        value = json.loads(
            text,
            parse_int=Whole,
            parse_float=Fraction,
            parse_constant=refuse,
            object_pairs_hook=pairs,
        )
    except RecursionError:
        return anyhow
    except ValueError:
        return {("rejected", "not JSON", raw)}
    if not isinstance(value, dict):
        return anyhow if value is None else {("rejected", "not a JSON object", raw)}
    types = source.types
    try:
        row = {name: load(value.get(name), types[name]) for name in types}
    except WrongType:
        row, reason = {}, "value of the wrong type"
    else:
        reason = lacks(source, row)
    outcome = ("rejected", reason, raw) if reason else ("loaded", *row.values())
    allowed: set[Outcome] = {outcome}
    if value[""] & set(types):  # of two values the last may count, or none
        allowed |= anyhow
    halves = re.compile("[\ud800-\udfff]")  # of surrogate pairs, which UTF-8 can't have
    if not reason and any(halves.search(str(v)) for v in row.values()):
        # Java writes a ? for each; to reject the record would be as right.
        row = {n: halves.sub("?", v) if type(v) is str else v for n, v in row.items()}
        allowed = {("loaded", *row.values()), *anyhow}
    if TOO_MUCH.search(text):
        allowed |= anyhow
    return allowed


def judge_line(source: Source, content: bytes) -> list[set[Outcome]]:
    """What may become of the records of a line.

    It is one record, unless it begins with JSON values before other objects.
    """
    text = content.decode("utf-8", "surrogateescape").strip(BLANK)
    found = []
    while text:
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            value, end = None, len(text)
        rest = text[end:].lstrip(BLANK)
        if rest and rest[0] != "{":
            value, end, rest = None, len(text), ""
        if isinstance(value, list) and value and {type(v) for v in value} == {dict}:
            found += [judge(source, json.dumps(item)) for item in value]
        else:
            found.append(judge(source, text[:end].rstrip(BLANK)))
        text = rest
    return found


# --- The fuzzed lines -----------------------------------------------------------------


def words(text: str, between: str | None = None) -> list[str]:
    """The parts of a text, which blanks or another text divide."""
    return text.split(between)


VALUES = words(
    """"x" "" "1" "NaN" "true" "é\\n\\u0000" true false null [] [1] ["x"] [[]] {}
    {"a":1} [{"a":1}] 0 1 -1 2147483647 2147483648 -2147483648 -2147483649
    9223372036854775807 9223372036854775808 -9223372036854775808 -9223372036854775809
    253402300799999 253402300800000"""
)
VALUES += ['" "', "9" * 400, "-" + "9" * 400]
# Not where text belongs: how these are spelled there is up to Spark.
FRACTIONS = words(
    """0.5 1.0 -0 -0.0 1e3 1E+3 1e-3 1e999 -1e999 1e-999 4.9e-324 2009.0
    1.7976931348623157e308 1.7976931348623159e308 0.12345678901234567890123456789
    1541106106796.5"""
)
FRACTIONS += ["0." + "1" * 400]
NO_VALUES = words(
    r"""NaN -NaN Infinity -Infinity INF +1 01 -01 00 1. .5 - 1e 1e+ 0x10 1_000 1L
    1d --1 'x' `x` “x” x "x x" ""x True TRUE None undefined "\x41" "\u12" "a\" 1; 1// 1/**/
    /**/1 #1 (1) ١ １ [ ] { } [1 [1} {1] {"a"} {"a":} [,] [1,]"""
)
NO_VALUES += ["", "1 2"]
CONTROLS = [
    *map(chr, range(32)),
    *"\x7f\x80\x85\xa0\u2028\u2029\u3000\ufeff\ufffd\uffff",
]
KEYS = [
    *(r'"\u0000"', '""', '" "', '"_corrupt"', '"raw"', '"reason"', '"problem"', '"$"'),
    *(
        '"source_file"',
        '"file_size"',
        '"file_id"',
        '"a.b"',
        '"a`b"',
        '"é"',
        r'"\ud800"',
        '"record"',
    ),
]
BYTES = [b"\xff", b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe9"]
BYTES += [b"\xe2\x82", b"\xf0\x9f\x98", b"\xc1\xbf"]
BYTES += ["\ufffd".encode(), "😀".encode()]  # good ones


def cut_off(source: Source) -> Iterator[str]:
    """A good line that lacks its end or its start."""
    whole = line(source)
    for at in range(1, len(whole)):
        yield whole[:at]
        if at % 5 == 0:
            yield whole[at:]


def wrong_types(source: Source) -> Iterator[str]:
    """All kinds of values in each column, and none."""
    for name, wanted in source.types.items():
        for value in VALUES + (FRACTIONS if wanted != "text" else []):
            yield line(source, **{name: value})
        yield line(source, **{name: None})


def pages(source: Source) -> Iterator[str]:
    """Values in the keys of an event that isn't a play."""
    if source.name == "event":
        for name in ("ts", "userId", "sessionId", "itemInSession"):
            for value in VALUES:
                yield line(source, page='"Home"', **{name: value})
            yield line(source, page='"Home"', **{name: None})


def unknown_keys(source: Source) -> Iterator[str]:
    """All kinds of values where they don't matter, unless they aren't JSON."""
    for value in [*VALUES, *FRACTIONS]:
        yield line(source, unknown=value)


def no_values(source: Source) -> Iterator[str]:
    """What is no JSON value, where text, a number or anything belongs."""
    for name in ("title", "duration", "year", "ts", "length", "userId", "unknown"):
        if name in {**source.types, "unknown": ""}:
            for value in NO_VALUES:
                yield line(source, **{name: value})


def control_characters(source: Source) -> Iterator[str]:
    """Control and odd white-space characters, inside and outside of strings."""
    name = source.some_text
    for char in CONTROLS:
        if char not in "\r\n":
            yield line(source, **{name: f'"a{char}b"'})
            yield line(source, **{name: f'"a\\{char}b"'})
            yield line(source, **{name: f'{char}"ab"'})
            yield line(source) + char
            yield char + line(source)
            yield line(source) + char + line(source)
            yield char
            yield f"foo{char}"


def escapes(source: Source) -> Iterator[str]:
    """Escaped characters, right and wrong, in a value and in a key."""
    name = source.some_text
    for code in range(32, 127):
        yield line(source, **{name: f'"\\{chr(code)}"'})
    for code in (0, 9, 10, 13, 34, 92, 0xE9, 0xD800, 0xDC00, 0xE000, 0xFFFD):
        yield line(source, **{name: f'"a\\u{code:04x}b"'})
        yield line(source, **{f"a\\u{code:04x}b": "1"})
    for text in ("\\ud83d\\ude00", "\\ude00\\ud83d", "\\uD83D", "\\\\u0000", "\\u00g0"):
        yield line(source, **{name: f'"{text}"'})
    for column in source.types:
        key = f"\\u{ord(column[0]):04x}{column[1:]}"
        yield line(source, **{column: None, key: "1"})
        yield line(source, **{column: None, key: source.good[column]})


def keys(source: Source) -> Iterator[str]:
    """Keys in another case, with spaces, twice, empty, or of a name that the job uses."""
    for name in source.types:
        for other in (name.upper(), name.title(), f" {name}", f"{name}\\u0000"):
            yield line(source, **{name: None, other: source.good[name]})
            yield line(source, **{other: "[1]"})
        for value in ("1", '"x"', "null", "{}"):
            yield line(source)[:-1] + f', "{name}": {value}}}'
            yield f'{{"{name}": {value}, {line(source)[1:]}'
    for key in KEYS:
        for value in ("1", '"x"', "null", "{}", "[{}]"):
            yield f"{{{key}: {value}, {line(source)[1:]}"
            yield f"{{{key}: {value}}}"


def syntax(source: Source) -> Iterator[str]:
    """Comments, commas, quotes and brackets that JSON doesn't have."""
    whole = line(source)
    for old, news in {
        '"': ["'", ""],
        ", ": [",, ", " ", "; ", "\t,\t"],
        ": ": [" ", " = ", ":: ", ":", "\ufeff: ", "\u3000: ", "\0:"],
        "{": words('{,|{{|(|[|{/**/|{//|{#|// {|/**/{|x{|,{|[{|<|0{|"x" {|[]{', "|"),
        "}": words(',}|}}|)|]|} // x|} # x|}x|};|},|}]|}null|}0|} "x"|\t}|} \t', "|"),
    }.items():
        for new in news:
            yield whole.replace(old, new)
            yield whole.replace(old, new, 1)


def brackets(source: Source) -> Iterator[str]:
    """Lines of little else than brackets, blanks and values."""
    chars, rng = '{}[]":, {}[]', random.Random(source.name)
    for size in range(1, 60):
        yield "".join(rng.choice(chars) for _ in range(size // 4 + 1))
    for text in words("{} [] {{}} [{}] [[]] {}{} []{} {}[] }{ ]["):
        yield text
        yield text * 3
        yield f" \t{text}\t "
    for text in (*words('null true 12 -1.5 "x" x " \' \\ /'), " \t ", ""):
        yield text
        yield f"[{text}]"


def several(source: Source) -> Iterator[str]:
    """Several objects on a line and in an array, good, bad and cut off."""
    name = source.some_text
    one, two = line(source, **{name: '"1"'}), line(source, **{name: '"2"'})
    bad, wrong = "{}", line(source, **{name: "[1]"})
    for texts in ((one, two), (one, bad), (bad, wrong, two), (wrong, one), (one,) * 50):
        for between in (
            "",
            " ",
            "\t \t",
            "\ufeff",
            ",",
            ", ",
            "x",
            " x ",
            "][",
            "}",
            "{",
        ):
            yield between.join(texts)
            yield f"[{between.join(texts)}]"
        yield "".join(texts)[:-9]
        yield "".join(texts)[9:]
        yield f"[{', '.join(texts)}"
        yield f"[{', '.join(texts)}, 1]"
        yield f"[[{', '.join(texts)}]]"
        yield f"[{', '.join(texts)}]{one}"


def nesting(source: Source) -> Iterator[str]:
    """Nesting, shallow and deeper than any stack, closed or not."""
    for opening, closing in (("[", "]"), ('{"a":', "}"), ('[{"a":', "}]"), ("{", "}")):
        for depth in (1, 10, 200, 2000, 50_000):
            yield opening * depth
            yield closing * depth
            yield opening * depth + "1" + closing * depth
            yield line(source, unknown=opening * depth + "1" + closing * depth)
            yield line(source, unknown=opening * depth)


def long_values(source: Source) -> Iterator[str]:
    """Texts of a megabyte, and numbers of more digits than a parser takes."""
    name = source.some_text
    for text in ("x" * 1_000_000, "é😀" * 9_999, "\\u00e9\\n" * 9_999, "{" * 99_999):
        yield line(source, **{name: f'"{text}"'})
        yield line(source, **{name: f'"{text}'})
        yield line(source, unknown=f'"{text}"')
    for column in (name, "duration", "year", "ts", "length", "unknown"):
        if column in {**source.types, "unknown": ""}:
            yield line(source, **{column: "1" * 999})
            yield line(source, **{column: "1" * 2000})
    yield line(source) + " " * 100_000
    yield "x" * 100_000
    yield '"' * 99_999


def bad_bytes(source: Source) -> Iterator[bytes]:
    """Bytes that are, or only look like, UTF-8, everywhere on a line."""
    whole = line(source).encode()
    for some in BYTES:
        yield whole.replace(b"o", some)
        yield whole + some
        yield some + whole
        yield whole + some + whole
        yield whole.replace(b"{", b"{" + some)
        yield whole.replace(b"}", b"," + some + b"}")
        yield some
    yield whole.decode().encode("utf-16")
    yield whole.decode().encode("utf-16-be")


def mutated(source: Source) -> Iterator[bytes]:
    """A good line with some bytes changed, put in, taken out or swapped."""
    rng = random.Random(source.name)
    for number in range(250):
        data = bytearray(line(source).encode())
        for _ in range(number % 3 + 1):
            at = rng.randrange(len(data))
            byte = rng.choice((rng.randrange(256), rng.choice(b'{}[]",:\\0e-. tn')))
            how = rng.randrange(4)
            if how == 0:
                data[at] = byte
            elif how == 1:
                data.insert(at, byte)
            elif how == 2:
                del data[at : at + rng.choice((1, 1, 1, 9))]
            else:
                data[at], data[at - 1] = data[at - 1], data[at]
        yield bytes(data)


FUZZ = (
    *(
        cut_off,
        wrong_types,
        pages,
        unknown_keys,
        no_values,
        control_characters,
        escapes,
    ),
    *(keys, syntax, brackets, several, nesting, long_values, bad_bytes, mutated),
)


def fuzzed(source: Source) -> dict[str, list[bytes]]:
    """The fuzzed lines by their sort, none of which holds a line end."""
    found = {}
    for sort in FUZZ:
        texts = (t if isinstance(t, bytes) else t.encode() for t in sort(source))
        found[sort.__name__] = [t for t in texts if not set(b"\r\n") & set(t)]
    return found


LINES = {source.name: fuzzed(source) for source in SOURCES}


def garbage(source: Source) -> Iterator[bytes]:
    """Whole files without a good record: random bytes, and a cut-off indented object."""
    rng = random.Random(source.name)
    for alphabet in (
        bytes(range(256)),
        b'{}":,\n\r \t0a\\',
        b"{}\n ",
        b"\0\xff\n{\xef\xbb\xbf",
    ):
        for size in (*range(1, 30, 3), 300, 3000):
            yield bytes(rng.choice(alphabet) for _ in range(size))
    for size in (0, 8, 1000):  # what begins like gzip
        yield b"\x1f\x8b" + bytes(rng.randrange(256) for _ in range(size))
    yield gzip.compress(line(source).encode())[:-9]
    indented = json.dumps(json.loads(line(source)), indent=2)
    for at in range(1, len(indented), 9):
        yield indented[:at].encode()


GARBAGE = {source.name: list(garbage(source)) for source in SOURCES}


# --- The tests ------------------------------------------------------------------------

# What sends a file's lines, and only them, to Spark's parser without a look by Python.
FLAT = re.compile(r'[ \t]*\{(?:[^"{}[\]]|"(?:[^"\\]|\\.)*")*\}[ \t]*')


def only_flat(source: Source, lines: list[bytes]) -> list[bytes]:
    """The lines that are one object which holds no other, in UTF-8."""
    texts = [each.decode("utf-8", "replace") for each in lines]
    flat = [bool(FLAT.fullmatch(t)) and "\ufffd" not in t for t in texts]
    return [each for each, is_flat in zip(lines, flat) if is_flat]


def amid_good(source: Source, lines: list[bytes]) -> list[bytes]:
    """Lines with a good one after each, so that no two make one record."""
    good = line(source).encode()
    return [each for content in lines for each in (content, good)]


@dataclass(frozen=True)
class Way:
    """How lines come in a file: its name, which of them, with which others, and how."""

    name: str
    part: slice
    lines: Callable[[Source, list[bytes]], list[bytes]]
    pack: Callable[[list[bytes]], bytes]


WAYS = (
    Way("flat/{}.json", slice(None), only_flat, b"\n".join),
    Way("split/{}.json", slice(None), amid_good, b"\n".join),
    Way("cr/{}.json", slice(0, None, 3), amid_good, b"\r".join),
    Way(
        "gzip/{}.json.gz",
        slice(2, None, 3),
        amid_good,
        lambda all: gzip.compress(b"\r\n".join(all)),
    ),
    Way(
        "large/{}.json",
        slice(1, None, 3),
        amid_good,
        lambda all: b"\n".join([*all, b" " * LIMIT]),
    ),
)


def files_of(source: Source) -> dict[str, bytes]:
    """All files of songs or of log events, by their names."""
    files = {}
    for sort, lines in LINES[source.name].items():
        for way in WAYS:
            files[way.name.format(sort)] = way.pack(way.lines(source, lines[way.part]))
        for number in range(0, len(lines), 25):
            files[f"alone/{sort}/{number}.json"] = lines[number]
    for number, content in enumerate(GARBAGE[source.name]):
        files[f"garbage/{number}.json"] = content
        files[f"garbage/{number}.json.gz"] = gzip.compress(content)
    return files


def outcome(source: Source, row: Row) -> Outcome:
    """What became of a record."""
    if row.reason is None and row.raw is None:
        return ("loaded", *(row[name] for name in source.types))
    return ("rejected", row.reason, row.raw and row.raw.strip(BLANK))


Found = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def found(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Found]:
    """What became of all records, by the source and the file that they came from."""
    found: dict[str, Found] = {}
    for source in SOURCES:
        folder = tmp_path_factory.mktemp(source.name)
        for name, content in files_of(source).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(etl, "WHOLE_FILE_LIMIT", LIMIT)
            uri = etl.to_uri(str(folder))
            records = etl.read_records(spark, uri, source.read_as).rows
        found[source.name] = {
            name: [outcome(source, row) for row in rows]
            for name, rows in by_file(records, folder).items()
        }
        records.unpersist()
    return found


def differences(
    rows: list[Outcome], wanted: list[set[Outcome]]
) -> tuple[list[Outcome], list[set[Outcome]]]:
    """The records that are there but not wanted, and those wanted but not there."""
    left, missing = Counter(rows), []
    for allowed in sorted(wanted, key=len):
        # A rejected one first: it bears its text, where loaded ones may be alike.
        ranked = sorted(allowed, key=lambda each: each[0], reverse=True)
        match = next((each for each in ranked if left[each]), None)
        if match:
            left[match] -= 1
        else:
            missing.append(allowed)
    return list(left.elements()), missing


@pytest.mark.parametrize("sort", [sort.__name__ for sort in FUZZ])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name.partition("/")[0])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_each_line_of_a_file_is_loaded_right_or_rejected(
    source: Source, way: Way, sort: str, found: dict[str, Found]
) -> None:
    lines = way.lines(source, LINES[source.name][sort][way.part])
    wanted = [record for each in lines for record in judge_line(source, each)]
    rows = found[source.name].get(way.name.format(sort), [])
    assert differences(rows, wanted) == ([], [])


@pytest.mark.parametrize("sort", [sort.__name__ for sort in FUZZ])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_line_that_is_a_whole_file_is_loaded_right_or_rejected(
    source: Source, sort: str, found: dict[str, Found]
) -> None:
    lines = LINES[source.name][sort]
    for number in range(0, len(lines), 25):
        rows = found[source.name].get(f"alone/{sort}/{number}.json", [])
        wanted = judge_line(source, lines[number])
        assert differences(rows, wanted) == ([], []), lines[number]


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_no_character_of_a_file_of_garbage_is_lost(
    source: Source, suffix: str, found: dict[str, Found]
) -> None:
    for number, content in enumerate(GARBAGE[source.name]):
        rows = found[source.name].get(f"garbage/{number}.{suffix}", [])
        assert all(row[0] == "rejected" and row[1] and row[2] for row in rows), content
        kept = "".join(raw for _, _, raw in rows)
        text = content.decode("utf-8", "backslashreplace")
        # In no order: how many records this is isn't known.
        kept, text = (re.sub(r"[ \t\n\r\ufeff]", "", each) for each in (kept, text))
        assert sorted(kept) == sorted(text), content
