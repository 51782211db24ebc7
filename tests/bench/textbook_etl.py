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

from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import TimestampType

# What S3A needs of the AWS SDK, whose whole bundle has 640 MB.
MODULES = ("s3", "s3-transfer-manager", "sts", "apache-client", "netty-nio-client")
PACKAGES = ["org.apache.hadoop:hadoop-aws:3.4.2"]
PACKAGES += [f"software.amazon.awssdk:{module}:2.29.52" for module in MODULES]
NOT_NEEDED = ("software.amazon.awssdk:bundle", "org.apache.hadoop:hadoop-client-*")


def create_spark_session(on_s3: bool) -> SparkSession:
    """A session with Spark's defaults, and with S3 where that is asked for."""
    builder = SparkSession.builder.appName("Sparkify")
    if on_s3:
        s3a = "spark.hadoop.fs.s3a"
        builder = (
            builder.config("spark.jars.packages", ",".join(PACKAGES))
            .config("spark.jars.excludes", ",".join(NOT_NEEDED))
            .config(f"{s3a}.access.key", os.environ["AWS_ACCESS_KEY_ID"])
            .config(f"{s3a}.secret.key", os.environ["AWS_SECRET_ACCESS_KEY"])
            .config(f"{s3a}.endpoint", os.environ["AWS_ENDPOINT_URL"])
            .config(f"{s3a}.endpoint.region", "us-east-1")
            .config(f"{s3a}.path.style.access", "true")
        )
    return builder.getOrCreate()


def process_song_data(spark: SparkSession, source: str, output: str) -> None:
    """Writes songs and artists."""
    df = spark.read.json(f"{source}/song_data/*/*/*/*.json")

    songs = df.select("song_id", "title", "artist_id", "year", "duration")
    writer = songs.dropDuplicates(["song_id"]).write.mode("overwrite")
    writer.partitionBy("year", "artist_id").parquet(f"{output}/songs")

    names = ("name", "location", "latitude", "longitude")
    artists = df.select("artist_id", *(f"artist_{name}" for name in names))
    artists = artists.toDF("artist_id", *names).dropDuplicates(["artist_id"])
    artists.write.mode("overwrite").parquet(f"{output}/artists")


def process_log_data(spark: SparkSession, source: str, output: str) -> None:
    """Writes users, time and songplays."""
    df = spark.read.json(f"{source}/log_data/*/*/*.json")
    df = df.filter(df.page == "NextSong").withColumnsRenamed(
        {"userId": "user_id", "sessionId": "session_id", "userAgent": "user_agent"}
    )

    users = df.select("user_id", "firstName", "lastName", "gender", "level")
    users = users.toDF("user_id", "first_name", "last_name", "gender", "level")
    users = users.dropDuplicates(["user_id"])
    users.write.mode("overwrite").parquet(f"{output}/users")

    get_timestamp = F.udf(lambda ts: datetime.fromtimestamp(ts / 1000), TimestampType())
    df = df.withColumn("start_time", get_timestamp("ts"))
    time = df.select("start_time").dropDuplicates()
    time = (
        time.withColumn("hour", F.hour("start_time"))
        .withColumn("day", F.dayofmonth("start_time"))
        .withColumn("week", F.weekofyear("start_time"))
        .withColumn("month", F.month("start_time"))
        .withColumn("year", F.year("start_time"))
        .withColumn("weekday", F.dayofweek("start_time"))
    )
    time.write.mode("overwrite").partitionBy("year", "month").parquet(f"{output}/time")

    song_df = spark.read.json(f"{source}/song_data/*/*/*/*.json")
    by_song = (df.song == song_df.title) & (df.artist == song_df.artist_name)
    songplays = df.join(song_df.drop("year"), by_song, "left").select(
        F.monotonically_increasing_id().alias("songplay_id"),
        *("start_time", "user_id", "level", "song_id", "artist_id", "session_id"),
        *("location", "user_agent"),
        F.year("start_time").alias("year"),
        F.month("start_time").alias("month"),
    )
    writer = songplays.write.mode("overwrite").partitionBy("year", "month")
    writer.parquet(f"{output}/songplays")


if __name__ == "__main__":
    source, output = sys.argv[1:]
    spark = create_spark_session(on_s3="s3a://" in source + output)
    process_song_data(spark, source, output)
    process_log_data(spark, source, output)
    spark.stop()
