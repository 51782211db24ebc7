"""The five tables of etl.py in DuckDB SQL: how fast one machine can be without Spark.

    python tests/bench/duckdb_etl.py INPUT OUTPUT

The tables have the rules of README.md, the order of rows too, but songplay_id is DuckDB's
own hash. It is for clean local input and a new OUTPUT: a bad record ends it, nothing is
checked, staged, locked or reported.
"""

from __future__ import annotations

import os
import sys

import duckdb

# known(x) orders like Spark: a null is less than any value, where DuckDB puts it last.
INPUT = """
CREATE MACRO known(x) AS {'known': x IS NOT NULL, 'value': x};
CREATE MACRO word(x) AS CASE WHEN trim(x) != '' THEN x END;
CREATE MACRO gap(x) AS (x IS NULL)::INT;

CREATE TABLE raw_songs AS
FROM read_json('SOURCE/song_data/**/*.json', format = 'newline_delimited', columns = {
    song_id: 'VARCHAR', title: 'VARCHAR', artist_id: 'VARCHAR', artist_name: 'VARCHAR',
    artist_location: 'VARCHAR', artist_latitude: 'DOUBLE', artist_longitude: 'DOUBLE',
    duration: 'DOUBLE', year: 'INTEGER'});

CREATE TABLE events AS
FROM read_json('SOURCE/log_data/**/*.json', format = 'newline_delimited', columns = {
    ts: 'BIGINT', userId: 'VARCHAR', sessionId: 'BIGINT', itemInSession: 'BIGINT',
    page: 'VARCHAR', song: 'VARCHAR', artist: 'VARCHAR', length: 'DOUBLE',
    level: 'VARCHAR', location: 'VARCHAR', userAgent: 'VARCHAR', firstName: 'VARCHAR',
    lastName: 'VARCHAR', gender: 'VARCHAR'});
"""

SONGS = """
CREATE TABLE songs AS
WITH records AS (
    SELECT song_id, word(title) AS title, artist_id, duration, coalesce(year, 0) AS year
    FROM raw_songs)
SELECT song_id, best.title, best.artist_id, best.duration, best.year
FROM (
    SELECT song_id, arg_min(
        {title: title, artist_id: artist_id, duration: duration, year: year},
        (gap(title) + gap(duration) + (year = 0)::INT, known(title), artist_id, year,
         known(duration))) AS best
    FROM records GROUP BY song_id);
"""

ARTISTS = """
CREATE TABLE artists AS
WITH records AS (
    SELECT artist_id, word(artist_name) AS name, word(artist_location) AS location,
           artist_latitude AS latitude, artist_longitude AS longitude
    FROM raw_songs)
SELECT artist_id, best.name, best.location, best.latitude, best.longitude
FROM (
    SELECT artist_id, arg_min(
        {name: name, location: location, latitude: latitude, longitude: longitude},
        (gap(name) + gap(location) + gap(latitude) + gap(longitude), gap(name),
         length(name), known(name), known(location), known(latitude), known(longitude))
        ) AS best
    FROM records GROUP BY artist_id);
"""

USERS = """
CREATE TABLE users AS
SELECT userId AS user_id, latest.first_name, latest.last_name, latest.gender, latest.level
FROM (
    SELECT userId, arg_max(
        {first_name: word(firstName), last_name: word(lastName), gender: word(gender),
         level: word(level)},
        (known(ts), known(itemInSession), known(sessionId), known(word(firstName)),
         known(word(lastName)), known(word(gender)), known(word(level)))) AS latest
    FROM events WHERE trim(userId) != '' GROUP BY userId);
"""

SONGPLAYS = """
CREATE TABLE songplays AS
WITH distinct_plays AS (
    SELECT ts, userId, sessionId, itemInSession, max(
        {level: known(level), location: known(location), userAgent: known(userAgent),
         song: known(song), artist: known(artist), length: known(length)}) AS play
    FROM events
    WHERE page = 'NextSong' AND ts IS NOT NULL AND sessionId IS NOT NULL
        AND trim(userId) != ''
    GROUP BY ts, userId, sessionId, itemInSession),
plays AS (
    SELECT * EXCLUDE play, play.level.value AS level, play.location.value AS location,
           play.userAgent.value AS userAgent, play.song.value AS song,
           play.artist.value AS artist, play.length.value AS length
    FROM distinct_plays),
names AS (
    SELECT DISTINCT artist_id, artist_name AS artist
    FROM raw_songs WHERE trim(artist_name) != ''),
songs_by_name AS (
    SELECT title AS song, artist,
           list({duration: duration, song_id: song_id, artist_id: artist_id}) AS songs
    FROM songs JOIN names USING (artist_id) GROUP BY title, artist),
artists_by_name AS (
    SELECT artist, min(artist_id) AS sole_artist_id
    FROM names GROUP BY artist HAVING count(*) = 1),
found AS (
    SELECT *, make_timestamp(ts * 1000) AS moment,
           list_min(list_transform(songs, lambda s: {
               gap: coalesce(abs(s.duration - length), 'inf'::DOUBLE),
               song_id: s.song_id, artist_id: s.artist_id})) AS best
    FROM plays
    LEFT JOIN songs_by_name USING (song, artist)
    LEFT JOIN artists_by_name USING (artist))
SELECT (hash(ts, userId, sessionId, itemInSession) >> 1)::BIGINT AS songplay_id,
       make_timestamptz(ts * 1000) AS start_time, userId AS user_id, word(level) AS level,
       best.song_id, coalesce(best.artist_id, sole_artist_id) AS artist_id,
       sessionId AS session_id, word(location) AS location, word(userAgent) AS user_agent,
       year(moment)::INT AS year, month(moment)::INT AS month
FROM found;
"""

TIME = """
CREATE TABLE time AS
WITH moments AS (
    SELECT DISTINCT start_time, year, month, start_time::TIMESTAMP AS moment
    FROM songplays)
SELECT start_time, hour(moment)::INT AS hour, day(moment)::INT AS day,
       week(moment)::INT AS week, (dayofweek(moment) + 1)::INT AS weekday, year, month
FROM moments;
"""

# table: (the columns of its folders, the order of its rows)
TABLES = {
    "songs": ("year", "artist_id, song_id"),
    "artists": ("", "artist_id"),
    "users": ("", "user_id"),
    "songplays": ("year, month", "start_time"),
    "time": ("year, month", "start_time"),
}


def write_table(db: duckdb.DuckDBPyConnection, table: str, output: str) -> None:
    """Writes a table's Parquet files below output/<table>/."""
    folders, order = TABLES[table]
    target = f"{output}/{table}"
    options = "FORMAT parquet, COMPRESSION snappy"
    if folders:
        order = f"{folders}, {order}"
        options += f", PARTITION_BY ({folders})"
    else:
        os.makedirs(target)
        target += "/data_0.parquet"
    db.execute(f"COPY (FROM {table} ORDER BY {order}) TO '{target}' ({options})")


def main(source: str, output: str) -> None:
    """Writes the five tables of source below output, on the cores that Spark would get."""
    os.makedirs(output)
    with duckdb.connect() as db:
        db.execute(
            f"SET threads = {len(os.sched_getaffinity(0))}; SET TimeZone = 'UTC'"
        )
        db.execute(INPUT.replace("SOURCE", source))
        for build in (SONGS, ARTISTS, USERS, SONGPLAYS, TIME):
            db.execute(build)
        for table in TABLES:
            write_table(db, table, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
