"""The networks. Run: python -m pytest tests/test_networks.py"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st

from model import GPT, Decoder, DiffusionTransformer, GPTConfig, PromptGenerator, Sampling, insert
from plumbing.autoregression import pick
from plumbing.devices import attend

SIZES = {"vocab_size": 97, "n_positions": 64, "n_layer": 3, "n_head": 4, "n_embd": 64}
GREEDY = Sampling(temperature=0, repetition_penalty=1)


def llama(n_kv_head, tied, theta, **sizes):
    """A random Llama of transformers: tied or untied, some or all heads of queries to a head of keys."""
    rope = {"rope_theta": theta, "rope_type": "default"}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{"vocab_size": 97, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96} | sizes,
            num_attention_heads=4,
            num_key_value_heads=n_kv_head,
            tie_word_embeddings=tied,
            rope_theta=theta,
            rope_parameters=rope,
            initializer_range=0.3,
        )
    )


KINDS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, initializer_range=0.3, layer_norm_epsilon=1e-2)
    ),
    "llama": lambda: llama(2, True, 10_000.0),
    "llama of one head of keys, untied": lambda: llama(1, False, 100_000.0, intermediate_size=160),
    "llama of as many heads of keys": lambda: llama(4, True, 500.0, hidden_size=128, num_hidden_layers=2),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A random decoder of transformers, in eval mode, and ours loaded from the folder that it saved."""
    torch.manual_seed(0)
    theirs = KINDS[request.param]().eval()
    folder = tmp_path_factory.mktemp("decoder")
    theirs.save_pretrained(folder)
    return theirs, GPT.from_pretrained(str(folder)).eval()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_hand_is_that_of_the_fused_kernel(causal):
    q, k, v = torch.randn(3, 2, 3, 16, 64).unbind()
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    by_hand = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=causal)  # on a CPU
    torch.testing.assert_close(by_hand.float(), fused, atol=0.05, rtol=0)


def test_logits_equal_those_of_transformers(pair):
    theirs, ours = pair
    tokens = torch.randint(0, 97, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ours.wte(tokens)), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_text_of_a_padded_batch_is_that_of_transformers_one_by_one(pair, penalty):
    """Each token is the likeliest by transformers' logits, the new ones penalised by its own class."""
    theirs, ours = pair
    penalise = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    prompts = [torch.randint(0, 97, (n,)).tolist() for n in (1, 7, 12, 30)]
    rows = ours.generate(prompts, 24, Sampling(temperature=0, repetition_penalty=penalty))
    for prompt, row in zip(prompts, rows):
        for i, token in enumerate(row):
            with torch.no_grad():
                logits = theirs(torch.tensor([prompt + row[:i]])).logits[:, -1]
            new = torch.tensor([row[:i]], dtype=torch.long)
            assert penalise(new, logits).argmax().item() == token


@pytest.mark.parametrize("soft_first", [False, True])
def test_cached_generation_equals_a_full_pass_over_the_whole_text(pair, soft_first):
    """With a soft prompt at the end of prompts of several lengths, or in front of them."""
    _, gpt = pair
    prompts = [[5, 6, 7, 8], [], [10, 11]]
    soft = torch.randn(3, 4, gpt.config.n_embd)
    rows = gpt.generate(prompts, 10, GREEDY, soft_prompt=soft, soft_first=soft_first)
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        with torch.no_grad():
            tokens = torch.tensor([prompt + row])
            h = insert(gpt.wte(tokens), soft[i : i + 1], torch.tensor([0 if soft_first else len(prompt)]))
            guess = gpt(h).argmax(-1)[0]
        assert guess[len(prompt) + 3 : -1].tolist() == row


def test_without_a_prefix_all_the_room_is_for_the_text():
    gpt = GPT(GPTConfig(vocab_size=9, n_positions=32, n_layer=1, n_head=2, n_embd=16))
    (row,) = gpt.generate([[]], 27, GREEDY, soft_prompt=torch.randn(1, 4, 16))
    assert len(row) == 27


