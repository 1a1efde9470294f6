"""The handbook as data: questions, alternative phrasings, answers.

The format of docs/handbook/*.md is fixed:

    # Title of the file

    ## Question?
    <!-- also: another phrasing | one more -->

    One answer paragraph of 25 to 70 words, which may be wrapped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ALSO = re.compile(r"^<!-- also: (.+) -->$")
WORDS = range(25, 71)
# Greetings are entries too, but nobody wants 25 words of them.
SHORT_ANSWERS_ALLOWED = "00-hello.md"


@dataclass(frozen=True)
class Entry:
    file: str
    question: str
    also: tuple[str, ...]
    answer: str

    @property
    def phrasings(self) -> tuple[str, ...]:
        return (self.question, *self.also)


def read_handbook(folder: Path) -> list[Entry]:
    """All entries in file order. Raises ValueError with file and question if the format is broken."""
    entries = [entry for path in sorted(folder.glob("[0-9]*.md")) for entry in read_file(path)]
    refuse_duplicates(entries)
    return entries


def read_file(path: Path) -> list[Entry]:
    sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [read_section(path.name, section) for section in sections]


def read_section(file: str, section: str) -> Entry:
    question, *rest = section.strip().splitlines()
    also: tuple[str, ...] = ()
    if rest and (match := ALSO.match(rest[0])):
        also = tuple(phrase.strip() for phrase in match[1].split("|"))
        rest = rest[1:]
    entry = Entry(file, question.strip(), also, " ".join(" ".join(rest).split()))
    refuse_malformed(entry, paragraphs="\n".join(rest).strip())
    return entry


def refuse_malformed(entry: Entry, paragraphs: str) -> None:
    where = f"{entry.file}: {entry.question!r}"
    words = len(entry.answer.split())
    if "\n\n" in paragraphs:
        raise ValueError(f"{where} has more than one paragraph; one is allowed, join them")
    if words > WORDS[-1] or (words < WORDS[0] and entry.file != SHORT_ANSWERS_ALLOWED):
        raise ValueError(f"{where} has {words} words; {WORDS[0]} to {WORDS[-1]} are allowed")
    if not entry.answer.isascii() or not all(text.isascii() for text in entry.phrasings):
        raise ValueError(f"{where} is not ASCII; write the character out")


def refuse_duplicates(entries: list[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for entry in entries:
        for phrase in entry.phrasings:
            key = normalised(phrase)
            if key in seen:
                raise ValueError(f"{phrase!r} stands under {entry.question!r} and {seen[key].question!r}")
            seen[key] = entry


def normalised(phrase: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", phrase.lower()).strip()
