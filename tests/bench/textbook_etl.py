"""The Sparkify ETL as it is usually written for the course: what etl.py is compared with.

    python tests/bench/textbook_etl.py INPUT OUTPUT

Nothing is set but what S3 needs: schemas are inferred, nothing is cached, so that each
table reads its JSON again, timestamps go through Python, and S3 is written by renaming.
On S3, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL are in the environment.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import TimestampType

sys.path.insert(0, str(Path(__file__).parents[2]))

import etl


def create_spark_session(on_s3: bool) -> SparkSession:
    """A session with Spark's defaults; for S3 with the jars that etl.py uses, but for its
    committer, which makes Spark 4.1 write with it unasked."""
    if not on_s3:
        return SparkSession.builder.appName("Sparkify").getOrCreate()
    packages, excludes = etl.s3_packages()
    packages = [name for name in packages if "spark-hadoop-cloud" not in name]
    spark = (
        SparkSession.builder.appName("Sparkify")
        .config("spark.jars.packages", ",".join(packages))
        .config("spark.jars.excludes", ",".join(excludes))
        .getOrCreate()
    )
    hadoop = spark._jsc.hadoopConfiguration()
    hadoop.set("fs.s3a.access.key", os.environ["AWS_ACCESS_KEY_ID"])
    hadoop.set("fs.s3a.secret.key", os.environ["AWS_SECRET_ACCESS_KEY"])
    if "AWS_ENDPOINT_URL" in os.environ:
        hadoop.set("fs.s3a.endpoint", os.environ["AWS_ENDPOINT_URL"])
        hadoop.set("fs.s3a.endpoint.region", "us-east-1")
        hadoop.set("fs.s3a.path.style.access", "true")
    return spark


def process_song_data(spark: SparkSession, source: str, output: str) -> None:
    """Writes songs and artists."""
    df = spark.read.json(f"{source}/song_data/*/*/*/*.json")

    songs = df.select("song_id", "title", "artist_id", "year", "duration")
    songs = songs.dropDuplicates(["song_id"])
    songs.write.mode("overwrite").partitionBy("year", "artist_id").parquet(
        f"{output}/songs"
    )

    artists = df.select(
        "artist_id",
        F.col("artist_name").alias("name"),
        F.col("artist_location").alias("location"),
        F.col("artist_latitude").alias("latitude"),
        F.col("artist_longitude").alias("longitude"),
    ).dropDuplicates(["artist_id"])
    artists.write.mode("overwrite").parquet(f"{output}/artists")


def process_log_data(spark: SparkSession, source: str, output: str) -> None:
    """Writes users, time and songplays."""
    df = spark.read.json(f"{source}/log_data/*/*/*.json")
    df = df.filter(df.page == "NextSong")

    users = df.select(
        F.col("userId").alias("user_id"),
        F.col("firstName").alias("first_name"),
        F.col("lastName").alias("last_name"),
        "gender",
        "level",
    ).dropDuplicates(["user_id"])
    users.write.mode("overwrite").parquet(f"{output}/users")

    get_timestamp = F.udf(lambda ts: datetime.fromtimestamp(ts / 1000), TimestampType())
    df = df.withColumn("start_time", get_timestamp("ts"))
    write_time(df, output)

    song_df = spark.read.json(f"{source}/song_data/*/*/*/*.json")
    by_song = (df.song == song_df.title) & (df.artist == song_df.artist_name)
    songplays = df.join(song_df, by_song, "left").select(
        F.monotonically_increasing_id().alias("songplay_id"),
        "start_time",
        F.col("userId").alias("user_id"),
        "level",
        "song_id",
        "artist_id",
        F.col("sessionId").alias("session_id"),
        "location",
        F.col("userAgent").alias("user_agent"),
        F.year("start_time").alias("year"),
        F.month("start_time").alias("month"),
    )
    songplays.write.mode("overwrite").partitionBy("year", "month").parquet(
        f"{output}/songplays"
    )


def write_time(df: DataFrame, output: str) -> None:
    """Writes time, of the start_time of the plays."""
    time = (
        df.select("start_time")
        .dropDuplicates()
        .withColumn("hour", F.hour("start_time"))
        .withColumn("day", F.dayofmonth("start_time"))
        .withColumn("week", F.weekofyear("start_time"))
        .withColumn("month", F.month("start_time"))
        .withColumn("year", F.year("start_time"))
        .withColumn("weekday", F.dayofweek("start_time"))
    )
    time.write.mode("overwrite").partitionBy("year", "month").parquet(f"{output}/time")


def main(source: str, output: str) -> None:
    """Writes the five tables of source below output, both without a last slash."""
    spark = create_spark_session("s3a://" in source + output)
    process_song_data(spark, source, output)
    process_log_data(spark, source, output)
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
