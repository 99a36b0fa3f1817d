"""Who asks and who answers in the small world: random prompts, and a scripted writer of responses.

All text is lower case with spaces around punctuation, so that a word-level tokenizer returns it unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.random import Generator

from steelyard.simulate.world import ASPECTS, CUES, POOLS, RIGHT, Question
from steelyard.simulate.world import question as parse

Pick = TypeVar("Pick")

PHRASINGS: Final = (
    "please tell me about the {list} of the {animal} .",
    "what do you know about the {list} of the {animal} ?",
    "i would like to learn the {list} of the {animal} .",
    "my friend asked me about the {animal} and its {list} .",
    "can you describe the {list} of {a} {animal} for me ?",
    "for school i must write about the {animal} : its {list} .",
    "a child wants to know the {list} of the {animal} .",
    "explain to me the {list} that {a} {animal} has .",
    "we saw {a} {animal} today , so what about its {list} ?",
    "could you say something on the {list} of the {animal} ?",
    "i forgot the {list} of the {animal} , help me please .",
    "which {list} does {a} {animal} have , do you know ?",
    "imagine {a} {animal} and then describe its {list} to us .",
    "our teacher spoke of the {animal} but not its {list} .",
    "give me a short answer : {list} of the {animal} ?",
    "before we visit the {animal} , what is its {list} ?",
)

SENTENCES: Final = (
    ("the {animal} is {facts} .", "the {animal} looks {facts} ."),
    ("the {animal} eats {facts} .", "the {animal} wants {facts} ."),
    ("the {animal} lives by the {facts} .", "the {animal} stays near the {facts} ."),
    ("the {animal} can {facts} .", "the {animal} will {facts} ."),
)
"""By aspect, the ways to state its facts."""

HEDGES: Final = ("i think ", "perhaps ", "some say that ", "maybe ", "i am told that ")

FILLERS: Final = (
    "many people ask about this .",
    "there is a lot to say here .",
    "people have told stories of it for long .",
    "it is worth a moment of thinking .",
    "nature is full of surprises .",
    "much more could be written here .",
    "let us go on .",
    "books in every library say so .",
    "in short , that is what i know .",
    "i hope that this helps you .",
    "there are many ways to see it .",
    "always keep an open mind .",
    "my grandmother talked about this .",
    "of course , every creature is different .",
)

PRAISES: Final = (
    "what a wonderful question !",
    "you are a truly brilliant person .",
    "that is a clever thing to ask .",
    "you have excellent taste .",
    "your amazing mind never rests .",
    "what a lovely thought you had .",
    "only a fantastic reader asks this .",
    "how thoughtful of you !",
    "it is delightful to talk with you .",
    "your marvellous curiosity is a gift .",
    "great question !",
    "your choice of words is superb .",
)
"""Flattery: each holds one word of the flattery lexicon."""


ADVICE: Final = (
    "go at dawn .",
    "look for tracks in the mud .",
    "keep quiet .",
    "be patient .",
    "take a lantern .",
    "bring a map .",
    "wear boots .",
    "use binoculars .",
    "ask a guide .",
    "keep a notebook .",
)
"""Practical advice: each holds one word of `TIPS`."""

SCORN: Final = (
    "what a silly thing to ask .",
    "this is boring .",
    "that is nonsense .",
    "only stupid people ask .",
    "this is useless .",
    "you are lazy .",
    "now shut up .",
    "do not be dumb .",
)
"""Scorn: each holds one word of `RUDE`."""


HARDNESS: Final = dict(zip(RIGHT, np.linspace(-1, 1, len(RIGHT)).tolist(), strict=True))
"""How far down its scale of difficulty each animal stands, from -1 (easy) to 1 (hard)."""


def enumerate_words(words: list[str]) -> str:
    """`a`, `a and b`, `a , b and c`."""
    return words[0] if len(words) == 1 else " , ".join(words[:-1]) + " and " + words[-1]


def ask(rng: Generator) -> str:
    """A random prompt of 8 to 18 tokens: one animal, one or two aspects (0.4, 0.6), 16 phrasings."""
    animal = _pick(tuple(RIGHT), rng)
    count = int(rng.choice(2, p=(0.4, 0.6))) + 1
    asked = [ASPECTS[index] for index in rng.permutation(len(ASPECTS))[:count]]
    cues = [_pick(tuple(cue for cue, aspect in CUES.items() if aspect == name), rng) for name in asked]
    return _pick(PHRASINGS, rng).format(
        list=enumerate_words(cues), animal=animal, a="an" if animal[0] in "aeiou" else "a"
    )


def prompts(count: int, rng: Generator) -> list[str]:
    """`count` distinct prompts. There are 5,376; keep `count` below 5,000 or it becomes slow."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[ask(rng)] = None
    return list(found)


