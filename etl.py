#!/usr/bin/env python3
"""Sparkify data lake ETL: song and log JSON in, a star schema of Parquet tables out.

It reads from top to bottom: the tables, reading, building, checking, the run; then the
plumbing: the lake's files, Spark and S3, the catalog, the settings.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from glob import escape, glob
from importlib.util import find_spec
from typing import Any, TextIO
from urllib.parse import unquote

if not find_spec("pyspark"):  # A node of EMR has pyspark below its Spark home only.
    home = os.environ.setdefault("SPARK_HOME", "/usr/lib/spark")
    sys.path += [f"{home}/python", *glob(f"{home}/python/lib/py4j-*.zip")]
try:
    import pyspark
    from py4j.protocol import Py4JError, Py4JNetworkError
    from pyspark import SparkConf, SparkContext
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql import functions as F
    from pyspark.sql.types import StructType
except ModuleNotFoundError as error:
    print(f"etl.py: error: {error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)


# --- Contract -------------------------------------------------------------------------


class SettingsError(Exception):
    """Wrong usage or settings, or a missing prerequisite: exit code 2."""


class RunError(Exception):
    """The run failed: exit code 1."""


@dataclass(frozen=True)
class Table:
    """A table: its primary key, its folders' columns, the order of rows in a file."""

    key: str
    folders: tuple[str, ...]
    order: tuple[str, ...]


MONTH = ("year", "month")
MONTH_ID = "year * 100 + month"
TABLES = {
    "songplays": Table("songplay_id", MONTH, ("start_time",)),
    "users": Table("user_id", (), ("user_id",)),
    "songs": Table("song_id", ("year",), ("artist_id", "song_id")),
    "artists": Table("artist_id", (), ("artist_id",)),
    "time": Table("start_time", MONTH, ("start_time",)),
}
# Columns that hold the primary key, by its name, of another table.
FOREIGN_KEYS = {
    "songplays": ("user_id", "song_id", "artist_id", "start_time"),
    "songs": ("artist_id",),
}
# The fields that are read. ts is in ms since 1970, duration and length are in seconds.
SONG_SCHEMA = """song_id string, title string, artist_id string, artist_name string,
    artist_location string, artist_latitude double, artist_longitude double,
    duration double, year int"""
EVENT_SCHEMA = """ts bigint, userId string, sessionId bigint, itemInSession bigint,
    page string, song string, artist string, length double, level string, gender string,
    location string, userAgent string, firstName string, lastName string"""
# Why a typed record is bad. A blank string is null there; the last ts is of year 9999.
SONG_FAULT = """CASE WHEN song_id IS NULL THEN 'no song_id'
    WHEN artist_id IS NULL THEN 'no artist_id'
    WHEN greatest(abs(duration), abs(artist_latitude), abs(artist_longitude))
        = double('infinity') THEN 'number out of range' END"""
HAS_TIME = "ts BETWEEN 0 AND 253402300799999"
EVENT_FAULT = f"""CASE WHEN page IS NULL THEN 'no page'
    WHEN page = 'NextSong' AND ts IS NULL THEN 'play without ts'
    WHEN NOT {HAS_TIME} THEN 'ts out of range'
    WHEN page = 'NextSong' AND userId IS NULL THEN 'play without userId'
    WHEN page = 'NextSong' AND sessionId IS NULL THEN 'play without sessionId'
    WHEN abs(length) = double('infinity') THEN 'number out of range' END"""
# A play's id. Ids in lakes out there depend on it: it never changes.
SONGPLAY_ID = "xxhash64(ts, userId, sessionId, itemInSession)"
IS_PLAY = """page = 'NextSong' AND ts IS NOT NULL AND userId IS NOT NULL
    AND sessionId IS NOT NULL"""
HAS_SONG_KEYS = "song_id IS NOT NULL AND artist_id IS NOT NULL"
# What is kept with a typed record: its file, a URL-encoded URI; why it is bad, if it
# is, and its text then (as ISO-8859-1 if it isn't UTF-8).
ORIGIN = "source_file string, reason string, raw string"
IS_GOOD = "reason IS NULL"
SOURCES = {"songs": "song_data", "events": "log_data"}  # folders of INPUT
INPUT_NAMES = (".json", ".json.gz")  # how the names of their files end
SCHEMAS = {"songs": SONG_SCHEMA, "events": EVENT_SCHEMA}
FAULTS = {"songs": SONG_FAULT, "events": EVENT_FAULT}
RECORDS = {"songs": f"{SONG_SCHEMA}, {ORIGIN}", "events": f"{EVENT_SCHEMA}, {ORIGIN}"}
RECORDS["events"] += ", year int, month int"  # of ts, 0 where it isn't valid
# The lake also keeps the typed records, and each user's latest event of each month.
FOLDERS = {
    **TABLES,
    "_records/songs": Table("", (), ("song_id",)),
    "_records/events": Table("", MONTH, ("ts",)),
    "_records/users": Table("", MONTH, ("userId",)),
}


# --- Read -----------------------------------------------------------------------------

# Where a record ends and another begins: at a line end after } or ], but not before
# the next key of the same object; before a line that begins with {, even where the one
# before was cut off; between } and {"key":, in an array also where a comma is between.
LINE_END = r"(?<=[}\]])[ \t]*+\r?\n\s*+(?=[^,\]}\s])"
LINE_END_WITH_COMMA = r'(?<=\})[ \t]*+,[ \t]*+\r?\n\s*+(?=[^,\]}\s"{])'
MARK = r"(?:\xef\xbb\xbf)?+"  # a byte order mark
LINE_START = rf"\n(?={MARK}\{{)"
NEXT_OBJECT = rf'(?={MARK}\{{\s*+"[^"\\]*+"\s*+:)'
BOUNDARY = rf"{LINE_END}|{LINE_END_WITH_COMMA}|{LINE_START}|(?<=\}})\s*+{NEXT_OBJECT}"
ARRAY_BOUNDARY = rf"{BOUNDARY}|(?<=\}})\s*+,\s*+{NEXT_OBJECT}"
ARRAY = rf"^{MARK}\s*+\["


def open_files(spark: SparkSession, folder: str, reader: str = "text") -> DataFrame:
    """The lines, value string, of the *.json and *.json.gz files below a folder, which
    are listed now; or their bytes, content binary, where the reader is binaryFile."""
    options = {"pathGlobFilter": "*.{json,json.gz}", "recursiveFileLookup": "true"}
    return spark.read.format(reader).options(**options).load(literal(folder))


def list_files(lines: DataFrame) -> dict[str, list[int]]:
    """The bytes and the time of change (ms) of each file, by its name in Hadoop."""
    index = lines._jdf.queryExecution().analyzed().relation().location()
    status = r"path=(.*?); isDirectory=false; length=(\d+);.*?modification_time=(-?\d+)"
    found = re.findall(status, index.allFiles().mkString("\n"), re.DOTALL)
    return {name: [int(size), int(changed)] for name, size, changed in found}


def is_of(files: Iterable[str]) -> Column:
    """True where source_file is one of some files, which are named as by list_files."""
    names = ", ".join(map(quote, ("", *files)))
    # url_decode takes a + for a space; IN () is no SQL.
    return F.expr(f"url_decode(replace(source_file, '+', '%2B')) IN ({names})")


def read_texts(lines: DataFrame, folder: str) -> DataFrame:
    """The texts of an input's files: a small local file is one, else a line is one.
    Out: source_file (a URL-encoded URI), text string."""
    path = F.col("_metadata.file_path").alias("source_file")
    if not folder.startswith("file:"):  # A whole object would cost S3 one request more.
        return lines.select(path, F.col("value").alias("text"))
    # Reading by line costs Hadoop a copy of its settings for each file.
    is_small = (F.col("_metadata.file_size") <= 2**20) & ~path.endswith(".gz")
    whole = open_files(lines.sparkSession, folder, "binaryFile").where(is_small)
    whole = whole.select(path, F.col("content").cast("string").alias("text"))
    return whole.unionAll(lines.where(~is_small).select(path, "value"))


