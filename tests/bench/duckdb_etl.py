"""The five tables of etl.py in DuckDB SQL: how fast one machine can be without Spark.

    python tests/bench/duckdb_etl.py INPUT OUTPUT

The tables have the rules of README.md and the order of its rows, but songplays has no
songplay_id, which is a hash that only Spark has. It is for clean local input and a new
OUTPUT: nothing is checked, staged, locked or reported.
"""

from __future__ import annotations

import os
import sys

import duckdb

# Of several records the first in an order is taken. known(x) orders as Spark does, for
# which a null is less than any value, while DuckDB puts it last.
SQL = """
SET TimeZone = 'UTC';
CREATE MACRO known(x) AS {'known': x IS NOT NULL, 'value': x};
CREATE MACRO word(x) AS CASE WHEN trim(x) != '' THEN x END;
CREATE MACRO gap(x) AS (x IS NULL)::INT;

CREATE TABLE raw_songs AS
SELECT song_id, word(title) AS title, artist_id, word(artist_name) AS name,
       word(artist_location) AS location, artist_latitude AS latitude,
       artist_longitude AS longitude, duration, coalesce(year, 0) AS year
FROM read_json('SOURCE/song_data/**/*.json', format = 'newline_delimited', columns = {
    song_id: 'VARCHAR', title: 'VARCHAR', artist_id: 'VARCHAR', artist_name: 'VARCHAR',
    artist_location: 'VARCHAR', artist_latitude: 'DOUBLE', artist_longitude: 'DOUBLE',
    duration: 'DOUBLE', year: 'INTEGER'})
WHERE trim(song_id) != '' AND trim(artist_id) != '';

CREATE TABLE events AS
FROM read_json('SOURCE/log_data/**/*.json', format = 'newline_delimited', columns = {
    ts: 'BIGINT', userId: 'VARCHAR', sessionId: 'BIGINT', itemInSession: 'BIGINT',
    page: 'VARCHAR', song: 'VARCHAR', artist: 'VARCHAR', length: 'DOUBLE',
    level: 'VARCHAR', location: 'VARCHAR', userAgent: 'VARCHAR', firstName: 'VARCHAR',
    lastName: 'VARCHAR', gender: 'VARCHAR'})
WHERE trim(userId) != '';

CREATE TABLE songs AS
SELECT song_id, unnest(arg_min(
    {title: title, artist_id: artist_id, duration: duration, year: year},
    (gap(title) + gap(duration) + (year = 0)::INT, known(title), artist_id, year,
     known(duration))))
FROM raw_songs GROUP BY song_id;

CREATE TABLE artists AS
SELECT artist_id, unnest(arg_min(
    {name: name, location: location, latitude: latitude, longitude: longitude},
    (gap(name), gap(location) + gap(latitude) + gap(longitude), length(name),
     known(name), known(location), known(latitude), known(longitude))))
FROM raw_songs GROUP BY artist_id;

CREATE TABLE users AS
SELECT userId AS user_id, unnest(arg_max(
    {first_name: word(firstName), last_name: word(lastName), gender: word(gender),
     level: word(level)},
    (known(ts), known(itemInSession), known(sessionId), known(word(firstName)),
     known(word(lastName)), known(word(gender)), known(word(level)))))
FROM events GROUP BY userId;

CREATE TABLE songplays AS
WITH plays AS (
    SELECT ts, userId, sessionId, itemInSession, unnest(arg_max(
        {level: level, location: location, userAgent: userAgent, song: song,
         artist: artist, length: length},
        (known(level), known(location), known(userAgent), known(song), known(artist),
         known(length))))
    FROM events
    WHERE page = 'NextSong' AND ts IS NOT NULL AND sessionId IS NOT NULL
    GROUP BY ts, userId, sessionId, itemInSession),
names AS (
    SELECT DISTINCT artist_id, name AS artist FROM raw_songs WHERE name IS NOT NULL),
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
SELECT make_timestamptz(ts * 1000) AS start_time, userId AS user_id, word(level) AS level,
       best.song_id, coalesce(best.artist_id, sole_artist_id) AS artist_id,
       sessionId AS session_id, word(location) AS location, word(userAgent) AS user_agent,
       year(moment)::INT AS year, month(moment)::INT AS month
FROM found;

CREATE TABLE time AS
SELECT start_time, hour(t)::INT AS hour, day(t)::INT AS day, week(t)::INT AS week,
       (dayofweek(t) + 1)::INT AS weekday, year, month
FROM (SELECT DISTINCT start_time, start_time::TIMESTAMP AS t, year, month FROM songplays);

COPY (FROM songs ORDER BY year, artist_id, song_id)
TO 'OUTPUT/songs' (FORMAT parquet, PARTITION_BY (year));
COPY (FROM songplays ORDER BY year, month, start_time)
TO 'OUTPUT/songplays' (FORMAT parquet, PARTITION_BY (year, month));
COPY (FROM time ORDER BY year, month, start_time)
TO 'OUTPUT/time' (FORMAT parquet, PARTITION_BY (year, month));
COPY (FROM artists ORDER BY artist_id) TO 'OUTPUT/artists/data_0.parquet';
COPY (FROM users ORDER BY user_id) TO 'OUTPUT/users/data_0.parquet';
"""


def build(source: str, output: str) -> None:
    """Writes the five tables of source, as Parquet files below output/<table>/."""
    for table in ("songplays", "users", "songs", "artists", "time"):
        os.makedirs(f"{output}/{table}")
    with duckdb.connect() as db:
        db.execute(SQL.replace("SOURCE", source).replace("OUTPUT", output))


if __name__ == "__main__":
    build(*sys.argv[1:])
