"""The toy: reviews of a small grammar, the whole path in minutes on a laptop, without a hub.

python prepare.py config/toy.py
python train_decoder.py config/toy.py
python train_diffusion.py config/toy.py
python probes.py config/toy.py
python sample.py config/toy.py --guide negative
"""

dataset = "toy"
out_dir = "out/toy"

prepare = {"encoder": "all-MiniLM-L6-v2", "max_documents": 12_000, "block_size": 56, "val_every": 20}
train_decoder = {
    "init_from": "scratch",
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "generator_width": 128,
    "generator_layers": 2,
    "batch_size": 64,
    "max_iters": 1000,
    "learning_rate": 2e-3,
    "warmup_iters": 100,
    "eval_interval": 500,
}
train_diffusion = {
    "width": 128,
    "layers": 4,
    "batch_size": 128,
    "max_iters": 1200,
    "learning_rate": 2e-3,
    "warmup_iters": 100,
    "eval_interval": 400,
}
probes = {"data": "data/toy/sentiment.jsonl,data/toy/topic.jsonl"}