def literal(path: str) -> str:
    """A path whose special characters match only themselves in Spark's readers."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


def quote(text: str) -> str:
    """A text as a literal of Spark's SQL."""
    return "'" + re.sub(r"(['\\])", r"\\\1", text) + "'"


def is_utf8(text: Column) -> Column:
    """True where the bytes of a string are UTF-8."""
    if hasattr(F, "is_valid_utf8"):
        return F.is_valid_utf8(text)
    return F.encode(text, "UTF-8") == text.cast("binary")  # 3.5 replaces the rest.


def parse(text: Column, of_type: str) -> Column:
    """The JSON values of a text, an array of a type; null where not all is of it."""
    # from_json alone ignores what follows the first value. So `whole` has to follow it.
    wrapped = F.concat(F.lit('{"values": ['), text, F.lit('], "whole": true}'))
    wanted = f"values array<{of_type}>, whole boolean, _corrupt string"
    options = {"allowSingleQuotes": "false", "allowNonNumericNumbers": "false"}
    options["columnNameOfCorruptRecord"] = "_corrupt"
    parsed = F.from_json(wrapped, wanted, options)
    is_whole = parsed["_corrupt"].isNull() & parsed["whole"].isNotNull()
    return F.when(is_whole, parsed["values"])


def trim(text: Column) -> Column:
    """A text without what may be around an object: marks, white space, brackets."""
    is_clean = text.startswith("{") & text.endswith("}")
    marks = F.lit(" \t\r\n\ufeff[],")
    return F.when(is_clean, text).otherwise(F.btrim(text, marks))


def split_text(text: Column) -> Column:
    """The pieces of a text, an array: the text itself where it has one object, its
    values where it is JSON as a whole, else what lies between boundaries."""
    values = F.when(is_utf8(text), parse(trim(text), "string"))
    values = F.transform(values, lambda value: F.coalesce(value, F.lit("null")))
    # Each byte becomes a character, since splitting would replace what isn't UTF-8.
    latin = F.decode(text.cast("binary"), "ISO-8859-1")
    pieces = F.when(latin.rlike(ARRAY), F.split(latin, ARRAY_BOUNDARY))
    pieces = pieces.otherwise(F.split(latin, BOUNDARY))
    pieces = F.transform(pieces, lambda p: F.encode(p, "ISO-8859-1").cast("string"))
    # This is slow, and most texts are a line with one {.
    is_one = text.startswith("{") & (F.substring_index(text, "{", 2) == text)
    is_one &= ~text.contains("\n")
    is_one |= F.size(values) == 1
    return F.when(is_one, F.array(text)).otherwise(F.coalesce(values, pieces))


def read_records(kind: str, texts: DataFrame) -> DataFrame:
    """The songs or events, good and bad, of texts as read_texts gives them. A blank
    string is null, a value of the wrong type a bad record. Out: RECORDS."""
    raw = F.col("raw")
    # An inner explode would make Spark split each text twice, to see if it is empty.
    pieces = texts.withColumn("raw", F.explode_outer(split_text(F.col("text"))))
    pieces = pieces.withColumn("raw", trim(raw)).where(raw != "")
    pieces = pieces.withColumn("values", parse(raw, f"struct<{SCHEMAS[kind]}>"))
    fault = F.when(~is_utf8(raw), "not UTF-8").when(F.isnotnull("values"), None)
    fault = fault.when(parse(raw, "string").isNull(), "not JSON")
    fault = fault.otherwise("value of the wrong type").alias("reason")
    latin = F.decode(raw.cast("binary"), "ISO-8859-1")
    text = F.when(is_utf8(raw), raw).otherwise(latin).alias("raw")
    records = pieces.select(F.inline_outer("values"), "source_file", fault, text)
    strings = re.findall(r"(\w+) string", SCHEMAS[kind])
    blank_is_null = {of: F.expr(f"if(trim({of}) = '', null, {of})") for of in strings}
    reason = F.expr(f"coalesce(reason, {FAULTS[kind]})")
    records = records.withColumns(blank_is_null).withColumn("reason", reason)
    records = records.withColumn("raw", F.expr("if(reason IS NULL, null, raw)"))
    part = f"if({HAS_TIME}, {{}}(timestamp_millis(ts)), 0)"
    parts = {of: F.expr(part.format(of)) for of in MONTH if kind == "events"}
    return records.withColumns(parts)


# --- Build ----------------------------------------------------------------------------


def build_songs(songs: DataFrame) -> DataFrame:
    """One row a song_id: of several records the most complete, then the first in order.
    In: SONG_SCHEMA. Out: song_id, title, artist_id string; year int (0 is unknown);
    duration double (seconds)."""
    gaps = "int(title IS NULL) + int(duration IS NULL) + int(year = 0)"
    best = F.expr(f"min(struct({gaps}, title, artist_id, year, duration)) AS best")
    songs = songs.where(HAS_SONG_KEYS).withColumn("year", F.expr("coalesce(year, 0)"))
    columns = ("best.title", "best.artist_id", "best.year", "best.duration")
    return songs.groupBy("song_id").agg(best).select("song_id", *columns)


def build_artists(songs: DataFrame) -> DataFrame:
    """One row an artist_id: of several records one with a name, then the most complete,
    then the shortest name, then the first in order. In: SONG_SCHEMA. Out: artist_id,
    name, location string; latitude, longitude double (degrees)."""
    names = ("name", "location", "latitude", "longitude")
    renamed = (f"artist_{name} AS {name}" for name in names)
    artists = songs.where(HAS_SONG_KEYS).selectExpr("artist_id", *renamed)
    gaps = "int(location IS NULL) + int(latitude IS NULL) + int(longitude IS NULL)"
    order = f"name IS NULL, {gaps}, length(name), {', '.join(names)}"
    best = F.expr(f"min(struct({order})) AS best")
    artists = artists.groupBy("artist_id").agg(best)
    return artists.select("artist_id", *(f"best.{name}" for name in names))


def build_users(events: DataFrame) -> DataFrame:
    """One row a user id of any event, as the user's latest event describes the user; of
    several at that moment the one of the highest itemInSession.
    In: EVENT_SCHEMA. Out: user_id, first_name, last_name, gender, level string."""
    names = ("userId AS user_id", "firstName AS first_name", "lastName AS last_name")
    return find_latest(events, "userId").selectExpr(*names, "gender", "level")


def find_latest(events: DataFrame, *key: str) -> DataFrame:
    """What describes the user in the latest event of each key, which holds userId. Out:
    the key; ts, itemInSession, sessionId, firstName, lastName, gender, level."""
    order = "ts, itemInSession, sessionId, firstName, lastName, gender, level"
    latest = F.expr(f"max(struct({order})) AS latest")
    events = events.where("userId IS NOT NULL").groupBy(*key).agg(latest)
    return events.select(*key, "latest.*")


def build_time(events: DataFrame) -> DataFrame:
    """One row a start_time of a play.
    In: EVENT_SCHEMA. Out: start_time timestamp; hour, day, week (ISO 8601), month,
    year, weekday (1 Sunday to 7 Saturday) int, in the session's time zone, UTC."""
    times = events.where(IS_PLAY).selectExpr("timestamp_millis(ts) AS start_time")
    return times.distinct().selectExpr(
        "start_time",
        "hour(start_time) AS hour",
        "day(start_time) AS day",
        "weekofyear(start_time) AS week",
        "month(start_time) AS month",
        "year(start_time) AS year",
        "dayofweek(start_time) AS weekday",
    )


