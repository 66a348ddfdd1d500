"""The paper's settings: gpt2-large, Sentence-T5-XL and 10 M documents of C4, on one large GPU. They are the
defaults too.

python prepare.py config/paper.py
python train_decoder.py config/paper.py --compile && python train_diffusion.py config/paper.py --compile
"""

dataset = "c4"
out_dir = "out/c4"

prepare = {
    "max_documents": 10_000_000,
    "block_size": 88,
    "encoder": "sentence-transformers/sentence-t5-xl",
    "tokenizer": "gpt2",
    "vocab_size": 50257,
}
train_decoder = {
    "init_from": "gpt2-large",
    "batch_size": 64,
    "max_iters": 250_000,
    "learning_rate": 5e-6,
    "warmup_iters": 5000,
    "weight_decay": 1e-7,
}
train_diffusion = {
    "batch_size": 256,
    "max_iters": 250_000,
    "learning_rate": 1e-3,
    "warmup_iters": 1000,
    "weight_decay": 1e-4,
}
sample = {
    "sampler": "ddpm",
    "steps": 250,
    "cfg_scale": 1.0,
    "temperature": 1.0,
    "repetition_penalty": 1.2,
}
