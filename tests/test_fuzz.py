"""Random input, good and bad, against an oracle that knows only Python's json and what
README promises: each record is loaded right or rejected with its text, once."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from conftest import by_file, read_files
from makers import Record, play, song, to_json
from pyspark.sql import Row, SparkSession

import etl

# ("loaded", a value for each column) or ("rejected", text, reasons)
Outcome = tuple[Any, ...]
SIZE, MAX_TS = 400, 253402300799999  # SIZE is how many lines there are of each sort
KINDS = {"songs": (song(), etl.SONG_SCHEMA), "events": (play(), etl.EVENT_SCHEMA)}


class Spelled(str):
    """A number as it is spelled."""


def refuse(constant: str) -> NoReturn:
    """Python's json takes NaN and Infinity; JSON doesn't."""
    raise ValueError(constant)


def load(value: Any, wanted: str) -> Any:
    """A value as a column of the wanted type has it. Raises TypeError."""
    is_number = isinstance(value, Spelled)
    if value is None or value in ("", " ") and wanted == "string":
        return None
    if wanted == "string":
        is_text = isinstance(value, str)
        return str(value) if is_text else json.dumps(value, separators=(",", ":"))
    if wanted == "double" and is_number:
        return float(value)
    if wanted.endswith("int") and is_number and re.fullmatch("-?[0-9]+", value):
        limit = 2 ** (31 if wanted == "int" else 63)
        if -limit <= int(value) < limit:
            return int(value)
    raise TypeError


def find_faults(row: Record) -> frozenset[str]:
    """Why a record of right types is bad."""
    faults = {"number out of range": bool({math.inf, -math.inf} & {*row.values()})}
    if "song_id" in row:
        faults.update({f"no {of}": not row[of] for of in ("song_id", "artist_id")})
    else:
        is_play = row["page"] == "NextSong"
        for key in ("ts", "userId", "sessionId"):
            faults[f"play without {key}"] = is_play and row[key] is None
        faults["ts out of range"] = not 0 <= (row["ts"] or 0) <= MAX_TS
        faults["no page"] = row["page"] is None
    return frozenset(fault for fault, is_there in faults.items() if is_there)


def reject(text: str, *reasons: str) -> Outcome:
    """The outcome of a bad record, for which each reason is right; its text as Python
    spells it, if it is JSON, since Spark respells a good array."""
    with suppress(ValueError):
        text = json.dumps(json.loads(text, parse_constant=refuse))
    return ("rejected", text, frozenset(reasons))


def judge(content: bytes, schema: str) -> Outcome:
    """What becomes of the text of one record."""
    types = dict(re.findall(r"(\w+) (\w+)", schema))
    try:
        text = content.decode().strip(" \t\ufeff[],")
    except UnicodeDecodeError:
        return reject(content.decode("latin-1").strip(" \t[],"), "not UTF-8")
    how = {"parse_int": Spelled, "parse_float": Spelled, "parse_constant": refuse}
    try:
        value = json.loads(text, **how)
        row = {name: load(value.get(name), wanted) for name, wanted in types.items()}
    except ValueError:
        return reject(text, "not JSON")
    except TypeError:
        return reject(text, "value of the wrong type")
    faults = find_faults(row)
    return reject(text, *faults) if faults else ("loaded", *row.values())


JSON = r"""null true false [] {} [true,{"b":["c"]}] {"a":{"b":null}} "" "x" "1" "NaN"
    "é😀" "\"\\\n\t\u00e9\ud83d\ude00{}[],:" 0 -1 2009 2147483647 2147483648 -2147483648
    -2147483649 9223372036854775807 9223372036854775808 -9223372036854775808
    -9223372036854775809 253402300799999 253402300800000 0.5 -0.25"""
VALUES = [*JSON.split(), '" "', "9" * 400]
# How these are spelled as a text is Spark's choice.
NUMBERS = ["1e3", "1E-3", "1e999", "-1e999", "1e-999", "2009.0", "0." + "1" * 400]
NO_JSON = r"""NaN -Infinity +1 01 1. .5 - 1e 0x10 1_0 'x' " "\x" "\u12" [1 {1} {"a"}"""
NO_VALUES = [*NO_JSON.split(), "x", "//", "", "1 2", '"a\tb"', '"a\0b"']


