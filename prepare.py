"""Stage 0: text in, training arrays out.

Each document is tokenised and cut into windows of at most block_size tokens, at sentence ends if possible.
Each window is split at a random word into prefix and continuation, and a frozen sentence encoder embeds both.
Training then reads memory maps and never runs the encoder.

    python prepare.py config/toy.py                                    a small grammar of reviews, made here
    python prepare.py --dataset my.jsonl.gz --encoder all-MiniLM-L6-v2 JSON lines with a field "text"
    python prepare.py --dataset notes.txt                              or a folder; blank lines end documents
    python prepare.py --dataset c4                                     the paper's data: 10 M documents of C4
    python prepare.py --dataset self --tokenizer smollm2 --max_documents 50000    what a decoder itself writes
    python prepare.py --grade samples.jsonl                            how the toy's grammar grades samples

Writes data/NAME/{train,val}/{tokens,length,split,prefix_emb,cont_emb}.npy, tokenizer.tiktoken and, last,
meta.json. It streams: a file for every SHARD windows, all joined at the end (which takes twice the disk), so
the same command continues an interrupted run, to the same bytes.
"""

import base64
import glob
import itertools
import json
import os
import re
import shutil
import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from model import GPT, Sampling
from plumbing.bpe import read_bpe
from plumbing.config import check, check_positive, reported_as, run
from plumbing.corpora import c4_documents, file_documents, openwebtext_documents, text_files
from plumbing.data import COLUMNS, DATA_FORMAT, data_name
from plumbing.decoders import load_tokenizer, source_sha256
from plumbing.devices import generator_at, pick_device
from plumbing.files import lock, sha256, write_file
from plumbing.text import GPT2_PATTERN, Encoder, Tokenizer, clean, read_ranks
from plumbing.toy import print_grades, toy_documents, toy_ranks, write_toy_files

dataset = "c4"  # toy, c4, openwebtext; self, paths (.txt, .jsonl, .jsonl.gz, folders), several with commas
max_documents = 10_000_000  # stop after this many
block_size = 88  # longest window, in tokens of text
encoder = "sentence-transformers/sentence-t5-xl"  # any sentence-transformers name or folder
splits = 1  # rows made from each window, each split at a place of its own
tokenizer = "gpt2"  # gpt2, a file of ranks (.tiktoken), or a decoder's: hub name, folder, .gguf, smollm2
openings = ""  # self: a text file, a line for each way to begin a document; see `self_documents`
vocab_size = 0  # keep the first so many tokens, <|endoftext|> included; 0: all
val_every = 100  # one document in so many is for validation
device = "auto"  # auto, cpu, cuda, mps, or several: cuda:0,cuda:1
grade = ""  # a JSON-lines file written by sample.py: only print how the toy's grammar grades it
seed = 1337  # fixes everything

SHARD = 1024  # windows embedded and written at a time


# ---------- Sources of documents: each yields texts, always in the same order -------------------------------


