"""Make Sparkify input, song_data/ and log_data/: clean at any size, or the dirty sample.

    python tests/bench/make_data.py OUT --songs 14896 --events 300000 --days 30 --users 99
    python tests/bench/make_data.py data_sample --sample

The same arguments always make the same bytes. Every listener, artist and title is invented.
"""

from __future__ import annotations

import argparse
import gzip
import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path
from random import Random
from typing import NamedTuple

SLOT_MS = 7_200_000
DAY_MS = 12 * SLOT_MS
PLAY_GAP_MS = 240_000  # a listener's events lie about one song apart
SONGS_PER_ARTIST = 1.5
SONGS_PER_FOLDER = 24
SESSION_END = 1 / 25  # the chance that an event is the last of its session
LOGGED_OUT = 0.025  # the share of events of nobody
SLOT_WEIGHTS = (7, 4, 5, 9, 12, 14, 15, 19, 21, 17, 15, 11)  # two hours each
WEEKDAY_WEIGHTS = (10, 10, 11, 10, 11, 7, 5)  # Monday first

CONSONANTS = "bbddffgghhjkkllllmmmnnnnpprrrrsssttttvvwzñš"
VOWELS = "aaaaeeeeiiiooouuéøü"
ENDINGS = ("", "", "", "l", "m", "n", "nd", "r", "rk", "s", "ss", "t", "x")
ARTIST_SHAPES = ("{}", "{} {}", "The {}s", "DJ {}", "{} & The {}s", "{} {} Trio")
PLAIN_TITLES = ("{}", "{} {}", "{} In {}", "My {} {}", "{}/{}", "The {} Of {}")
LONG_TITLES = ("Song For {} {}", "{} {} (Album Version)", "Don't {}", "{} (Live)")
COUNTRIES = ("England", "France", "Sweden", "Brazil", "Japan", "Ghana", "Texas", "Ohio")
STATES = ("AL", "CA", "CO", "FL", "LA-MS", "NC-SC", "NY-NJ-PA", "PA-NJ-DE-MD", "TX")
FIRST_NAMES = {
    "F": (
        "Ada",
        "Bryn",
        "Cleo",
        "Dina",
        "Edda",
        "Fern",
        "Greta",
        "Hana",
        "Inez",
        "Juno",
    ),
    "M": (
        "Abel",
        "Bram",
        "Cyrus",
        "Dov",
        "Emil",
        "Finn",
        "Gus",
        "Hugo",
        "Kofi",
        "Milo",
    ),
}
WINDOWS = "Mozilla/5.0 (Windows NT 6.1; WOW64"
MAC = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_9_4) AppleWebKit/537"
IPHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 7_1_2 like Mac OS X) AppleWebKit/537"
LINUX = "Mozilla/5.0 (X11; Ubuntu; Linux x86_64"
GECKO = "(KHTML, like Gecko)"
USER_AGENTS = (
    f'"{WINDOWS}) AppleWebKit/537.36 {GECKO} Chrome/36.0.1985.125 Safari/537.36"',
    f'"{MAC}.36 {GECKO} Chrome/36.0.1985.143 Safari/537.36"',
    f'"{MAC}.78.2 {GECKO} Version/7.0.6 Safari/537.78.2"',
    f'"{IPHONE}.51.2 {GECKO} Version/7.0 Mobile/11D257 Safari/9537.53"',
    f"{WINDOWS}; rv:31.0) Gecko/20100101 Firefox/31.0",
    f"{LINUX}; rv:31.0) Gecko/20100101 Firefox/31.0",
)


class Page(NamedTuple):
    """A page of the app and how the web server logs it."""

    name: str
    method: str
    status: int


PAGES = {
    "NextSong": Page("NextSong", "PUT", 200),
    "Home": Page("Home", "GET", 200),
    "Settings": Page("Settings", "GET", 200),
    "Save Settings": Page("Save Settings", "PUT", 307),
    "Help": Page("Help", "GET", 200),
    "About": Page("About", "GET", 200),
    "Upgrade": Page("Upgrade", "GET", 200),
    "Submit Upgrade": Page("Submit Upgrade", "PUT", 307),
    "Downgrade": Page("Downgrade", "GET", 200),
    "Submit Downgrade": Page("Submit Downgrade", "PUT", 307),
    "Login": Page("Login", "PUT", 307),
    "Logout": Page("Logout", "PUT", 307),
    "Error": Page("Error", "GET", 404),
}
LEVEL_AFTER = {"Submit Upgrade": "paid", "Submit Downgrade": "free"}
# How many of about 1,000 events show which page.
MEMBER_PAGES = {
    "NextSong": 872,
    "Home": 80,
    "Settings": 10,
    "Save Settings": 3,
    "Help": 7,
    "About": 3,
    "Logout": 9,
    "Error": 2,
}
FREE_PAGES = {**MEMBER_PAGES, "Upgrade": 10, "Submit Upgrade": 4}
PAID_PAGES = {**MEMBER_PAGES, "Downgrade": 12, "Submit Downgrade": 2}
VISITOR_PAGES = {"Home": 600, "Login": 350, "Help": 30, "About": 20}


