"""Stage 0: text in, training arrays out.

Each document is tokenised and cut into windows of at most block_size tokens, at sentence ends where there
are any; each window is split at a random word into prefix and continuation; a frozen sentence encoder
embeds both sides. Training then reads memory maps and never runs the encoder.

    python prepare.py config/toy.py                                    a small grammar of reviews, made here
    python prepare.py --dataset my.jsonl.gz --encoder all-MiniLM-L6-v2 JSON lines with a field "text"
    python prepare.py --dataset notes.txt                              or a folder; blank lines end documents
    python prepare.py --dataset c4                                     the paper's 10 M documents, of the hub
    python prepare.py --judge samples.jsonl                            how the toy's grammar judges samples

Writes data/NAME/{train,val}/{tokens,length,split,prefix_emb,cont_emb}.npy, tokenizer.tiktoken and, last,
meta.json. It streams: a file for each SHARD of windows, which are joined at the end (for that it needs twice
the disk), so that the same command again continues an interrupted run, to the same bytes.
"""

import base64
import glob
import heapq
import itertools
import json
import os
import re
import shutil
import tarfile
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from configurator import InputError, check, run
from model import Tokenizer, load_encoder
from storage import (
    COLUMNS,
    DATA_FORMAT,
    GPT2_PATTERN,
    data_name,
    hub_file,
    read_bpe,
    read_ranks,
    read_rows,
    sha256,
    write_file,
)

dataset = "c4"  # toy, c4, openwebtext, or paths (.txt, .jsonl, .jsonl.gz, folders): a.txt or a.txt:1,b.txt:3
max_documents = 10_000_000  # stop after so many
block_size = 88  # longest window, in tokens of text
encoder = "sentence-transformers/sentence-t5-xl"  # any sentence-transformers name or folder
splits = 1  # rows of a window, each with a random split of its own
tokenizer = "gpt2"  # gpt2, a file of ranks (.tiktoken), or a decoder's: hub's name, folder, .gguf, smollm2
vocab_size = 0  # the first so many ranks, <|endoftext|> included; 0: all
val_every = 100  # one document in so many is for validation
device = "auto"  # auto, cpu, cuda, mps, or several: cuda:0,cuda:1
judge = ""  # a JSON-lines file of sample.py: only report what the toy's grammar says of it
seed = 1337  # fixes everything

SHARD = 4096  # windows embedded and written at a time


# ---------- The toy: a grammar of short reviews, whose sentiment and topic are known ------------------------

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
    """A text that the pattern of (a|b|c) groups matches."""
    return re.sub(r"\(([^()]*)\)", lambda m: str(rng.choice(m[1].split("|"))), pattern)


def sentence_patterns(topic, sentiment):
    """The grammar's sentences of one topic and sentiment: opening, event, opinions, closing."""
    slots = {k: f"({v})" for k, v in (TOPICS[topic] | SENTIMENTS[sentiment]).items()}
    return [OPENING, slots["event"], [opinion.format(**slots) for opinion in OPINIONS], slots["closing"]]


def toy_documents(toy_seed):
    """Endless (text, sentiment, topic): neutral opening and event, two or three opinions, often a closing."""
    for number in itertools.count():
        rng = np.random.default_rng((toy_seed, number))
        topic, sentiment = rng.choice(list(TOPICS)), rng.choice(list(SENTIMENTS))
        opening, event, opinions, closing = sentence_patterns(topic, sentiment)
        chosen = [opening, event, *rng.choice(opinions, rng.integers(2, 4))]
        if rng.random() < 0.6:
            chosen.append(closing)
        yield ". ".join(pick_one(pattern, rng) for pattern in chosen) + ".", str(sentiment), str(topic)


def judge_text(text):
    """The grammar's verdict -> sentiment or None, topic or None, sentences, those that it could have written.

    A text has a sentiment (a topic) where all its words are of that one.
    """

    def owner(groups, names):
        words = {g: "|".join(groups[g][name] for name in names) for g in groups}
        found = [g for g in groups if re.search(rf"\b({words[g]})\b", text)]
        return found[0] if len(found) == 1 else None

    sentences = re.findall(r"\s*([^.]+)\.", text)
    could = sum(bool(grammar().fullmatch(s)) for s in sentences)
    sentiment = owner(SENTIMENTS, ("adjective", "verb", "closing"))
    return sentiment, owner(TOPICS, ("event", "noun")), len(sentences), could


