"""Stage 0: text in, training arrays out.

Each document is tokenised and cut into windows of at most block_size tokens, at sentence ends where there
are any; each window is split at a random word into prefix and continuation; a frozen sentence encoder
embeds both sides. Training then reads memory maps and never runs the encoder.

    python prepare.py config/toy.py                                    a small grammar of reviews, made here
    python prepare.py --dataset my.jsonl.gz --encoder all-MiniLM-L6-v2 JSON lines with a field "text"
    python prepare.py --dataset notes.txt                              text; a blank line ends a document
    python prepare.py --dataset folder/                                all such files in it
    python prepare.py --dataset c4                                     the paper's 10 M documents, of the hub
    python prepare.py --judge samples.jsonl                            how the toy's grammar judges samples

Writes data/NAME/{train,val}/{tokens,length,split,prefix_emb,cont_emb}.npy, tokenizer.tiktoken and, last,
meta.json. It streams, and the same command again continues an interrupted run to the same bytes.
"""

import glob
import io
import itertools
import json
import lzma
import os
import re
import shutil
import tarfile
import zlib
from functools import cache

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from configurator import (
    COLUMNS,
    DATA_FORMAT,
    DATASETS,
    PROCESSES,
    RANK,
    InputError,
    alone,
    check,
    data_name,
    hub_file,
    join_processes,
    pick_device,
    read_json_lines,
    read_own_json,
    read_ranks,
    run,
    sha256,
    share,
    write_file,
    write_json,
    write_ranks,
)
from model import load_encoder, make_tokenizer, tokenise

dataset = "c4"  # toy, c4, openwebtext, or a path: .txt, .jsonl, .jsonl.gz or a folder of them
max_documents = 10_000_000  # stop after so many
block_size = 88  # longest window, in tokens of text
encoder = "sentence-transformers/sentence-t5-xl"  # any sentence-transformers name or folder
tokenizer = "gpt2"  # gpt2, or a file of ranks (.tiktoken); toy has its own
vocab_size = 50257  # the first so many ranks, <|endoftext|> included
val_every = 100  # one document in so many is for validation
device = "auto"  # auto, cpu, cuda, cuda:1, mps
judge = ""  # a JSON-lines file of sample.py: only report what the toy's grammar says of it
seed = 1337  # fixes everything

PROGRESS_FORMAT = 3
SHARD = 4096  # windows embedded, and made safe on disk, at a time
HEADER = 128  # bytes before the rows of a .npy file


# ------------------------------------------------------------------------------------------------------------
# The toy: a grammar of short reviews, whose sentiment and topic are known
# ------------------------------------------------------------------------------------------------------------

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


def toy_documents(seed):
    """Endless (text, sentiment, topic): opening and event, neutral; two or three opinions; often a
    closing.
    """
    for number in itertools.count():
        rng = np.random.default_rng((seed, number))
        topic, sentiment = rng.choice(list(TOPICS)), rng.choice(list(SENTIMENTS))
        opening, event, opinions, closing = sentence_patterns(topic, sentiment)
        chosen = [
            opening,
            event,
            *rng.choice(opinions, rng.integers(2, 4)),
            *[closing] * int(rng.random() < 0.6),
        ]
        yield ". ".join(pick_one(pattern, rng) for pattern in chosen) + ".", str(sentiment), str(topic)