def random_line(kind: str, rng: random.Random, values: list[str]) -> str:
    """A record, each value of which may be another one or missing."""
    record, schema = KINDS[kind]
    pairs = []
    for name, value in [*record.items(), ("unknown", 1), ("page2", "NextSong")]:
        chance = rng.random()
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
        if chance < 0.12:
            is_double = f"{name} double" in schema or name == "unknown"
            text = rng.choice(values + (NUMBERS if is_double else []))
        if chance < 0.95:
            pairs.append(f'"{name}":{rng.choice(["", " "])}{text}')
    rng.shuffle(pairs)
    return "{" + rng.choice([", ", ",", "\t,"]).join(pairs) + "}"


def damaged(line: bytes, rng: random.Random) -> bytes:
    """A line with some bytes changed, put in, taken out, or cut off."""
    data = bytearray(line)
    if rng.random() < 0.3:
        return line[: rng.randrange(2, len(line))]
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(data))
        byte = rng.choice([rng.randrange(128), *b'{}[]",:\\0e-. \x80\xe9\xff'])
        data[at : at + rng.choice([0, 1, 1, 9])] = bytes([byte]) * rng.choice([0, 1, 1])
    return bytes(data)


def random_lines(kind: str, seed: int) -> Iterator[tuple[bytes, list[bytes]]]:
    """Lines, each with the texts of the records that are on it."""
    rng = random.Random(f"{kind} {seed}")
    for _ in range(SIZE):
        line = random_line(kind, rng, VALUES + NO_VALUES).encode()
        before, after = rng.choice(["", " \t", "\ufeff"]), rng.choice(["", " \t", ","])
        line = before.encode() + line + after.encode()
        yield line, [line]
        line = damaged(to_json(KINDS[kind][0]).encode(), rng)
        # Where a record ends on a line is clear but for two that are damaged.
        if not re.search(rb"[\r\n]|\}\s*,?\s*\{", line):
            yield line, [line]
        texts = [random_line(kind, rng, VALUES) for _ in range(rng.randrange(2, 5))]
        line = rng.choice(["", " ", "\t "]).join(texts)
        if rng.random() < 0.5 and "e999" not in line:  # There it is spelled Infinity.
            line = f"[{rng.choice([',', ', ', ' ,']).join(texts)}]"
        yield line.encode(), [text.encode() for text in texts]


def outcomes(rows: list[Row], wanted: Counter[Outcome]) -> Counter[Outcome]:
    """What became of records; of several reasons that are right each will do."""
    reasons = {of[1]: of[2] for of in wanted if of[0] == "rejected"}
    found: Counter[Outcome] = Counter()
    for fields in map(Row.asDict, rows):
        _, reason, raw = (fields.pop(of) for of in ("source_file", "reason", "raw"))
        outcome = ("loaded", *fields.values())
        if reason:
            outcome = reject(raw, reason)
            right = reasons.get(outcome[1], ())
            outcome = (*outcome[:2], right) if reason in right else outcome
        found[outcome] += 1
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_each_line_is_loaded_right_or_rejected_whole_or_by_line(
    seed: int, kind: str, spark: SparkSession, tmp_path: Path
) -> None:
    schema = KINDS[kind][1]
    lines = list(random_lines(kind, seed))
    files = {f"{number}.json": line for number, (line, _) in enumerate(lines)}
    files["all.json.gz"] = gzip.compress(b"\n".join(files.values()))
    found = by_file(read_files(spark, tmp_path, files, kind), tmp_path)
    in_all: Counter[Outcome] = Counter()
    for number, (line, texts) in enumerate(lines):
        wanted = Counter(judge(text, schema) for text in texts)
        assert outcomes(found.get(f"{number}.json", []), wanted) == wanted, line
        in_all += wanted
    assert outcomes(found["all.json.gz"], in_all) == in_all
    assert len({of[2] for of in in_all if of[0] == "rejected"}) >= 6
    assert sum(of[0] == "loaded" for of in in_all) > SIZE / 2


def test_no_byte_of_garbage_is_lost(spark: SparkSession, tmp_path: Path) -> None:
    rng, blank = random.Random(1), b" \t\r\n[]\xef\xbb\xbf"
    alphabets = (bytes(set(range(256)) - {44}), b'{}":\n\r \t0a\\', b"\0\xff\n{}")
    files = {f"{n}.json": bytes(rng.choices(alphabets[n % 3], k=n)) for n in range(300)}
    found = by_file(read_files(spark, tmp_path, files, "songs"), tmp_path)
    for name, content in files.items():
        kept = b""
        for row in found.get(name, []):
            kept += row.raw.encode("latin-1" if row.reason == "not UTF-8" else "utf-8")
        counts = [Counter(data.translate(None, blank)) for data in (kept, content)]
        assert counts[0] == counts[1], content