def build_songplays(events: DataFrame, songs: DataFrame) -> DataFrame:
    """One row a distinct play (ts, userId, sessionId, itemInSession), with or without a
    song; of several deliveries the last in the order of their fields. A play's song has
    exactly its title and, among the names that the catalogue gives the song's artist,
    exactly its artist; of several the nearest in duration wins, then the smallest
    song_id. A play without a song gets the artist_id of the only artist of that name.
    In: EVENT_SCHEMA and SONG_SCHEMA. Out: songplay_id bigint; start_time timestamp;
    user_id, level, song_id, artist_id string; session_id bigint; location, user_agent
    string; year, month int of start_time."""
    key = ("ts", "userId", "sessionId", "itemInSession")
    fields = "level, location, userAgent, song, artist, length"
    greatest = F.expr(f"max(struct({fields})) AS play")
    plays = events.where(IS_PLAY).repartition(*key)  # Else Spark sorts them twice.
    plays = plays.groupBy(*key).agg(greatest).select(*key, "play.*")
    # Each song by its title and a name of its artist; the only artist of each name.
    names = songs.where(HAS_SONG_KEYS).where("artist_name IS NOT NULL")
    names = names.selectExpr("artist_id", "artist_name AS artist").distinct()
    titles = build_songs(songs).withColumnRenamed("title", "song")
    titles = titles.join(names, on="artist_id", how="inner").groupBy("song", "artist")
    every = F.expr("collect_list(struct(duration, song_id, artist_id)) AS songs")
    sole = F.expr("if(count(*) = 1, min(artist_id), null) AS sole_artist_id")
    # Both have one row a key, so that no join can multiply a play.
    found = plays.join(titles.agg(every), on=["song", "artist"], how="left")
    found = found.join(names.groupBy("artist").agg(sole), on="artist", how="left")
    gap = "coalesce(abs(s.duration - length), double('infinity'))"
    fit = f"s -> struct({gap}, s.song_id, s.artist_id)"
    best = F.expr(f"array_min(transform(songs, {fit}))")
    found = found.withColumns({"best": best, "start_time": F.timestamp_millis("ts")})
    return found.selectExpr(
        f"{SONGPLAY_ID} AS songplay_id",
        "start_time",
        "userId AS user_id",
        "level",
        "best.song_id",
        "coalesce(best.artist_id, sole_artist_id) AS artist_id",
        "sessionId AS session_id",
        "location",
        "userAgent AS user_agent",
        "year(start_time) AS year",
        "month(start_time) AS month",
    )


# --- Write and check ------------------------------------------------------------------


def write_files(rows: DataFrame, lake: Lake, name: str) -> None:
    """Adds rows as Parquet to one of the FOLDERS, in few files of even size."""
    table = FOLDERS[name]
    # DataFrame.hint takes no columns before Spark 4.
    hint = f"REBALANCE({', '.join(table.folders)})" if table.folders else "REBALANCE"
    sized = lake.spark.sql(f"SELECT /*+ {hint} */ * FROM {{rows}}", rows=rows)
    files = sized.sortWithinPartitions(*table.folders, *table.order).write
    files.mode("append").partitionBy(*table.folders).parquet(f"{lake.root}/{name}")


def read_files(lake: Lake, name: str, schema: str | StructType) -> DataFrame:
    """The rows of the Parquet files below a folder of the lake, if there are any."""
    is_there = lake.fs.exists(lake.path(name))
    paths = [literal(f"{lake.root}/{name}")] if is_there else []
    return lake.spark.read.schema(schema).format("parquet").load(paths)


def check_tables(views: dict[str, DataFrame]) -> dict[str, dict[str, int]]:
    """Checks the five tables as written: every primary key is unique and not null, and
    there are as many as in the view due_TABLE, if there is one; every foreign key finds
    its row or is null. Raises RunError where not. Of a view all_TABLE the rows are only
    counted. Returns, by view, its rows and how many have each foreign key."""
    queries, owners = [], {table.key: name for name, table in TABLES.items()}
    for name, rows in views.items():
        rows.createOrReplaceTempView(name)
        kind, _, table = name.rpartition("_")
        links = FOREIGN_KEYS.get(name, ())
        figures = {"rows": "count(*)", **{key: f"count({key})" for key in links}}
        if kind != "all":
            figures["keys"] = f"count(DISTINCT {TABLES[table].key})"
        counts = ", ".join(f"'{of}', {count}" for of, count in figures.items())
        queries.append(f"SELECT '{name}', map({counts}) FROM {name}")
        for key in links:
            lost = f"'{name}: no row of {owners[key]} for {key} ' || min({key})"
            join = f"{name} LEFT ANTI JOIN {owners[key]} USING ({key})"
            queries.append(f"SELECT {lost}, null FROM {join}")
    spark = views["songplays"].sparkSession
    found = dict(spark.sql(" UNION ALL ".join(queries)).collect())
    found.pop(None, None)  # A foreign key that finds all its rows has no text.
    if lost := sorted(found.keys() - views.keys()):
        raise RunError(f"check failed: {lost[0]}")
    for name, table in TABLES.items():
        rows, keys = found[name]["rows"], found[name]["keys"]
        due = found.get(f"due_{name}", found[name])["keys"]
        if not rows == keys == due:
            fault = f"{rows:,} rows, {keys:,} different {table.key}, {due:,} due"
            raise RunError(f"check failed: {name}: {fault}")
    return found


# --- Run ------------------------------------------------------------------------------


def run(settings: Settings) -> dict[str, Any]:
    """A whole run: reads what is new, builds, checks, publishes. Returns its report,
    empty if nothing is new. Raises SettingsError, RunError or what Spark raises: the
    tables are as they were, unless the error says more."""
    sizes = preflight(settings)
    say(f"Sparkify ETL: {settings.input} -> {settings.output}")
    with step(f"1/5 Start Spark {pyspark.__version__}"):
        spark = start_spark(settings, sizes)
    lake, report = open_lake(spark, settings.output), {}
    run_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(4).hex()}"
    with claimed(lake, run_id, settings.break_lock) as staging:
        news = find_news(lake, settings)
        if any(news.fresh.values()) or news.stale or not news.files:
            report = update(lake, staging, news, settings)
        else:
            say("Nothing is new: the lake stays as it is.")
    if settings.database:
        try:
            with step(f"Register the tables in {settings.database}"):
                register_tables(lake, settings.database)
        except (Exception, KeyboardInterrupt) as error:
            reason = f"{explain(error)}: the next run tries it again"
            raise RunError(f"published, but not registered: {reason}") from error
    return report


