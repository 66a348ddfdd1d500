"""How the paper samples. Data, sizes and trainings need no settings: the scripts' defaults are the paper's
(gpt2-large, Sentence-T5-XL, 10 M documents of C4, 250,000 steps of each stage), on one large GPU.

python probes.py config/paper.py --data toxicity
python sample.py config/paper.py --prefix "The weather in Boston" --guide nontoxic:50
"""

sampler = "ddpm"
steps = 250
cfg_scale = 1.0
guide_through = "network"
temperature = 1.0
repetition_penalty = 1.2

probes = {"inverse_penalty": 1000.0, "weight": 50.0}