def judge_text(text):
    """The grammar's own verdict -> (sentiment or None, topic or None, sentences, sentences that it could
    have written).

    A sentiment (a topic) is a text's where its words are all of that one. An unfinished last sentence does
    not count.
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
    for row in read_json_lines(path):
        check(isinstance(row.get("continuation"), str), f"{path}: not a file of sample.py --out")
        verdicts.setdefault(str(row.get("guide")), []).append(judge_text(row["continuation"]))
    columns = (*SENTIMENTS, *TOPICS, "as asked", "fluent")
    print(f"{'guide':24}{'texts':>6}" + "".join(f"{column:>10}" for column in columns))
    for guide, rows in verdicts.items():
        sentiments, topics, sentences, could = zip(*rows)
        asked = {re.sub(r"^.*=|:.*$", "", item.strip()) for item in guide.split(",")}
        share = {name: sentiments.count(name) / len(rows) for name in SENTIMENTS}
        share |= {name: topics.count(name) / len(rows) for name in TOPICS}
        share["as asked"] = sum(asked <= {s, t} for s, t in zip(sentiments, topics)) / len(rows)
        share["fluent"] = sum(could) / max(1, sum(sentences))  # of the sentences
        if guide == "none":
            del share["as asked"]
        cells = (f"{share[column]:10.1%}" if column in share else " " * 10 for column in columns)
        print(f"{guide:24}{len(rows):6}" + "".join(cells))


def toy_ranks():
    """The toy's own tokenizer: each byte, and each whole word of the grammar, with and without a space
    before it.
    """
    words = sorted(set(re.findall(r"[A-Za-z]+", grammar().pattern)))
    tokens = [bytes([b]) for b in range(256)] + [
        w.encode() for word in words for w in (word, f" {word}") if len(w) > 1
    ]
    return {token: rank for rank, token in enumerate(tokens)}


def write_toy_files(folder, seed):
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


# ------------------------------------------------------------------------------------------------------------
# Sources of documents: each yields texts, in an order that does not change
# ------------------------------------------------------------------------------------------------------------


def file_documents(path):
    """Texts of one file."""
    if path.endswith((".jsonl", ".jsonl.gz")):
        for number, row in enumerate(read_json_lines(path), 1):
            check(isinstance(row.get("text"), str), f'{path}, row {number}: no field "text" with a string')
            yield row["text"]
    else:
        try:
            with open(path, encoding="utf-8-sig") as f:
                lines = []
                for line in itertools.chain(f, [""]):
                    if line.strip() and len(lines) < 10_000:
                        lines.append(line)
                    elif lines:
                        yield "".join([*lines, line])
                        lines = []
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"cannot read {path} as UTF-8 text: {e}") from None


def openwebtext_documents():
    """The 21 archives of the hub's copy, each of many .xz archives of text files."""
    for number in range(21):
        # the last revision of the archives that is complete; later ones need a library to read
        revision = "b3166bc19fbae165867d7f4965dc52279d1e9f40"
        name = f"urlsf_subset{number:02d}.tar"
        path = hub_file("Skylion007/openwebtext", name, repo_type="dataset", revision=revision)
        try:
            with tarfile.open(path) as outer:
                for member in (m for m in outer if m.name.endswith(".xz")):
                    with tarfile.open(fileobj=outer.extractfile(member), mode="r|xz") as inner:
                        for text in (t for t in inner if t.isfile()):
                            yield inner.extractfile(text).read().decode("utf-8", "replace")
        except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
            raise InputError(f"{path} is damaged ({e}): remove it, and it is downloaded again") from None


def c4_documents():
    for number in share(range(1024)):
        name = f"en/c4-train.{number:05d}-of-01024.json.gz"
        yield from (row["text"] for row in read_json_lines(hub_file("allenai/c4", name, repo_type="dataset")))


def documents():
    """The texts of `dataset`. Raises InputError for a path that is missing or holds no text."""
    if dataset == "toy":
        return every(text for text, _, _ in toy_documents(seed))
    if dataset == "c4":
        return c4_documents()
    if dataset == "openwebtext":
        return every(openwebtext_documents())
    check(os.path.exists(dataset), f"there is no dataset {dataset!r}: use toy, c4, openwebtext or a path")
    check(text_files(), f"{dataset}: no .txt, .jsonl or .jsonl.gz file")
    return every(itertools.chain.from_iterable(map(file_documents, text_files())))