def load_manifest(lake: Lake, settings: Settings) -> dict[str, Any]:
    """The lake's manifest: INPUT; the hash of this script; the state of each file whose
    records the lake holds, as list_files has it; the counts of its records, as
    stage_records has them. With none to rely on, it has no files: a full run."""
    with open(__file__, "rb") as file:
        script = hashlib.sha256(file.read()).hexdigest()
    empty = {"input": settings.input, "script": script, "files": {}, "counts": []}
    names, found = list_manifests(lake), {}
    with suppress(ValueError, TypeError):
        found = dict(json.loads(lake.read(names[0]))) if len(names) == 1 else {}
    tables = (lake.fs.exists(lake.path(name)) for name in TABLES if found)
    reasons = {
        "--full or --break-lock tells so": settings.full or settings.break_lock,
        "the lake has no manifest": not names,
        "the manifest is damaged or not the only one": not empty.keys() <= found.keys(),
        "INPUT is another": found.get("input") != settings.input,
        "etl.py has changed": found.get("script") != script,
        "a table is missing": not all(tables),
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        say(f"All files are read, since {why[0]}.")
        return empty
    return found


def list_manifests(lake: Lake) -> list[str]:
    """The names of the lake's manifests; a whole lake has one."""
    return [name for name in lake.files("_records") if "/_manifest-" in name]


@dataclass(frozen=True)
class News:
    """What is new in INPUT. Files are named as Hadoop lists them."""

    manifest: dict[str, Any]  # of the run before
    lines: dict[str, DataFrame]  # of all files, by kind
    files: dict[str, list[int]]  # the state of each file
    fresh: dict[str, set[str]]  # new and changed files, by kind
    stale: set[str]  # known files that are changed or missing


def find_news(lake: Lake, settings: Settings) -> News:
    """Compares INPUT's files with those of the manifest."""
    manifest = load_manifest(lake, settings)
    folders = {kind: f"{settings.input}/{of}" for kind, of in SOURCES.items()}
    lines = {kind: open_files(lake.spark, of) for kind, of in folders.items()}
    states = {kind: list_files(of) for kind, of in lines.items()}
    files, known = {**states["songs"], **states["events"]}, manifest["files"]
    kept = {name for name, state in files.items() if known.get(name) == state}
    fresh = {kind: of.keys() - kept for kind, of in states.items()}
    # A full run reads a file that came after its listing, too. Only counts name it.
    stale = {*known, *(name for name, *_ in manifest["counts"])} - kept
    new = files.keys() - kept
    text = f"{len(new - stale):,} new, {len(new & stale):,} changed"
    say(f"{len(files):,} files: {text}, {len(stale - new):,} missing.")
    return News(manifest, lines, files, fresh, stale)


def update(lake: Lake, staging: str, news: News, settings: Settings) -> dict[str, Any]:
    """Reads what is new; builds, checks, publishes what changes. Returns the report."""
    run_id, staged = staging.split("/")[1], replace(lake, root=f"{lake.root}/{staging}")
    with step("2/5 Read songs and events"), ThreadPoolExecutor() as pool:
        read = pool.map(lambda kind: stage_records(lake, staged, news, kind), SOURCES)
        (songs, song_months, bad_songs), (events, event_months, bad_events) = read
        stay = [of for of in news.manifest["counts"] if of[0] not in news.stale]
        counts, report = [*stay, *songs, *events], {"run": run_id}
        report.update(input=settings.input, output=settings.output, **sum_up(counts))
        report.update(limit=settings.max_rejected, new=sum_up(songs + events))
        if report["new"]["rejected"]:
            bad = bad_songs.unionAll(bad_events).repartitionByRange("source_file")
            bad.write.json(f"{lake.root}/_rejected/{run_id}")
        if fault := find_fault(report, counts):
            raise RunError(fault)
    changes = find_changes(news, song_months, event_months)
    months = sorted((changes["songplays"] or set()) - {0})
    what = ", ".join(f"{of // 100}-{of % 100:02}" for of in months) or "users"
    what = "every month" if changes["songplays"] is None else what
    with step(f"3/5 Build {what}"):
        views = stage_tables(lake, staged, changes)
    with step("4/5 Check the tables"):
        figures = check_tables(views)
    with step("5/5 Publish"):
        tables = {of: figures.get(f"all_{of}", figures[of])["rows"] for of in TABLES}
        for of, table in zip(report["records"].values(), ("songs", "songplays")):
            of["duplicate"], of["kept"] = of.pop("kept") - tables[table], tables[table]
        report.update(built=what, tables=tables, plays=figures["songplays"])
        manifest = {**news.manifest, "files": news.files, "counts": counts}
        staged.write(f"_records/_manifest-{run_id}.json", json.dumps(manifest))
        lake.write(f"_reports/{run_id}.json", json.dumps(report, indent=2))
        publish(lake, staging, find_replaced(lake, changes))
    return report


def stage_records(lake: Lake, staged: Lake, news: News, kind: str) -> tuple[Any, ...]:
    """Stages the records of new and changed files, which are parsed once; and those of
    known files in the same months. Gives the counts of the new ones, each a list of
    file, kind, month_id, reason or null, records, songs or plays; the months that
    change; and the new bad records: source_file, reason, raw."""
    name, fresh, known = f"_records/{kind}", news.fresh[kind], news.manifest["files"]
    month_id = F.expr(MONTH_ID if kind == "events" else "0")  # Songs have one folder.
    if fresh:
        folder = f"{news.manifest['input']}/{SOURCES[kind]}"
        texts = read_texts(news.lines[kind], folder)
        texts = texts.where(is_of(fresh)) if known else texts
        write_files(read_records(kind, texts), staged, name)
    # Spark lists the folder's files now, before those of known records join them.
    records = read_files(staged, name, RECORDS[kind]).withColumn("month_id", month_id)
    is_kept = f"{IS_GOOD} AND {IS_PLAY}" if kind == "events" else IS_GOOD
    groups = records.groupBy("source_file", "month_id", "reason")
    found = groups.agg(F.count("*"), F.expr(f"count_if({is_kept})")).collect()
    counts = [[unquote(file), kind, *figures] for file, *figures in found]
    stale = [of for of in news.manifest["counts"] if of[0] in news.stale]
    months = {month for _, of, month, *_ in counts + stale if of == kind}
    if known and months:
        stays = month_id.isin(months) & ~is_of(news.stale)
        write_files(read_files(lake, name, RECORDS[kind]).where(stays), staged, name)
    bad = records.where("reason IS NOT NULL").select("source_file", "reason", "raw")
    return counts, months, bad


def find_changes(news: News, songs: set[int], events: set[int]) -> dict[str, Any]:
    """The months in which each of the FOLDERS changes: a set, or None for every month.
    In: the months in which records change; that of all songs is 0."""
    changes: dict[str, Any] = dict.fromkeys(FOLDERS)
    if news.manifest["files"]:
        changes.update({"_records/events": events, "_records/users": events})
        if not songs:
            changes.update({"songs": set(), "artists": set(), "_records/songs": set()})
            changes.update({"songplays": events, "time": events})
    return changes


def stage_tables(lake: Lake, staged: Lake, changes: dict[str, Any]) -> dict[str, Any]:
    """Stages what changes of the tables. Gives the views that check_tables wants."""

    def complete(name: str, rows: DataFrame) -> DataFrame:
        """Staged rows and, of the months that don't change, the published ones."""
        if (months := changes[name]) is None:
            return rows
        stays = ~F.expr(MONTH_ID).isin(months) if months else F.lit(True)
        return rows.unionByName(read_files(lake, name, rows.schema).where(stays))

    songs = read_files(staged, "_records/songs", RECORDS["songs"])
    songs = complete("_records/songs", songs).where(IS_GOOD)
    events = read_files(staged, "_records/events", RECORDS["events"]).where(IS_GOOD)
    latest = find_latest(events, "userId", *MONTH)
    write_files(latest, staged, "_records/users")
    latest = read_files(staged, "_records/users", latest.schema)
    if not changes["songplays"]:  # All plays are built (None) or only checked (set()).
        events = complete("_records/events", events).where(IS_GOOD)
    tables = {
        "songplays": build_songplays(events, songs),
        "users": build_users(complete("_records/users", latest)),
        "songs": build_songs(songs),
        "artists": build_artists(songs),
        "time": build_time(events),
    }
    changing = [name for name in TABLES if changes[name] != set()]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: write_files(tables[name], staged, name), changing))
    views = {"due_songs": songs.select("song_id")}
    plays = events.where(IS_PLAY)
    views["due_songplays"] = plays.selectExpr(f"{SONGPLAY_ID} AS songplay_id")
    for name, built in tables.items():
        rows = read_files(staged, name, built.schema)
        views[name] = complete(name, rows)
        if changes[name]:  # Only some months: those are checked, the whole is counted.
            views[name], views[f"all_{name}"] = rows, views[name]
    return views


def find_replaced(lake: Lake, changes: dict[str, Any]) -> list[str]:
    """The lake's files in whose place the run's come."""
    replaced = list_manifests(lake)
    for folder, months in changes.items():
        for name in lake.files(folder):
            year, month = (re.findall(r"/year=(\d+)/month=(\d+)/", name) or [(0, 0)])[0]
            if months is None or int(year) * 100 + int(month) in months:
                replaced.append(name)
    return replaced


def sum_up(counts: list[list[Any]]) -> dict[str, Any]:
    """What became of counted records, before duplicates are found; why they are bad."""
    outcomes = ("read", "rejected", "not plays", "kept")
    records = {kind: dict.fromkeys(outcomes, 0) for kind in SOURCES}
    rejected: Counter[str] = Counter()
    for _, kind, _, reason, read, kept in counts:
        records[kind]["read"] += read
        records[kind]["kept"] += kept
        records[kind]["rejected" if reason else "not plays"] += read - kept
        rejected.update({f"{kind}: {reason}": read} if reason else {})
    return {"records": records, "rejected": rejected}