class Artist(NamedTuple):
    """One artist row of the catalogue; coordinates in degrees, None if unknown."""

    artist_id: str
    name: str | int
    location: str
    latitude: float | None
    longitude: float | None


class Song(NamedTuple):
    """One song object of the catalogue; duration in seconds, year 0 if unknown."""

    song_id: str
    title: str | int
    artist: Artist
    year: int
    duration: float


class Track(NamedTuple):
    """What a play says it played, each field as JSON text; the length in seconds."""

    artist: str
    song: str
    length: str


class User(NamedTuple):
    """A listener; every field but the starting level is JSON text."""

    user_id: str
    first_name: str
    last_name: str
    gender: str
    location: str
    registration: str
    user_agent: str
    level: str


NO_TRACK = Track("null", "null", "null")
NOBODY = User('""', "null", "null", "null", "null", "null", "null", "free")


@dataclass
class Session:
    """A listener's running session: its number and the next itemInSession."""

    user: User
    number: int
    item: int = 0


# Names and numbers


def json_text(value: object) -> str:
    """Return the value as JSON text the way the logs write it, slashes escaped."""
    return json.dumps(value).replace("/", "\\/")


def make_word(rng: Random) -> str:
    """Return a capitalised nonsense word of two or three syllables."""
    count = rng.choice((2, 2, 3))
    syllables = (rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(count))
    return ("".join(syllables) + rng.choice(ENDINGS)).capitalize()


def make_artist_name(rng: Random) -> str:
    """Return an artist name."""
    return rng.choice(ARTIST_SHAPES).format(make_word(rng), make_word(rng))


def make_title(rng: Random) -> str:
    """Return a song title."""
    shape = rng.choice(PLAIN_TITLES + LONG_TITLES)
    return shape.format(make_word(rng), make_word(rng))


def make_duration(rng: Random) -> float:
    """Return a song's length in seconds."""
    return round(rng.triangular(30, 600, 220), 5)


def make_new(
    make: Callable[[Random], str], count: int, taken: set[str], rng: Random
) -> list[str]:
    """Return count names from make, no two alike and none of those taken."""
    names: dict[str, None] = {}
    while len(names) < count:
        name = make(rng)
        if name not in taken:
            names[name] = None
    return list(names)


def spread(number: int, size: int) -> int:
    """Return number's place in a fixed shuffle of range(size).

    size is a power of 16 or 26.
    """
    return (number + 1) * 2_654_435_761 % size


def letters(number: int, length: int) -> str:
    """Return number in base 26, as capital letters, A for 0."""
    digits = ""
    for _ in range(length):
        number, digit = divmod(number, 26)
        digits = chr(ord("A") + digit) + digits
    return digits


def song_id(number: int) -> str:
    """Return the song id that belongs to a number below 11 million."""
    return f"SO{letters(spread(number, 26**5), 5)}12A{spread(number, 16**8):08X}"


def artist_id(number: int) -> str:
    """Return the artist id that belongs to a number below 11 million."""
    return f"AR{letters(spread(number, 26**5), 5)}1187B{spread(number, 16**6):06X}"