@cache
def grammar():
    """One pattern for all sentences of the grammar."""
    each = itertools.starmap(sentence_patterns, itertools.product(TOPICS, SENTIMENTS))
    found = [p for opening, event, opinions, closing in each for p in (opening, event, *opinions, closing)]
    return re.compile("|".join(found))


def judge_file(path):
    """Prints, for each guide in a file of sample.py, what the grammar makes of its texts, in shares."""
    verdicts = {}
    for row in read_rows(path, "guide", "continuation"):
        verdicts.setdefault(row["guide"], []).append(judge_text(row["continuation"]))
    names = (*SENTIMENTS, *TOPICS)
    print(f"{'guide':24}{'texts':>6}" + "".join(f"{name:>10}" for name in (*names, "as asked", "fluent")))
    for guide, rows in verdicts.items():
        sentiments, topics, sentences, could = zip(*rows)
        asked = {re.sub(r"^.*=|:.*$", "", item.strip()) for item in guide.split(",")} - {"none"}
        shares = [(sentiments + topics).count(name) / len(rows) for name in names]
        as_asked = sum(asked <= {s, t} for s, t in zip(sentiments, topics)) / len(rows)
        shares.append(as_asked if asked else float("nan"))
        shares.append(sum(could) / max(1, sum(sentences)))  # of the sentences
        print(f"{guide:24}{len(rows):6}" + "".join(f"{share:10.1%}" for share in shares))


def toy_ranks():
    """The toy's own tokenizer: each byte, and each word of the grammar, with and without a space."""
    words = sorted(set(re.findall(r"[A-Za-z]+", grammar().pattern)))
    tokens = [spelt.encode() for word in words for spelt in (word, f" {word}") if len(spelt) > 1]
    return {token: rank for rank, token in enumerate([*(bytes([b]) for b in range(256)), *tokens])}


def write_toy_files(folder):
    """sentiment.jsonl and topic.jsonl, of documents that training does not see, and prefixes.txt, neutral."""
    labelled = {"sentiment": [], "topic": []}
    for text, sentiment, topic in itertools.islice(toy_documents(seed + 1), 1000):
        opinions = text[:-1].split(". ")[1:]
        labelled["topic"].append((". ".join(opinions) + ".", topic))
        labelled["sentiment"].append((". ".join(opinions[1:]) + ".", sentiment))
    for name, pairs in labelled.items():
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)
        write_file(f"{folder}/{name}.jsonl", "".join(lines))
    openings = (text.partition(". ")[0] + ".\n" for text, _, _ in toy_documents(seed + 2))
    write_file(f"{folder}/prefixes.txt", "".join(list(dict.fromkeys(itertools.islice(openings, 99)))[:20]))


# ---------- Sources of documents: each yields texts, in an order that does not change -----------------------


def file_documents(path):
    """Texts of one file: of JSON lines the field "text"; of plain text, what blank lines part."""
    if path.endswith((".jsonl", ".jsonl.gz")):
        yield from (row["text"] for row in read_rows(path, "text"))
    else:
        try:
            with open(path, encoding="utf-8-sig") as f:
                yield from ("".join(lines) for blank, lines in itertools.groupby(f, str.isspace) if not blank)
        except UnicodeDecodeError as e:
            raise InputError(f"{path} is not text in UTF-8: {e}") from None


def openwebtext_documents():
    """The 21 archives of the hub's copy, each of many .xz archives of text files."""
    for number in range(21):
        # the last revision of the archives that is complete; later ones need a library to read
        revision = "b3166bc19fbae165867d7f4965dc52279d1e9f40"
        name = f"urlsf_subset{number:02d}.tar"
        path = hub_file("Skylion007/openwebtext", name, repo_type="dataset", revision=revision)
        with tarfile.open(path) as outer:
            for member in (m for m in outer if m.name.endswith(".xz")):
                with tarfile.open(fileobj=outer.extractfile(member), mode="r|xz") as inner:
                    for text in (t for t in inner if t.isfile()):
                        yield inner.extractfile(text).read().decode("utf-8", "replace")


