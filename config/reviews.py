"""A small decoder and diffusion for a laptop: short passages of film reviews, or any text of your own.

python prepare.py config/reviews.py --dataset reviews.jsonl.gz
python train_decoder.py config/reviews.py
python train_diffusion.py config/reviews.py

The model goes to out/reviews. A few thousand documents are enough to fine-tune the shipped model instead: add
--init_from pretrained/reviews --max_iters 150 --warmup_iters 10 --learning_rate 1e-3 --muon 0.005 to both
trainings.
"""

dataset = "reviews.jsonl.gz"
out_dir = "out/reviews"

prepare = {"encoder": "all-MiniLM-L6-v2", "block_size": 64, "splits": 3, "vocab_size": 8192}
train_decoder = {
    "init_from": "scratch",
    "n_layer": 6,
    "n_head": 5,
    "n_embd": 320,
    "generator_width": 256,
    "generator_layers": 3,
    "batch_size": 128,
    "max_iters": 12_500,
    "learning_rate": 3e-3,
    "muon": 0.02,
    "warmup_iters": 200,
    "decay_per_step": 3e-4,
    "eval_interval": 500,
    "eval_rows": 1024,
}
train_diffusion = {
    "width": 192,
    "layers": 6,
    "max_iters": 5000,
    "learning_rate": 3e-3,
    "muon": 0.02,
    "warmup_iters": 200,
    "eval_interval": 500,
}

eval = {
    "judge_lm": "smollm2",
    "judges": "vader,pretrained/english/judges/sentiment.npz,pretrained/english/judges/topic.npz",
    "num_texts": 1000,
    "prefix_tokens": 20,
    "cfg_scales": "1,2.5,5",
    "plain_temperatures": "0.7,0.85,1",
    "prompts": "The movie was|This film is about|I watched it with|The story|The director|Last night we"
    "|The acting in this|When I first heard about|The main character|In the beginning,|My friends and I"
    "|The film opens with|The plot|After an hour|The soundtrack|We rented this|The ending|This is a|The book"
    "|I thought",
    "num_samples": 2,
    "control_tokens": 32,
    "attributes": "negative,positive,sports",
    "guidance_weights": "20,40,80,160",
    "best_of": "10",
    "vector_layer": 3,
    "vector_weights": "1,2,4,8",
    "pairs": "negative+sports,positive+sports",
    "lengths": "8,16,32,60",
    "seeds": 5,
}