def find_fault(report: dict[str, Any], counts: list[list[Any]]) -> str | None:
    """Why a run must not publish: too much is rejected, or there is nothing."""
    records, limit = report["records"], report["limit"]
    read, bad = (sum(of[n] for of in records.values()) for n in ("read", "rejected"))
    if bad / max(read, 1) > limit:
        [(why, count)] = report["rejected"].most_common(1)
        examples = (of[:4] for of in counts if f"{of[1]}: {of[3]}" == why)
        file, kind, _, reason = next(examples)
        most = f"{count:,} {kind} are '{reason}', as in {file}"
        hint = " (objects over several lines are for small local files)"
        where = f"see {report['output']}/_rejected{hint * (reason == 'not JSON')}"
        over = f"over --max-rejected {limit:g}"
        return f"{bad:,} of {read:,} records are bad, {over}: {most}; {where}"
    for kind, what in (("songs", "song"), ("events", "play (page NextSong)")):
        if not records[kind]["kept"]:
            return f"no {what} in {report['input']}/{SOURCES[kind]}: check --input"
    return None


def format_report(report: dict[str, Any]) -> str:
    """A report as a person reads it."""
    records, built = report["records"].items(), report["plays"]["rows"]
    lines = ["Input    " + "".join(f"{of:>12}" for of in report["records"]["songs"])]
    for kind, of in records:
        lines.append(f"{kind:9}" + "".join(f"{count:12,}" for count in of.values()))
    lines += ["", "Table            rows"]
    lines += [f"{name:9}{rows:12,}" for name, rows in report["tables"].items()]
    for what in ("song", "artist"):
        found = report["plays"][f"{what}_id"]
        share = f"{found:,} of {built:,} plays ({found / max(built, 1):.0%})"
        lines.append(f"{share} that were built have their {what} in the catalogue")
    read, bad = (sum(of[n] for _, of in records) for n in ("read", "rejected"))
    share = f"{bad / read:.1%}, limit {report['limit']:.1%}"
    lines += ["", f"Rejected {bad:,} of {read:,} records ({share})"]
    lines += [f"{count:9,}  {why}" for why, count in sorted(report["rejected"].items())]
    if report["new"]["rejected"]:
        lines.append(f"See {report['output']}/_rejected/{report['run']}")
    lines.append(f"Next: query {report['output']}/songplays, as README.md shows")
    return "\n".join(lines)


def explain(error: BaseException) -> str:
    """An exception in one line: its first cause, and the file that it was about."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, (Py4JNetworkError, ConnectionError)):
        text = "Java has ended, maybe for want of memory: start again with --debug"
    causes = re.findall(r"^(?:Caused by: |: )(.+)", text, re.MULTILINE)
    about = re.search(r"while reading file (.+?\.json(?:\.gz)?)", text)
    line = causes[-1] if causes else " ".join(text.splitlines()[:2])
    return f"{about[1]}: {line}" if about else line


def say(text: str, end: str = "\n", to: TextIO | None = None) -> None:
    """Tells the person who waits; local folders as paths, which can be pasted."""
    print(re.sub("file:/+", "/", text), end=end, file=to or sys.stderr, flush=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Announces a step of the run; adds its seconds at its end."""
    start, line = time.monotonic(), f"{title} ".ljust(40, ".")
    say(line, end="")
    try:
        yield
    finally:
        again = f"\r{line}" if sys.stderr.isatty() else ""  # over Spark's progress bar
        say(f"{again} {time.monotonic() - start:4.0f} s")


# --- Lake -----------------------------------------------------------------------------

LEASE = 90  # seconds without a sign of life after which a run counts as dead
HEARTBEAT = 15  # seconds between two signs of life
LATE_TASKS = 0.5  # seconds for which Spark's tasks may go on after a failure
# What a run publishes; of earlier runs it deletes nothing else.
ROWS = rf"({'|'.join(FOLDERS)})(/\w+=[^/]+)*/part-[^/]*\.parquet"
OWN_FILE = re.compile(rf"{ROWS}|_records/_manifest-[^/]*\.json")


@dataclass(frozen=True)
class Lake:
    """OUTPUT as Hadoop's FileSystem `fs` serves it. Names are paths below `root`."""

    root: str
    spark: SparkSession
    fs: Any

    def path(self, name: str) -> Any:
        """Hadoop's Path of a file or folder."""
        return self.spark._jvm.org.apache.hadoop.fs.Path(f"{self.root}/{name}")

    def files(self, folder: str) -> dict[str, int]:
        """The files at any depth below a folder, and when each was changed (ms)."""
        top = self.path(folder)
        if not self.fs.exists(top):
            return {}
        if self.root.startswith("s3"):  # A request lists 1,000 objects of all folders.
            every = self.fs.listFiles(top, True)
            found = list(iter(lambda: every.hasNext() and every.next(), False))
        else:  # listFiles starts a process for each local file.
            found = list(self.fs.listStatus(top))
            for of in found:
                found += self.fs.listStatus(of.getPath()) if of.isDirectory() else ()
        start = len(self.fs.makeQualified(self.path("")).toString().rstrip("/")) + 1
        files = ((of.getPath(), of) for of in found if not of.isDirectory())
        return {at.toString()[start:]: of.getModificationTime() for at, of in files}

    def read(self, name: str) -> str:
        """The text of a small file."""
        with closing(self.fs.open(self.path(name))) as stream:
            return bytes(stream.readAllBytes()).decode()

    def write(self, name: str, text: str) -> None:
        """Writes a small file, over the one that is there."""
        with closing(self.fs.create(self.path(name), True)) as stream:
            stream.write(bytearray(text.encode()))

    def move(self, source: str, target: str) -> None:
        """Renames a file, whose target must not exist."""
        paths = (self.path(source), self.path(target))
        if not self.root.startswith("s3"):  # S3 has no folders.
            self.fs.mkdirs(paths[1].getParent())
        try:
            reason = "" if self.fs.rename(*paths) else "can't be renamed to its place"
        except Py4JError as error:  # The answer may be lost, not the call.
            reason = explain(error)
        if reason and not self.fs.exists(paths[1]):
            raise OSError(f"{self.root}/{target}: {reason}")

    def delete(self, name: str, recursive: bool = False) -> None:
        """Deletes a file, an empty folder or, if recursive, any, where it is there."""
        path = self.path(name)
        if not self.fs.delete(path, recursive) and self.fs.exists(path):
            raise OSError(f"{self.root}/{name} can't be deleted")


def open_lake(spark: SparkSession, root: str) -> Lake:
    """The lake at a URI."""
    path = spark._jvm.org.apache.hadoop.fs.Path(root)
    return Lake(root, spark, path.getFileSystem(spark._jsc.hadoopConfiguration()))


@contextmanager
def claimed(lake: Lake, run_id: str, break_lock: bool = False) -> Iterator[str]:
    """Keeps other runs from the lake while inside; first finishes or clears away what
    dead ones have left. Gives the name of the run's staging folder. Raises RunError
    while another run is alive, SettingsError where OUTPUT can't be written."""
    staging, ended = f"_staging/{run_id}", threading.Event()
    owner, alive = f"{staging}/_owner.json", f"{staging}/_alive"
    me = {"host": os.uname().nodename, "process": os.getpid(), "start": time.ctime()}

    def stay_alive() -> None:
        while not ended.wait(HEARTBEAT):
            try:
                lake.write(alive, "")
            except Exception as error:  # noqa: BLE001
                say(f"\n{lake.root} fails, trying again: {explain(error)}")

    try:
        lake.write(alive, "")
        lake.write(owner, json.dumps(me))
    except Py4JError as error:
        raise SettingsError(f"OUTPUT {lake.root}: {explain(error)}") from error
    heartbeat = threading.Thread(target=stay_alive, daemon=True)
    heartbeat.start()
    try:
        clear_others(lake, staging, break_lock)
        yield staging
    finally:
        ended.set()
        heartbeat.join()
        with suppress(Exception):  # What else fails now would hide the reason.
            if lake.fs.exists(lake.path(f"{staging}/_journal.json")):
                lake.delete(owner)  # The next start takes over and finishes it.
                lake.delete(alive)
            else:
                if sys.exc_info()[0]:  # Tasks that end late may add to it.
                    time.sleep(LATE_TASKS)
                lake.delete(staging, recursive=True)
            lake.delete("_staging")  # This fails while another run is in it.