def c4_documents():
    for number in range(1024):
        name = f"en/c4-train.{number:05d}-of-01024.json.gz"
        path = hub_file("allenai/c4", name, repo_type="dataset")
        yield from (row["text"] for row in read_rows(path, "text"))


def text_files(path):
    """The files of a dataset that is a path, in order."""
    folders = os.walk(path) if os.path.isdir(path) else [("", [], [path])]
    found = (os.path.join(folder, name) for folder, _, names in folders for name in names)
    return sorted(path for path in found if path.endswith((".txt", ".jsonl", ".jsonl.gz")))


def timed_texts(path, weight):
    """(when it comes, text) of each text of a path, `weight` times in turn."""
    files = itertools.chain.from_iterable(text_files(path) for _ in range(weight))
    for number, text in enumerate(itertools.chain.from_iterable(map(file_documents, files))):
        yield number / weight, text


def documents():
    """-> the texts of `dataset`, and the size of their files: of several paths each text as often as its path
    has weight, drawn in that proportion. Raises InputError for a path that is missing or holds no text.
    """
    toy = (text for text, _, _ in toy_documents(seed))
    sources = {"toy": toy, "c4": c4_documents(), "openwebtext": openwebtext_documents()}
    if dataset in sources:
        return sources[dataset], 0
    weights = {}
    for part in dataset.split(","):
        path, weight = re.fullmatch(r"(.*?)(?::(\d+))?", part, re.DOTALL).groups()
        check(os.path.exists(path), f"there is no dataset {path!r}: use toy, c4, openwebtext or a path")
        check(text_files(path), f"{path}: no .txt, .jsonl or .jsonl.gz file")
        weights[path] = int(weight or 1)
    merged = heapq.merge(*itertools.starmap(timed_texts, weights.items()), key=lambda timed: timed[0])
    size = sum(os.path.getsize(file) for path in weights for file in text_files(path))
    return (text for _, text in merged), size


# ---------- From text to windows ----------------------------------------------------------------------------


def choose_tokenizer():
    """The BPE ranks of the tokenizer asked for, {bytes: rank}, and the pattern that cuts text to pieces."""
    pattern = GPT2_PATTERN
    if dataset == "toy":
        return toy_ranks(), pattern
    if tokenizer == "gpt2":
        try:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except Exception as e:
            offline = "without a network, give --tokenizer a .tiktoken file, as in a trained model's folder"
            raise InputError(f"cannot get GPT-2's BPE through tiktoken ({e}); {offline}") from None
    elif tokenizer.endswith(".tiktoken"):
        ranks = read_ranks(tokenizer)
    else:
        ranks, _, pattern = read_bpe(tokenizer)
    size = vocab_size or len(ranks) + 1
    check(256 < size <= len(ranks) + 1, f"--vocab_size={size}: {tokenizer} has {len(ranks) + 1}")
    return {token: rank for token, rank in ranks.items() if rank < size - 1}, pattern


def token_flags(ranks, bpe):
    """Over the vocabulary: begins a word, a character; ends a sentence; its tokens without the space."""
    tokens = sorted(ranks, key=ranks.get)
    word = [t[:1].isspace() for t in tokens] + [True]  # <|endoftext|> too may follow anything
    character = [t[0] & 0xC0 != 0x80 for t in tokens] + [True]
    sentence = [re.search(rb"[.!?][\"')\]]*$", t) is not None for t in tokens] + [True]
    spaced = (i for i, token in enumerate(tokens) if re.fullmatch(rb" [!-~]+", token))
    bare = {i: bpe.encode_ordinary(tokens[i][1:].decode()) for i in spaced}
    return np.array(word), np.array(character), np.array(sentence), bare


