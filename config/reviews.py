"""Short passages of film reviews, or of any text of your own, on a laptop: a small decoder and diffusion.

python prepare.py config/reviews.py --dataset reviews.jsonl.gz
python train_decoder.py config/reviews.py && python train_diffusion.py config/reviews.py
"""

dataset = "reviews.jsonl.gz"
out_dir = "out/reviews"

prepare = {"encoder": "all-MiniLM-L6-v2", "block_size": 64, "vocab_size": 8192}
train_decoder = {
    "init_from": "scratch",
    "n_layer": 6,
    "n_head": 4,
    "n_embd": 256,
    "generator_width": 256,
    "generator_layers": 4,
    "batch_size": 128,
    "max_iters": 20_000,
    "learning_rate": 2e-3,
    "warmup_iters": 500,
    "weight_decay": 1e-4,
    "eval_interval": 500,
}
train_diffusion = {
    "width": 256,
    "layers": 6,
    "max_iters": 10_000,
    "warmup_iters": 500,
    "eval_interval": 500,
}