def song_path(number: int) -> str:
    """Return the path, below the output folder, of song file number 0, 1, 2, …"""
    folder = letters(number // SONGS_PER_FOLDER, 3)
    code = f"{letters(spread(number, 26**2), 2)}128F{spread(number, 16**7):07X}"
    return f"song_data/{'/'.join(folder)}/TR{folder}{code}.json"


def log_path(day: date) -> str:
    """Return the path, below the output folder, of a day's log file."""
    return f"log_data/{day:%Y}/{day:%m}/{day:%Y-%m-%d}-events.json"


def zipf(size: int, rng: Random) -> int:
    """Return an index below size; index k about 1 / (k + 1) times as often as 0."""
    return int((size + 1) ** rng.random()) - 1


def split(total: int, weights: Sequence[int]) -> list[int]:
    """Return total as len(weights) whole parts in proportion to the weights."""
    bounds = [total * part // sum(weights) for part in itertools.accumulate(weights)]
    return [high - low for low, high in zip([0, *bounds], bounds)]


# Songs


def make_artist(number: int, name: str, rng: Random) -> Artist:
    """Return an artist: one in three has coordinates, three in five a location."""
    placed = rng.random() < 0.34
    located = placed or rng.random() < 0.4
    location = f"{make_word(rng)}, {rng.choice(COUNTRIES)}" if located else ""
    latitude = round(rng.uniform(-50, 65), 5) if placed else None
    longitude = round(rng.uniform(-120, 140), 5) if placed else None
    return Artist(artist_id(number), name, location, latitude, longitude)


def make_year(rng: Random) -> int:
    """Return a song's year: 0 for three in ten, else 1961 to 2010, mostly late."""
    return 0 if rng.random() < 0.3 else 2010 - int(50 * rng.random() ** 2)


def make_songs(count: int, rng: Random, taken: Iterable[str] = ()) -> list[Song]:
    """Return count songs, of two artists for every three songs.

    Most artists have one song, the first ones many. None has a name in taken.
    """
    artist_count = max(1, round(count / SONGS_PER_ARTIST))
    names = make_new(make_artist_name, artist_count, set(taken), rng)
    artists = [make_artist(number, name, rng) for number, name in enumerate(names)]
    others = (artists[int(artist_count * rng.random() ** 2)] for _ in itertools.count())
    of_songs = itertools.islice(itertools.chain(artists, others), count)
    return [
        Song(
            song_id(number), make_title(rng), artist, make_year(rng), make_duration(rng)
        )
        for number, artist in enumerate(of_songs)
    ]


def song_record(song: Song) -> dict[str, object]:
    """Return the song as the catalogue's JSON object."""
    return {
        "artist_id": song.artist.artist_id,
        "artist_latitude": song.artist.latitude,
        "artist_location": song.artist.location,
        "artist_longitude": song.artist.longitude,
        "artist_name": song.artist.name,
        "duration": song.duration,
        "num_songs": 1,
        "song_id": song.song_id,
        "title": song.title,
        "year": song.year,
    }


def song_line(song: Song) -> str:
    """Return the song as one line of JSON, without a line end."""
    return json.dumps(song_record(song), separators=(",", ":"))


# Events


def make_user(number: int, start: date, rng: Random) -> User:
    """Return a listener who registered in the 90 days before start."""
    gender = rng.choice("FM")
    registered = midnight_ms(start) - int(rng.random() * 90 * DAY_MS)
    return User(
        user_id=json_text(str(number)),
        first_name=json_text(rng.choice(FIRST_NAMES[gender])),
        last_name=json_text(make_word(rng)),
        gender=json_text(gender),
        location=json_text(f"{make_word(rng)}-{make_word(rng)}, {rng.choice(STATES)}"),
        registration=f"{registered}.0",
        user_agent=json_text(rng.choice(USER_AGENTS)),
        level="paid" if rng.random() < 0.3 else "free",
    )


def make_track(artist: str | int, song: str | int, length: float) -> Track:
    """Return what a play of this song logs; the length in seconds."""
    return Track(json_text(artist), json_text(song), json_text(length))


def make_tracks(
    songs: Sequence[Song], song_share: float, artist_share: float, rng: Random
) -> Iterator[Track]:
    """Yield endless plays, the first songs and artists most often.

    song_share of the plays are of one of the songs; artist_share only name an artist of
    theirs, with a title that no song has; the others name neither.
    """
    artists = list(dict.fromkeys(str(song.artist.name) for song in songs))
    strangers = make_new(make_artist_name, len(artists), set(artists), rng)
    catalogue_titles = {str(song.title) for song in songs}

    def shelf(names: list[str]) -> list[Track]:
        titles = make_new(make_title, len(songs), catalogue_titles, rng)
        pairs = zip(itertools.cycle(names), titles)
        return [make_track(name, title, make_duration(rng)) for name, title in pairs]

    known = [make_track(song.artist.name, song.title, song.duration) for song in songs]
    unheard = shelf(artists)
    unknown = shelf(strangers)
    while True:
        chance = rng.random()
        if chance < song_share:
            yield known[zipf(len(known), rng)]
        elif chance < song_share + artist_share:
            yield unheard[zipf(len(unheard), rng)]
        else:
            yield unknown[zipf(len(unknown), rng)]


def midnight_ms(day: date) -> int:
    """Return the start of the day, UTC, in milliseconds since 1970."""
    return int(datetime.combine(day, time(), timezone.utc).timestamp()) * 1000


def make_times(day: date, count: int, rng: Random) -> Iterator[int]:
    """Yield count ascending moments of the day, UTC, in milliseconds since 1970.

    No two are equal, unless there are more of them than milliseconds.
    """
    for slot, slot_count in enumerate(split(count, SLOT_WEIGHTS)):
        start = midnight_ms(day) + slot * SLOT_MS
        for place in range(slot_count):
            low = place * SLOT_MS // slot_count
            high = (place + 1) * SLOT_MS // slot_count
            yield start + low + int(rng.random() * (high - low))


def event_line(
    ts: int, session: int, item: int, level: str, user: User, page: Page, track: Track
) -> str:
    """Return one log event as JSON, without a line end; ts in ms since 1970."""
    auth = "Logged Out" if user is NOBODY else "Logged In"
    return (
        f'{{"artist":{track.artist},"auth":"{auth}","firstName":{user.first_name},'
        f'"gender":{user.gender},"itemInSession":{item},"lastName":{user.last_name},'
        f'"length":{track.length},"level":"{level}","location":{user.location},'
        f'"method":"{page.method}","page":"{page.name}",'
        f'"registration":{user.registration},"sessionId":{session},'
        f'"song":{track.song},"status":{page.status},"ts":{ts},'
        f'"userAgent":{user.user_agent},"userId":{user.user_id}}}'
    )


def make_bag(weights: dict[str, int]) -> list[Page]:
    """Return each page as often as its weight says."""
    return [PAGES[name] for name, weight in weights.items() for _ in range(weight)]


def draw(bag: Sequence[Page], rng: Random) -> Page:
    """Return a page from the bag, which stays full."""
    return bag[int(rng.random() * len(bag))]


def make_event_lines(
    times: Iterable[int],
    users: Sequence[User],
    tracks: Iterator[Track],
    crowd: int,
    rng: Random,
) -> Iterator[str]:
    """Yield a log line for each moment, from crowd sessions at a time.

    The first users have the most sessions. No session has an itemInSession twice. An
    upgrade shows in all later events of its user.
    """
    bags = {"free": make_bag(FREE_PAGES), "paid": make_bag(PAID_PAGES)}
    visitor_bag = make_bag(VISITOR_PAGES)
    levels = {user.user_id: user.level for user in users}
    numbers = itertools.count(1)

    def new_session() -> Session:
        return Session(users[zipf(len(users), rng)], next(numbers))

    sessions = [new_session() for _ in range(crowd)]
    for ts in times:
        seat = int(rng.random() * crowd)
        session = sessions[seat]
        user = session.user
        level = levels[user.user_id]
        if rng.random() < LOGGED_OUT:
            page = draw(visitor_bag, rng)
            yield event_line(
                ts, session.number, session.item, level, NOBODY, page, NO_TRACK
            )
        else:
            page = draw(bags[level], rng)
            track = next(tracks) if page.name == "NextSong" else NO_TRACK
            yield event_line(ts, session.number, session.item, level, user, page, track)
        levels[user.user_id] = LEVEL_AFTER.get(page.name, level)
        session.item += 1
        if page.name == "Logout" or rng.random() < SESSION_END:
            sessions[seat] = new_session()


def make_days(start: date, days: int, events: int) -> list[tuple[date, int]]:
    """Return each day and its share of the events, fewer at weekends."""
    dates = [start + timedelta(days=number) for number in range(days)]
    return list(
        zip(dates, split(events, [WEEKDAY_WEIGHTS[day.weekday()] for day in dates]))
    )


def make_log_days(
    days: Sequence[tuple[date, int]],
    users: Sequence[User],
    tracks: Iterator[Track],
    rng: Random,
) -> Iterator[tuple[date, Iterator[str]]]:
    """Yield each day with its log lines, which are to be read before the next day."""
    rate = sum(count for _, count in days) / (len(days) * DAY_MS)
    crowd = max(1, round(rate * PLAY_GAP_MS))
    times = itertools.chain.from_iterable(
        make_times(day, count, rng) for day, count in days
    )
    lines = make_event_lines(times, users, tracks, crowd, rng)
    for day, count in days:
        yield day, itertools.islice(lines, count)


# The sample: favourites that its listeners play, and dirt that only it has

SAMPLE_SEED = "sample"
SAMPLE_START = date(2018, 11, 28)
SAMPLE_DAYS = 3
SAMPLE_EVENTS = 840
SAMPLE_USERS = 40
SAMPLE_MADE_SONGS = 22
SAMPLE_SONG_SHARE = 0.12
SAMPLE_ARTIST_SHARE = 0.45

# artist, title, year, duration in seconds
FAVOURITES = (
    ("The Biscuit Cartel", "Dunk Me Twice", 2004, 201.29914),
    ("Señora Tornado", "Baile Del Paraguas", 1998, 262.16444),
    ("Admiral Otter", "Sea Shanty For Landlubbers", 2009, 175.20281),
    ("Moth Parliament", "Order Of The Lampshade", 1987, 304.48281),
    ("Søren Snøfnug", "Vinterkaffe", 2006, 222.06649),
    ("The Apologetic Vikings", "Sorry About The Village", 1979, 190.30159),
    ("DJ Lukewarm", "Tepid (Extended Mix)", 2010, 498.12853),
    ("Polite Volcano", "Excuse My Lava", 1994, 278.46485),
    ("Audit My Heart", "Receipts/Regrets", 2002, 205.87057),
    ("Клуб Ночных Чайников", "Пар Над Крышей", 2005, 248.97261),
    ("Quantum Accordion", "Both Here And There", 1972, 333.73995),
    ("Captain Cardigan", "Elbow Patches", 1966, 157.83138),
    ("Grandmother Circuit", "Knit One Purl Techno", 2009, 387.00363),
    ("Haunted Stapler", "Red Tape Séance", 1999, 226.21995),
    ("Żółta Gęś", "Jaźń I Żaba", 1984, 208.84853),
    ("眠いラクダ", "砂のピアノ", 2001, 271.98649),
    ("Marzipan Riot", "Almond Uprising", 1992, 182.17751),
    ("Elevator Opera", "Third Floor Haberdashery", 0, 245.13261),
    ("Lady Thermostat", "Sixty-Eight", 1977, 212.00934),
    ("The Reluctant Flamingos", "One Leg At A Time", 1990, 199.57506),
    ("The Biscuit Cartel", "Crumbs On The Evidence", 2004, 187.45424),
    ("Señora Tornado", "Café Con Truenos", 0, 198.73914),
    ("Admiral Otter", "My Submarine Has A Garden", 2010, 231.78404),
    ("Moth Parliament", "Filibuster By Candlelight", 1989, 411.01016),
    ("Søren Snøfnug", "Rensdyr På Taget", 2008, 256.10404),
    ("The Apologetic Vikings", "Pillage (Please)", 1981, 214.59546),
    ("DJ Lukewarm", "Room Temperature", 2010, 361.40363),
    ("Polite Volcano", "Mind The Magma", 1996, 233.16853),
    ("Audit My Heart", "Tax Deductible Love", 2003, 219.42812),
    ("Клуб Ночных Чайников", "Свисток", 0, 143.49016),
    ("Quantum Accordion", "Polka Of Uncertainty", 1973, 185.99138),
    ("Captain Cardigan", "Button Up", 1967, 149.44608),
    ("Grandmother Circuit", "Doily Overdrive", 2010, 291.44771),
    ("Haunted Stapler", "Paper Jam Ballad", 0, 252.49914),
    ("The Biscuit Cartel", "Shortbread Heist", 2007, 243.77424),
    ("The Apologetic Vikings", "We'll Fix The Gate", 0, 167.3922),
)
# location, latitude, longitude of those that have any
PLACES: dict[str, tuple[str, float | None, float | None]] = {
    "The Biscuit Cartel": ("Crumbleford, England", 52.19205, -1.70829),
    "Señora Tornado": ("Villa Relámpago, Mexico", 19.43268, -99.13421),
    "Admiral Otter": ("Kelp Harbor, Oregon", 44.62402, -124.05236),
    "Søren Snøfnug": ("Isvågen, Norway", 69.64921, 18.95532),
    "DJ Lukewarm": ("Tepid Springs, Nevada", None, None),
    "Audit My Heart": ("Ledger Falls, Ohio", None, None),
    "Captain Cardigan": ("Wooliston, Scotland", 56.81691, -4.18265),
    "Żółta Gęś": ("Gęsiogród, Poland", None, None),
    "Lady Thermostat": ("Drafty Hall, Maine", None, None),
}

# Artists and songs that try the rules: two artists share a name, two have two rows each.
NUMBERED = Artist(artist_id(901), 112, "", None, None)
BEIGE = Artist(artist_id(902), "Beige Alert", "", None, None)
SYRUP = Artist(
    artist_id(903), "The Syrup Society", "Griddle Creek, Vermont", 44.0, -72.7
)
WAFFLE = Artist(artist_id(904), "Waffle Embargo", "", None, None)
COMET = Artist(artist_id(905), "Slow Comet", "", None, None)
STATIC_EAST = Artist(artist_id(906), "Juniper Static", "Fusebox, Georgia", None, None)
STATIC_WEST = Artist(
    artist_id(907), "Juniper Static", "Dry Socket, Arizona", 33.4, -112.1
)
CHOIR = Artist(artist_id(908), "The Lantern Choir", "Wickham Deep, Wales", 52.4, -3.7)
CHOIR_GUEST = Artist(artist_id(908), "Lantern Choir & Maude", "", None, None)
PLUM_BAND = Artist(artist_id(909), "Otto Plum & The Pits", "", None, None)
PLUM = Artist(artist_id(909), "Otto Plum", "", None, None)

KAZOO = Song(song_id(901), "Emergency Kazoo", NUMBERED, 1999, 222.5)
NOT_FOUND = Song(song_id(902), 404, BEIGE, 2008, 164.04)
PANCAKES_SYRUP = Song(song_id(903), "Midnight Pancakes", SYRUP, 1985, 240.25)
PANCAKES_WAFFLE = Song(song_id(904), "Midnight Pancakes", WAFFLE, 1985, 240.25)
COMET_SHORT = Song(song_id(905), "Tail Of Ice", COMET, 1971, 180.5)
COMET_LONG = Song(song_id(906), "Tail Of Ice", COMET, 2003, 300.5)
PORCH_LIGHT = Song(song_id(907), "Porch Light", STATIC_EAST, 1996, 215.0)
FUSE_BOX = Song(song_id(908), "Fuse Box", STATIC_WEST, 0, 195.75)
GLOW_WORM = Song(song_id(909), "Glow Worm Waltz", CHOIR, 1958, 176.5)
WICK = Song(song_id(910), "Trim The Wick", CHOIR_GUEST, 1964, 188.25)
STONE_FRUIT = Song(song_id(911), "Stone Fruit", PLUM_BAND, 0, 233.0)
JAM_SESSION = Song(song_id(912), "Jam Session", PLUM, 1975, 402.5)


def sample_user(number: int, first_name: str, last_name: str, location: str) -> User:
    """Return a listener who starts out free."""
    return User(
        user_id=json_text(str(number)),
        first_name=json_text(first_name),
        last_name=json_text(last_name),
        gender=json_text("F"),
        location=json_text(location),
        registration="1540300000796.0",
        user_agent=json_text(USER_AGENTS[number % len(USER_AGENTS)]),
        level="free",
    )


MINA = sample_user(91, "Mina", "Brightwater", "Kelp Harbor-Saltlick, OR")
IVA = sample_user(92, "Iva", "Thistlewood", "Tepid Springs-Mirage, NV")
ZOFIE = sample_user(93, "Žofie", "Jířová", "Griddle Creek, VT")
TAMSIN = sample_user(94, "Tamsin", "O'Puddle", "Ledger Falls-Copper Mill, OH")


class Visit(NamedTuple):
    """A written-out session: its start in UTC, its events so many seconds apart.

    A step is the name of a page, or the play of a track.
    """

    user: User
    session: int
    start: str
    apart: int
    level: str
    steps: tuple[str | Track, ...]


VISITS = (
    # Mina upgrades. "112" and "404" stand in the catalogue as numbers.
    Visit(
        MINA,
        901,
        start="2018-11-28T09:15:02.796",
        apart=230,
        level="free",
        steps=(
            "Home",
            make_track("112", "Emergency Kazoo", 222.5),
            make_track(112, "Emergency Kazoo", 222.5),
            make_track("Beige Alert", "404", 164.0),
        ),
    ),
    Visit(
        MINA,
        902,
        start="2018-11-29T18:02:11.796",
        apart=200,
        level="free",
        steps=("Upgrade", "Submit Upgrade", "Home", make_track(112, "Siren", 201.5)),
    ),
    Visit(
        MINA,
        903,
        start="2018-11-30T07:40:00.796",
        apart=0,
        level="paid",
        steps=(make_track("Slow Comet", "Dust", 99.5),),
    ),
    # The same title by two artists, and by none. The same title twice by one artist: a
    # length nearest to the short one, to the long one, to neither.
    Visit(
        IVA,
        910,
        start="2018-11-28T21:10:00.796",
        apart=240,
        level="free",
        steps=(
            make_track("The Syrup Society", "Midnight Pancakes", 240.25),
            make_track("Waffle Embargo", "Midnight Pancakes", 240.25),
            make_track("Polite Volcano", "Midnight Pancakes", 240.25),
            make_track("Slow Comet", "Tail Of Ice", 181.0),
            make_track("Slow Comet", "Tail Of Ice", 299.0),
            make_track("Slow Comet", "Tail Of Ice", 240.5),
        ),
    ),
    # Iva upgrades too: only itemInSession tells which event was the last.
    Visit(
        IVA,
        911,
        start="2018-11-30T20:15:00.796",
        apart=0,
        level="free",
        steps=("Upgrade", "Submit Upgrade", "Home"),
    ),
    # One name, two artists: a song of either is clear, any other play is not.
    Visit(
        ZOFIE,
        920,
        start="2018-11-29T12:10:00.796",
        apart=240,
        level="free",
        steps=(
            make_track("Juniper Static", "Porch Light", 215.0),
            make_track("Juniper Static", "Fuse Box", 195.75),
            make_track("Juniper Static", "Attic Noise", 240.5),
            make_track("juniper static", "Porch Light", 215.0),
        ),
    ),
    # One artist, two names: both stand for all songs of that artist.
    Visit(
        TAMSIN,
        930,
        start="2018-11-30T14:10:00.796",
        apart=200,
        level="free",
        steps=(
            make_track("The Lantern Choir", "Glow Worm Waltz", 176.5),
            make_track("Lantern Choir & Maude", "Glow Worm Waltz", 176.5),
            make_track("The Lantern Choir", "Trim The Wick", 188.25),
            make_track("Lantern Choir & Maude", "Snuffed", 204.0),
            make_track("Otto Plum", "Stone Fruit", 233.0),
            make_track("Otto Plum & The Pits", "Compote", 187.0),
        ),
    ),
    # A play in the same millisecond as one of Žofie's.
    Visit(
        TAMSIN,
        931,
        start="2018-11-29T12:14:00.796",
        apart=0,
        level="free",
        steps=(make_track("Nobody's Teaspoon", "Clink", 61.5),),
    ),
)


def moment_ms(text: str) -> int:
    """Return the ISO 8601 UTC time, without its zone, in milliseconds since 1970."""
    moment = datetime.fromisoformat(text).replace(tzinfo=timezone.utc)
    return round(moment.timestamp() * 1000)


def line_ms(line: str) -> int:
    """Return the ts of a log line, in milliseconds since 1970."""
    return json.loads(line)["ts"]


def visit_lines(visit: Visit) -> list[str]:
    """Return the visit's log lines."""
    lines = []
    level = visit.level
    for item, step in enumerate(visit.steps):
        ts = moment_ms(visit.start) + item * visit.apart * 1000
        page = PAGES[step] if isinstance(step, str) else PAGES["NextSong"]
        track = NO_TRACK if isinstance(step, str) else step
        lines.append(
            event_line(ts, visit.session, item, level, visit.user, page, track)
        )
        level = LEVEL_AFTER.get(page.name, level)
    return lines


def favourite_songs() -> list[Song]:
    """Return the songs of FAVOURITES."""
    artists = {
        name: Artist(artist_id(800 + number), name, *PLACES.get(name, ("", None, None)))
        for number, name in enumerate(dict.fromkeys(row[0] for row in FAVOURITES))
    }
    return [
        Song(song_id(800 + number), title, artists[name], year, duration)
        for number, (name, title, year, duration) in enumerate(FAVOURITES)
    ]


def pretty(song: Song) -> str:
    """Return the song as JSON over many lines, its letters unescaped."""
    return json.dumps(song_record(song), indent=4, ensure_ascii=False)


def without(line: str, key: str) -> str:
    """Return the one-line JSON object without the key."""
    record = {name: value for name, value in json.loads(line).items() if name != key}
    return json.dumps(record, separators=(",", ":"))


def zip_bytes(content: bytes) -> bytes:
    """Return the content gzipped, without the time; the same bytes from every Python."""
    target = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=target, mtime=0) as file:
        file.write(content)
    return target.getvalue()


def sample_song_files(songs: Sequence[Song]) -> dict[str, bytes]:
    """Return path to content of the sample's song files: the songs, and dirt."""
    tricky = (KAZOO, NOT_FOUND, PANCAKES_SYRUP, PANCAKES_WAFFLE)
    tricky += (PORCH_LIGHT, FUSE_BOX, GLOW_WORM, WICK)
    vikings = next(song for song in songs if song.title == "Pillage (Please)")
    lost = vikings._replace(song_id=song_id(990), title="Unnamed Saga")
    vague = song_line(lost).replace(f'"duration":{lost.duration}', '"duration":"long"')
    twice = songs[1]
    together = (COMET_SHORT, COMET_LONG, STONE_FRUIT, twice)
    texts = [
        *(song_line(song) for song in (*songs, *tricky)),
        "\n".join(pretty(song) for song in together),
        without(song_line(lost), "song_id"),
        without(song_line(lost), "artist_id"),
        vague,
    ]
    files = {song_path(number): text.encode() for number, text in enumerate(texts)}
    zipped = zip_bytes(song_line(JAM_SESSION).encode())
    return {**files, f"{song_path(len(texts))}.gz": zipped}


def sample_log_days(songs: Sequence[Song], rng: Random) -> list[list[str]]:
    """Return the lines of each of the sample's days, in order and without dirt."""
    numbers = range(1, SAMPLE_USERS + 1)
    users = [make_user(number, SAMPLE_START, rng) for number in numbers]
    tracks = make_tracks(songs, SAMPLE_SONG_SHARE, SAMPLE_ARTIST_SHARE, rng)
    days = make_days(SAMPLE_START, SAMPLE_DAYS, SAMPLE_EVENTS)
    made = [
        line for _, lines in make_log_days(days, users, tracks, rng) for line in lines
    ]
    placed = [line for visit in VISITS for line in visit_lines(visit)]
    lines = sorted([*made, *placed], key=line_ms)
    return [
        [line for line in lines if 0 <= line_ms(line) - midnight_ms(day) < DAY_MS]
        for day, _ in days
    ]


def sample_log_files(songs: Sequence[Song], rng: Random) -> dict[str, bytes]:
    """Return path to content of the sample's log files: plays, and dirt."""
    first, second, third = sample_log_days(songs, rng)

    def lost_play(near: str, session: int, user: User = TAMSIN) -> str:
        track = make_track("Admiral Otter", "Lost At Sea", 187.5)
        return event_line(
            line_ms(near) + 1, session, 0, "free", user, PAGES["NextSong"], track
        )

    timeless = lost_play(first[99], 940)
    timeless = timeless.replace(f'"ts":{line_ms(timeless)}', '"ts":null')
    homeless = without(lost_play(second[99], 941), "sessionId")
    nameless = lost_play(third[99], 942, NOBODY)
    cut_off = lost_play(third[-1], 943)[:250]
    repeated = next(line for line in reversed(second) if '"page":"NextSong"' in line)

    first = [*first[:50], "", *first[50:100], timeless, *first[100:]]
    second = [*second[:50], "-- rotated --", *second[50:100], homeless, *second[100:]]
    third = [
        repeated,
        *third[:50],
        "   ",
        *third[50:100],
        nameless,
        *third[100:],
        cut_off,
    ]
    paths = [log_path(SAMPLE_START + timedelta(days=number)) for number in range(3)]
    return {
        paths[0]: "".join(f"{line}\r\n" for line in first).encode(),
        paths[1]: "".join(f"{line}\n" for line in second).encode("utf-8-sig"),
        paths[2]: "\n".join(third).encode(),
    }


def sample_files() -> dict[str, bytes]:
    """Return path (below the output folder) to content of every file of the sample."""
    rng = Random(SAMPLE_SEED)
    favourites = favourite_songs()
    names = [str(song.artist.name) for song in favourites]
    songs = [*favourites, *make_songs(SAMPLE_MADE_SONGS, rng, taken=names)]
    return {**sample_song_files(songs), **sample_log_files(songs, rng)}


# Files and the command line


def write_sample(out: Path) -> None:
    """Write the sample's files below out."""
    for name, content in sample_files().items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_songs(out: Path, songs: Sequence[Song]) -> None:
    """Write each song into a file of its own below out."""
    for number, song in enumerate(songs):
        path = out / song_path(number)
        if number % SONGS_PER_FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(song_line(song).encode())


def write_clean(
    out: Path, songs: int, events: int, days: int, users: int, seed: int, start: date
) -> None:
    """Write clean input below out: so many songs, events, days and users."""
    catalogue = make_songs(songs, Random(f"songs {seed}"))
    write_songs(out, catalogue)
    rng = Random(f"events {seed}")
    listeners = [make_user(number, start, rng) for number in range(1, users + 1)]
    tracks = make_tracks(catalogue, song_share=0.05, artist_share=0.5, rng=rng)
    for day, lines in make_log_days(
        make_days(start, days, events), listeners, tracks, rng
    ):
        path = out / log_path(day)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)


