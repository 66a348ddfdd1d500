"""Draws the README's pictures into assets/, from the repository's root: python assets/figures.py

No data is needed: they show the model in pretrained/reviews, measured figures, or Gaussians, whose best
denoiser is a formula.
"""

import sys

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, ".")
import model as nano
from plumbing.decoding import insert
from train_decoder import noise_scale

MODEL = nano.DGLM("pretrained/reviews", "cpu")
BLUE, ORANGE, GREEN, GREY = COLOURS = "#3b6fb6", "#d9702a", "#3a8f5f", "#8a8a8a"
plt.rcParams.update({"axes.prop_cycle": plt.cycler(color=COLOURS), "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.titlesize": 10.5, "axes.titlelocation": "left", "legend.frameon": False})
plt.rcParams.update({"figure.labelsize": 9.5, "xtick.major.size": 0, "ytick.major.size": 0})


def overview():
    """The method in one drawing, in pixels. A network has the colour of the stage that trains it."""
    plt.figure(figsize=(10, 420 / 110)).set_layout_engine("none")
    ax, middle = plt.axes((0, 0, 1, 1), xlim=(0, 1100), ylim=(420, 0)), {"ha": "center", "va": "center"}
    ax.axis("off")
    for x, y, width, height, text_x, colour, name, stage in (
        (427, 308, 489, 96, 502, BLUE, "decoder: says it", "stage 1: decoder, prompt generator"),
        (355, 90, 353, 150, 531, GREEN, "diffusion: proposes what to say in 4 steps", "stage 2: diffusion"),
        (405, 12, 252, 46, 531, ORANGE, "linear probe:  p(negative | $x$)", "stage 3: linear probe"),
        (158, 144, 94, 48, 205, GREY, "sentence\nencoder", "never: sentence encoder (frozen)"),
        (580, 258, 360, 34, 760, BLUE, "prompt generator: turns it into 8 soft tokens", None),
    ):
        style = {"boxstyle": "round,pad=0,rounding_size=9", "fc": (colour, 0.15), "ec": colour, "lw": 1.6}
        ax.add_patch(FancyBboxPatch((x, y), width, height, label=stage, **style))
        ax.text(text_x, y + min(height / 2, 24), name, **middle)
    ax.legend(title="Trained in", fontsize=8.5, title_fontsize=8.5, alignment="left", loc="upper right")

    cells = [(70, 148, 114, "The food was", GREY), (1020, 350, 144, "cold, and the\nservice was slow.", BLUE)]
    cells += [(467 + 55 * i, 350, 51, word, GREY) for i, word in enumerate(("The", "food", "was"))]
    cells += [(634 + 36 * i, 350, 32, f"$s_{i + 1}$", GREEN) for i in range(8)]
    x, y, width, words, colours = zip(*cells)  # x: of the middle
    ax.bar_label(ax.bar(x, 40, width, y, color=colours, alpha=0.5), words, label_type="center")
    ax.text(70, 133, "prefix", **middle)
    ax.text(1020, 335, "continuation", **middle)
    ax.text(305, 35, "--guide negative", color=ORANGE, **middle)
    ax.text(658, 75, "its gradient pushes every step", color=ORANGE, **middle)
    embeddings(ax)

    arrows = [((128, 168), (156, 168)), ((253, 168), (295, 168)), ((325, 168), (353, 168))]
    arrows += [((415 + 90 * i, 168), (475 + 90 * i, 168)) for i in range(4)]
    arrows += [((760, 232), (760, 256)), ((760, 293), (760, 348)), ((917, 370), (946, 370))]
    for start, end in [*arrows, ((70, 189), (425, 370)), ((376, 35), (403, 35)), ((531, 59), (531, 88))]:
        bend = "angle,angleA=90,angleB=0" if start[0] == 70 else "arc3"
        style = {"arrowstyle": "-|>", "connectionstyle": bend, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", end, start, arrowprops=style | {"color": ORANGE if end[1] < 100 else "black"})


def embeddings(ax):
    """Columns of 8 numbers, light or dark: the prefix's, then noise, which gives way to the proposal."""
    x_pref, noise, x = 0.2 + 0.8 * torch.rand(3, 8, generator=torch.Generator().manual_seed(5))
    for i, label in enumerate((r"$x_\mathrm{pref}$", "noise", "", "less noise", "", "proposal $x$")):
        middle, share = 310 + 90 * i, max(0, i - 1) / 4
        for colour, shades in ((GREY, (noise if i else x_pref) * (1 - share)), (GREEN, x * share)):
            ax.bar(middle, 9, 24, range(132, 204, 9), color=[(colour, shade) for shade in shades.tolist()])
        ax.text(middle, 221, label, ha="center", va="center")


def best_v(z_t, log_snr, means, deviation):
    """The v of least error where data are an even mixture of N(means[k], deviation^2); means (n, E)."""
    alpha, sigma = nano.alpha_sigma(log_snr)
    variance = (alpha * deviation) ** 2 + sigma**2  # of z_t within a component
    log_p = (alpha * z_t @ means.T - alpha**2 * means.square().sum(-1) / 2) / variance  # of each component
    mean = log_p.softmax(-1) @ means
    x = mean + alpha * deviation**2 / variance * (z_t - alpha * mean)  # E[x | z_t]
    return nano.velocity(x, (z_t - alpha * x) / sigma, log_snr)


def noise():
    """Where noise levels lie, and what NoiseBins learns of the best denoiser's loss."""
    means, deviation, bins = torch.randn(64, 384) * 0.75, 0.65, nano.NoiseBins()  # the variance is about 1

    def error(log_snr):
        n, eps = len(log_snr), torch.randn(len(log_snr), 384)
        x = means[torch.randint(64, (n,))] + deviation * torch.randn(n, 384)
        v = best_v(nano.diffuse(x, eps, log_snr), log_snr, means, deviation)
        return (v - nano.velocity(x, eps, log_snr)).square().mean(-1)

    for _ in range(2000):
        log_snr, _ = bins.sample(1024)
        bins.update(log_snr, nano.loss_weight(log_snr) * error(log_snr))
    levels = (torch.arange(100) + 0.5) * 0.3 - 15  # the middles of the bins
    t = torch.linspace(0.0002, 0.9998, 4999, dtype=torch.float64)
    fig, axes = plt.subplots(1, 3, figsize=(11.4, 3.6))
    axes[0].plot(levels, torch.cat(nano.alpha_sigma(levels), 1) ** 2, label=["α²: signal", "σ²: noise"])
    for name, c in (("paper's sampler: cosine", 1), (f"stage 1: cosine + 2 ln {noise_scale:g}", noise_scale)):
        log_snr = nano.cosine_log_snr(t, c)
        axes[1].plot(log_snr, -torch.gradient(t, spacing=(log_snr,))[0], label=name)  # dt / dlambda
    axes[1].plot(levels, bins.value / bins.value.sum() / 0.3, label="stage 2: follows weight × error")
    axes[2].plot(levels, nano.loss_weight(levels), label="weight φ")
    errors = [error(level.expand(1000)).mean() for level in levels]
    axes[2].plot(levels, errors, c=GREY, label="error of the best denoiser")
    axes[2].plot(levels, bins.value, c=GREEN, label="weight × error, as NoiseBins finds it")
    titles = "Signal and noise in z = α x + σ ε", "How often each level is used", "What NoiseBins measures"
    for ax, title, top in zip(axes, titles, (1.5, 0.24, 1.5)):
        ax.set(title=title, xlim=(-15, 15), ylim=(0, top), yticks=(0, top / 3, top / 1.5), xlabel="log-SNR λ")
        ax.legend(loc="upper left")
    fig.supxlabel("Left: noise. Right: clean. Data of this example: 64 Gaussian clusters in 384 dimensions")


def guidance():
    """Unguided and guided samples of a mixture in the plane, beside the true posterior."""
    means = torch.tensor([[-1.3, 0.8], [-0.8, -1.0], [0.1, 0.1], [1.2, -0.9], [0.9, 1.2]])
    deviation, slope, n, axis = 0.3, torch.tensor([2.0, 1.5]), 4000, torch.linspace(-2.45, 2.45, 150)

    def run(guides, way="estimate"):  # -> samples (n, 2), and the paths of 15 (15, steps + 1, 2)
        def denoiser(z_t, x_pref, alpha2, no_prefix):
            path.append(z_t.detach())
            return best_v(z_t, alpha2.logit(), means, deviation)

        settings, rng = nano.Sampling(60, cfg_scale=1, guide_through=way), torch.Generator().manual_seed(1)
        covariance, path = nano.Covariance(*torch.linalg.eigh(many.T.cov())), []
        x = nano.sample(denoiser, torch.zeros(n, 2), torch.ones(n) > 0, settings, guides, covariance, rng=rng)
        return x, torch.stack([*path, x], dim=1)[:15]

    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (150, 150, 2)
    prior = torch.exp(-(grid[:, :, None] - means).square().sum(-1) / (2 * deviation**2)).sum(-1)
    posterior = prior * (grid @ slope).sigmoid()
    many = means[torch.randint(5, (4 * n,))] + deviation * torch.randn(4 * n, 2)
    exact = many[torch.rand(4 * n) < (many @ slope).sigmoid()][:n]  # rejection sampling
    probe = [(lambda x: nano.F.logsigmoid(x @ slope), 1.0)]
    panels = (
        ("Unguided: p(x)", prior, BLUE, *run([])),
        ("Weight 1, at the estimate", posterior, ORANGE, *run(probe)),
        ("Weight 1, through the network", posterior, ORANGE, *run(probe, "network")),
        ("The truth: p(x | y)", posterior, GREEN, exact, torch.empty(0, 2, 2)),
    )
    fig, axes = plt.subplots(1, 4, figsize=(11.4, 3.5))
    for ax, (title, density, colour, x, paths) in zip(axes, panels):
        title += f"\n{(x @ slope > 0).float().mean():.0%} right of the line"
        ax.contourf(axis, axis, density / density.max(), [0.03, 0.2, 0.5, 0.8, 1], cmap="Greys", alpha=0.35)
        ax.scatter(*x[:1000].T, s=3, color=colour, alpha=0.5, lw=0)
        ax.plot(*paths.permute(2, 1, 0), "k", lw=0.9)
        ax.plot(*paths[:, 0].T, "ko", mfc="white", ms=5)
        ax.plot(*paths[:, -1].T, "ko", mfc=colour, ms=6)
        ax.axline((0, 0), slope=-slope[0] / slope[1], color="black", ls="--")
        ax.set(title=title, xlim=(-2.45, 2.45), ylim=(-2.45, 2.45), xticks=[], yticks=[])
    fig.supxlabel("○ noise → ● sample: z from the same 15 starts.   Dashed: the probe's p(y | x) = 1/2")


def watch():
    """One sentence through the sampler under two guides: what sample.py --watch prints, and the text."""
    start, likeliest, steps = "This film", nano.Sampling(temperature=0), []
    frame = {"xlim": (0, 1.4), "ylim": (4.5, -0.6), "xticks": [], "yticks": [], "frame_on": False}
    _, axes = plt.subplots(2, 2, figsize=(11.4, 4.2), width_ratios=(1, 9), subplot_kw=frame)
    for (ax, ax_words), guide, colour in zip(axes, ("negative", "positive"), (ORANGE, BLUE)):
        (parsed,) = nano.parse_guide(guide, MODEL.probes)
        ((text, _),) = MODEL.generate([start], guide, on_step=lambda *step: steps.append(step))
        for y, (prefixes, _, e) in enumerate(steps[-4:]):
            ax.bar_label(ax.barh(y, parsed.log_prob(e)[0].exp(), color=colour), fmt="%.2f", padding=2)
            (words,) = MODEL.write(prefixes, e, 32, likeliest, torch.Generator().manual_seed(1338))
            ax_words.text(0, y, start + words, va="center", size=9.5)
        ax_words.text(0, 4, start + text, va="center", size=9.5, weight="bold")
        ax.set_yticks(range(5), [*(f"λ = {log_snr:.0f}" for _, log_snr, _ in steps[-4:]), "written"])
        ax.set_title(f"p({guide})")
        ax_words.set_title(f"--guide {guide}: the decoder's likeliest words for each step's prediction")


def soft_prompt():
    """What the decoder reads, and what each place predicts: where there is a loss, Decoder.forward says."""
    tokens, kept = MODEL.tokenizer.encode_ordinary("The food was cold, and the service slow."), []
    tokens, split = torch.tensor([[*tokens, MODEL.tokenizer.eot_token]]), torch.tensor([3])
    row = insert(tokens, -torch.arange(1, 9)[None], split)[0, :-1].tolist()  # soft tokens: -1 to -8
    names = [MODEL.tokenizer.decode([i]).strip() if i >= 0 else f"$s_{-i}$" for i in row] + ["end of\ntext"]
    watch_keep = MODEL.decoder.gpt.register_forward_pre_hook
    with watch_keep(lambda gpt, _, kwargs: kept.extend(kwargs["keep"][0]), with_kwargs=True):
        MODEL.decoder(tokens, torch.tensor([tokens.shape[1]]), split, torch.zeros(1, 384), torch.ones(1))

    _, ax = plt.subplots(figsize=(11.4, 2.8), subplot_kw={"frame_on": False, "yticks": []})
    bars = ax.bar(range(18), 1, 0.9, color=[GREY] * 3 + [GREEN] * 8 + [BLUE] * 7, alpha=0.5)
    ax.bar_label(bars, names[:-1], label_type="center")
    for i in (i for i, keep in enumerate(kept) if keep):
        ax.annotate(names[i + 1], (i, 1), (i, 1.7), ha="center", arrowprops={"arrowstyle": "<-"})
    gap = [i for i, keep in enumerate(kept) if not keep]
    ax.plot((gap[0] - 0.45, gap[-1] + 0.45), (1.15, 1.15), color=GREY)
    ax.text((gap[0] + gap[-1]) / 2, 1.3, "no loss: the next token is a soft one", ha="center", color=GREY)

    soft = "soft tokens = generator(z, α²): the last one predicts\nthe first word of the continuation"
    notes = "prefix tokens never\nsee the soft tokens", soft, "the continuation sees\neverything to its left"
    title = "The decoder reads from left to right. Above each box: the next token, which it learns to predict"
    ax.set(xlim=(-0.5, 17.6), ylim=(-0.1, 2.3), title=title, xticks=(1, 6.5, 14), xticklabels=notes)


def little_data():
    """Control against the number of labelled rows: the mean and the range of three draws of rows."""
    rows = (25, 50, 100, 200, 1000, 5000)
    shares = {
        "negative, reviews model": (
            (64, 66, 59),
            (86, 76, 86),
            (77, 82, 90),
            (90, 86, 87),
            (86, 88, 94),
            (93, 83, 90),
        ),
        "positive, reviews model": (
            (89, 66, 77),
            (78, 89, 96),
            (97, 96, 88),
            (100, 98, 93),
            (100, 96, 99),
            (99, 99, 99),
        ),
        "joy, english model": (
            (50, 10, 42),
            (45, 18, 20),
            (68, 28, 25),
            (35, 35, 55),
            (50, 30, 65),
            (42, 50, 48),
        ),
    }
    _, ax = plt.subplots(figsize=(8, 3.2))
    for (name, draws), colour in zip(shares.items(), COLOURS):
        draws = torch.tensor(draws, dtype=torch.float)
        ax.plot(rows, draws.mean(1), "o-", color=colour, label=name)
        ax.fill_between(rows, draws.amin(1), draws.amax(1), color=colour, alpha=0.2, lw=0)
    ax.set(xscale="log", xticks=rows, xticklabels=rows, ylim=(0, 100), xlabel="labelled rows")
    ax.set_title("Share of texts with the attribute, by other judges, in % (mean and range of three draws)")
    ax.legend(loc="lower right")


if __name__ == "__main__":
    torch.manual_seed(0)
    for picture in (overview, noise, guidance, watch, soft_prompt, little_data):
        picture()
        plt.savefig(f"assets/{picture.__name__}.png", dpi=110)
