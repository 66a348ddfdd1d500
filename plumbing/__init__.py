"""Everything that is not the method, in modules with one job each.

errors          mistakes that a person can fix: one line, exit status 2
config          settings at the top of a script, from the command line and from config files
files           files that are complete or absent: weights, checkpoints, JSON lines, downloads
devices         devices, precision, processes, and random numbers without state
data            what prepare.py wrote, as memory maps
corpora         text that others wrote: files of your own, and C4
self_text       text that a decoder writes, to train a model on
toy             a small grammar of reviews, whose sentiment and topic are known
text            the tokenizer and the sentence encoder
bpe             tokenizers that others trained
convert         decoders that others trained
gguf_files      those in .gguf files, the format of llama.cpp
autoregression  writing token after token, with a key-value cache
optim           the optimizers and the learning rate
labelled        labelled text, for probes and judges
judges          judges of fluency and of attributes
results         the results of eval.py, on disk and as tables
plot            pictures of these tables
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  before anything that an older Python cannot import
    print(f"nanoDGLM needs Python 3.11 or newer, and this is {sys.version.split()[0]}", file=sys.stderr)
    raise SystemExit(2)