def make_room(out: Path, force: bool) -> None:
    """Make sure that out holds no song_data and log_data; delete them if force says so.

    Raises FileExistsError if they are there and force is false.
    """
    for folder in (out / "song_data", out / "log_data"):
        if folder.exists():
            if not force:
                raise FileExistsError(f"{folder} is already there; --force replaces it")
            shutil.rmtree(folder)


def whole_number(text: str) -> int:
    """Return the number of at least 1 that the text says, or raise ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked arguments; wrong ones end the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description="Make Sparkify input: clean at any size, or the small dirty sample."
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder for song_data and log_data"
    )
    parser.add_argument(
        "--sample", action="store_true", help="make the sample, with its dirt"
    )
    parser.add_argument(
        "--songs", type=whole_number, help="how many songs, one file each"
    )
    parser.add_argument(
        "--events", type=whole_number, help="how many log events in all"
    )
    parser.add_argument(
        "--days", type=whole_number, help="how many days, one log file each"
    )
    parser.add_argument("--users", type=whole_number, help="how many listeners")
    parser.add_argument("--seed", type=int, help="another seed, other data (1)")
    parser.add_argument(
        "--start", type=date.fromisoformat, help="first day (2018-11-01)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace song_data and log_data"
    )
    arguments = parser.parse_args(argv)
    sizes = (arguments.songs, arguments.events, arguments.days, arguments.users)
    fixed = (*sizes, arguments.seed, arguments.start)
    if arguments.sample and any(value is not None for value in fixed):
        parser.error("--sample is always the same: it goes with OUT and --force only")
    if not arguments.sample and not all(sizes):
        parser.error("give --songs, --events, --days and --users, or --sample")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Make what the arguments ask for; return the exit code, 2 if that fails."""
    arguments = parse_arguments(argv)
    try:
        make_room(arguments.out, arguments.force)
        if arguments.sample:
            write_sample(arguments.out)
        else:
            write_clean(
                arguments.out,
                songs=arguments.songs,
                events=arguments.events,
                days=arguments.days,
                users=arguments.users,
                seed=1 if arguments.seed is None else arguments.seed,
                start=arguments.start or date(2018, 11, 1),
            )
    except (OSError, OverflowError) as error:
        print(f"make_data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
