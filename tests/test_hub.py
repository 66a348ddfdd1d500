"""What comes from the hub, against a small server on the loopback address that answers as the hub does,
with files in the real formats: C4's archives, the attribute sets, GPT-2 and Sentence-T5.

Run: python -m pytest tests/test_hub.py
"""

import base64
import gzip
import hashlib
import http.server
import itertools
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
import transformers
from conftest import copy_scripts, in_one
from sentence_transformers import SentenceTransformer
from sentence_transformers import models as layers
from tokenizers import Tokenizer, models, pre_tokenizers

from plumbing.files import load_weights, sha256
from plumbing.text import Encoder
from plumbing.toy import toy_documents, toy_ranks

COMMIT = "b3166bc19fbae165867d7f4965dc52279d1e9f40"


class Hub(http.server.BaseHTTPRequestHandler):
    """/REPO/resolve/REVISION/FILE, with the headers that huggingface_hub asks for, from ROOT/REPO/FILE; and
    what a repository holds, for older clients at /api/models/REPO, for newer ones in its /tree/REVISION too.
    """

    root = None

    def content(self):
        """-> bytes, or None if there is no such thing here."""
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            repo, *tree = path.removeprefix("/api/models/").partition("/revision/")[0].split("/tree/")
            files = list_files(f"{self.root}{repo}")
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            sizes = ((name, os.path.getsize(f"{self.root}{repo}/{name}")) for name in files)
            entries = [{"type": "file", "path": name, "size": n, "oid": COMMIT} for name, n in sizes]
            return json.dumps(entries if tree else info).encode() if files else None
        repo, _, rest = path.partition("/resolve/")
        path = f"{self.root}{repo}/{rest.partition('/')[2]}"
        if os.path.isfile(path):
            with open(path, "rb") as f:
                return f.read()

    def do_GET(self):
        content = self.content()
        found = content is not None
        content = content or b""
        self.send_response(200 if found else 404)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def list_files(folder):
    """The files below a folder, by their paths in it."""
    files = [os.path.join(below, name) for below, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(path, folder) for path in files)


def sentence_t5(folder):
    """A tiny random Sentence-T5 in its real layout: T5 encoder, mean pooling, dense, normalise."""
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127)))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    transformers.T5TokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "raw")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(pieces),
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
    }
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    transformers.T5EncoderModel(config).save_pretrained(folder / "raw")
    t5 = layers.Transformer(str(folder / "raw"), max_seq_length=256)
    dense = layers.Dense(64, 64, bias=False, activation_function=torch.nn.Identity())
    parts = [t5, layers.Pooling(64, "mean"), dense, layers.Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder / "st"))
    return folder / "st"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server's address, and a copy of the project with a tokenizer."""
    root = tmp_path_factory.mktemp("hub")
    project = copy_scripts(tmp_path_factory.mktemp("project"))
    docs = [text for text, _, _ in itertools.islice(toy_documents(3), 120)]

    def write(path, content):
        os.makedirs((root / path).parent, exist_ok=True)
        (root / path).write_bytes(content)

    shutil.copytree(sentence_t5(tmp_path_factory.mktemp("t5")), root / "sentence-transformers/sentence-t5-xl")
    for file, texts in (("00000", docs[:50]), ("00001", [*docs[50:100], "0x1f" * 200, *docs[100:]])):
        rows = "".join(json.dumps({"text": t, "timestamp": "2019", "url": "u"}) + "\n" for t in texts)
        write(f"datasets/allenai/c4/en/c4-train.{file}-of-01024.json.gz", gzip.compress(rows.encode()))
    for number, repo in enumerate(("sst2", "amazon_polarity", "ag_news", "toxic_conversations")):
        classes = 4 if repo == "ag_news" else 2
        rows = [{"text": docs[i], "label": i % classes, "label_text": "x"} for i in range(60 + number)]
        write(f"datasets/SetFit/{repo}/train.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
    ranks = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in toy_ranks().items())
    (project / "toy.tiktoken").write_text("".join(ranks))
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(vocab_size=VOCAB, n_positions=128, n_layer=2, n_head=2, n_embd=64)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2-large")

    Hub.root = str(root) + "/"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", project
    server.shutdown()


VOCAB = len(toy_ranks()) + 1
NUM_DOCUMENTS = 119


def test_c4_and_gpt2_make_a_model_with_the_default_names(hub):
    """prepare.py from c4 with Sentence-T5-XL, one step of both stages with gpt2-large as the decoder (once
    frozen), the paper's probes, a text.
    """
    bpe = f"--tokenizer=toy.tiktoken --vocab_size={VOCAB} --block_size=64 --val_every=9"
    small = "--max_iters=1 --eval_rows=8 --batch_size=4"
    generator = "--generator_width=64 --generator_layers=1"
    sample = "sample.py --prefix Today --guide toxic:5,sports --steps=2 --max_new_tokens=4"
    stages = [
        f"prepare.py {bpe} --max_documents={NUM_DOCUMENTS}",
        f"train_decoder.py --freeze {generator} {small} --out_dir=out/frozen",
        f"train_decoder.py {generator} {small}",
        f"train_diffusion.py --width=64 --layers=2 {small}",
        "probes.py --data=sentiment,toxicity,topic --out_dir=out/c4 --weight=20",
        f"{sample} --out_dir=out/c4",
    ]
    url, project = hub
    env = {"HF_ENDPOINT": url, "HF_HOME": str(project / "hf"), "HF_HUB_DISABLE_XET": "1"}
    said, notes = in_one(stages, project, **env)
    assert "exit status" not in notes and "Traceback" not in notes, notes
    meta = json.loads((project / "data/c4/meta.json").read_text())
    assert meta["data"]["encoder"] == "sentence-transformers/sentence-t5-xl" and meta["data"]["E"] == 64
    assert NUM_DOCUMENTS - 1 <= sum(meta["N"].values()) < 2 * NUM_DOCUMENTS
    frozen = load_weights(f"{project}/out/frozen", "decoder")[0]["architecture"]["frozen"]
    assert frozen == {"name": "gpt2-large", "sha256": sha256(f"{Hub.root}/gpt2-large/model.safetensors")}
    assert all(label in said for label in (" positive\n", " toxic\n", " business, "))
    assert said.splitlines()[-1].startswith("Today")

    # the same model, uploaded, writes the same text; a copy of what only the owner needs is not downloaded
    shutil.copytree(project / "out/c4", f"{Hub.root}/someone/model")
    again, notes = in_one([f"{sample} --out_dir=someone/model"], project, **env)
    assert again.splitlines()[-1] == said.splitlines()[-1], notes
    assert not list((project / "hf").glob("**/models--someone--model/**/*.pt"))


def test_an_encoder_from_a_folder_gives_unit_vectors_and_special_tokens_are_plain_text_to_it(tmp_path):
    x = Encoder(str(sentence_t5(tmp_path)))(["The soup was really good.", "We flew to an island."])
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-2)
    assert x.shape == (2, 64) and abs(x[0] @ x[1]) < 0.999
    x, spaced = Encoder("all-MiniLM-L6-v2")(["Good [SEP] bad", "Good [ SEP ] bad"])
    assert x @ spaced > 0.999