def text_files():
    """The files of a dataset that is a path, in order."""
    found = [dataset]
    if os.path.isdir(dataset):
        found = [os.path.join(folder, name) for folder, _, names in os.walk(dataset) for name in names]
    return sorted(f for f in found if f.endswith((".txt", ".jsonl", ".jsonl.gz")))


def every(texts):
    """This process's share of the texts."""
    return itertools.islice(texts, RANK, None, PROCESSES)


# ------------------------------------------------------------------------------------------------------------
# From text to windows
# ------------------------------------------------------------------------------------------------------------


def choose_ranks():
    """The BPE ranks of the tokenizer asked for -> {bytes: rank}."""
    if dataset == "toy":
        return toy_ranks()
    if tokenizer == "gpt2":
        try:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except Exception as e:
            offline = "without a network, give --tokenizer a .tiktoken file, as in a trained model's folder"
            why = type(e).__name__
            raise InputError(f"cannot get GPT-2's BPE through tiktoken ({why}); {offline}") from None
    else:
        ranks = read_ranks(tokenizer)
    limit = len(ranks) + 1
    check(
        257 <= vocab_size <= limit,
        f"{tokenizer} does not have {vocab_size} entries: give --vocab_size, from 257 to {limit}",
    )
    check(vocab_size <= 65536, f"vocab_size={vocab_size}: at most 65536")
    ranks = {token: rank for token, rank in ranks.items() if rank < vocab_size - 1}
    bytes_first = all(bytes([b]) in ranks for b in range(256))
    check(bytes_first, f"{tokenizer}: its first {vocab_size} entries lack a byte: raise --vocab_size")
    return ranks


def token_flags(ranks):
    """Boolean arrays over the vocabulary (the token begins a word, begins a character, ends a sentence), and
    {token: its tokens without the space that it begins with}.
    """
    tokens, bpe = sorted(ranks, key=ranks.get), make_tokenizer(ranks)
    word = [t[:1].isspace() for t in tokens] + [True]  # <|endoftext|> too may follow anything
    character = [t[0] & 0xC0 != 0x80 for t in tokens] + [True]
    sentence = [re.search(rb"[.!?][\"')\]]*$", t) is not None for t in tokens] + [True]
    bare = {
        i: bpe.encode_ordinary(t[1:].decode()) for i, t in enumerate(tokens) if re.fullmatch(rb" [!-~]+", t)
    }
    return np.array(word), np.array(character), np.array(sentence), bare