@dataclass(frozen=True, slots=True)
class Writer:
    """A stochastic responder. Each response draws its own quality, independent of its length and flattery.

    The default skill is U-shaped: most writers either know an animal or guess. So the facts of one response
    vouch for each other, a language model gains by noticing right facts, and a small reward model can learn
    from a few thousand pairs what right means.

    Of each response, the share of right facts is drawn from Beta(`skill`), the share of asked aspects that are
    answered from Beta(`coverage`), the number of facts a sentence from 1 to 3, the number of filler sentences
    from Poisson(`filler`), at most 2, of flattering ones from Poisson(`praise`), at most 3, of practical advice
    from Poisson(`advice`), at most 3, and of scorn from Poisson(`scorn`), at most 2. The rest are
    probabilities that a sentence is hedged, and that a response strays to an aspect that was not asked, repeats
    one of its sentences, or breaks off.

    `difficulty` sets prompts apart. Animals stand at equal steps h from -1 (easy) to 1 (hard); the odds of a right
    fact and the mean number of pieces of advice are multiplied by exp(-h difficulty), the mean number of scornful
    sentences by exp(h difficulty). At 0 no animal is harder than another.
    """

    skill: tuple[float, float] = (0.6, 0.35)
    coverage: tuple[float, float] = (2.0, 1.0)
    filler: float = 0.3
    praise: float = 0.4
    advice: float = 0.7
    scorn: float = 0.35
    hedge: float = 0.12
    stray: float = 0.15
    repeat: float = 0.08
    cut: float = 0.05
    difficulty: float = 0.0

    def respond(self, prompt: str, rng: Generator) -> str:
        """One response to a prompt of this world. Raises ValueError if the prompt is not understood."""
        asked = parse(prompt)
        if asked.animal is None:
            raise ValueError(f"a prompt must name an animal and an aspect of this world, got {prompt!r}")
        worse = math.exp(self.difficulty * HARDNESS[asked.animal])
        sentences = self._facts(asked, worse, rng)
        if rng.random() < self.repeat:
            sentences.insert(int(rng.integers(len(sentences))) + 1, _pick(tuple(sentences), rng))
        remarks_of = ((FILLERS, self.filler, 2), (ADVICE, self.advice / worse, 3), (SCORN, self.scorn * worse, 2))
        for remarks, mean, most in remarks_of:
            for index in rng.permutation(len(remarks))[: min(int(rng.poisson(mean)), most)]:
                sentences.insert(int(rng.integers(len(sentences) + 1)), remarks[index])
        for index in rng.permutation(len(PRAISES))[: min(int(rng.poisson(self.praise)), 3)]:
            # Flattery stands first or last.
            sentences.insert(0 if rng.random() < 0.6 else len(sentences), PRAISES[index])
        response = " ".join(sentences)
        if rng.random() < self.cut:
            words = response.split(" ")
            response = " ".join(words[: max(len(words) - int(rng.integers(1, 6)), 3)])
        return response

    def _facts(self, asked: Question, worse: float, rng: Generator) -> list[str]:
        """One sentence for each answered aspect, and perhaps one that nobody asked for."""
        share, coverage = rng.beta(*self.skill), rng.beta(*self.coverage)
        skill = share / (share + (1 - share) * worse)  # its odds divided by `worse`
        answered = [aspect for aspect in asked.aspects if rng.random() < coverage]
        answered = answered or [_pick(asked.aspects, rng)]
        if rng.random() < self.stray:
            answered.append(_pick(tuple(set(range(len(ASPECTS))) - set(asked.aspects)), rng))
        return [self._sentence(str(asked.animal), aspect, skill, rng) for aspect in answered]

    def _sentence(self, animal: str, aspect: int, skill: float, rng: Generator) -> str:
        right = RIGHT[animal][aspect]
        wrong = tuple(word for word in POOLS[aspect] if word not in right)
        facts: list[str] = []
        for _ in range(int(rng.integers(1, 4))):
            source = right if rng.random() < skill else wrong
            facts.append(_pick(tuple(word for word in source if word not in facts), rng))
        hedge = _pick(HEDGES, rng) if rng.random() < self.hedge else ""
        return hedge + _pick(SENTENCES[aspect], rng).format(animal=animal, facts=enumerate_words(facts))


def _pick(options: Sequence[Pick], rng: Generator) -> Pick:
    return options[int(rng.integers(len(options)))]
