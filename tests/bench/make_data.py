"""Make clean Sparkify input of any size: song_data/ and log_data/ below a folder.

    python tests/bench/make_data.py FOLDER --songs 14896 --events 3000000 --days 365

Each song has a file and each day has one. The same arguments always make the same bytes;
the songs depend on --songs and --seed alone. All listeners, artists and titles are invented.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path
from random import Random

DAY_MS = 86_400_000
# A listener's events lie about one song apart, which says how many listen at a time.
EVENT_GAP_MS = 240_000
SECOND_NAME = 0.05  # the share of artists who also appear under another name
RETAKE = 0.01  # the share of songs that have title and artist of an earlier one
KNOWN_SONG = 0.05  # the share of plays that are of a song of the catalogue
KNOWN_ARTIST = 0.5  # the share of plays of another song by one of its artists
REPEAT = 0.001  # the share of plays that are delivered twice
SESSION_END = 0.04  # the chance that an event is the last of its session
LOGGED_OUT = 0.025  # the share of events of nobody

CONSONANTS, VOWELS = "bbddffghjkkllmmnnprrssttvwzñš", "aaaeeiioouuéøü"
ARTISTS = ("{}", "{} {}", "The {}s", "DJ {}", "{} & The {}s", "{} {} Trio")
STRANGERS = ("{} Ensemble", "{} {} Quartet", "MC {}", "{} & Sons")  # in no catalogue
TITLES = ("{}", "{} {}", "{} In {}", "My {} {}", "{}/{}", "Song For {} {}", "{} (Live)")
NEW_TITLES = ("{} {} (Demo)", "{}/{} (Demo)", "My {} (Demo)")  # nor these
PLACES = ("{}-{}, CA", "{}-{}, LA-MS", "{}, NY-NJ-PA", "{}, England", "{}-{}, France")
CHROME = "AppleWebKit/537.36 (KHTML, like Gecko) Chrome/36.0.1985.125 Safari/537.36"
USER_AGENTS = (
    f'"Mozilla/5.0 (Windows NT 6.1; WOW64) {CHROME}"',
    f'"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_9_4) {CHROME}"',
    "Mozilla/5.0 (Windows NT 6.1; WOW64; rv:31.0) Gecko/20100101 Firefox/31.0",
)

# An event's line: {} stands for what tells of the user, %s for what changes.
EVENT = (
    '{{"artist":%s,"auth":"{}","firstName":{},"gender":{},"itemInSession":%s,'
    '"lastName":{},"length":%s,"level":"%s","location":{},"method":"%s","page":"%s",'
    '"registration":{},"sessionId":%s,"song":%s,"status":%s,"ts":%s,"userAgent":{},'
    '"userId":{}}}\n'
)
VISITOR = EVENT.format("Logged Out", *["null"] * 6, '""')
# (page, method, status), as often as it comes in some 1,000 events of such a listener
MEMBER_PAGES = [("NextSong", "PUT", 200)] * 872 + [("Home", "GET", 200)] * 80
MEMBER_PAGES += [("Settings", "GET", 200)] * 24 + [("Logout", "PUT", 307)] * 9
PAGES = {
    "free": MEMBER_PAGES + [("Submit Upgrade", "PUT", 307)] * 4,
    "paid": MEMBER_PAGES + [("Submit Downgrade", "PUT", 307)] * 2,
}
VISITOR_PAGES = [("Home", "GET", 200)] * 60 + [("Login", "PUT", 307)] * 40
LEVEL_AFTER = {"Submit Upgrade": "paid", "Submit Downgrade": "free"}


def make_word(rng: Random) -> str:
    """A capitalised nonsense word."""
    syllables = range(rng.choice((2, 2, 3)))
    word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in syllables)
    return f"{word}{rng.choice(('', 'l', 'n', 'rk', 's', 't'))}".capitalize()


def make_name(shapes: Sequence[str], rng: Random) -> str:
    """A name of one of the shapes."""
    return rng.choice(shapes).format(make_word(rng), make_word(rng))


def pick(items: Sequence, rng: Random) -> object:
    """One of the items; number k comes about 1 / (k + 1) times as often as number 0."""
    return items[int((len(items) + 1) ** rng.random()) - 1]


def make_artist(rng: Random) -> tuple[dict, list[str]]:
    """An artist: the fields that tell of one in a song file, and the names."""
    name, is_placed = make_name(ARTISTS, rng), rng.random() < 0.34
    fields = {
        "artist_id": f"AR{rng.getrandbits(64):016X}",
        "artist_latitude": round(rng.uniform(-50, 65), 5) if is_placed else None,
        "artist_location": make_name(PLACES, rng) if rng.random() < 0.6 else "",
        "artist_longitude": round(rng.uniform(-99, 99), 5) if is_placed else None,
    }
    guests = [f"{name} feat. {make_word(rng)}"] if rng.random() < SECOND_NAME else []
    return fields, [name, *guests]


def make_songs(count: int, rng: Random) -> tuple[list[dict], list[tuple]]:
    """So many songs, and a play of each, which may name the artist otherwise. Two songs of
    three are of a new artist, the others mostly of the first ones."""
    songs, plays, works = [], [], []
    for _ in range(count):
        chance, title = rng.random(), make_name(TITLES, rng)
        if not works or chance < 0.66:
            artist, names = make_artist(rng)
        elif chance < 0.66 + RETAKE:
            artist, names, title = rng.choice(works)
        else:
            artist, names, _ = works[int(len(works) * rng.random() ** 2)]
        works.append((artist, names, title))
        song = {
            **artist,
            "artist_name": rng.choice(names),
            "duration": round(rng.triangular(30, 600), 5),
            "num_songs": 1,
            "song_id": f"SO{rng.getrandbits(64):016X}",
            "title": title,
            "year": 0 if rng.random() < 0.3 else 2010 - int(50 * rng.random() ** 2),
        }
        songs.append(song)
        plays.append(to_json(rng.choice(names), title, song["duration"]))
    return songs, plays


def write_songs(folder: Path, songs: Sequence[dict], rng: Random) -> None:
    """Writes each song into a file of its own below the folder, 24 a folder."""
    for number, song in enumerate(songs):
        letters = [chr(65 + number // 24 // 26**n % 26) for n in (2, 1, 0)]
        path = folder / "song_data" / "/".join(letters)
        path.mkdir(parents=True, exist_ok=True)
        path /= f"TR{''.join(letters)}{rng.getrandbits(52):013X}.json"
        path.write_text(json.dumps(song, separators=(",", ":")), encoding="utf-8")


def to_json(*values: object) -> tuple:
    """The values as JSON text the way the logs write it, slashes escaped."""
    return tuple(json.dumps(value).replace("/", "\\/") for value in values)


def make_template(number: int, rng: Random) -> str:
    """The line of a listener's events, with %s for what changes."""
    name = (make_word(rng), rng.choice("FM"), make_word(rng))
    registered = 1_541_000_000_796.0 - rng.randrange(90 * DAY_MS)
    place, agent = make_name(PLACES, rng), rng.choice(USER_AGENTS)
    about = to_json(*name, place, registered, agent, str(number))
    return EVENT.format("Logged In", *about)