def test_of_a_prefix_that_is_too_long_the_end_is_read():
    gpt = GPT(GPTConfig(vocab_size=9, n_positions=32, n_layer=1, n_head=2, n_embd=16))
    soft = torch.randn(1, 4, 16)
    end = torch.arange(18).remainder(8).tolist()
    (long,), (short,) = (gpt.generate([p], 10, GREEDY, soft_prompt=soft) for p in ([3] * 50 + end, end))
    assert long == short


def test_generation_stops_before_the_stop_token(pair):
    _, gpt = pair
    (free,) = gpt.generate([[1, 2, 3]], 20, GREEDY)
    stop = free[5]
    (row,) = gpt.generate([[1, 2, 3]], 20, GREEDY, stop=stop)
    assert row == free[: free.index(stop)]


@given(
    seed=st.integers(0, 10**6),
    seen=st.sets(st.integers(0, 19)),
    penalty=st.floats(0.5, 2),
    temperature=st.floats(0.2, 2),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.05, 1),
)
def test_tokens_are_drawn_as_transformers_draws_them(seed, seen, penalty, temperature, top_k, top_p):
    """Penalty, temperature, of all the top_k likeliest (0: all), of these the fewest that make up top_p."""
    logits = 3 * torch.randn(1, 20, generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor([sorted(seen)], dtype=torch.long)
    n = 3000
    steps = [transformers.RepetitionPenaltyLogitsProcessor(penalty)]
    steps += [transformers.TemperatureLogitsWarper(temperature)]
    steps += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    scores = transformers.LogitsProcessorList([*steps, transformers.TopPLogitsWarper(top_p)])(ids, logits)
    p = scores.softmax(-1)[0]

    mask = torch.zeros(n, 20, dtype=torch.bool)
    mask[:, sorted(seen)] = True
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    drawn = pick(logits.repeat(n, 1), mask, sampling, torch.Generator().manual_seed(seed))
    share = drawn.bincount(minlength=20) / n
    assert not share[p == 0].any() and share[p > 0.01].all()
    torch.testing.assert_close(share, p, atol=0.05, rtol=0)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 5))
def test_insert_puts_the_block_before_the_element_asked_for(at, K):
    rows = torch.arange(6).repeat(len(at), 1)
    block = 100 + torch.arange(K).repeat(len(at), 1)
    for row, place in zip(insert(rows, block, torch.tensor(at)).tolist(), at):
        assert row == [*range(place), *range(100, 100 + K), *range(place, 6)]


def small_decoder(frozen=False):
    torch.manual_seed(0)
    generator = PromptGenerator(E=64, n_embd=64, d=64, n=2, K=8, frozen=frozen)
    return Decoder(GPT(GPTConfig(**SIZES)), generator)


@pytest.mark.parametrize("frozen", [False, True])
def test_decoder_loss_counts_each_real_token_that_something_precedes(frozen):
    """Including the one after the window, excluding a prefix with the soft prompt in front of it. The
    reference is the cross-entropy written out row by row.
    """
    decoder = small_decoder(frozen)
    tokens = torch.randint(0, 97, (3, 21))
    length = torch.tensor([20, 11, 6])
    split = torch.tensor([9, 0, 5])
    z = torch.randn(3, 64)
    alpha2 = torch.rand(3)
    with torch.no_grad():
        soft = decoder.generator(z, alpha2)
        terms = {False: [], True: []}
        for i in range(3):
            n = int(length[i]) + 1
            s = int(split[i])
            at = 0 if frozen else s
            h = torch.cat((decoder.gpt.wte(tokens[i, :at]), soft[i], decoder.gpt.wte(tokens[i, at:n])))[None]
            log_p = decoder.gpt(h)[0].log_softmax(-1)
            for j in range(n):
                place = j if j < at else j + 8  # the first token of a prefix, at 0, has nothing before it
                nll = -log_p[place - 1, tokens[i, j]].item()
                terms[False] += [nll] * (place > 0 and (j >= s or not frozen))
                terms[True] += [nll] * (j >= s)
        for continuation_only, expected in terms.items():
            loss = decoder(tokens, length, split, z, alpha2, continuation_only)
            assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_writing_reads_the_soft_prompt_where_training_put_it(frozen):
    """The likeliest tokens, one by one, of a full pass."""
    decoder = small_decoder(frozen)
    prompt = [5, 6, 7]
    x = torch.randn(1, 64)
    (written,) = decoder.write([prompt], x, 8, replace(GREEDY, sigma2=0.0))
    with torch.no_grad():
        soft = decoder.generator(x, torch.ones(1))
        row = prompt
        for _ in range(8):
            at = torch.tensor([0 if frozen else 3])
            row = row + [
                decoder.gpt(insert(decoder.gpt.wte(torch.tensor([row])), soft, at))[0, -1].argmax().item()
            ]
    assert written == row[3:]