def cut(tokens, size, flags):
    """Tokens of a document, <|endoftext|> last (n,) -> windows of at most `size`, ended at the last sentence,
    word or letter, each with the one token that follows it.

    They begin without a space, as a prefix does that a person types.
    """
    word, character, sentence, bare = flags
    start = 0
    while start < len(tokens) - 1:
        head = np.array(bare.get(int(tokens[start]), tokens[start : start + 1]), dtype=np.int64)
        if len(head) > size // 2:
            head = tokens[start : start + 1]
        end = min(start + size - len(head) + 1, len(tokens) - 1)
        if end < len(tokens) - 1:
            at = np.arange(start + size // 2, end) + 1  # an early end would waste the window
            begins = [word[tokens[at]] & sentence[tokens[at - 1]], word[tokens[at]], character[tokens[at]]]
            end = next((int(at[b][-1]) for b in begins if b.any()), end)
        yield np.concatenate((head, tokens[start + 1 : end + 1]))
        start = end


def split_points(window, flags, rng):
    """Where the continuations begin, `splits` of them if it has as many: 0 (no prefix), or a random word (or
    character, if there is one word).
    """
    word, character = (np.flatnonzero(begins[window][1:]) + 1 for begins in flags[:2])
    places = np.append(0, word if len(word) else character)
    return rng.choice(places, min(splits, len(places)), replace=False).tolist()


def windows(bpe, flags, text, number):
    """The windows of document `number` -> [(tokens and the next one, split), ...], `splits` of each; none if
    it is empty or, of c4, no prose.
    """
    text = re.sub(r"\s{1000,}", " ", text)  # a million blanks are too many for tiktoken
    tokens = np.array([*bpe.encode_ordinary(text), bpe.eot_token])
    if len(tokens) == 1 or dataset == "c4" and len(tokens) - 1 >= 0.25 * len(text):
        return []
    rng = np.random.default_rng((seed, number, 1))  # not the stream that wrote the toy's document
    pieces = cut(tokens, block_size, flags)
    return [(piece, split) for piece in pieces for split in split_points(piece[:-1], flags, rng)]


def shards(numbered, bpe, flags):
    """Pairs (number, text) -> by the SHARD [(tokens, split, whether held out)], and the documents done."""
    shard = []
    for number, text in numbered:
        text = text.encode("utf-8", "replace").decode().strip()  # JSON can hold lone surrogates: no text
        held_out = zlib.crc32(text.encode()) % val_every == 0  # so the same text is on the same side again
        shard += [(*window, held_out) for window in windows(bpe, flags, text, number)]
        if len(shard) >= SHARD:
            yield shard, number + 1
            shard = []
    if shard:
        yield shard, number + 1


# ---------- From windows to arrays: a file for each shard, and at the end all of them, one after another ----


def embed(shard, bpe, encode):
    """-> {column: array}, a row a split; embeddings in fp16, no prefix all zeros."""
    pieces, split, val = zip(*shard)
    length = np.array([len(piece) - 1 for piece in pieces], dtype=np.uint16)
    tokens = np.zeros((len(shard), block_size + 1), dtype=np.uint16 if bpe.n_vocab <= 65536 else np.uint32)
    for row, piece in zip(tokens, pieces):
        row[: len(piece)] = piece
    prefixes = [bpe.decode(piece[:at]).strip() for piece, at in zip(pieces, split) if at]
    continuations = [bpe.decode(piece[at:-1]).strip() for piece, at in zip(pieces, split)]
    embedded = encode(prefixes + continuations).astype(np.float16)
    split = np.array(split, dtype=np.uint16)
    prefix_emb, cont_emb = np.zeros_like(embedded[: len(shard)]), embedded[len(prefixes) :]
    prefix_emb[split > 0] = embedded[: len(prefixes)]
    return dict(zip(COLUMNS, (tokens, length, split, prefix_emb, cont_emb))) | {"val": np.array(val)}


def join(folder, parts):
    """Writes the .npy files -> {subset: rows}, mean and deviation of train's continuation embeddings."""
    held_out = [np.load(part)["val"] for part in parts]
    n = {"train": sum(int((~val).sum()) for val in held_out), "val": sum(int(val.sum()) for val in held_out)}
    check(all(n.values()), f"{dataset} gave too few windows: {n}: remove {folder}, lower --val_every")
    total = squares = 0.0
    for subset in n:
        os.makedirs(f"{folder}/{subset}", exist_ok=True)
        arrays, start = {}, 0
        for part, val in zip(tqdm(parts, f"join {subset}", leave=False, delay=2), held_out):
            mine = val == (subset == "val")
            end = start + mine.sum()
            with np.load(part) as columns:
                for name in COLUMNS:
                    rows, path = columns[name][mine], f"{folder}/{subset}/{name}.npy"
                    if name not in arrays:
                        shape = (n[subset], *rows.shape[1:])
                        arrays[name] = np.lib.format.open_memmap(path, "w+", rows.dtype, shape)
                    arrays[name][start:end] = rows
            if subset == "train":
                x = arrays["cont_emb"][start:end].astype(np.float64)
                total, squares = total + x.sum(0), squares + (x * x).sum(0)
            start = end
    mean = total / n["train"]
    std = np.sqrt(np.maximum(squares / n["train"] - mean**2, 0))
    return n, mean, np.maximum(std, 1e-3)  # some encoders have dead dimensions


def main(settings):
    if judge:
        return judge_file(judge)
    check(2 <= block_size <= 65535, f"block_size={block_size}: must be from 2 to 65535")
    check(val_every >= 2 and splits >= 1, "--val_every must be at least 2, --splits at least 1")
    check(dataset != "toy" or max_documents < 10**7, "for the toy say python prepare.py config/toy.py")
    folder, (source, size) = f"data/{data_name(dataset)}", documents()
    made_with = {k: v for k, v in settings.items() if k not in ("device", "judge")}
    made_with["bytes"] = size
    for path in filter(os.path.exists, (f"{folder}/parts/settings.json", f"{folder}/meta.json")):
        before = json.loads(Path(path).read_text())["settings"]
        changed = ", ".join(k for k, v in made_with.items() if before.get(k) != v)
        check(not changed, f"{folder} was made with other {changed}: remove that folder, or rename the file")
    if os.path.exists(f"{folder}/meta.json"):
        shutil.rmtree(f"{folder}/parts", ignore_errors=True)
        return print(f"{folder} is prepared already")

    (ranks, pattern), encode = choose_tokenizer(), load_encoder(encoder, device)
    bpe = Tokenizer(ranks, pattern)
    flags = token_flags(ranks, bpe)
    os.makedirs(f"{folder}/parts", exist_ok=True)
    write_file(f"{folder}/parts/settings.json", json.dumps({"settings": made_with}))
    lines = (base64.b64encode(token) + b" %d\n" % ranks[token] for token in sorted(ranks, key=ranks.get))
    write_file(f"{folder}/tokenizer.tiktoken", b"".join(lines))
    parts = sorted(glob.glob(f"{glob.escape(folder)}/parts/*.npz"))  # named after the documents done
    done = int(os.path.basename(parts[-1]).removesuffix(".npz")) if parts else 0
    known = max_documents if dataset in ("toy", "c4") else None
    rest = itertools.islice(enumerate(source), done, max_documents)
    for shard, reached in shards(tqdm(rest, folder, known, initial=done, unit=" documents"), bpe, flags):
        parts.append(f"{folder}/parts/{reached:012d}.npz")
        write_file(parts[-1], partial(np.savez, **embed(shard, bpe, encode)))

    n, mean, std = join(folder, parts)
    if dataset == "toy":
        write_toy_files(folder)
    files = ["tokenizer.tiktoken", *(f"{subset}/{name}.npy" for subset in n for name in COLUMNS)]
    hashes = {name: sha256(f"{folder}/{name}") for name in tqdm(files, "hash", leave=False, delay=2)}
    what = {
        "name": data_name(dataset),
        "encoder": encoder,
        "E": len(mean),
        "tokenizer": hashes["tokenizer.tiktoken"],
        "vocab_size": len(ranks) + 1,
        "pattern": pattern,
        "block_size": block_size,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    meta = {"format": DATA_FORMAT, "data": what, "N": n, "settings": made_with, "sha256": hashes}
    write_file(f"{folder}/meta.json", json.dumps(meta, indent=1) + "\n")
    shutil.rmtree(f"{folder}/parts")
    print(f"{folder}: {n['train']:,} windows to train on, {n['val']:,} to validate")


if __name__ == "__main__":
    run(main, globals())