def self_documents():
    """Documents of about a window, written by the decoder that --tokenizer names.

    Each follows <|endoftext|> and the next line of the openings, where {a|b} stands for either. A line
    `Write a sad sentence. => My {cat|dog}` asks a decoder with a chat template, and its answer begins as the
    line ends. Yields functions -> (text, whether it is complete), so that a run that continues skips them.
    """
    lines = Path(openings).read_text("utf-8-sig").splitlines() if openings else ["{}"]
    lines = [line for line in lines if line.strip()]
    theirs = load_tokenizer(tokenizer)
    fits = theirs.chat_template or not any("=>" in line for line in lines)
    check(fits, f"{openings}: {tokenizer} has no chat template, so it knows no =>")
    where = pick_device(device.split(",")[0])
    gpt = GPT.from_pretrained(tokenizer, renumber=False).to(where)
    *ordinary, eot = read_bpe(tokenizer)[1]
    ordinary, sampling = set(ordinary), Sampling(temperature=1, top_k=1000, top_p=0.95, repetition_penalty=1)

    def begin(number):
        """-> the tokens before document `number`, and its first tokens."""
        rng = np.random.default_rng((seed, number, 2))
        line = re.sub("{(.*?)}", lambda found: rng.choice(found[1].split("|")), lines[number % len(lines)])
        asked, _, start = (part.strip() for part in line.rpartition("=>"))
        if asked:
            chat = [{"role": "user", "content": asked}]
            asked = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before, start = (theirs.encode(text, add_special_tokens=False) for text in (asked, start))
        return before or [eot], start

    @lru_cache(maxsize=1)
    def write(group):
        """-> {number: document}, 512 of them; those with prompts of similar length are written together."""
        begun = {number: begin(number) for number in range(512 * group, 512 * (group + 1))}
        order, texts = sorted(begun, key=lambda number: len(sum(begun[number], []))), {}
        for at in tqdm(range(0, 512, 128), "write", leave=False):
            numbers, rng = order[at : at + 128], generator_at(where, seed, group, at)
            prompts = [sum(begun[number], []) for number in numbers]
            for number, row in zip(numbers, gpt.generate(prompts, block_size, sampling, rng=rng)):
                row = (begun[number][1] + row)[: block_size + 1]
                kept = list(itertools.takewhile(ordinary.__contains__, row))  # special tokens end it
                texts[number] = theirs.decode(kept).rstrip("\ufffd"), kept != row
        return texts

    for number in itertools.count():
        yield partial(lambda number: write(number // 512)[number], number)


def documents():
    """-> the texts of `dataset`, and the hashes of its files; several paths take turns.

    Raises InputError for a path that is missing or holds no text.
    """
    toy = (text for text, _, _ in toy_documents(seed))
    sources = {"toy": toy, "c4": c4_documents(), "openwebtext": openwebtext_documents()}
    if dataset in sources:
        return sources[dataset], []
    texts, hashes = [], []
    for path in dataset.split(","):
        if path == "self":
            files = [openings] if openings else []
            texts.append(self_documents())
            hashes.append(source_sha256(tokenizer))
        else:
            files = text_files(path) if os.path.exists(path) else []
            none = f"there is no dataset {path!r}: use toy, c4, openwebtext, self, or .txt, .jsonl, .jsonl.gz"
            check(files, none)
            texts.append(itertools.chain.from_iterable(map(file_documents, files)))
        hashes += map(sha256, files)
    turns = itertools.zip_longest(*texts)
    return (text for turn in turns for text in turn if text is not None), hashes


# ---------- From text to windows ----------------------------------------------------------------------------


def choose_tokenizer():
    """The BPE ranks {bytes: rank} of the chosen tokenizer, and the pattern that splits text into pieces."""
    pattern = GPT2_PATTERN
    if dataset == "toy":
        return toy_ranks(), pattern
    if tokenizer == "gpt2":
        offline = "without a network, give --tokenizer a .tiktoken file, as in a trained model's folder"
        with reported_as(f"cannot get GPT-2's BPE through tiktoken; {offline}"):
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    elif tokenizer.endswith(".tiktoken"):
        ranks = read_ranks(tokenizer)
    else:
        ranks, _, pattern = read_bpe(tokenizer)
    size = vocab_size or len(ranks) + 1
    check(256 < size <= len(ranks) + 1, f"--vocab_size={size}: {tokenizer} has {len(ranks) + 1}")
    return {token: rank for token, rank in ranks.items() if rank < size - 1}, pattern


class Boundaries(NamedTuple):
    """What each token of the vocabulary begins or ends, so that text is cut where a reader would cut it."""

    word: np.ndarray  # (V,) bool: begins a word
    character: np.ndarray  # (V,) bool: begins a character
    sentence: np.ndarray  # (V,) bool: ends a sentence
    bare: dict  # a token that begins with a space: the tokens of the same text without it

    @classmethod
    def of(cls, ranks, bpe):
        tokens = sorted(ranks, key=ranks.get)
        word = [t[:1].isspace() for t in tokens] + [True]  # <|endoftext|> may follow anything
        character = [t[0] & 0xC0 != 0x80 for t in tokens] + [True]
        sentence = [re.search(rb"[.!?][\"')\]]*$", t) is not None for t in tokens] + [True]
        spaced = (i for i, token in enumerate(tokens) if re.fullmatch(rb" [!-~]+", token))
        bare = {i: bpe.encode_ordinary(tokens[i][1:].decode()) for i in spaced}
        return cls(np.array(word), np.array(character), np.array(sentence), bare)


def cut(tokens, size, boundaries, complete=True):
    """Yields windows of at most `size` tokens, each followed by the one token that comes next.

    tokens: (n,) of a document; <|endoftext|> last if it is complete, else only the first window is yielded. A
    window ends after its last sentence, else word, else letter, and begins without a space, like a prefix
    that a person types.
    """
    word, character, sentence, bare = boundaries
    start = 0
    while start < len(tokens) - 1:
        head = np.array(bare.get(int(tokens[start]), tokens[start : start + 1]), dtype=np.int64)
        if len(head) > size // 2:
            head = tokens[start : start + 1]
        end = min(start + size - len(head) + 1, len(tokens) - 1)  # tokens[end] is the one that comes next
        if end < len(tokens) - 1 or not complete:
            at = np.arange(start + size // 2, end) + 1  # ending in the first half would waste the window
            begins = [word[tokens[at]] & sentence[tokens[at - 1]], word[tokens[at]], character[tokens[at]]]
            end = next((int(at[b][-1]) for b in begins if b.any()), end)
        yield np.concatenate((head, tokens[start + 1 : end + 1]))
        start = end if complete else len(tokens)


def windows(bpe, boundaries, text, number, complete=True):
    """The windows of document `number` -> [(tokens and the next one, split), ...], `splits` of each.

    <|endoftext|> comes after the last if it is complete. A split is 0 (no prefix), or a random word, or in a
    window of one word a random character. There are none if the document is empty or, in c4, not prose: 0.25
    tokens a character or more [official code].
    """
    tokens = np.array([*bpe.encode_ordinary(text), *[bpe.eot_token] * complete])
    if len(tokens) < 2 or dataset == "c4" and len(tokens) - 1 >= 0.25 * len(text):
        return []
    rows, rng = [], np.random.default_rng((seed, number, 1))  # not the stream that wrote the toy's document
    for piece in cut(tokens, block_size, boundaries, complete):
        word, character = (np.flatnonzero(begins[piece[1:-1]]) + 1 for begins in boundaries[:2])
        places = np.append(0, word if len(word) else character)
        chosen = rng.choice(places, min(splits, len(places)), replace=False)
        rows += [(piece, int(split)) for split in chosen]
    return rows


def shards(numbered, bpe, boundaries):
    """Pairs (number, text) -> shards [(tokens, split, whether held out), ...], and the documents done."""
    shard = []
    for number, text in numbered:
        text, complete = text() if callable(text) else (text, True)
        text = clean(text).strip()
        held_out = zlib.crc32(text.encode()) % val_every == 0  # the same text is always on the same side
        shard += [(*window, held_out) for window in windows(bpe, boundaries, text, number, complete)]
        if len(shard) >= SHARD:
            yield shard, number + 1
            shard = []
    if shard:
        yield shard, number + 1


# ---------- From windows to arrays: a file for each shard, all joined at the end ----------------------------


def embed(shard, bpe, encode):
    """-> {column: array}, a row for each split; embeddings in fp16, those of an empty prefix all zeros."""
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
    few = f"{dataset} gave too few windows: {n['train']} to train on and, from other documents, {n['val']} to"
    check(n["train"] > 1 and n["val"], f"{few} validate: add documents or lower --val_every")
    total = squares = 0.0
    for subset, name in tqdm([*itertools.product(n, COLUMNS)], "join", leave=False, delay=2):
        os.makedirs(f"{folder}/{subset}", exist_ok=True)
        path, start = f"{folder}/{subset}/{name}.npy", 0
        for part, val in zip(parts, held_out):
            rows = np.load(part)[name][val == (subset == "val")]
            if start == 0:
                shape = (n[subset], *rows.shape[1:])
                array = np.lib.format.open_memmap(path, "w+", rows.dtype, shape)
            array[start : start + len(rows)] = rows
            start += len(rows)
            if (subset, name) == ("train", "cont_emb"):
                x = rows.astype(np.float64)
                total, squares = total + x.sum(0), squares + (x * x).sum(0)
    mean = total / n["train"]
    std = np.sqrt(np.maximum(squares / n["train"] - mean**2, 0))
    return n, mean, np.maximum(std, 1e-3)  # some encoders have dead dimensions


def main(settings):
    if grade:
        return print_grades(grade)
    check(2 <= block_size <= 65535, f"block_size={block_size}: must be from 2 to 65535")
    check(val_every >= 2, "--val_every must be at least 2")
    check_positive(settings, "splits", "max_documents")
    endless = {"toy", "self"} & set(dataset.split(",")) and max_documents == 10_000_000
    check(not endless, f"{dataset} has no end: say --max_documents, or a config file such as config/toy.py")
    folder = f"data/{data_name(dataset)}"
    source, hashes = documents()
    made_with = {k: v for k, v in settings.items() if k not in ("device", "grade")} | {"files": hashes}
    begun = f"{folder}/parts/{zlib.crc32(json.dumps(made_with).encode()):08x}"  # of a run with these settings
    os.makedirs(begun, exist_ok=True)
    _locked = lock(f"{folder}/.lock")  # until main ends
    if os.path.exists(f"{folder}/meta.json"):
        with reported_as(f"{folder}/meta.json is damaged, or not of this project: remove it"):
            before = json.loads(Path(f"{folder}/meta.json").read_text())["settings"]
            changed = ", ".join(k for k, v in made_with.items() if before.get(k) != v)
        check(not changed, f"{folder} was made with other {changed}: remove its meta.json or rename the file")
        shutil.rmtree(f"{folder}/parts", ignore_errors=True)
        return print(f"{folder} is prepared already")

    # the tokenizer, the encoder, and where an earlier run stopped
    (ranks, pattern), encode = choose_tokenizer(), Encoder(encoder, device)
    bpe = Tokenizer(ranks, pattern)
    boundaries = Boundaries.of(ranks, bpe)
    lines = (base64.b64encode(token) + b" %d\n" % ranks[token] for token in sorted(ranks, key=ranks.get))
    write_file(f"{folder}/tokenizer.tiktoken", b"".join(lines))
    parts = sorted(glob.glob(f"{glob.escape(begun)}/*.npz"))  # named after the documents done
    done = int(os.path.basename(parts[-1]).removesuffix(".npz")) if parts else 0

    # one shard after another, then all together
    known = max_documents if dataset in ("toy", "c4", "self") else None
    rest = itertools.islice(enumerate(source), done, max_documents)
    progress = tqdm(rest, folder, known, initial=done, unit=" documents")
    for shard, reached in shards(progress, bpe, boundaries):
        parts.append(f"{begun}/{reached:012d}.npz")
        write_file(parts[-1], partial(np.savez, **embed(shard, bpe, encode)))
        done = reached
    n, mean, std = join(folder, parts)
    if dataset == "toy":
        write_toy_files(folder, seed)
    data = {
        "name": data_name(dataset),
        "encoder": encoder,
        "E": len(mean),
        "tokenizer": sha256(f"{folder}/tokenizer.tiktoken"),
        "vocab_size": len(ranks) + 1,
        "pattern": pattern,
        "block_size": block_size,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    meta = {"format": DATA_FORMAT, "data": data, "N": n, "settings": made_with}
    write_file(f"{folder}/meta.json", json.dumps(meta, indent=1) + "\n")
    shutil.rmtree(f"{folder}/parts")
    print(f"{folder}: {done:,} documents; {n['train']:,} windows to train on, {n['val']:,} to validate")


if __name__ == "__main__":
    run(main, globals())
