"""The networks. Run: python -m pytest tests/test_networks.py"""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import InputError
from model import GPT, Decoder, DiffusionTransformer, GPTConfig, PromptGenerator, insert, pick

SIZES = {"vocab_size": 97, "n_positions": 64, "n_layer": 3, "n_head": 4, "n_embd": 64}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random GPT-2 of transformers, in eval mode, and ours loaded from the folder that it saved."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, initializer_range=0.3)).eval()
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return theirs, GPT.from_pretrained(str(folder)).eval()


def test_logits_equal_those_of_transformers(pair):
    theirs, ours = pair
    tokens = torch.randint(0, 97, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ours.wte(tokens)), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_text_of_a_padded_batch_is_that_of_transformers_one_by_one(pair, penalty):
    theirs, ours = pair
    prompts = [torch.randint(0, 96, (n,)).tolist() for n in (1, 7, 12, 30)]
    new = ours.generate(prompts, 24, temperature=0, repetition_penalty=penalty)
    for prompt, row in zip(prompts, new):
        theirs_row = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert row == theirs_row[0, len(prompt) :].tolist()


def test_cached_generation_equals_a_full_pass_over_the_whole_text(pair):
    """With a soft prompt at the end of prompts of several lengths."""
    _, gpt = pair
    prompts, soft = [[5, 6, 7, 8], [9], [10, 11]], torch.randn(3, 4, 64)
    rows = gpt.generate(prompts, 10, soft, temperature=0)
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        with torch.no_grad():
            h = insert(gpt.wte(torch.tensor([prompt + row])), soft[i : i + 1], torch.tensor([len(prompt)]))
            guess = gpt(h).argmax(-1)[0]
        assert guess[len(prompt) + 3 : -1].tolist() == row


def test_generation_stops_before_the_stop_token(pair):
    _, gpt = pair
    (free,) = gpt.generate([[1, 2, 3]], 20, temperature=0)
    stop = free[5]
    (row,) = gpt.generate([[1, 2, 3]], 20, temperature=0, stop=stop)
    assert row == free[: free.index(stop)]


def test_top_p_keeps_the_smallest_set_with_that_probability(pair):
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(2000, 1)
    seen = torch.zeros(2000, 4, dtype=torch.bool)
    drawn = pick(scores, seen, 1.0, 0.75, 1.0, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1}
    assert (drawn == 0).float().mean().item() == pytest.approx(0.5 / 0.8, abs=0.04)


def test_top_p_of_even_scores_keeps_many_tokens():
    """900 of 1000, all alike likely; the penalty on the first, already seen, moves it out of them."""
    scores = (5 - 1e-4 * torch.arange(1000)).repeat(4000, 1)
    seen = torch.zeros(4000, 1000, dtype=torch.bool)
    seen[:, 0] = True
    drawn = pick(scores, seen, 1.0, 0.9, 1.1, torch.Generator().manual_seed(0))
    assert drawn.min() >= 1 and 880 < drawn.max() <= 930
    assert drawn.float().mean().item() == pytest.approx(450, rel=0.04)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(score):
    scores, seen = torch.full((2, 1000), score), torch.zeros(2, 1000, dtype=torch.bool)
    with pytest.raises(InputError, match="not finite"):
        pick(scores, seen, 1.0, 0.9, 1.0, torch.Generator())


def test_a_prefix_too_long_is_refused(pair):
    with pytest.raises(InputError, match="too long"):
        pair[1].generate([[1] * 60], 10)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 5))
def test_insert_puts_the_block_before_the_element_asked_for(at, K):
    rows, block = torch.arange(6).repeat(len(at), 1), 100 + torch.arange(K).repeat(len(at), 1)
    for row, place in zip(insert(rows, block, torch.tensor(at)).tolist(), at):
        assert row == [*range(place), *range(100, 100 + K), *range(place, 6)]


def small_decoder():
    torch.manual_seed(0)
    return Decoder(GPT(GPTConfig(**SIZES)), PromptGenerator(E=64, n_embd=64, d=64, n=2, K=8))


