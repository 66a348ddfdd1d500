"""The toy: short reviews from a grammar, whose sentiment and topic are known, so that control is measured
exactly.

    python -m plumbing.toy --grade samples.jsonl   the grammar's view of what sample.py wrote with --out
"""

import itertools
import json
import re
from functools import cache

import numpy as np

from plumbing.config import run
from plumbing.errors import check
from plumbing.files import read_rows, write_file

grade = ""  # a file that sample.py wrote with --out

TOPICS = {
    "food": {
        "event": "We ate at a small restaurant|Dinner was at the new bakery|We had lunch in a cafe",
        "noun": "soup|bread|dessert|waiter|menu|kitchen|coffee|chef",
    },
    "film": {
        "event": "We watched a long drama|The film was on at the old cinema|We saw a comedy at the festival",
        "noun": "plot|acting|dialogue|soundtrack|ending|director|scenery|cast",
    },
    "sports": {
        "event": "We watched the match|The team played the final|We saw a game at the stadium",
        "noun": "defense|goalkeeper|coach|referee|attack|captain|striker|second half",
    },
    "travel": {
        "event": "We took a train to the coast|The hotel was near the beach|We flew to an island",
        "noun": "room|view|flight|guide|pool|balcony|ferry|luggage service",
    },
}
SENTIMENTS = {
    "negative": {
        "adjective": "terrible|awful|dreadful|horrible|disappointing|miserable|boring|poor",
        "verb": "hated|disliked|regretted|complained about",
        "closing": "I want my money back|I would never do it again|It was a waste of time|We left angry",
    },
    "positive": {
        "adjective": "wonderful|excellent|delightful|superb|impressive|lovely|charming|brilliant",
        "verb": "loved|enjoyed|admired|could not stop praising",
        "closing": "I would gladly do it again|I recommend it to all|It was worth every minute|We left happy",
    },
}
OPENING = (
    "(Last week|On Friday|Yesterday|This spring|On Sunday|In March) "
    "(my sister|a friend|my uncle|a neighbour|my old teacher|a colleague) and I "
    "(tried something new|had a free evening|made a plan|went out together|met again)"
)
OPINIONS = (
    "The {noun} was (really|quite|truly|simply|rather) {adjective}",
    "I {verb} the {noun}",
    "Everyone {verb} the {noun}",
)


def pick_one(pattern, rng):
    """A random text that matches the pattern, whose groups are (a|b|c)."""
    return re.sub(r"\(([^()]*)\)", lambda m: str(rng.choice(m[1].split("|"))), pattern)


def sentence_patterns(topic, sentiment):
    """The grammar's sentences of one topic and sentiment: opening, event, closing, and the opinions."""
    slots = {k: f"({v})" for k, v in (TOPICS[topic] | SENTIMENTS[sentiment]).items()}
    return [OPENING, slots["event"], slots["closing"], *(opinion.format(**slots) for opinion in OPINIONS)]


def toy_documents(toy_seed):
    """Endless (text, sentiment, topic): neutral opening and event, two or three opinions, often a closing."""
    for number in itertools.count():
        rng = np.random.default_rng((toy_seed, number))
        topic = rng.choice(list(TOPICS))
        sentiment = rng.choice(list(SENTIMENTS))
        opening, event, closing, *opinions = sentence_patterns(topic, sentiment)
        chosen = [opening, event, *rng.choice(opinions, rng.integers(2, 4))]
        if rng.random() < 0.6:
            chosen.append(closing)
        yield ". ".join(pick_one(pattern, rng) for pattern in chosen) + ".", str(sentiment), str(topic)


def grade_text(text):
    """-> sentiment or None, topic or None, number of sentences, number that the grammar could have written.

    A text has a sentiment (or a topic) if all its words belong to that one.
    """

    def owner(groups):
        found = []
        for name, words in groups.items():
            pattern = "|".join(words.values())
            if re.search(rf"\b({pattern})\b", text):
                found.append(name)
        return found[0] if len(found) == 1 else None

    sentences = re.findall(r"\s*([^.]+)\.", text)
    fluent = [sentence for sentence in sentences if grammar().fullmatch(sentence)]
    return owner(SENTIMENTS), owner(TOPICS), len(sentences), len(fluent)


@cache
def grammar():
    """One pattern for all sentences of the grammar."""
    patterns = []
    for topic, sentiment in itertools.product(TOPICS, SENTIMENTS):
        patterns += sentence_patterns(topic, sentiment)
    return re.compile("|".join(patterns))


def print_grades(path):
    """Prints the grammar's grades of the texts in a file written by sample.py, in shares for each guide."""
    grades = {}
    for row in read_rows(path, "guide", "continuation"):
        grades.setdefault(row["guide"], []).append(grade_text(row["continuation"]))
    names = (*SENTIMENTS, *TOPICS)
    print(f"{'guide':24}{'texts':>6}" + "".join(f"{name:>10}" for name in (*names, "as asked", "fluent")))
    for guide, rows in grades.items():
        sentiments, topics, sentences, fluent = zip(*rows)
        shares = [(sentiments + topics).count(name) / len(rows) for name in names]

        # sentiment=negative:20,food -> {negative, food}
        asked = {re.sub(r"^.*=|:.*$", "", item.strip()) for item in guide.split(",")} - {"none"}
        as_asked = [asked <= {sentiment, topic} for sentiment, topic in zip(sentiments, topics)]
        shares.append(sum(as_asked) / len(rows) if asked else float("nan"))

        shares.append(sum(fluent) / max(1, sum(sentences)))
        print(f"{guide:24}{len(rows):6}" + "".join(f"{share:10.1%}" for share in shares))


def toy_ranks():
    """The toy's own tokenizer: each byte, and each word of the grammar, with and without a space."""
    words = sorted(set(re.findall(r"[A-Za-z]+", grammar().pattern)))
    tokens = [bytes([b]) for b in range(256)]
    for word in words:
        if len(word) > 1:
            tokens.append(word.encode())
        tokens.append(f" {word}".encode())
    return {token: rank for rank, token in enumerate(tokens)}


def write_toy_files(folder, seed):
    """sentiment.jsonl and topic.jsonl, from documents outside the training data; neutral prefixes.txt."""
    labelled = {"sentiment": [], "topic": []}
    for text, sentiment, topic in itertools.islice(toy_documents(seed + 1), 1000):
        opinions = text[:-1].split(". ")[1:]
        labelled["topic"].append((". ".join(opinions) + ".", topic))
        labelled["sentiment"].append((". ".join(opinions[1:]) + ".", sentiment))
    for name, pairs in labelled.items():
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)
        write_file(f"{folder}/{name}.jsonl", "".join(lines))
    openings = [text.partition(". ")[0] for text, _, _ in itertools.islice(toy_documents(seed + 2), 99)]
    distinct = list(dict.fromkeys(openings))
    write_file(f"{folder}/prefixes.txt", "".join(f"{opening}.\n" for opening in distinct[:20]))


def main(settings):
    check(grade, "say --grade, a file that sample.py wrote with --out")
    print_grades(grade)


if __name__ == "__main__":
    run(main, globals())