def clear_others(lake: Lake, staging: str, break_lock: bool) -> None:
    """Finishes what dead runs have left, or raises RunError where one is alive."""
    files = lake.files("_staging")
    others = {"/".join(name.split("/")[:2]) for name in files} - {staging}
    for other in others:
        owner, alive = f"{other}/_owner.json", files.get(f"{other}/_alive", 0)
        age = (files.get(f"{staging}/_alive", 0) - alive) / 1000
        if owner in files and age < LEASE and not break_lock:
            them = f"{lake.read(owner)}, alive {age:.0f} s ago"
            hint = f"if it is dead, wait {LEASE} s or add --break-lock"
            raise RunError(f"{lake.root} is in use by {them}: {hint}")
    for other in sorted(others):
        lake.delete(f"{other}/_owner.json")  # That run must not go on from here.
        journal = f"{other}/_journal.json"
        try:
            if lake.fs.exists(lake.path(journal)):
                places = (other, *TABLES, "_records")
                there = {name for place in places for name in lake.files(place)}
                finish(lake, other, json.loads(lake.read(journal)), there)
        except (ValueError, KeyError, RunError) as error:
            if not break_lock:
                hint = "add --break-lock to discard it and replace every table"
                raise RunError(f"{lake.root}/{journal}: {error}: {hint}") from error
            for name in list_manifests(lake):  # Its records are not all in place.
                lake.delete(name)
        lake.delete(other, recursive=True)
        say(f"Finished or cleared away what was left in {other}.")


def publish(lake: Lake, staging: str, replaced: Iterable[str]) -> None:
    """Moves staged files into the lake, then deletes those that they replace; a journal
    of both comes first. A reader sees old rows, new rows or both, never fewer."""
    run_id, there = staging.split("/")[1], lake.files(staging)
    names = filter(OWN_FILE.fullmatch, (name[len(staging) + 1 :] for name in there))
    # With the run in its name no file is in the way of another run's.
    staged = {of: re.sub("/part-(?!.*/)", f"/part-{run_id}-", of) for of in names}
    journal = {"staged": staged, "replaced": list(filter(OWN_FILE.fullmatch, replaced))}
    lake.write(f"{staging}/_journal.tmp", json.dumps(journal))
    confirm_claim(lake, staging)
    lake.move(f"{staging}/_journal.tmp", f"{staging}/_journal.json")
    try:
        confirm_claim(lake, staging)
        finish(lake, staging, journal, set(there))
    except (Py4JError, OSError, KeyboardInterrupt) as error:
        reason = f"the next start of etl.py finishes it: {explain(error)}"
        raise RunError(f"publishing was cut off, {reason}") from error


def confirm_claim(lake: Lake, staging: str) -> None:
    """Raises RunError when another run has taken over."""
    if not lake.fs.exists(lake.path(f"{staging}/_owner.json")):
        raise RunError("another run has taken over the lake: this one stops")


def finish(lake: Lake, staging: str, journal: dict[str, Any], there: set[str]) -> None:
    """Does what is left to do of a journal, given the files that there are; nothing,
    where moving had not begun. Raises RunError where a table's file is lost."""
    targets = {f"{staging}/{name}": of for name, of in journal["staged"].items()}
    lost = sorted(of for name, of in targets.items() if not {name, of} & there)
    if lost and not there & set(targets.values()):
        return  # Nothing was moved yet, so the journal is void.
    if lost:
        raise RunError(f"{lake.root}/{lost[0]} is lost")
    # A target that exists is whole: S3A copies a file, then deletes it.
    moves = {name: of for name, of in targets.items() if {name, of} & there == {name}}
    with ThreadPoolExecutor(32) as pool:
        for is_last in (False, True):  # A manifest tells of records that are in place.
            names = [name for name in moves if ("/_manifest-" in name) == is_last]
            list(pool.map(lake.move, names, map(moves.get, names)))
        list(pool.map(lake.delete, journal["replaced"]))
    # A file lies in its table's folder, or one or two levels deeper.
    folders = {name.rsplit("/", of)[0] for name in journal["replaced"] for of in (1, 2)}
    for folder in sorted(folders, reverse=True):
        with suppress(Py4JError, OSError):  # A folder that isn't empty stays.
            lake.delete(folder)
    lake.delete(f"{staging}/_journal.json")


# --- Spark and S3 ---------------------------------------------------------------------

EMR = "/usr/share/aws/emr"  # a folder of every EMR node
SQL_OPTIONS = {
    # Without these the tables would depend on the machine.
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.compression.codec": "snappy",
    "spark.sql.files.ignoreCorruptFiles": "false",
    "spark.sql.files.ignoreMissingFiles": "false",
    # At the default, 4 MB more for each file, small files make hundreds of tasks.
    "spark.sql.files.openCostInBytes": "65536",
}
# The AWS SDK that each Hadoop was built with. S3A needs few modules of its 640 MB.
SDK_2 = "s3 s3-transfer-manager sts sso ssooidc apache-client netty-nio-client"
SDKS = {
    "3.3.4": ("com.amazonaws:aws-java-sdk-{}:1.12.262", "s3 sts dynamodb"),
    "3.4.1": ("software.amazon.awssdk:{}:2.24.6", SDK_2),
    "3.4.2": ("software.amazon.awssdk:{}:2.29.52", SDK_2),
    "3.5.0": ("software.amazon.awssdk:{}:2.35.5", SDK_2),  # 2.35.4 has no ssooidc
}
# What dl.cfg's section [AWS] may hold, and S3A's setting for it.
S3A_KEYS = {
    "aws_access_key_id": "access.key",
    "aws_secret_access_key": "secret.key",
    "aws_session_token": "session.token",
    "aws_region": "endpoint.region",
    "endpoint_url": "endpoint",
}
CONFIG_KEYS = {"LAKE": ("input", "output", "database"), "AWS": tuple(S3A_KEYS)}
# Not to be downloaded: whole SDKs, what Spark has, what other clouds need.
NOT_NEEDED = (
    "software.amazon.awssdk:bundle,com.amazonaws:aws-java-sdk-bundle,joda-time:*,"
    "org.apache.hadoop:hadoop-client-*,org.apache.hadoop:hadoop-*cloud*,"
    "org.apache.hadoop:hadoop-azure*,com.google.cloud.bigdataoss:*,"
    "com.fasterxml.jackson.*:*,org.eclipse.jetty:*"
)
# Settings of an own Spark.
S3A_OPTIONS = {
    "spark.jars.excludes": NOT_NEEDED,
    "spark.hadoop.fs.s3a.directory.operations.purge.uploads": "true",  # of killed runs
    "spark.hadoop.fs.s3a.committer.magic.track.commits.in.memory.enabled": "true",
    "spark.hadoop.fs.s3a.input.stream.type": "prefetch",
    # A dead server is waited for some seconds, not minutes: S3A tries three times.
    "spark.hadoop.fs.s3a.attempts.maximum": "0",
    "spark.hadoop.fs.s3a.retry.limit": "2",
    "spark.hadoop.fs.s3a.connection.timeout": "10000",  # ms
}


def preflight(settings: Settings) -> dict[str, int]:
    """Raises SettingsError for what would fail after Spark's slow start. Returns the
    bytes of each file of INPUT by its URI; nothing where they can't be listed."""
    source, has_boto3 = settings.input, bool(find_spec("boto3"))
    sizes = check_s3(settings) if has_boto3 and settings.on_s3 else {}
    is_local = source.startswith("file:")
    hint = "give --input the folder of song_data/ and log_data/"
    for part in SOURCES.values():
        if is_local:
            folder = f"{source[7:]}/{part}"
            try:
                os.listdir(folder)
            except OSError as why:
                raise SettingsError(f"INPUT {folder}: {why.strerror}: {hint}") from None
            paths = filter(os.path.isfile, glob(f"{escape(folder)}/**", recursive=True))
            paths = (path for path in paths if path.endswith(INPUT_NAMES))
            sizes.update((f"file://{path}", os.path.getsize(path)) for path in paths)
        is_listed = is_local or (has_boto3 and source.startswith("s3"))
        if is_listed and not any(of.startswith(f"{source}/{part}/") for of in sizes):
            lack = f"INPUT {source} holds no {part}/ with .json or .json.gz files"
            raise SettingsError(f"{lack}: {hint}")
    for name in (settings.output, *sizes):  # Not UTF-8, or parts that no path keeps.
        if re.search(r"[\ud800-\udfff]|(?<![:/])//|/\.\.?/", name):
            raise SettingsError(f"Hadoop can't read {name!a}: rename it")
    return sizes