def cut(tokens, size, flags):
    """Tokens of a document (n,) -> windows of at most `size`, ended at the last sentence, word or letter.

    They begin without a space, as a prefix does that a person types.
    """
    word, character, sentence, bare = flags
    start = 0
    while start < len(tokens):
        head = np.array(bare.get(int(tokens[start]), tokens[start : start + 1]), dtype=np.int64)
        if len(head) > size // 2:
            head = tokens[start : start + 1]
        end = min(start + size - len(head) + 1, len(tokens))
        if end < len(tokens):
            at = np.arange(start + size // 2, end) + 1  # an early end would waste the window
            begins = [word[tokens[at]] & sentence[tokens[at - 1]], word[tokens[at]], character[tokens[at]]]
            end = next((int(at[b][-1]) for b in begins if b.any()), end)
        yield np.concatenate((head, tokens[start + 1 : end]))
        start = end


def split_point(window, flags, rng):
    """Where the continuation begins: 0 (no prefix), or a random word of the window, or, where it has none,
    character.
    """
    word, character, *_ = flags
    for begins in (word, character):
        at = np.flatnonzero(begins[window])
        at = at[(at > 0) & (at < len(window))]
        if len(at):
            break
    return int(rng.choice(np.append(0, at)))


def windows(bpe, flags, text, number):
    """The windows of document `number` -> [(tokens, split), ...]; none if it is empty or, of c4, no prose."""
    tokens = np.array(tokenise(bpe, text), dtype=np.int64)
    if not text or dataset == "c4" and len(tokens) >= 0.25 * len(text):
        return []
    rng = np.random.default_rng((seed, number, 1))  # not the stream that wrote the toy's document
    pieces = list(cut(tokens, block_size, flags))
    out = [(piece, split_point(piece, flags, rng)) for piece in pieces]
    if len(pieces[-1]) < block_size:  # room for the end of the document; it is nobody's whole continuation
        out[-1] = np.append(pieces[-1], bpe.eot_token), out[-1][1]
    return out


def shards(texts, done, bpe, flags, bar):
    """Pairs (number, text) -> yields ({"train": windows, "val": windows}, documents done), by the SHARD."""
    shard = {"train": [], "val": []}
    for number, text in texts:
        text = text.encode("utf-8", "replace").decode().strip()  # JSON can hold lone surrogates: no text
        shard["val" if number % val_every == 0 else "train"] += windows(bpe, flags, text, number)
        done += 1
        bar.update()
        if len(shard["train"]) + len(shard["val"]) >= SHARD:
            yield shard, done
            shard = {"train": [], "val": []}
    yield shard, done


# ------------------------------------------------------------------------------------------------------------
# Arrays on disk, which grow shard by shard
# ------------------------------------------------------------------------------------------------------------


class Arrays:
    """The .npy files of one split, appended to; `cut_to` drops what an interruption left half done.

    crc: {name: the CRC-32 of that file's rows}.
    """

    def __init__(self, folder, E):
        os.makedirs(folder, exist_ok=True)
        kinds = {"tokens": ("<u2", (block_size,)), "length": ("<u2", ()), "split": ("<u2", ())}
        self.kinds = kinds | {"prefix_emb": ("<f2", (E,)), "cont_emb": ("<f2", (E,))}
        self.files = {}
        for name in self.kinds:
            path = f"{folder}/{name}.npy"
            self.files[name] = open(path, "r+b" if os.path.exists(path) else "w+b")

    def cut_to(self, rows, crc):
        """Raises InputError where the rows that stay are not those that were written."""
        self.crc = crc  # kept up to date by `append`
        for name, (kind, shape) in self.kinds.items():
            header = io.BytesIO()
            fields = {"descr": kind, "fortran_order": False, "shape": (rows, *shape)}
            np.lib.format.write_array_header_1_0(header, fields)
            assert len(header.getvalue()) == HEADER  # numpy leaves room for the first axis to grow
            file, found = self.files[name], 0
            file.truncate(HEADER + rows * np.dtype((kind, shape)).itemsize)
            file.seek(0)
            file.write(header.getvalue())
            while chunk := file.read(2**24):
                found = zlib.crc32(chunk, found)
            folder = os.path.dirname(os.path.dirname(file.name))
            check(found == crc[name], f"{file.name} is damaged: remove {folder} and prepare it again")
            file.flush()

    def append(self, columns):
        for name, rows in columns.items():
            content = np.ascontiguousarray(rows, dtype=self.kinds[name][0]).tobytes()
            self.files[name].write(content)
            self.crc[name] = zlib.crc32(content, self.crc[name])
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())


def embed(batch, bpe, encode, E):
    """[(tokens, split), ...] -> the columns of their rows, embeddings in fp16; no prefix is all zeros."""
    length, split = np.array([len(t) for t, _ in batch]), np.array([s for _, s in batch])
    tokens = np.zeros((len(batch), block_size), dtype=np.uint16)
    for row, (window, _) in zip(tokens, batch):
        row[: len(window)] = window
    ends = [len(w) - (w[-1] == bpe.eot_token) for w, _ in batch]
    texts = [bpe.decode(w[:s]).strip() for w, s in batch if s]
    texts += [bpe.decode(w[s:n]).strip() for (w, s), n in zip(batch, ends)]
    embedded = encode(texts).astype(np.float16)
    check(np.isfinite(embedded).all(), f"the encoder {encoder} gave numbers that are not finite on {device}")
    prefix_emb = np.zeros((len(batch), E), dtype=np.float16)
    prefix_emb[split > 0], cont_emb = embedded[: -len(batch)], embedded[-len(batch) :]
    return {
        "tokens": tokens,
        "length": length,
        "split": split,
        "prefix_emb": prefix_emb,
        "cont_emb": cont_emb,
    }