def make_tracks(plays: Sequence[tuple], rng: Random) -> Iterator[tuple]:
    """Endless plays, the first songs and artists most often: some of the given ones, some
    of other songs of their artists, most of strangers."""

    def new_track(artist: str) -> tuple:
        length = round(rng.triangular(30, 600), 5)
        return (artist, *to_json(make_name(NEW_TITLES, rng), length))

    others = [new_track(artist) for artist, _, _ in plays]
    strange = [new_track(*to_json(make_name(STRANGERS, rng))) for _ in plays]
    while True:
        chance = rng.random() - KNOWN_SONG
        tracks = plays if chance < 0 else others if chance < KNOWN_ARTIST else strange
        yield pick(tracks, rng)


def make_times(day: date, count: int, rng: Random) -> list[int]:
    """So many moments of a day, UTC, ascending, in milliseconds since 1970."""
    start = int(datetime.combine(day, time(), timezone.utc).timestamp()) * 1000
    moments = (rng.triangular(0, DAY_MS, 0.7 * DAY_MS) for _ in range(count))
    return [start + int(moment) for moment in sorted(moments)]


def make_lines(
    times: Iterator[int], plays: Sequence[tuple], users: int, crowd: int, rng: Random
) -> Iterator[str]:
    """The log lines of these moments, from so many sessions at a time, most of them of the
    first users.

    An upgrade shows in all later events of its user. The second delivery of a play, some
    of which tell of another browser, takes the place of a later event.
    """
    templates = [make_template(number + 1, rng) for number in range(users)]
    levels = [rng.choice(("free", "free", "paid")) for _ in templates]
    tracks, numbers = make_tracks(plays, rng), itertools.count(1)
    # Of each running session: its user, its number, its next itemInSession.
    sessions = [[pick(range(users), rng), next(numbers), 0] for _ in range(crowd)]
    repeats: list[str] = []
    for ts in times:
        if repeats and rng.random() < 0.02:
            browser = rng.choice(("Mozilla", "Opera", "Lynx"))
            yield repeats.pop().replace("Mozilla", browser)
            continue
        seat = int(rng.random() * crowd)
        user, number, item = sessions[seat]
        level, template = levels[user], templates[user]
        pages = PAGES[level]
        if rng.random() < LOGGED_OUT:
            template, pages = VISITOR, VISITOR_PAGES
        page, method, status = pages[int(rng.random() * len(pages))]
        artist, song, length = next(tracks) if page == "NextSong" else ["null"] * 3
        what = (artist, item, length, level, method, page, number, song, status, ts)
        line = template % what
        yield line
        if page == "NextSong" and rng.random() < REPEAT:
            repeats.append(line)
        levels[user] = LEVEL_AFTER.get(page, level)
        sessions[seat][2] += 1
        if page == "Logout" or rng.random() < SESSION_END:
            sessions[seat] = [pick(range(users), rng), next(numbers), 0]


def write_input(
    folder: Path, songs: int, events: int, days: int, seed: int, first_day: date
) -> None:
    """Writes input below a folder: so many songs and events, fewer at weekends."""
    rng = Random(f"songs {seed}")
    catalogue, plays = make_songs(songs, rng)
    write_songs(folder, catalogue, rng)
    rng = Random(f"events {seed}")
    dates = [first_day + timedelta(days=number) for number in range(days)]
    ends = list(itertools.accumulate(6 if d.weekday() > 4 else 10 for d in dates))
    ends = [events * end // ends[-1] for end in ends]
    counts = [end - before for before, end in zip([0, *ends], ends)]
    times = (ts for day in zip(dates, counts) for ts in make_times(*day, rng))
    crowd = max(1, events * EVENT_GAP_MS // (days * DAY_MS))
    lines = make_lines(times, plays, max(99, events // 100), crowd, rng)
    for day, count in zip(dates, counts):
        path = folder / f"log_data/{day:%Y/%m}/{day}-events.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(itertools.islice(lines, count))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make Sparkify input of any size.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    for name in ("songs", "events", "days"):
        parser.add_argument(f"--{name}", type=int, required=True, metavar="N")
    parser.add_argument(
        "--seed", type=int, default=1, help="another one, other data (1)"
    )
    parser.add_argument(
        "--first-day", type=date.fromisoformat, default=date(2018, 11, 1)
    )
    write_input(**vars(parser.parse_args()))
