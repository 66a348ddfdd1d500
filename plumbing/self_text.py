"""Text that a pretrained decoder writes itself, as training data for the model that will steer it."""

import itertools
import re
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.bpe import read_bpe
from plumbing.convert import load_tokenizer
from plumbing.devices import rng_at
from plumbing.errors import check

GROUP = 512  # documents that are begun together, so that prompts of similar length share a batch
BATCH = 128


class SelfWriter:
    """Documents of about block_size tokens, each a function of the seed and its number.

    name: the decoder. load_gpt(): the same decoder as a `model.GPT` with its own token numbers, called when
    the first document is written. sampling: a `model.Sampling`. openings: a text file, or "" to begin with
    nothing. Document number i begins with line i of this file, over and over; {a|b} in a line stands for
    either. For a line such as `Write a sad sentence. => My {cat|dog}`, the decoder's chat template asks for
    what stands before the arrow, and the answer begins with what stands behind it.

    Raises InputError if a line has an arrow and the decoder no chat template.
    """

    def __init__(self, name, load_gpt, sampling, openings, block_size, seed, device):
        self.load_gpt = load_gpt
        self.gpt = None
        self.sampling = sampling
        self.block_size = block_size
        self.seed = seed
        self.device = device
        self.tokenizer = load_tokenizer(name)
        *ordinary, self.eot = read_bpe(name)[1]
        self.ordinary = set(ordinary)
        lines = Path(openings).read_text("utf-8-sig").splitlines() if openings else ["{}"]
        self.lines = [line for line in lines if line.strip()]
        asks = any("=>" in line for line in self.lines)
        fits = self.tokenizer.chat_template or not asks
        check(fits, f"{openings}: {name} has no chat template, so it cannot be asked with =>")
        self.group = None  # the number of the last group that was written
        self.texts = {}  # its documents

    def prompt(self, number):
        """-> the tokens that the decoder reads before document `number`, and the document's first tokens."""
        rng = np.random.default_rng((self.seed, number, 2))
        line = self.lines[number % len(self.lines)]
        line = re.sub("{(.*?)}", lambda found: rng.choice(found[1].split("|")), line)
        request, _, start = line.rpartition("=>")
        before = [self.eot]
        if request.strip():
            chat = [{"role": "user", "content": request.strip()}]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            before = self.tokenizer.encode(text, add_special_tokens=False) or before
        return before, self.tokenizer.encode(start.strip(), add_special_tokens=False)

    def write(self, numbers, prompts, rng):
        """Yields (number, text, whether it is complete) for the documents of one batch."""
        if self.gpt is None:
            self.gpt = self.load_gpt()
        read = [before + start for before, start in prompts]
        written = self.gpt.generate(read, self.block_size, self.sampling, rng=rng)
        for number, (_, start), new in zip(numbers, prompts, written):
            tokens = (start + new)[: self.block_size + 1]
            kept = list(itertools.takewhile(lambda token: token in self.ordinary, tokens))
            yield number, self.tokenizer.decode(kept).rstrip("\ufffd"), len(kept) < len(tokens)

    def write_group(self, group):
        """-> {number: (text, whether it is complete)} of all documents of a group."""
        numbers = range(GROUP * group, GROUP * (group + 1))
        prompts = {number: self.prompt(number) for number in numbers}
        by_length = sorted(numbers, key=lambda number: sum(map(len, prompts[number])))
        texts = {}
        for begin in tqdm(range(0, GROUP, BATCH), "write", leave=False):
            batch = by_length[begin : begin + BATCH]
            rng = rng_at(self.device, self.seed, group, begin)
            for number, text, complete in self.write(batch, [prompts[number] for number in batch], rng):
                texts[number] = text, complete
        return texts

    def document(self, number):
        """-> the text of a document, and whether it is complete."""
        group = number // GROUP
        if group != self.group:
            self.texts = self.write_group(group)
            self.group = group
        return self.texts[number]


def self_documents(**settings):
    """Endless functions -> (text, whether it is complete). A document that is skipped is never written."""
    writer = SelfWriter(**settings)
    for number in itertools.count():
        yield partial(writer.document, number)