def test_decoder_loss_counts_each_real_token_that_something_precedes():
    """Against the same cross-entropy written out row by row."""
    decoder = small_decoder()
    tokens, length, split = torch.randint(0, 97, (3, 20)), torch.tensor([20, 11, 6]), torch.tensor([9, 0, 5])
    z, alpha2 = torch.randn(3, 64), torch.rand(3)
    with torch.no_grad():
        soft = decoder.generator(z, alpha2)
        terms = {False: [], True: []}
        for i in range(3):
            n, s = int(length[i]), int(split[i])
            h = torch.cat((decoder.gpt.wte(tokens[i, :s]), soft[i], decoder.gpt.wte(tokens[i, s:n])))[None]
            log_p = decoder.gpt(h)[0].log_softmax(-1)
            for j in range(n):
                place = j if j < s else j + 8  # the first token of a prefix, at 0, has nothing before it
                nll = -log_p[place - 1, tokens[i, j]].item()
                terms[False] += [nll] * (place > 0)
                terms[True] += [nll] * (j >= s)
        for continuation_only, expected in terms.items():
            loss = decoder(tokens, length, split, z, alpha2, continuation_only)
            assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_every_weight_of_the_decoder_learns():
    decoder = small_decoder()
    tokens = torch.randint(0, 97, (4, 30))
    decoder(
        tokens, torch.full((4,), 30), torch.tensor([3, 0, 10, 20]), torch.randn(4, 64), torch.rand(4)
    ).backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters()}
    dead = [name for name, g in gradients.items() if g is None or not g.any()]
    # beyond the time layers that start at zero (nothing reaches the embedding behind them) all is alive
    assert all(".time." in name for name in dead), dead


def test_every_weight_of_the_diffusion_learns():
    torch.manual_seed(0)
    net = DiffusionTransformer(E=64, d=64, n=4, M=64)
    absent = torch.tensor([True, False, False])
    net(torch.randn(3, 64), torch.randn(3, 64), torch.rand(3), absent).square().mean().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(".time." in name for name in dead), dead


def test_noise_level_changes_the_output_once_trained():
    torch.manual_seed(0)
    net = DiffusionTransformer(E=64, d=64, n=2, M=64)
    for name, p in net.named_parameters():
        if "time_" in name:
            torch.nn.init.normal_(p, std=0.1)
    z = torch.randn(1, 64)
    assert (net(z, z, torch.tensor([0.1])) - net(z, z, torch.tensor([0.9]))).abs().max() > 1e-3


def test_null_vector_stands_for_an_absent_prefix():
    net = DiffusionTransformer(E=64, d=64, n=2, M=64)
    z, alpha2, absent = torch.randn(2, 64), torch.rand(2), torch.tensor([True, True])
    one, other = net(z, torch.randn(2, 64), alpha2, absent), net(z, torch.randn(2, 64), alpha2, absent)
    torch.testing.assert_close(one, other)


def test_the_papers_networks_have_the_official_tensors():
    """Shapes of the published architecture (E = d = 768), built without memory."""
    with torch.device("meta"):
        net, generator = DiffusionTransformer(), PromptGenerator()
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert shapes["widen_z.weight"] == (6144, 768) and shapes["inp_z.weight"] == (384, 96)
    assert shapes["widen_pref.weight"] == (3072, 768) and shapes["inp_pref.weight"] == (384, 48)
    assert shapes["out.weight"] == (96, 768) and shapes["narrow.weight"] == (768, 6144)
    assert shapes["transformer.blocks.11.ff_in.weight"] == (4096, 768)
    assert shapes["transformer.skips.5.weight"] == (768, 1536)
    shapes = {name: tuple(p.shape) for name, p in generator.named_parameters()}
    assert shapes["widen.weight"] == (3072, 768) and shapes["inp.weight"] == (768, 384)
    assert shapes["out.weight"] == (1280, 768) and len(generator.transformer.blocks) == 6


@settings(max_examples=4)
@given(st.integers(0, 3))
def test_targets_never_hold_a_padding_token(split):
    tokens, length = torch.randint(0, 97, (1, 10)), torch.tensor([4])
    decoder, z, alpha2 = small_decoder(), torch.randn(1, 64), torch.rand(1)
    with torch.no_grad():
        one = decoder(tokens, length, torch.tensor([split]), z, alpha2)
        other = decoder(
            tokens.clone().index_fill_(1, torch.arange(4, 10), 0), length, torch.tensor([split]), z, alpha2
        )
    assert one.item() == pytest.approx(other.item(), abs=1e-6)