def test_eot_row_changes_the_last_row_of_the_output_layer_and_so_when_texts_end():
    torch.manual_seed(0)
    sizes = dict(vocab_size=9, n_positions=32, n_layer=1, n_head=2, n_embd=16)
    gpt = GPT(GPTConfig(**sizes))
    untied = GPT(GPTConfig(**sizes, tied=False))
    row = torch.randn(16)
    head = gpt.wte.weight.detach().clone()
    head[-1] += row
    untied.load_state_dict(gpt.state_dict() | {"lm_head.weight": head})
    h = torch.randn(2, 5, 16)
    torch.testing.assert_close(gpt(h, eot_row=row), untied(h))

    gpt.ln_f.bias.data += 1  # so that the sign of the row decides
    for eot_row, ended in ((torch.full((16,), 9.0), True), (torch.full((16,), -9.0), False)):
        (written,) = gpt.generate([[1, 2]], 20, Sampling(), stop=8, eot_row=eot_row)
        assert (written == []) == ended and (ended or len(written) == 20)


def test_every_weight_learns():
    """Except in the time embedding, which feeds layers that start at zero."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 97, (4, 30))
    length = torch.full((4,), 30)
    split = torch.tensor([3, 0, 10, 20])
    x = torch.randn(4, 64)
    alpha2 = torch.rand(4)
    no_prefix = torch.tensor([True, False, False, False])
    decoder = small_decoder()
    diffusion = DiffusionTransformer(E=64, d=64, n=4, M=64)
    decoder(tokens, length, split, x, alpha2).backward()
    diffusion(x, x.flip(0), alpha2, no_prefix).square().mean().backward()
    for net in (decoder, diffusion):
        dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        assert all(".time." in name for name in dead), dead


def test_null_vector_stands_for_an_absent_prefix():
    net = DiffusionTransformer(E=64, d=64, n=2, M=64)
    z = torch.randn(2, 64)
    alpha2 = torch.rand(2)
    no_prefix = torch.tensor([True, True])
    one = net(z, torch.randn(2, 64), alpha2, no_prefix)
    other = net(z, torch.randn(2, 64), alpha2, no_prefix)
    torch.testing.assert_close(one, other)


def test_the_papers_networks_have_the_official_tensors():
    """Shapes of the published architecture (E = d = 768), built without memory."""
    with torch.device("meta"):
        net = DiffusionTransformer()
        generator = PromptGenerator()
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert shapes["widen_z.weight"] == (6144, 768) and shapes["inp_z.weight"] == (384, 96)
    assert shapes["widen_pref.weight"] == (3072, 768) and shapes["inp_pref.weight"] == (384, 48)
    assert shapes["out.weight"] == (96, 768) and shapes["narrow.weight"] == (768, 6144)
    assert shapes["transformer.blocks.11.ff_in.weight"] == (4096, 768)
    assert shapes["transformer.skips.5.weight"] == (768, 1536)
    shapes = {name: tuple(p.shape) for name, p in generator.named_parameters()}
    assert shapes["widen.weight"] == (3072, 768) and shapes["inp.weight"] == (768, 384)
    assert shapes["out.weight"] == (1280, 768) and len(generator.transformer.blocks) == 6


def test_padding_is_never_a_target():
    decoder = small_decoder()
    tokens = torch.randint(0, 97, (1, 10))
    z = torch.randn(1, 64)
    other = tokens.clone()
    other[:, 4:] = 0
    for split in range(3):
        rest = torch.tensor([3]), torch.tensor([split]), z, torch.tensor([0.5])
        with torch.no_grad():
            torch.testing.assert_close(decoder(tokens, *rest), decoder(other, *rest))