def check_s3(settings: Settings) -> dict[str, int]:
    """The bytes of each object of INPUT on S3, by its URI. Raises SettingsError unless
    it can be listed, and objects in OUTPUT on S3 be written and deleted."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    sizes, uri = {}, settings.on_s3[0]
    aws, retries = dict(settings.aws), {"total_max_attempts": 2}
    region = aws.pop("aws_region", None)
    style = {"addressing_style": "path" if "endpoint_url" in aws else "auto"}
    config = Config(connect_timeout=2, read_timeout=10, retries=retries, s3=style)
    try:
        s3 = boto3.resource("s3", region_name=region, config=config, **aws)
        for part in SOURCES.values() if uri == settings.input else ():
            scheme, _, bucket, prefix = f"{uri}/{part}/".split("/", 3)
            found = s3.Bucket(bucket).objects.filter(Prefix=prefix)
            sizes.update((f"{scheme}//{bucket}/{of.key}", of.size) for of in found)
        uri = settings.output
        if uri.startswith("s3"):
            _, _, bucket, key = f"{uri}/_probe-{os.urandom(8).hex()}".split("/", 3)
            probe = s3.Object(bucket, key)
            probe.delete()  # Leave no probe where deleting is denied.
            probe.put()
            probe.delete()
        method = getattr(boto3.Session().get_credentials(), "method", None)
    except (BotoCoreError, ClientError, ValueError) as error:
        hint = f" (ENDPOINT_URL {aws['endpoint_url']})" if "endpoint_url" in aws else ""
        raise SettingsError(f"{uri}: {explain(error)}{hint}") from error
    if method == "sso" and not aws and pyspark.__version__ < "4":
        hint = "install pyspark 4, or set what aws configure export-credentials prints"
        raise SettingsError(f"Spark 3.5 knows no AWS SSO: {hint}")
    return {name: size for name, size in sizes.items() if name.endswith(INPUT_NAMES)}


def start_spark(settings: Settings, sizes: dict[str, int]) -> SparkSession:
    """A session of the job's own, on the Spark at hand or on pip's, which it starts."""
    has_spark = {"SPARK_HOME", "PYSPARK_GATEWAY_PORT"} & os.environ.keys()
    if not has_spark and SparkContext._gateway is None:
        start_own_spark(settings, 0 < sum(sizes.values()) < 2**26)  # 64 MB
    builder = SparkSession.builder
    builder = builder.enableHiveSupport() if settings.database else builder
    spark = builder.getOrCreate().newSession()
    for key, value in SQL_OPTIONS.items():
        spark.conf.set(key, value)
    for uri in settings.on_s3:
        configure_s3(spark, uri.split("/")[2], settings.aws)
    encoding = spark._jvm.java.lang.System.getProperty("sun.jnu.encoding")
    names = (settings.output, *sizes)
    local = "".join(name for name in names if name.startswith("file:"))
    if "ANSI" in encoding and not local.isascii():
        raise SettingsError("Java passes over names with é: set LC_ALL=C.UTF-8 for it")
    return spark


def start_own_spark(settings: Settings, is_small: bool) -> None:
    """Starts pip's Spark, whose progress bar is shown; its log, too, when debugging."""
    cores = os.cpu_count() or 1
    # A task waits for one small object after another.
    threads = max(32, cores) if settings.input.startswith("s3") else cores
    # A small input is read before Java's second compiler pays. Without that compiler
    # Java makes too small a code cache.
    quick = " -XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m"
    options = {
        "spark.master": f"local[{threads}]",
        "spark.driver.memory": "2g",
        "spark.driver.extraJavaOptions": "-XX:+UseParallelGC" + quick * is_small,
        "spark.driver.host": "127.0.0.1",  # A laptop's name may resolve to nothing.
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": str(sys.stderr.isatty()).lower(),
        "spark.sql.shuffle.partitions": str(4 * cores),
        "spark.hadoop.mapreduce.fileoutputcommitter.marksuccessfuljobs": "false",
    }
    if settings.on_s3:
        options.update(S3A_OPTIONS)
        options["spark.jars.packages"] = packages = s3_packages()
        chain = "software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider"
        if "aws-java-sdk" in packages:
            chain = "com.amazonaws.auth.DefaultAWSCredentialsProviderChain"
        options["spark.hadoop.fs.s3a.aws.credentials.provider"] = chain
    if os.environ.get("LC_ALL") in ("C", "POSIX"):  # Java passes over names with é.
        os.environ["LC_ALL"] = "C.UTF-8"
    reader, writer = os.pipe()

    def relay() -> None:
        for chunk in iter(lambda: os.read(reader, 65536), b""):
            if settings.debug or chunk.startswith(b"\r"):  # The bar begins with it.
                os.write(2, chunk)

    threading.Thread(target=relay, daemon=True).start()
    try:
        conf = SparkConf(loadDefaults=False).setAll(list(options.items()))
        gateway = launch_gateway(conf, {"stdout": writer, "stderr": writer})
        context = SparkContext(appName="sparkify-etl", gateway=gateway)
    except Exception as error:
        hint = "install Java 17 (apt-get install openjdk-17-jre-headless), see --debug"
        raise SettingsError(f"Spark didn't start: {explain(error)}: {hint}") from error
    finally:
        os.close(writer)
    files = context._jvm.org.apache.hadoop.fs.FileSystem
    local = files.getLocal(context._jsc.hadoopConfiguration())
    local.setWriteChecksum(False)  # The lake shall have no .crc files.
    local.setVerifyChecksum(False)  # Looking for theirs fails at names with a colon.


def s3_packages() -> str:
    """The Maven packages that give S3A to the Spark at hand; "" for one that has it."""
    home = os.environ.get("SPARK_HOME", os.path.dirname(pyspark.__file__))
    jars = " ".join(os.listdir(f"{home}/jars"))
    hadoop = re.search(r"hadoop-client-api-(\S+)\.jar", jars)
    if "hadoop-aws" in jars or not hadoop:
        return ""
    packages = [f"org.apache.hadoop:hadoop-aws:{hadoop[1]}"]
    sdk, modules = SDKS.get(hadoop[1], ("", ""))
    packages += [sdk.format(module) for module in modules.split()]
    if "spark-core_2.13-4.1.1.jar" in jars:  # It then commits to S3 without copying.
        packages.append("org.apache.spark:spark-hadoop-cloud_2.13:4.1.1")
    return ",".join(packages)


def configure_s3(spark: SparkSession, bucket: str, aws: dict[str, str]) -> None:
    """Gives S3A what dl.cfg says, for this bucket alone; on the running context, since
    what Spark is started with stands in a command line, which every user can read."""
    loader = spark._jvm.java.lang.Thread.currentThread().getContextClassLoader()
    if not loader.getResource("org/apache/hadoop/fs/s3a/S3AFileSystem.class"):
        packages = f"{s3_packages()} --exclude-packages '{NOT_NEEDED}'"
        raise SettingsError(f"Spark has no S3A: start it with --packages {packages}")
    options = {S3A_KEYS[key]: value for key, value in aws.items()}
    if "endpoint_url" in aws:
        options.setdefault("endpoint.region", "us-east-1")
        options["path.style.access"] = "true"
    if "aws_access_key_id" in aws:
        kind = "Temporary" if "aws_session_token" in aws else "Simple"
        provider = f"org.apache.hadoop.fs.s3a.{kind}AWSCredentialsProvider"
        options["aws.credentials.provider"] = provider
    for key, value in options.items():
        spark._jsc.hadoopConfiguration().set(f"fs.s3a.bucket.{bucket}.{key}", value)


# --- Catalog --------------------------------------------------------------------------