def main(settings):
    if judge:
        return judge_file(judge)
    check(2 <= block_size <= 65535, f"block_size={block_size}: must be from 2 to 65535")
    check(val_every >= 2 and max_documents >= 2, "val_every and max_documents must be at least 2")
    own = dataset != "toy" or max_documents <= 1_000_000
    check(own, "the toy has settings of its own: python prepare.py config/toy.py")
    folder = f"data/{data_name(dataset)}"
    source, place = documents(), pick_device(device)
    join_processes(place)
    with alone(f"{folder}/prepare"):
        if PROCESSES > 1:
            torch.distributed.barrier()  # whose first has the lock
        prepare(folder, settings, source, place)


def prepare(folder, settings, source, place):
    """Writes the folder, or what of it is missing."""
    meta_path = f"{folder}/meta.json"
    part = f"{folder}/part-{RANK}-of-{PROCESSES}" if PROCESSES > 1 else folder
    choice = {k: v for k, v in settings.items() if k not in ("device", "judge")}
    if dataset not in DATASETS and os.path.exists(dataset):
        choice["size of files"] = [os.path.getsize(path) for path in text_files()]
    for path, version in ((meta_path, DATA_FORMAT), (f"{part}/progress.json", PROGRESS_FORMAT)):
        made = read_own_json(path, version) if os.path.exists(path) else {"settings": choice}
        changed = ", ".join(k for k, v in choice.items() if made["settings"].get(k, v) != v)
        check(not changed, f"{folder} was made with other {changed}: remove that folder, or rename the file")
    if os.path.exists(meta_path):
        for path in read_own_json(meta_path, DATA_FORMAT)["sha256 of"]:
            whole = os.path.exists(f"{folder}/{path}")
            check(whole, f"{folder}/{path} is missing: remove {folder} and prepare it again")
        return print(f"{folder} is prepared already")
    progress = write_part(part, choice, source, place)
    if PROCESSES > 1:
        torch.distributed.barrier()
        progress = join_parts(folder) if RANK == 0 else None
    if RANK == 0:
        finish(folder, progress)


def write_part(folder, choice, source, place):
    """Writes the arrays of this process's share of the documents -> what progress.json holds at their end:
    documents and windows done, and of the continuations' embeddings the sum and the sum of squares.
    """
    ranks = choose_ranks()
    bpe, flags, encode = make_tokenizer(ranks), token_flags(ranks), load_encoder(encoder, place)
    E, path = encode(["width"]).shape[1], f"{folder}/progress.json"
    os.makedirs(folder, exist_ok=True)
    write_ranks(f"{folder}/tokenizer.tiktoken", ranks)
    progress = {"format": PROGRESS_FORMAT, "settings": choice, "documents": 0, "N": {"train": 0, "val": 0}}
    progress |= {"sum": [0.0] * E, "squares": [0.0] * E}
    progress["crc"] = {split: dict.fromkeys(COLUMNS, 0) for split in progress["N"]}
    if os.path.exists(path):
        progress = read_own_json(path, PROGRESS_FORMAT)
    arrays = {split: Arrays(f"{folder}/{split}", E) for split in ("train", "val")}
    for split in arrays:
        arrays[split].cut_to(progress["N"][split], progress["crc"][split])

    done, most = progress["documents"], len(share(range(max_documents)))
    numbered = zip(itertools.count(RANK, PROCESSES), source)
    options = {"desc": folder, "unit": " documents", "dynamic_ncols": True, "disable": RANK > 0}
    with tqdm(total=most if dataset in ("toy", "c4") else None, initial=done, **options) as bar:
        texts = itertools.islice(numbered, done, most)
        for shard, progress["documents"] in shards(texts, done, bpe, flags, bar):
            for split, batch in shard.items():
                if batch:
                    columns = embed(batch, bpe, encode, E)
                    arrays[split].append(columns)
                    progress["N"][split] += len(batch)
                    if split == "train":
                        x = columns["cont_emb"].astype(np.float64)
                        progress["sum"] = (progress["sum"] + x.sum(0)).tolist()
                        progress["squares"] = (progress["squares"] + (x * x).sum(0)).tolist()
            write_json(path, progress)
            bar.set_postfix(windows=f"{sum(progress['N'].values()):,}")
    for split in arrays:
        arrays[split].cut_to(progress["N"][split], progress["crc"][split])
    return progress


