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
import logging
import os
import re
import signal
import socket
import sys
import threading
import traceback
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from glob import escape, glob
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

if not find_spec("pyspark"):  # A node of EMR has pyspark below its Spark home only.
    home = os.environ.setdefault("SPARK_HOME", "/usr/lib/spark")
    sys.path += [f"{home}/python", *glob(f"{home}/python/lib/py4j-*.zip")]
try:
    import pyspark
    from py4j.protocol import Py4JJavaError
    from pyspark import SparkConf, SparkContext
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql import functions as F
except ModuleNotFoundError as error:
    print(f"etl.py: error: {error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

log = logging.getLogger("etl")


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


MONTH, MONTH_ID = ("year", "month"), "year * 100 + month"
TABLES = {
    "songplays": Table("songplay_id", MONTH, ("start_time",)),
    "users": Table("user_id", (), ("user_id",)),
    "songs": Table("song_id", ("year",), ("artist_id", "song_id")),
    "artists": Table("artist_id", (), ("artist_id",)),
    "time": Table("start_time", MONTH, ("start_time",)),
}
# (table, column, the table whose primary key the column holds)
FOREIGN_KEYS = (
    ("songplays", "user_id", "users"),
    ("songplays", "song_id", "songs"),
    ("songplays", "artist_id", "artists"),
    ("songplays", "start_time", "time"),
    ("songs", "artist_id", "artists"),
)
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
# What is read: a folder of INPUT, its fields, their faults, how typed records are kept.
SONG, PLAY = "song_id", f"if({IS_PLAY}, {SONGPLAY_ID}, null)"
SOURCES = {
    "songs": ("song_data", SONG_SCHEMA, SONG_FAULT, Table(SONG, (), ("song_id",))),
    "events": ("log_data", EVENT_SCHEMA, EVENT_FAULT, Table(PLAY, MONTH, ("ts",))),
}
LATEST_EVENTS = Table("userId", MONTH, ("userId",))  # of each user in each month


# --- Read -----------------------------------------------------------------------------

# Where a record ends and another begins: at a line end after } or ], but not before
# the next key of the same object; before a line that begins with {, even where the one
# before was cut off; between } and {"key": on one line, where an array has a comma.
LINE_END = r"(?<=[}\]])[ \t]*+\r?\n\s*+(?=[^,\]}\s])"
LINE_END_WITH_COMMA = r'(?<=\})[ \t]*+,[ \t]*+\r?\n\s*+(?=[^,\]}\s"])'
NEXT_OBJECT = r'(?=\{\s*+"[^"\\]*+"\s*+:)'
BOUNDARY = rf"{LINE_END}|{LINE_END_WITH_COMMA}|\n(?=\{{)|(?<=\}})\s*+{NEXT_OBJECT}"
ARRAY_BOUNDARY = rf"{BOUNDARY}|(?<=\}})\s*+,\s*+{NEXT_OBJECT}"
ARRAY = r"^(?:\xef\xbb\xbf)?\s*+\["  # The first three bytes are a byte order mark.


def open_files(spark: SparkSession, folder: str, kind: str = "text") -> DataFrame:
    """The lines, value string, of the *.json and *.json.gz files below a folder, which
    are listed now; or their bytes, content binary, where the kind is binaryFile."""
    files = spark.read.option("pathGlobFilter", "*.{json,json.gz}")
    return files.option("recursiveFileLookup", True).format(kind).load(literal(folder))


def list_files(lines: DataFrame) -> dict[str, list[int]]:
    """The bytes and the time of change (ms) of each file of an input, by Hadoop's name."""
    index = lines._jdf.queryExecution().analyzed().relation().location()
    status = r"path=(.*); isDirectory=false; length=(\d+);.* modification_time=(\d+);"
    found = re.findall(status, index.allFiles().mkString("\n"))
    return {name: [int(size), int(changed)] for name, size, changed in found}


def is_of(files: Iterable[str]) -> Column:
    """True where source_file is one of some files, which are given by Hadoop's names."""
    quoted = (re.sub(r"(['\\])", r"\\\1", name) for name in files)
    names = ", ".join(f"'{name}'" for name in ("", *quoted))
    return F.expr(f"url_decode(replace(source_file, '+', '%2B')) IN ({names})")


def read_texts(lines: DataFrame, folder: str) -> DataFrame:
    """The texts of an input's files: a small local file is one, else a line is one. Out:
    source_file (a URL-encoded URI), text string."""
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


def is_utf8(text: Column) -> Column:
    """True where the bytes of a string are UTF-8."""
    if hasattr(F, "is_valid_utf8"):
        return F.is_valid_utf8(text)
    return F.encode(text, "UTF-8") == text.cast("binary")  # 3.5 replaces the rest.


def parse(text: Column, kind: str) -> Column:
    """The JSON values of a text, an array of a type; null where not all is of it."""
    # from_json alone ignores what follows the first value. So `whole` has to follow it.
    wrapped = F.concat(F.lit('{"values": ['), text, F.lit('], "whole": true}'))
    wanted = f"values array<{kind}>, whole boolean, _corrupt string"
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
    """The pieces of a text, an array, each of which should be one JSON object."""
    values = F.when(is_utf8(text), parse(trim(text), "string"))
    values = F.transform(values, lambda value: F.coalesce(value, F.lit("null")))
    # Each byte becomes a character, since splitting would replace what isn't UTF-8.
    latin = F.decode(text.cast("binary"), "ISO-8859-1")
    pieces = F.when(latin.rlike(ARRAY), F.split(latin, ARRAY_BOUNDARY))
    pieces = pieces.otherwise(F.split(latin, BOUNDARY))
    pieces = F.transform(pieces, lambda p: F.encode(p, "ISO-8859-1").cast("string"))
    # This is slow, and most texts are a line with one {.
    is_one = (F.substring_index(text, "{", 2) == text) & ~text.contains("\n")
    is_one |= F.size(values) == 1
    return F.when(is_one, F.array(text)).otherwise(F.coalesce(values, pieces))


def read_records(
    kind: str, lines: DataFrame, folder: str, files: Iterable[str] | None = None
) -> DataFrame:
    """The typed songs or events, good or bad, of the files below a folder, or of some of
    them. A blank string is null; a value of the wrong type makes a bad record. Out:
    SONG_SCHEMA or EVENT_SCHEMA; source_file string; reason string, why a record is bad;
    raw string, its text (as ISO-8859-1 if it isn't UTF-8); year, month int of an
    event's ts, 0 where it isn't valid."""
    _, schema, rules, layout = SOURCES[kind]
    raw, texts = F.col("raw"), read_texts(lines, folder)
    texts = texts if files is None else texts.where(is_of(files))
    # An inner explode would make Spark split each text twice, to see if it is empty.
    pieces = texts.withColumn("raw", F.explode_outer(split_text(F.col("text"))))
    pieces = pieces.withColumn("raw", trim(raw)).where(raw != "")
    pieces = pieces.withColumn("values", parse(raw, f"struct<{schema}>"))
    fault = (
        F.when(~is_utf8(raw), "not UTF-8")
        .when(F.isnotnull("values"), None)
        .when(parse(raw, "string").isNull(), "not JSON")
        .otherwise("value of the wrong type")
    )
    latin = F.decode(raw.cast("binary"), "ISO-8859-1")
    records = pieces.select(
        F.explode_outer("values").alias("record"),
        "source_file",
        fault.alias("fault"),
        F.when(is_utf8(raw), raw).otherwise(latin).alias("raw"),
    )
    strings = re.findall(r"(\w+) string", schema)
    blank_is_null = {of: F.expr(f"if(trim({of}) = '', null, {of})") for of in strings}
    records = (
        records.select("record.*", "source_file", "fault", "raw")
        .withColumns(blank_is_null)
        .withColumn("reason", F.expr(f"coalesce(fault, {rules})"))
        .withColumn("raw", F.expr("if(reason IS NULL, null, raw)"))
        .drop("fault")
    )
    for column in layout.folders:  # year and month
        value = f"if({HAS_TIME}, {column}(timestamp_millis(ts)), 0)"
        records = records.withColumn(column, F.expr(value))
    return records


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
    then the one of the shortest name, then the first in alphabetical order.
    In: SONG_SCHEMA. Out: artist_id, name, location string; latitude, longitude double
    (degrees)."""
    best = F.expr(
        """min(struct(artist_name IS NULL,
        int(artist_location IS NULL) + int(artist_latitude IS NULL)
        + int(artist_longitude IS NULL), length(artist_name), artist_name AS name,
        artist_location AS location, artist_latitude AS latitude,
        artist_longitude AS longitude)) AS best"""
    )
    artists = songs.where(HAS_SONG_KEYS).groupBy("artist_id").agg(best)
    columns = ("best.name", "best.location", "best.latitude", "best.longitude")
    return artists.select("artist_id", *columns)


def build_users(events: DataFrame) -> DataFrame:
    """One row a user id of any event, as the user's latest event describes the user; of
    several at that moment the one of the highest itemInSession.
    In: EVENT_SCHEMA. Out: user_id, first_name, last_name, gender, level string."""
    return find_latest(events, "userId").selectExpr(
        "userId AS user_id",
        "firstName AS first_name",
        "lastName AS last_name",
        "gender",
        "level",
    )


def find_latest(events: DataFrame, *key: str) -> DataFrame:
    """The latest event of each key, which has userId: what describes the user."""
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
    song; of several deliveries the greatest, field by field.
    A play's song has exactly its title and, among the names that the catalogue gives
    the song's artist, exactly its artist; of several the nearest in duration wins, then
    the smallest song_id. A play without a song gets the artist_id of the only artist of
    that name. In: EVENT_SCHEMA and SONG_SCHEMA. Out: songplay_id bigint; start_time
    timestamp; user_id, level, song_id, artist_id string; session_id bigint; location,
    user_agent string; year, month int of start_time."""
    key = ("ts", "userId", "sessionId", "itemInSession")
    fields = "level, location, userAgent, song, artist, length"
    greatest = F.expr(f"max(struct({fields})) AS play")
    plays = events.where(IS_PLAY).repartition(*key)  # Else they are sorted twice.
    plays = plays.groupBy(*key).agg(greatest).select(*key, "play.*")
    gap = "coalesce(abs(song.duration - length), double('infinity'))"
    fit = f"song -> struct({gap}, song.song_id, song.artist_id)"
    best = F.expr(f"array_min(transform(songs, {fit}))")
    titles, names = look_up_songs(songs)
    found = (
        plays
        # Each of these has one row a key, so that no join can multiply a play.
        .join(titles, on=["song", "artist"], how="left")
        .join(names, on="artist", how="left")
        .withColumns({"best": best, "start_time": F.timestamp_millis("ts")})
    )
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


def look_up_songs(songs: DataFrame) -> tuple[DataFrame, DataFrame]:
    """The songs of each title and name of their artist: song, artist string; songs, an
    array of (duration, song_id, artist_id). And the artist of each name, null where
    several have it: artist, sole_artist_id string."""
    names = songs.where(HAS_SONG_KEYS).where("artist_name IS NOT NULL")
    names = names.selectExpr("artist_id", "artist_name AS artist").distinct()
    found = F.expr("collect_list(struct(duration, song_id, artist_id)) AS songs")
    titles = build_songs(songs).withColumnRenamed("title", "song")
    titles = titles.join(names, on="artist_id", how="inner").groupBy("song", "artist")
    sole = F.expr("if(count(*) = 1, min(artist_id), null) AS sole_artist_id")
    return titles.agg(found), names.groupBy("artist").agg(sole)


# --- Write and check ------------------------------------------------------------------


def write_files(rows: DataFrame, folder: str, table: Table) -> None:
    """Adds rows as Parquet to a folder, in few files of even size."""
    # DataFrame.hint takes no columns before Spark 4.
    hint = f"REBALANCE({', '.join(table.folders)})" if table.folders else "REBALANCE"
    sized = rows.sparkSession.sql(f"SELECT /*+ {hint} */ * FROM {{rows}}", rows=rows)
    ordered = sized.sortWithinPartitions(*table.folders, *table.order)
    ordered.write.mode("append").partitionBy(*table.folders).parquet(folder)


def check_tables(tables: dict[str, DataFrame], due: dict[str, int]) -> dict[str, int]:
    """Checks the five tables as written; returns the rows of each. Raises RunError
    unless each has as many as are due, every primary key is unique and not null, and
    every foreign key that isn't null finds its row."""
    queries = []
    for name, table in TABLES.items():
        tables[name].createOrReplaceTempView(name)
        figures = f"count(*), count(DISTINCT {table.key}), ''"
        queries.append(f"SELECT '{name}', {figures} FROM {name}")
    for name, column, owner in FOREIGN_KEYS:
        lost = f"'{name}: no row of {owner} for {column} ' || min({column})"
        join = f"{owner} ON {name}.{column} = {owner}.{TABLES[owner].key}"
        queries.append(f"SELECT '', 0, 0, {lost} FROM {name} LEFT ANTI JOIN {join}")
    spark = tables["songplays"].sparkSession
    for name, rows, keys, lost in spark.sql(" UNION ALL ".join(queries)).collect():
        if lost:
            raise RunError(f"check failed: {lost}")
        due.setdefault(name, rows)
        if name and not rows == keys == due[name]:
            fault = f"{rows:,} rows, {keys:,} different {TABLES[name].key}"
            raise RunError(f"check failed: {name}: {fault}, {due[name]:,} due")
    return {name: due[name] for name in TABLES}


# --- Run ------------------------------------------------------------------------------


def run(settings: Settings) -> dict[str, Any]:
    """A whole run: reads what is new, builds, checks, publishes. Returns its report,
    which is in OUTPUT/_reports/, too; an empty one where nothing is new. Raises
    SettingsError for wrong settings, RunError or what Spark raises for the rest: the
    tables are as they were, unless the error says more."""
    sizes = preflight(settings)
    log.info("starting Spark")
    spark = start_spark(settings, sizes)
    lake = open_lake(spark, settings.output)
    run_id = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    with claimed(lake, run_id, settings.break_lock) as staging:
        known = load_manifest(lake, settings)
        news = [find_news(lake, settings.input, kind, known[kind]) for kind in SOURCES]
        if any(of.gone or not of.known for of in news):
            report = update(lake, staging, news, settings)
        else:
            report = {}
            log.info("nothing is new: the lake stays as it is")
    if settings.database:
        log.info("registering the tables in %s", settings.database)
        register_tables(lake, settings.database)
    return report


def load_manifest(lake: Lake, settings: Settings) -> dict[str, dict[str, Any]]:
    """What the lake's manifest has of each file whose records the lake holds, by kind.
    Where it can't be relied on, nothing is known, which makes a full run."""
    names = [name for name in lake.files("_records") if "/_manifest-" in name]
    manifest: dict[str, Any] = {}
    with suppress(ValueError):
        manifest = json.loads(lake.read(names[0])) if names else {}
    reasons = {
        "as told by --full or --break-lock": settings.full or settings.break_lock,
        "the lake has no manifest": not names,
        "the manifest is damaged or not the only one": not manifest or names[1:],
        "INPUT is another": manifest.get("input") != settings.input,
        "etl.py has changed": manifest.get("script") != hash_script(),
    }
    if why := next((reason for reason, holds in reasons.items() if holds), None):
        log.info("a full run: %s", why)
        return {kind: {} for kind in SOURCES}
    return manifest["files"]


def hash_script() -> str:
    """The SHA-256 of this script, since another one may make other records."""
    with open(__file__, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


@dataclass(frozen=True)
class News:
    """What is new in INPUT's songs or events. Files are named as Hadoop lists them."""

    kind: str
    folder: str
    lines: DataFrame  # of all files in it
    states: dict[str, list[int]]  # the bytes and the time of change of each file
    known: dict[str, Any]  # what the manifest has of each file of the lake
    gone: set[str]  # new, changed and missing files, whose old records go


def find_news(lake: Lake, uri: str, kind: str, known: dict[str, Any]) -> News:
    """Compares INPUT's files with the known ones."""
    folder = f"{uri}/{SOURCES[kind][0]}"
    lines = open_files(lake.spark, folder)
    states = list_files(lines)
    before = {name: of["state"] for name, of in known.items()}
    names = states.keys() | before.keys()
    gone = {name for name in names if states.get(name) != before.get(name)}
    counts = f"{len(gone - before.keys()):,} new, {len(gone & before.keys()):,} changed"
    log.info("%s or missing files in %s", counts, folder)
    return News(kind, folder, lines, states, known, gone)


def update(
    lake: Lake, staging: str, news: list[News], settings: Settings
) -> dict[str, Any]:
    """Reads what is new; builds, checks and publishes what changes with it. Returns the
    run's report."""
    run_id, folder = staging.split("/")[1], f"{lake.root}/{staging}"
    log.info("reading %s", settings.input)
    with ThreadPoolExecutor() as pool:
        songs, events = pool.map(partial(stage_records, lake, staging), news)
    files = {"songs": songs.files, "events": events.files}
    counts = {kind: sum_up(of) for kind, of in files.items()}
    stage_rejected(songs.staged, events.staged, f"{folder}/_rejected/{run_id}")
    if fault := find_fault(counts, settings):
        lake.delete(f"{staging}/_records", recursive=True)
        publish(lake, staging, replaced=())
        raise RunError(fault)
    log.info("building the tables")
    tables, due = stage_tables(lake, staging, songs, events)
    log.info("checking the tables")
    rows = check_tables(tables, due)
    found = ("count(song_id) AS with_song", "count(artist_id) AS with_artist")
    plays = tables["songplays"].selectExpr(*found).first().asDict()
    report = {"run": run_id, "input": settings.input, "output": settings.output}
    report.update(records=counts, tables=rows, plays=plays)
    lake.write(f"{staging}/_reports/{run_id}.json", json.dumps(report, indent=2))
    manifest = {"input": settings.input, "script": hash_script(), "files": files}
    lake.write(f"{staging}/_records/_manifest-{run_id}.json", json.dumps(manifest))
    log.info("publishing to %s", settings.output)
    publish(lake, staging, find_replaced(lake, songs, events))
    return report


@dataclass(frozen=True)
class Records:
    """The typed songs or events, good or bad, of INPUT."""

    staged: DataFrame  # of the months, as year * 100 + month, of which some are new
    months: list[int]
    rest: DataFrame  # of the other months, as the lake has them
    files: dict[str, Any]  # the manifest's: their states, counts by month and reason
    is_full: bool  # nothing was known


def stage_records(lake: Lake, staging: str, news: News) -> Records:
    """Stages the records of all months in which some change: those of new and changed
    files, which are parsed once, and those of other files, which the lake has."""
    layout, place = SOURCES[news.kind][-1], f"{staging}/_records/{news.kind}"
    names = news.states.keys() & news.gone
    wanted = names if news.known else None
    fresh = read_records(news.kind, news.lines, news.folder, wanted)
    fresh = stage(lake, fresh, place, layout) if names else fresh.where("false")
    gone = [of for name, of in news.known.items() if name in news.gone]
    files = {name: of for name, of in news.known.items() if name not in news.gone}
    new = {name: {"state": news.states[name], "counts": []} for name in names}
    good = F.expr(f"count(if(reason IS NULL, {layout.key}, null))")
    month = F.expr(MONTH_ID) if layout.folders else F.lit(0)
    counts = fresh.withColumn("id", month).groupBy("source_file", "id", "reason")
    for file, *figures in counts.agg(F.count("*"), good).collect():
        # A file that has come since the listing has no state, so the next run reads it.
        of = new.setdefault(unquote(file), {"state": [], "counts": []})
        of["counts"].append(figures)
    months = sorted({of[0] for file in [*gone, *new.values()] for of in file["counts"]})
    is_new, staged, rest = month.isin([-1, *months]), fresh, fresh.where("false")
    if news.known:
        known = read_back(lake, f"_records/{news.kind}", fresh)
        kept, rest = known.where(is_new & ~is_of(news.gone)), known.where(~is_new)
        staged = stage(lake, kept, place, layout) if months else fresh
    return Records(staged, months, rest, {**files, **new}, not news.known)


def stage(lake: Lake, rows: DataFrame, name: str, table: Table) -> DataFrame:
    """Adds rows to a folder of the lake; gives all that are there then."""
    write_files(rows, f"{lake.root}/{name}", table)
    if not lake.fs.exists(lake.path(name)):  # There was no row.
        lake.fs.mkdirs(lake.path(name))
    return read_back(lake, name, rows)


def read_back(lake: Lake, name: str, like: DataFrame) -> DataFrame:
    """The rows below a folder of the lake, which has the columns of others."""
    files = lake.spark.read.schema(like.schema)
    return files.parquet(literal(f"{lake.root}/{name}"))


def sum_up(files: dict[str, Any]) -> dict[str, Any]:
    """How many records some files have, which are rejected, which are songs or plays."""
    counts = [of for file in files.values() for of in file["counts"]]
    rejected: Counter[str] = Counter()
    for _, reason, read, _ in counts:
        rejected.update({reason: read} if reason else {})
    read, good = (sum(of[n] for of in counts) for n in (2, 3))
    return {"read": read, "rejected": dict(sorted(rejected.items())), "good": good}


def stage_rejected(songs: DataFrame, events: DataFrame, folder: str) -> None:
    """Writes the bad records, if any, as JSON lines: source_file, reason, raw."""
    columns = ("source_file", "reason", "raw")
    bad = songs.select(*columns).unionAll(events.select(*columns))
    if (bad := bad.where("reason IS NOT NULL")).head(1):
        bad.repartitionByRange("source_file").write.json(folder)


def find_fault(counts: dict[str, dict[str, Any]], settings: Settings) -> str | None:
    """Why a run must not publish: too much is rejected, or there is nothing."""
    read = sum(of["read"] for of in counts.values())
    bad = sum(sum(of["rejected"].values()) for of in counts.values())
    if bad > settings.max_rejected * read:
        limit = f"--max-rejected {settings.max_rejected:g}: no table is changed"
        hint = "small local files alone may have objects over several lines"
        place = f"see {settings.output}/_rejected ({hint})"
        return f"{bad:,} of {read:,} records are bad, over {limit}: {place}"
    for kind, what in (("songs", "song"), ("events", "play (page NextSong)")):
        if not counts[kind]["good"]:
            return f"no {what} in {settings.input}/{SOURCES[kind][0]}: check --input"
    return None


def stage_tables(
    lake: Lake, staging: str, songs: Records, events: Records
) -> tuple[dict[str, DataFrame], dict[str, int]]:
    """Stages the tables that change: of some months or, where songs change, all. Gives
    the five tables as the lake will have them and how many rows are due."""
    good = "reason IS NULL"
    latest = find_latest(events.staged.where(good), "userId", *MONTH)
    latest = stage(lake, latest, f"{staging}/_records/users", LATEST_EVENTS)
    if not events.is_full:
        others = ~F.expr(MONTH_ID).isin([-1, *events.months])
        known = read_back(lake, "_records/users", latest)
        latest = latest.unionByName(known.where(others))
    all_songs = songs.staged.unionByName(songs.rest).where(good)
    plays = events.staged.unionByName(events.rest) if songs.months else events.staged
    plays = plays.where(good)
    tables = {
        "songplays": build_songplays(plays, all_songs),
        "users": build_users(latest),
        "songs": build_songs(all_songs),
        "artists": build_artists(all_songs),
        "time": build_time(plays),
    }

    def stage_table(name: str) -> DataFrame:
        if name in ("songs", "artists") and not songs.months:
            return read_back(lake, name, tables[name])
        return stage(lake, tables[name], f"{staging}/{name}", TABLES[name])

    with ThreadPoolExecutor() as pool:
        staged = dict(zip(TABLES, pool.map(stage_table, TABLES)))
    keys = {"songplays": plays.selectExpr(PLAY)}
    if songs.months:
        keys["songs"] = all_songs.select(SONG)
    return staged, {of: key.dropna().distinct().count() for of, key in keys.items()}


def find_replaced(lake: Lake, songs: Records, events: Records) -> list[str]:
    """The lake's files in whose place others come."""
    starts = ["users/", "_records/_manifest-"]
    if songs.months:
        starts += ["songplays/", "songs/", "artists/", "time/", "_records/songs/"]
    for month in events.months:
        folder = f"year={month // 100}/month={month % 100}/"
        tables = ("songplays", "time", "_records/events", "_records/users")
        starts += [f"{table}/{folder}" for table in tables]
    names = (of for folder in (*TABLES, "_records") for of in lake.files(folder))
    return [of for of in names if events.is_full or of.startswith(tuple(starts))]


def format_report(report: dict[str, Any]) -> str:
    """A report as a person reads it."""
    lines = [f"{count:12,}  rows of {name}" for name, count in report["tables"].items()]
    lines += [f"{count:12,}  plays {name}" for name, count in report["plays"].items()]
    for kind, counts in report["records"].items():
        lines.append(f"{counts['read']:12,}  {kind} read")
        rejected = counts["rejected"].items()
        lines += [f"{count:12,}  {kind} rejected: {why}" for why, count in rejected]
    return "\n".join([*lines, f"lake: {report['output']}"])


def explain(error: BaseException) -> str:
    """An exception in one line: its first cause, and the file that it was about."""
    text = str(error).strip() or type(error).__name__  # Ctrl-C has no message.
    causes = re.findall(r"^(?:Caused by: |: )(.+)", text, re.MULTILINE)
    about = re.search(r"while reading file (.+?\.json(?:\.gz)?)", text)
    line = causes[-1] if causes else " ".join(text.splitlines()[:2])
    return f"{about[1]}: {line}" if about else line


# --- Lake -----------------------------------------------------------------------------

LEASE = 90  # seconds without a sign of life after which a run counts as dead
HEARTBEAT = 15  # seconds between two signs of life
# What a run writes into a table or its records.
OWN_FILE = re.compile(r"(.*/)?part-[^/]*\.parquet|_records/_manifest-[^/]*\.json")


@dataclass(frozen=True)
class Lake:
    """OUTPUT as Hadoop's FileSystem `fs` serves it. Names are paths below `root`."""

    root: str
    spark: SparkSession
    fs: Any
    path_class: Any  # Looking it up by its name costs Java five calls.

    def path(self, name: str) -> Any:
        """Hadoop's Path of a file or folder."""
        return self.path_class(f"{self.root}/{name}")

    def files(self, folder: str) -> dict[str, int]:
        """The files at any depth below a folder: when each was changed, by name (ms)."""
        folders, statuses = [self.path(folder)], []
        if not self.fs.exists(folders[0]):
            return {}
        if self.root.startswith("s3"):  # A request lists 1,000 objects of all folders.
            found = self.fs.listFiles(folders.pop(), True)
            while found.hasNext():
                statuses.append(found.next())
        for path in folders:  # listFiles starts a process for each local file.
            inside = list(self.fs.listStatus(path))
            folders += [status.getPath() for status in inside if status.isDirectory()]
            statuses += [status for status in inside if not status.isDirectory()]
        start = len(self.fs.makeQualified(self.path("")).toString().rstrip("/")) + 1
        times = ((of.getPath(), of.getModificationTime()) for of in statuses)
        return {path.toString()[start:]: changed for path, changed in times}

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
        except Py4JJavaError as error:
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
    path_class = spark._jvm.org.apache.hadoop.fs.Path
    hadoop = spark._jsc.hadoopConfiguration()
    return Lake(root, spark, path_class(root).getFileSystem(hadoop), path_class)


@contextmanager
def claimed(lake: Lake, run_id: str, break_lock: bool = False) -> Iterator[str]:
    """Keeps other runs from the lake while inside; first finishes or clears away what
    dead ones have left. Gives the name of the run's staging folder, where a file that
    is written again every 15 s tells the living from the dead. Raises RunError while
    another run is alive, SettingsError where OUTPUT can't be written."""
    staging, ended = f"_staging/{run_id}", threading.Event()
    owner, alive = f"{staging}/_owner.json", f"{staging}/_alive"
    start = datetime.now(timezone.utc).isoformat(timespec="seconds")
    me = {"host": socket.gethostname(), "process": os.getpid(), "start": start}

    def stay_alive() -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(Exception):  # The next one may be in time, too.
                lake.write(alive, "")

    try:
        lake.write(alive, "")
        lake.write(owner, json.dumps(me))
    except Py4JJavaError as error:
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
            files = lake.files(staging)
            # A journal is for the next start, and a claim without owner is taken over.
            is_over = owner in files and f"{staging}/_journal.json" not in files
            for name in () if is_over else (owner, alive):
                lake.delete(name)
            for name in (staging, "_staging"):  # One that isn't empty stays.
                lake.delete(name, recursive=is_over and name == staging)


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
                places = (other, *TABLES, "_records", "_rejected", "_reports")
                there = {name for place in places for name in lake.files(place)}
                finish(lake, other, json.loads(lake.read(journal)), there)
        except (ValueError, KeyError, RunError) as error:
            if not break_lock:
                hint = "add --break-lock to discard it and replace every table"
                raise RunError(f"{lake.root}/{journal}: {error}: {hint}") from error
        lake.delete(other, recursive=True)
        log.info("finished or cleared away what was left in %s", other)


def publish(lake: Lake, staging: str, replaced: Iterable[str]) -> None:
    """Moves what a run has staged into the lake, then deletes the files that it
    replaces. A journal of both comes first, so that the next start can finish what is
    cut off. A reader sees old rows, new rows or both, never fewer."""
    run_id, there = staging.split("/")[1], lake.files(staging)
    names = [name[len(staging) + 1 :] for name in there]
    other = r"/[_.](?!manifest-)|^_(?!records|rejected|reports)"
    names = [name for name in names if not re.search(other, name)]
    # With the run in its name no file is in the way of another run's.
    staged = {of: re.sub("/part-(?!.*/)", f"/part-{run_id}-", of) for of in names}
    journal = {"staged": staged, "replaced": list(filter(OWN_FILE.fullmatch, replaced))}
    lake.write(f"{staging}/_journal.tmp", json.dumps(journal))
    confirm_claim(lake, staging)
    lake.move(f"{staging}/_journal.tmp", f"{staging}/_journal.json")
    try:
        confirm_claim(lake, staging)
        finish(lake, staging, journal, {*there, *journal["replaced"]})
    except RunError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        reason = f"the next start of etl.py finishes it: {explain(error)}"
        raise RunError(f"publishing was cut off, {reason}") from error


def confirm_claim(lake: Lake, staging: str) -> None:
    """Raises RunError when another run has taken over."""
    if not lake.fs.exists(lake.path(f"{staging}/_owner.json")):
        raise RunError("another run has taken over the lake: nothing is published")


def finish(lake: Lake, staging: str, journal: dict[str, Any], there: set[str]) -> None:
    """Does what is left to do of a journal, given the files that there are; nothing,
    where moving had not begun. Raises RunError where a table's file is lost."""
    targets = {f"{staging}/{name}": of for name, of in journal["staged"].items()}
    left = [name for name in targets if name in there]
    gone = {of for name, of in targets.items() if not {name, of} & there}
    lost = sorted(filter(OWN_FILE.fullmatch, gone))
    if lost and not there & set(targets.values()):
        return
    if lost:
        raise RunError(f"{lake.root}/{lost[0]} is lost")
    moves = {name: targets[name] for name in left if targets[name] not in there}
    with ThreadPoolExecutor(32) as pool:
        for is_last in (False, True):  # A manifest tells of records that are in place.
            names = [name for name in moves if ("/_manifest-" in name) == is_last]
            list(pool.map(lake.move, names, map(moves.get, names)))
        # A target that exists is whole: S3A copies a file, then deletes it.
        list(pool.map(lake.delete, [*journal["replaced"], *(set(left) - set(moves))]))
    emptied = folders_of(journal["replaced"]) - folders_of(targets.values())
    for folder in sorted(emptied, reverse=True):
        with suppress(Py4JJavaError, OSError):  # Another's file is in it.
            lake.delete(folder)
    lake.delete(f"{staging}/_journal.json")


def folders_of(names: Iterable[str]) -> set[str]:
    """The folders above some files, but the lake itself."""
    return {str(of) for name in names for of in PurePosixPath(name).parents} - {"."}


# --- Spark and S3 ---------------------------------------------------------------------

EMR = "/usr/share/aws/emr"  # a folder of every EMR node
SQL_OPTIONS = {
    # Without these the tables would depend on the machine.
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.compression.codec": "snappy",
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
    "AWS_ACCESS_KEY_ID": "access.key",
    "AWS_SECRET_ACCESS_KEY": "secret.key",
    "AWS_SESSION_TOKEN": "session.token",
    "AWS_REGION": "endpoint.region",
    "ENDPOINT_URL": "endpoint",
}
# What those packages name but Spark has already, or other clouds need.
NOT_NEEDED = (
    "software.amazon.awssdk:bundle,com.amazonaws:aws-java-sdk-bundle,joda-time:*,"
    "org.apache.hadoop:hadoop-client-*,org.apache.hadoop:hadoop-cloud-storage,"
    "org.apache.hadoop:hadoop-azure*,com.google.cloud.bigdataoss:*,"
    "com.fasterxml.jackson.*:*,org.eclipse.jetty:*"
)


def uses_s3(settings: Settings) -> bool:
    """True where INPUT or OUTPUT is on S3."""
    return "s3" in (settings.input[:2], settings.output[:2])


def preflight(settings: Settings) -> dict[str, int]:
    """Raises SettingsError for what would fail after Spark's slow start. Returns the
    bytes of each file of INPUT by its name; nothing where they can't be listed."""
    has_boto3 = find_spec("boto3") is not None
    sizes = check_s3(settings) if uses_s3(settings) and has_boto3 else {}
    if settings.input.startswith("file:"):
        folder = escape(settings.input[len("file://") :])
        found = filter(os.path.exists, glob(f"{folder}/**/*.json*", recursive=True))
        sizes = {name: os.path.getsize(name) for name in found}
    elif not settings.input.startswith("s3") or not has_boto3:
        return sizes
    for part, *_ in SOURCES.values():
        if not any(f"/{part}/" in f"/{name}" for name in sizes):
            hint = "give --input the folder of song_data/ and log_data/"
            lack = f"INPUT {settings.input} holds no {part}/ with .json or .json.gz"
            raise SettingsError(f"{lack} files: {hint}")
    return sizes


def check_s3(settings: Settings) -> dict[str, int]:
    """The bytes of each object of INPUT on S3, by its key. Raises SettingsError unless
    it can be listed, and objects in OUTPUT on S3 be written and deleted."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    uri, sizes = settings.input, {}
    aws = {key.lower(): value for key, value in settings.aws.items()}
    region, retries = aws.pop("aws_region", None), {"total_max_attempts": 2}
    style = {"addressing_style": "path" if "endpoint_url" in aws else "auto"}
    config = Config(connect_timeout=2, read_timeout=10, retries=retries, s3=style)
    try:
        client = boto3.client("s3", region_name=region, config=config, **aws)
        for part, *_ in SOURCES.values() if uri.startswith("s3") else ():
            _, bucket, key = f"{uri}/{part}/".split("/", 3)[1:]
            pages = client.get_paginator("list_objects_v2")
            found = pages.paginate(Bucket=bucket, Prefix=key).search("Contents[]")
            sizes.update((of["Key"], of["Size"]) for of in found if of)
        uri = settings.output
        if uri.startswith("s3"):
            _, bucket, key = f"{uri}/_probe-{uuid.uuid4().hex}".split("/", 3)[1:]
            client.delete_object(Bucket=bucket, Key=key)  # What can't go must not come.
            client.put_object(Bucket=bucket, Key=key)
            client.delete_object(Bucket=bucket, Key=key)
        method = getattr(boto3.Session().get_credentials(), "method", None)
    except (BotoCoreError, ClientError, ValueError) as error:
        raise SettingsError(f"{uri}: {explain(error)}") from error
    if method == "sso" and not aws and pyspark.__version__ < "4":
        hint = "install pyspark 4, or set what aws configure export-credentials prints"
        raise SettingsError(f"Spark 3.5 knows no AWS SSO: {hint}")
    return {key: size for key, size in sizes.items() if ".json" in key}


def start_spark(settings: Settings, sizes: dict[str, int]) -> SparkSession:
    """A session of the job's own, on the Spark at hand or on pip's, which it starts."""
    given = {"SPARK_HOME", "PYSPARK_GATEWAY_PORT"} & set(os.environ)
    if not given and SparkContext._gateway is None:
        start_own_spark(settings, 0 < sum(sizes.values()) < 2**26)  # 64 MB
    builder = SparkSession.builder
    builder = builder.enableHiveSupport() if settings.database else builder
    spark = builder.getOrCreate().newSession()
    for key, value in SQL_OPTIONS.items():
        spark.conf.set(key, value)
    for uri in (settings.input, settings.output):
        if uri.startswith("s3a:"):
            configure_s3(spark, uri.split("/")[2], settings.aws)
    encoding = spark._jvm.java.lang.System.getProperty("sun.jnu.encoding")
    if "ANSI" in encoding and not "".join(of for of in sizes if of[0] == "/").isascii():
        raise SettingsError("Java passes over names with é: set LC_ALL=C.UTF-8 for it")
    return spark


def start_own_spark(settings: Settings, is_small: bool) -> None:
    """Starts pip's Spark, whose log is shown only when debugging."""
    cores = os.cpu_count() or 1
    # A task waits for one small object after another.
    threads = max(32, cores) if settings.input.startswith("s3") else cores
    # Java's second compiler doesn't pay; without it, Java makes too small a code cache.
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
        **(s3_options() if uses_s3(settings) else {}),
    }
    if os.environ.get("LC_ALL") in ("C", "POSIX"):  # Java passes over names with é.
        os.environ["LC_ALL"] = "C.UTF-8"
    reader, writer = os.pipe()
    threading.Thread(target=relay, args=(reader, settings.debug), daemon=True).start()
    try:
        conf = SparkConf(loadDefaults=False).setAll(list(options.items()))
        gateway = launch_gateway(conf, {"stdout": writer, "stderr": writer})
        conf = SparkConf(_jvm=gateway.jvm).setAppName("sparkify-etl")
        context = SparkContext(conf=conf, gateway=gateway)
    except Exception as error:
        hint = "install Java 17 (apt-get install openjdk-17-jre-headless), see --debug"
        raise SettingsError(f"Spark didn't start: {explain(error)}: {hint}") from error
    finally:
        os.close(writer)
    files = context._jvm.org.apache.hadoop.fs.FileSystem  # shall write no .crc files
    files.getLocal(context._jsc.hadoopConfiguration()).setWriteChecksum(False)


def relay(reader: int, everything: bool) -> None:
    """Shows what a JVM prints: its progress bar, or everything."""
    for chunk in iter(lambda: os.read(reader, 65536), b""):
        if everything or chunk.startswith(b"\r"):  # The bar alone begins with it.
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()


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


def s3_options() -> dict[str, str]:
    """What an own Spark needs for S3."""
    packages, s3a = s3_packages(), "spark.hadoop.fs.s3a"
    chain = "software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider"
    if "aws-java-sdk" in packages:
        chain = "com.amazonaws.auth.DefaultAWSCredentialsProviderChain"
    return {
        "spark.jars.packages": packages,
        "spark.jars.excludes": NOT_NEEDED,
        f"{s3a}.aws.credentials.provider": chain,
        f"{s3a}.directory.operations.purge.uploads": "true",  # of a run that was killed
        f"{s3a}.committer.magic.track.commits.in.memory.enabled": "true",
        f"{s3a}.input.stream.type": "prefetch",
    }


def configure_s3(spark: SparkSession, bucket: str, aws: dict[str, str]) -> None:
    """Gives S3A what dl.cfg says, for this bucket alone; on the running context, since
    a session's settings stand in the JVM's command line, which every user can read."""
    loader = spark._jvm.java.lang.Thread.currentThread().getContextClassLoader()
    if not loader.getResource("org/apache/hadoop/fs/s3a/S3AFileSystem.class"):
        packages = f"{s3_packages()} --exclude-packages '{NOT_NEEDED}'"
        raise SettingsError(f"Spark has no S3A: start it with --packages {packages}")
    options = {S3A_KEYS[key]: value for key, value in aws.items()}
    if "ENDPOINT_URL" in aws:
        options.setdefault("endpoint.region", "us-east-1")
        options["path.style.access"] = "true"
    if "AWS_ACCESS_KEY_ID" in aws:
        kind = "Temporary" if "AWS_SESSION_TOKEN" in aws else "Simple"
        provider = f"org.apache.hadoop.fs.s3a.{kind}AWSCredentialsProvider"
        options["aws.credentials.provider"] = provider
    for key, value in options.items():
        spark._jsc.hadoopConfiguration().set(f"fs.s3a.bucket.{bucket}.{key}", value)


# --- Catalog --------------------------------------------------------------------------


def register_tables(lake: Lake, database: str) -> None:
    """Registers the lake's tables in the catalog of the Spark at hand, in Hive's format,
    which Athena and Redshift read. Raises RunError for a table that isn't external."""
    spark = lake.spark
    spark.sql(f"CREATE DATABASE IF NOT EXISTS `{database}`")
    for name, table in TABLES.items():
        rows = spark.read.parquet(literal(f"{lake.root}/{name}"))
        location, full = lake.path(name).toString(), f"`{database}`.`{name}`"
        if os.path.isdir(EMR):  # Athena knows no s3a.
            location = location.replace("s3a:", "s3:", 1)
        if spark.catalog.tableExists(f"{database}.{name}"):
            described = spark.sql(f"DESCRIBE EXTENDED {full}").drop("comment").collect()
            if (facts := dict(described)).get("Type") != "EXTERNAL":
                raise RunError(f"{full} is no external table: rename or drop it")
            if (spark.table(full).dtypes, facts["Location"]) != (rows.dtypes, location):
                spark.sql(f"DROP TABLE {full}")
        columns = {column: f"`{column}` {kind}" for column, kind in rows.dtypes}
        folders = ", ".join(columns.pop(column) for column in table.folders)
        named = ", ".join(columns.values())
        create = f"CREATE EXTERNAL TABLE IF NOT EXISTS {full} ({named})"
        kept = f"PARTITIONED BY ({folders})" if folders else ""
        place = location.replace("'", r"\'")
        spark.sql(f"{create} {kept} STORED AS PARQUET LOCATION '{place}'")
        if folders:
            spark.sql(f"MSCK REPAIR TABLE {full} SYNC PARTITIONS")


# --- Settings -------------------------------------------------------------------------

CONFIG_KEYS = {"LAKE": ("INPUT", "OUTPUT", "DATABASE"), "AWS": tuple(S3A_KEYS)}


@dataclass(frozen=True)
class Settings:
    """What a run needs to know: URIs without a last slash, what dl.cfg has in [AWS]."""

    input: str
    output: str
    database: str | None
    max_rejected: float
    full: bool
    break_lock: bool
    debug: bool
    aws: dict[str, str] = field(repr=False)


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Settings from the command line, else dl.cfg, else the defaults."""
    here = os.path.dirname(os.path.abspath(__file__))
    about = "Makes five tables under OUTPUT of song_data/ and log_data/ under INPUT."
    parser = argparse.ArgumentParser("etl.py", description=about, allow_abbrev=False)

    def fail(message: str) -> None:  # In one line; argparse prints the usage, too.
        raise SettingsError(f"{message} (see etl.py --help)")

    parser.error = fail  # type: ignore[assignment,method-assign]
    add = parser.add_argument
    add("--config", metavar="FILE", help="settings (default: dl.cfg, if there is one)")
    add("--input", metavar="URI", help="holds song_data/ and log_data/")
    add("--output", metavar="URI", help="the lake of the five tables")
    add("--database", metavar="NAME", help="register the tables in Spark's catalog")
    limit = "publish nothing above this fraction of bad records (default: 0.01)"
    add("--max-rejected", metavar="FRACTION", type=float, default=0.01, help=limit)
    add("--full", action="store_true", help="read all files, known ones too")
    add("--break-lock", action="store_true", help="take over from a run that is dead")
    add("--debug", action="store_true", help="show tracebacks and Spark's own log")
    parser.set_defaults(input=f"{here}/data_sample", output="lake")
    config = read_config(parser.parse_args(argv).config, here)
    parser.set_defaults(**{key.lower(): value for key, value in config["LAKE"].items()})
    flags = vars(parser.parse_args(argv))
    if not 0 <= flags["max_rejected"] <= 1:  # NaN is neither.
        fail(f"--max-rejected {flags['max_rejected']} is not between 0 and 1")
    flags.update(input=to_uri(flags["input"]), output=to_uri(flags["output"]))
    del flags["config"]
    return Settings(**flags, aws=config["AWS"])


def read_config(path: str | None, script_folder: str) -> dict[str, dict[str, str]]:
    """The values, by section and key, of a settings file: the named one, else ./dl.cfg,
    else the one beside the script. No error shows a value, which may be a secret."""
    config: dict[str, dict[str, str]] = {section: {} for section in CONFIG_KEYS}
    places = filter(os.path.exists, ("dl.cfg", f"{script_folder}/dl.cfg"))
    path = path or next(places, os.devnull)
    # A secret may hold a %, so there is no interpolation.
    parser = configparser.RawConfigParser(None, inline_comment_prefixes="#")
    parser.default_section = ""
    parser.optionxform = str.upper  # type: ignore[assignment,method-assign]
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
        for section in parser.sections():
            for key, value in parser[section].items():
                if key not in CONFIG_KEYS.get(section, ()):
                    raise ValueError
                if value.strip("'\""):
                    config[section][key] = value.strip("'\"")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}: see dl.cfg.example") from None
    except (configparser.Error, ValueError):
        known = [f"[{name}] {' '.join(keys)}" for name, keys in CONFIG_KEYS.items()]
        hint = f"write each key once, as KEY = VALUE, under {' or '.join(known)}"
        raise SettingsError(f"{path}: {hint}") from None
    return config


def to_uri(path: str) -> str:
    """The absolute URI of a path or URI, without a last slash. A path without a scheme
    is local. s3:// is s3a:// but on EMR, whose own Spark serves it."""
    if re.match(r"(file:|(?!\w[\w+.-]+:)).", path, re.DOTALL):
        local = re.sub("^file:(//(?=/))?", "", path)
        return "file://" + os.path.abspath(os.path.expanduser(local))
    if not re.match("s3a?://[^/]|hdfs:|viewfs:", path):
        raise SettingsError(f"'{path}' is no path, hdfs: URI or s3a://BUCKET/PREFIX")
    if not os.path.isdir(EMR):
        path = re.sub("^s3:", "s3a:", path)
    return re.sub("(?<!:)(?<!:/)/+", "/", path).rstrip("/")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit code: 0 published, 1 failed, 2 wrong settings."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%X")
    log.setLevel(logging.INFO)
    if threading.current_thread() is threading.main_thread():
        # SIGTERM ends the run as Ctrl-C does, for which pyspark stops Spark's jobs.
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    secrets: list[str] = []
    try:
        settings = parse_settings(argv)
        secrets = [settings.aws.get(key, "") for key in tuple(S3A_KEYS)[:3]]
        if report := run(settings):
            print(format_report(report))
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        text = f"etl.py: error: {explain(error)}"
        if "--debug" in (sys.argv if argv is None else argv):
            text = traceback.format_exc() + text
        for secret in (of for of in secrets if len(of) >= 16):  # AWS has no shorter.
            text = text.replace(secret, "***")
        print(text, file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    sys.exit(main())
