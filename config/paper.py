"""The paper's way to sample, with its guidance weight for probes.

Data, sizes and trainings need no settings here: the defaults of the scripts are the paper's (gpt2-large,
Sentence-T5-XL, 10 M documents of C4, 250,000 steps of each stage). They are meant for one large GPU.

python probes.py config/paper.py --out_dir out/c4 --data toxicity
python sample.py config/paper.py --out_dir out/c4 --prefix "The weather in Boston" --guide nontoxic:50
"""

sampler = "ddpm"
steps = 250
cfg_scale = 1.0
guide_through = "network"
temperature = 1.0
repetition_penalty = 1.2

probes = {"inverse_penalty": 1000.0, "weight": 50.0}