def join_parts(folder):
    """One after another, the parts that the processes wrote -> their progress.json, added up."""
    parts = [f"{folder}/part-{rank}-of-{PROCESSES}" for rank in range(PROCESSES)]
    each = [read_own_json(f"{part}/progress.json", PROGRESS_FORMAT) for part in parts]
    remove([f"{folder}/progress.json"])  # of one process, whose arrays are about to go
    os.replace(f"{parts[0]}/tokenizer.tiktoken", f"{folder}/tokenizer.tiktoken")
    whole = {"settings": each[0]["settings"], "documents": sum(p["documents"] for p in each)}
    whole |= {key: np.sum([p[key] for p in each], axis=0).tolist() for key in ("sum", "squares")}
    whole["N"] = {split: sum(p["N"][split] for p in each) for split in ("train", "val")}
    for split, rows in whole["N"].items():
        arrays = Arrays(f"{folder}/{split}", len(whole["sum"]))
        arrays.cut_to(0, dict.fromkeys(COLUMNS, 0))
        for part in tqdm(parts, desc=f"join {folder}/{split}", leave=False, delay=2):
            columns = {name: np.load(f"{part}/{split}/{name}.npy", mmap_mode="r") for name in arrays.kinds}
            for at in range(0, len(columns["length"]), SHARD):
                arrays.append({name: column[at : at + SHARD] for name, column in columns.items()})
        arrays.cut_to(rows, arrays.crc)
    return whole


def finish(folder, progress):
    """Writes meta.json, with which the data is whole, and removes what only an interrupted run needs."""
    n, done = progress["N"], progress["documents"]
    leftovers = [f"{folder}/progress.json", *glob.glob(f"{glob.escape(folder)}/part-*")]
    if not n["train"] or not n["val"]:
        remove(leftovers)
        what = f"{done} documents gave {n['train']} windows for training and {n['val']} for validation"
        raise InputError(f"{dataset}: {what}; both are needed")
    mean = np.array(progress["sum"]) / n["train"]
    std = np.sqrt(np.maximum(np.array(progress["squares"]) / n["train"] - mean**2, 0))
    tokenizer_path = f"{folder}/tokenizer.tiktoken"
    meta = {"format": DATA_FORMAT, "name": data_name(dataset), "encoder": encoder}
    meta |= {"tokenizer": sha256(tokenizer_path), "vocab_size": len(read_ranks(tokenizer_path)) + 1}
    meta |= {"block_size": block_size, "E": len(mean), "N": n, "documents": done}
    meta |= {"mean": mean.tolist(), "std": std.tolist(), "settings": progress["settings"]}
    arrays = [f"{split}/{name}.npy" for split in n for name in COLUMNS]
    files = tqdm(["tokenizer.tiktoken", *arrays], desc=f"hash {folder}", leave=False, delay=2)
    meta["sha256 of"] = {path: sha256(f"{folder}/{path}") for path in files}
    if dataset == "toy":
        write_toy_files(folder, seed)
    write_json(f"{folder}/meta.json", meta)
    remove(leftovers)
    print(f"{folder}: {n['train']:,} windows to train on, {n['val']:,} to validate, of {done:,} documents")


def remove(paths):
    for path in filter(os.path.exists, paths):
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


if __name__ == "__main__":
    run(main, globals())
