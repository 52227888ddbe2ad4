"""Obtain the training text and clean it into paragraphs of plain prose.

The default text is the King James Bible from the Debian package bible-kjv-text, read by the program of the package
bible-kjv; both are unpacked into a temporary folder and nothing is installed. Knows nothing about tokens or models.
"""

import re
import subprocess
import tempfile
from pathlib import Path

PARAGRAPH_CHARACTERS = 500
PARAGRAPHS = 20
SENTENCE_END = (".", "!", "?", ".)", "?)")
# Every verse begins with a capital, even in mid-sentence; these words are certainly no names there.
CONTINUATION = re.compile(
    r"^(And|But|For|That|Then|The|Of|To|In|Which|Who|With|Nor|Or|So|As|Because|If|When|Whose|From|By|Unto|Neither|Even)\b"
)

Chapter = list[str]
"""The paragraphs of one chapter, without line breaks inside."""


def fetch_bible() -> list[Chapter]:
    """Download and unpack the two Debian packages with apt-get and dpkg, and return the chapters in order.

    Raises subprocess.CalledProcessError if apt-get, dpkg or the reading program fails, with its own words on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", "bible-kjv", "bible-kjv-text"], cwd=folder, check=True)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), folder], check=True)
        dump = subprocess.run(
            [f"{folder}/usr/bin/bible", "-f", "-p", f"{folder}/usr/lib", "gen1:1-rev22:21"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            encoding="latin-1",
        ).stdout
    return parse_verses(dump)


def parse_verses(dump: str) -> list[Chapter]:
    """Group lines such as "Ge1:2 And the earth was …" by chapter and join the verses of each."""
    verses: dict[str, list[str]] = {}
    for line in dump.splitlines():
        reference, _, verse = line.partition(" ")
        verses.setdefault(reference.partition(":")[0], []).append(verse.strip())
    return [join_verses(chapter) for chapter in verses.values()]


def join_verses(verses: list[str]) -> Chapter:
    """Join verses into paragraphs that end with a sentence and have about PARAGRAPH_CHARACTERS characters."""
    paragraphs: Chapter = []
    current = ""
    for verse in verses:
        if current.endswith((",", ";", ":")):
            verse = CONTINUATION.sub(lambda word: word[0].lower(), verse, count=1)
        current = f"{current} {verse}" if current else verse
        if len(current) >= PARAGRAPH_CHARACTERS and current.endswith(SENTENCE_END):
            paragraphs.append(current)
            current = ""
    if current:
        paragraphs.append(current)
    return paragraphs


def read_files(paths: list[Path]) -> list[Chapter]:
    """Read UTF-8 text files whose paragraphs are parted by blank lines; every PARAGRAPHS of them make a chapter.

    Raises OSError or UnicodeDecodeError if one cannot be read.
    """
    chapters: list[Chapter] = []
    for path in paths:
        parts = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
        paragraphs = [" ".join(part.split()) for part in parts if part.strip()]
        chapters += [paragraphs[i : i + PARAGRAPHS] for i in range(0, len(paragraphs), PARAGRAPHS)]
    return chapters
