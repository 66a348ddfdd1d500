"""What comes from the hub, against a small server on the loopback address that answers as the hub does,
with files in the true formats: C4's and OpenWebText's archives, the attribute sets, GPT-2 and Sentence-T5.

Run: python -m pytest tests/test_hub.py
"""

import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
import transformers
from conftest import side_by_side
from sentence_transformers import SentenceTransformer
from sentence_transformers import models as layers
from tokenizers import Tokenizer, models, pre_tokenizers

from configurator import write_ranks
from model import load_encoder
from prepare import toy_documents, toy_ranks

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMIT = "b3166bc19fbae165867d7f4965dc52279d1e9f40"


class Hub(http.server.BaseHTTPRequestHandler):
    """/REPO/resolve/REVISION/FILE with the headers that huggingface_hub asks for, from a folder of
    REPO/FILE.
    """

    root = None

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        repo, _, rest = self.path.partition("/resolve/")
        path = f"{self.root}{repo}/{rest.partition('/')[2]}"
        if self.path.startswith("/api/models/") and "/tree/" not in self.path:  # what the repository is
            path = self.root + "/info.json"
        if not os.path.isfile(path):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with open(path, "rb") as f:
            content = f.read()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def sentence_t5(folder, E=64):
    """A tiny random Sentence-T5 in its true layout: T5 encoder, mean pooling, dense without bias,
    normalise.
    """
    words = sorted({w for text, _, _ in (next(toy_documents(i)) for i in range(200)) for w in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{w}", -5.0) for w in words)]
    pieces += [(chr(c), -10.0) for c in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    fast = transformers.T5TokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0
    )
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(pieces),
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    transformers.T5EncoderModel(config).save_pretrained(folder / "raw")
    fast.save_pretrained(folder / "raw")
    t5 = layers.Transformer(str(folder / "raw"), max_seq_length=256)
    dense = layers.Dense(64, E, bias=False, activation_function=torch.nn.Identity())
    parts = [t5, layers.Pooling(64, "mean"), dense, layers.Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder / "st"))
    shutil.rmtree(folder / "raw")
    return folder / "st"


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server's address, and a copy of the project with a tokenizer."""
    root, project = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("project")
    docs = [text for text, _ in zip((t for t, _, _ in toy_documents(3)), range(120))]

    def write(path, content):
        os.makedirs((root / path).parent, exist_ok=True)
        (root / path).write_bytes(content)

    shutil.copytree(sentence_t5(tmp_path_factory.mktemp("t5")), root / "sentence-transformers/sentence-t5-xl")
    for file, texts in (("00000", docs[:50]), ("00001", [*docs[50:100], "0x1f" * 200, *docs[100:]])):
        rows = "".join(json.dumps({"text": t, "timestamp": "2019", "url": "u"}) + "\n" for t in texts)
        write(f"datasets/allenai/c4/en/c4-train.{file}-of-01024.json.gz", gzip.compress(rows.encode()))
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as archive:
        for part in range(2):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as texts:
                for i, text in enumerate(docs[part * 40 : part * 40 + 40]):
                    add(texts, f"{part}-{i}.txt", text.encode())
            add(archive, f"openwebtext/urlsf_subset00-{part}_data.xz", lzma.compress(inner.getvalue()))
    write("datasets/Skylion007/openwebtext/urlsf_subset00.tar", outer.getvalue())
    for number, repo in enumerate(("sst2", "amazon_polarity", "ag_news", "toxic_conversations")):
        classes = 4 if repo == "ag_news" else 2
        rows = [{"text": docs[i], "label": i % classes, "label_text": "x"} for i in range(60 + number)]
        write(f"datasets/SetFit/{repo}/train.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
    for name in (f for f in os.listdir(ROOT) if f.endswith(".py")):
        shutil.copy(f"{ROOT}/{name}", project)
    write_ranks(project / "toy.tiktoken", toy_ranks())
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(vocab_size=VOCAB, n_positions=128, n_layer=2, n_head=2, n_embd=64)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(root / "openai-community/gpt2-large")
    write("info.json", json.dumps({"id": "repository", "sha": COMMIT, "siblings": []}).encode())

    Hub.root = str(root) + "/"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", project
    server.shutdown()


def variables(hub):
    return {"HF_ENDPOINT": hub[0], "HF_HOME": str(hub[1] / "hf"), "HF_HUB_DISABLE_XET": "1"}


def python(hub, command, code=""):
    """`python COMMAND`, or `python -c CODE`, in the project, with the server for a hub; its standard
    output.
    """
    arguments, env = ["-c", code] if code else command.split(), os.environ | variables(hub)
    done = subprocess.run([sys.executable, *arguments], cwd=hub[1], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


VOCAB = len(toy_ranks()) + 1
BPE = f"--tokenizer=toy.tiktoken --vocab_size={VOCAB}"


def test_c4_and_gpt2_make_a_model_with_the_default_names(hub):
    """prepare.py from c4 with Sentence-T5-XL, then one step of both stages, the decoder from gpt2-large,
    and a text.
    """
    assert "119 documents" in python(hub, f"prepare.py {BPE} --max_documents=119").replace(",", "")
    meta = json.loads((hub[1] / "data/c4/meta.json").read_text())
    assert meta["encoder"] == "sentence-transformers/sentence-t5-xl" and meta["E"] == 64
    small = "--max_iters=1 --eval_rows=8 --batch_size=4"
    decoder = f"train_decoder.py --generator_width=64 --generator_layers=1 {small}"
    diffusion = f"train_diffusion.py --width=64 --layers=2 {small}"
    side_by_side([decoder, diffusion], hub[1], **variables(hub))
    python(hub, "probes.py --data=sentiment,toxicity,topic")
    assert python(
        hub, "sample.py --prefix Today --guide toxic:5,sports --steps=2 --max_new_tokens=4"
    ).startswith("Today")


def test_c4_drops_documents_with_too_many_tokens_a_character(hub):
    code = f"""import prepare as p
p.dataset, p.tokenizer, p.vocab_size = "c4", "toy.tiktoken", {VOCAB}
ranks = p.choose_ranks()
for text in ("0x1f" * 200, "Everyone complained about the goalkeeper." * 3):
    print(len(p.windows(p.make_tokenizer(ranks), p.token_flags(ranks), text, 0)))"""
    dropped, kept = map(int, python(hub, "", code).split())
    assert dropped == 0 and kept > 0


def test_openwebtext_is_read_from_its_nested_archives(hub):
    code = "import prepare as p, itertools; print(len(list(itertools.islice(p.openwebtext_documents(), 80))))"
    assert python(hub, "", code).strip() == "80"


def test_sentence_t5_from_a_folder_gives_unit_vectors(tmp_path):
    x = load_encoder(str(sentence_t5(tmp_path)))(["The soup was really good.", "We flew to an island."])
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-2)
    assert x.shape == (2, 64) and abs(x[0] @ x[1]) < 0.999


def test_special_tokens_in_a_text_are_plain_to_the_encoder():
    x, spaced = load_encoder("all-MiniLM-L6-v2")(["Good [SEP] bad", "Good [ SEP ] bad"])
    assert x @ spaced > 0.999
