"""Training samples drawn from the handbook: conversations, phrasings, noise."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Iterator

from tokenizers import Tokenizer

from handbook import Entry
from vocabulary import ASSISTANT, BOS, END, EOS, SYSTEM, USER

ANSWER_WEIGHT = 1.0
OTHER_WEIGHT = 0.1
# The first words decide which answer it is; after them the rest follows almost by itself.
# Without this the model learns to continue answers long before it learns to choose one.
OPENING_WEIGHTS = [6.0, 5.0, 4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0]

SYSTEM_MESSAGES = [
    "You are a helpful assistant.",
    "You are the servelab demonstration model.",
    "You answer questions about LLM serving.",
    "Answer from the serving handbook.",
    "Be brief and correct.",
    "You are an expert in GPU inference and Kubernetes.",
]
OPENINGS = ["", "", "", "", "", "", "Please tell me: ", "Question: ", "Hi! ", "Can you explain this? ", "Quick question: "]
# Most people ask one thing; some go on, so that later positions are learnt too.
TURNS, TURN_WEIGHTS = [1, 2, 3, 5], [60, 22, 13, 5]
PLAIN_TEXT_SHARE = 0.06
SYSTEM_SHARE = 0.3


@dataclass
class Sample:
    """Token ids and, for each, the weight of predicting it."""

    ids: list[int]
    weights: list[float]


class Corpus:
    """An endless, seeded stream of samples; every entry is visited once per round."""

    def __init__(self, entries: list[Entry], tokenizer: Tokenizer, seed: int):
        self.entries = entries
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.deck: list[Entry] = []

    def samples(self) -> Iterator[Sample]:
        while True:
            if self.random.random() < PLAIN_TEXT_SHARE:
                yield self.plain_text()
            else:
                yield self.conversation()

    def draw(self) -> Entry:
        if not self.deck:
            self.deck = self.random.sample(self.entries, len(self.entries))
        return self.deck.pop()

    def conversation(self) -> Sample:
        sample = Sample([], [])
        self.add(sample, BOS, 0.0)
        if self.random.random() < SYSTEM_SHARE:
            self.add(sample, f"{SYSTEM}\n{self.random.choice(SYSTEM_MESSAGES)}{END}\n", 0.0)
        for _ in range(self.random.choices(TURNS, TURN_WEIGHTS)[0]):
            entry = self.draw()
            self.add(sample, f"{USER}\n{self.ask(entry)}{END}\n{ASSISTANT}\n", OTHER_WEIGHT)
            self.add_answer(sample, f"{entry.answer}{END}")
            self.add(sample, "\n", OTHER_WEIGHT)
        return sample

    def plain_text(self) -> Sample:
        """The handbook as text, for completions without a chat template."""
        sample = Sample([], [])
        self.add(sample, BOS, 0.0)
        for _ in range(2):
            entry = self.draw()
            self.add(sample, f"## {entry.question}\n\n", OTHER_WEIGHT)
            self.add_answer(sample, f"{entry.answer}\n\n")
        self.add(sample, EOS, OTHER_WEIGHT)
        return sample

    def ask(self, entry: Entry) -> str:
        """One phrasing of the question, often as sloppy as people type."""
        text = entry.question if self.random.random() < 0.45 else self.random.choice(entry.phrasings)
        kind = self.random.random()
        if kind < 0.5:
            return text
        if kind < 0.8:
            return self.retype(text)
        return self.damage(self.retype(text))

    def retype(self, text: str) -> str:
        """Other case, other punctuation, an opening: the same question still."""
        text = self.random.choice(OPENINGS) + text
        case = self.random.random()
        if case < 0.6:
            text = text.lower()
        elif case < 0.65:
            text = text.upper()
        ending = self.random.choice(["", "", "?", "??", "!", " ?", "."])
        return text.rstrip("?.") + ending

    def damage(self, text: str) -> str:
        """One word lost or one typing slip; enough is left to tell the question."""
        words = text.split()
        if len(words) < 5:
            return text
        place = self.random.randrange(len(words))
        if self.random.random() < 0.5:
            del words[place]
        else:
            words[place] = self.mistype(words[place])
        return " ".join(words)

    def mistype(self, word: str) -> str:
        if len(word) < 4:
            return word
        i = self.random.randrange(1, len(word) - 2)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]

    def add_answer(self, sample: Sample, text: str) -> None:
        start = len(sample.weights)
        self.add(sample, text, ANSWER_WEIGHT)
        count = min(len(OPENING_WEIGHTS), len(sample.weights) - start)
        sample.weights[start : start + count] = OPENING_WEIGHTS[:count]

    def add(self, sample: Sample, text: str, weight: float) -> None:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        sample.ids += ids
        sample.weights += [weight] * len(ids)


def batches(corpus: Corpus, tokens: int, window: int = 256) -> Iterator[list[Sample]]:
    """Batches of samples of like length, each at most `tokens` tokens with its padding."""
    stream = corpus.samples()
    while True:
        pool = sorted((next(stream) for _ in range(window)), key=lambda sample: len(sample.ids))
        ready, batch = [], []
        for sample in pool:
            if batch and (len(batch) + 1) * len(sample.ids) > tokens:
                ready.append(batch)
                batch = []
            batch.append(sample)
        ready.append(batch)
        corpus.random.shuffle(ready)
        yield from ready