def register_tables(lake: Lake, database: str) -> None:
    """Registers the lake's tables in the catalog of the Spark at hand, as Hive's, which
    Athena and Redshift read. Raises RunError for a table that isn't external."""
    spark = lake.spark
    spark.sql(f"CREATE DATABASE IF NOT EXISTS `{database}`")
    for name, table in TABLES.items():
        rows = spark.read.parquet(literal(f"{lake.root}/{name}"))
        location, full = lake.path(name).toString(), f"`{database}`.`{name}`"
        if os.path.isdir(EMR):  # Athena knows no s3a.
            location = location.replace("s3a:", "s3:", 1)
        if spark.catalog.tableExists(full):
            described = spark.sql(f"DESCRIBE EXTENDED {full}").drop("comment").collect()
            if (facts := dict(described)).get("Type") != "EXTERNAL":
                raise RunError(f"{full} is no external table: rename or drop it")
            if (spark.table(full).dtypes, facts["Location"]) != (rows.dtypes, location):
                spark.sql(f"DROP TABLE {full}")
        columns = {column: f"`{column}` {kind}" for column, kind in rows.dtypes}
        folders = ", ".join(columns.pop(column) for column in table.folders)
        named = ", ".join(columns.values())
        create = f"CREATE EXTERNAL TABLE IF NOT EXISTS {full} ({named})"
        partitions = f"PARTITIONED BY ({folders})" if folders else ""
        spark.sql(f"{create} {partitions} STORED AS PARQUET LOCATION {quote(location)}")
        if folders:
            spark.sql(f"MSCK REPAIR TABLE {full} SYNC PARTITIONS")


# --- Settings -------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a run needs to know: URIs without a last slash, what dl.cfg has in [AWS]."""

    input: str
    output: str
    database: str | None = None
    max_rejected: float = 0.01
    full: bool = False
    break_lock: bool = False
    debug: bool = False
    aws: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def on_s3(self) -> list[str]:
        """INPUT and OUTPUT, if they are on S3."""
        return [uri for uri in (self.input, self.output) if uri.startswith("s3")]


def parse_settings(argv: Sequence[str] = ()) -> Settings:
    """Settings from a command line, else dl.cfg, else the defaults."""
    here = os.path.dirname(os.path.abspath(__file__))
    about = "Makes five tables under OUTPUT of song_data/ and log_data/ under INPUT."
    parser = argparse.ArgumentParser("etl.py", description=about, allow_abbrev=False)
    parser.argument_default = argparse.SUPPRESS  # Only flags that are given are there.

    def fail(message: str) -> None:  # In one line; argparse prints the usage, too.
        raise SettingsError(f"{message} (see etl.py --help)")

    parser.error = fail  # type: ignore[assignment,method-assign]
    add = parser.add_argument
    add("--config", metavar="FILE", help="settings (default: dl.cfg, if there is one)")
    source = "holds song_data/ and log_data/ (default: data_sample/ beside etl.py)"
    add("--input", metavar="URI", help=source)
    add("--output", metavar="URI", help="the lake of the five tables (default: lake/)")
    add("--database", metavar="NAME", help="register the tables in Spark's catalog")
    limit = "publish nothing above this fraction of bad records (default: 0.01)"
    add("--max-rejected", metavar="FRACTION", type=float, help=limit)
    add("--full", action="store_true", help="read all files, known ones too")
    takeover = "take over from a dead run; read all files"
    add("--break-lock", action="store_true", help=takeover)
    add("--debug", action="store_true", help="show tracebacks and Spark's own log")
    flags = vars(parser.parse_args(argv))
    if not 0 <= flags.get("max_rejected", 0) <= 1:  # NaN is neither.
        fail(f"--max-rejected {flags['max_rejected']} is not between 0 and 1")
    config = read_config(flags.pop("config", None), here)
    places = {"input": f"{here}/data_sample", "output": "lake"}
    chosen = {**places, **config["LAKE"], **flags}
    chosen.update((key, to_uri(chosen[key])) for key in places)
    return Settings(**chosen, aws=config["AWS"])


def read_config(path: str | None, script_folder: str) -> dict[str, dict[str, str]]:
    """The values, by section and key, of a settings file: the named one, else ./dl.cfg,
    else the one beside the script. No error shows a value, which may be a secret."""
    places = filter(os.path.exists, ("dl.cfg", f"{script_folder}/dl.cfg"))
    path = path or next(places, os.devnull)
    # A secret may hold a %, so there is no interpolation.
    parser = configparser.RawConfigParser(None, inline_comment_prefixes="#")
    parser.default_section = ""
    known = (f"[{of}] {' '.join(keys).upper()}" for of, keys in CONFIG_KEYS.items())
    hint = f"write each key once, as KEY = VALUE, under {' or '.join(known)}"
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}: see dl.cfg.example") from None
    except (configparser.Error, ValueError):
        raise SettingsError(f"{path}: {hint}") from None
    homes = {key: section for section, keys in CONFIG_KEYS.items() for key in keys}
    config: dict[str, dict[str, str]] = {section: {} for section in CONFIG_KEYS}
    for section in parser.sections():
        for key, value in parser[section].items():
            if homes.get(key) != section or "\n" in value:
                home = homes.get(key, section)
                move = f"move {key.upper()} under [{home}]: " * (home != section)
                raise SettingsError(f"{path}: {move}{hint}")
            if text := value.strip("'\""):
                config[section][key] = text
    if {*parser.sections()} - CONFIG_KEYS.keys():
        raise SettingsError(f"{path}: {hint}")
    return config


def to_uri(path: str) -> str:
    """The absolute URI of a path or URI, without a last slash. A path without a scheme
    is local. s3:// is s3a:// but on EMR, whose own Spark serves it."""
    scheme = re.match(r"(\w[\w+.-]+:)?", path)[0]
    if scheme in ("", "file:") and path != scheme:
        local = re.sub("^file:(//(?=/))?", "", path)
        return "file://" + os.path.abspath(os.path.expanduser(local))
    if not re.match("s3a?://[^/]|hdfs:|viewfs:", path):
        raise SettingsError(f"'{path}' is no path, hdfs: URI or s3a://BUCKET/PREFIX")
    if not os.path.isdir(EMR):
        path = re.sub("^s3:", "s3a:", path)
    return re.sub("(?<!:)(?<!:/)/+", "/", path).rstrip("/")


def run_or_cancel(settings: Settings) -> dict[str, Any]:
    """Runs the job in a thread of its own, since Ctrl-C amid a call of Java would mix
    up the answers to later calls; ends it at Ctrl-C, within 10 s on its own Spark."""
    given = SparkContext._active_spark_context
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run, settings)
        try:
            return job.result()
        except KeyboardInterrupt as error:
            context = SparkContext._active_spark_context
            until = time.monotonic() + (10 if context else 0)
            while not wait([job], timeout=0.1).done and time.monotonic() < until:
                with suppress(Exception):  # It may be ending already.
                    context.cancelAllJobs() if given else context.stop()
            if not (job.done() or given):  # Java ends with this process.
                hint = "the next start finishes or clears away what is left"
                say(f"\netl.py: error: interrupted: {hint}")
                os._exit(1)
            if isinstance(job.exception(), (RunError, type(None))):
                return job.result()
            raise RunError("interrupted: no table is changed") from error


def main(argv: Sequence[str] = ()) -> int:
    """Runs the job; returns the exit code: 0 done, 1 failed, 2 wrong settings."""
    secrets: list[str] = []
    try:
        settings = parse_settings(argv)
        open_to_all = ("aws_region", "endpoint_url")
        secrets = [of for key, of in settings.aws.items() if key not in open_to_all]
        if report := run_or_cancel(settings):
            with suppress(OSError, UnicodeError):  # The tables are published.
                say(format_report(report), to=sys.stdout)
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        text = f"etl.py: error: {explain(error)}"
        if "--debug" in argv:
            text = traceback.format_exc() + text
        for secret in (of for of in secrets if len(of) >= 16):  # AWS has no shorter.
            text = text.replace(secret, "***")
        say(text)
        return 2 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main(sys.argv[1:]))
