"""Draws the README's pictures into assets/, from the repository's root: python assets/figures.py

No data is needed: overview.png is only drawn; noise.png and guidance.png are of mixtures of Gaussians, whose
best denoiser is known in closed form, soft_prompt.png and watch.png of the model in pretrained/reviews.
"""

import sys
import textwrap

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import to_rgb

sys.path.insert(0, ".")
import model as nano
from plumbing.decoding import insert
from train_decoder import noise_scale

MODEL = nano.DGLM("pretrained/reviews", "cpu")
BLUE, ORANGE, GREEN, GREY = COLOURS = "#3b6fb6", "#d9702a", "#3a8f5f", "#8a8a8a"
plt.rcParams.update({"axes.prop_cycle": plt.cycler(color=COLOURS), "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.titlesize": 10.5, "axes.titlelocation": "left", "legend.frameon": False})
plt.rcParams.update({"figure.labelsize": 9.5, "xtick.major.size": 0, "ytick.major.size": 0})


def cell(ax, x, y, width, text, colour):
    """A token, or several, that the decoder reads or writes; x and y: its left upper corner."""
    ax.add_patch(plt.Rectangle((x, y), width, 36, color=colour, alpha=0.5, lw=0))
    ax.text(x + width / 2, y + 18, text, ha="center", va="center")


def network(ax, x, y, width, height, text, colour, top=False):
    style = {"boxstyle": "round,pad=0,rounding_size=9", "edgecolor": colour, "lw": 1.6, "zorder": 0}
    box = plt.matplotlib.patches.FancyBboxPatch((x, y), width, height, facecolor=(colour, 0.15), **style)
    ax.add_patch(box)
    at = (x + 14, y + 20) if top else (x + width / 2, y + height / 2)
    ax.text(*at, text, ha="left" if top else "center", va="center")


def embedding(ax, x, numbers, colour, label):
    """A column of numbers, light to dark, its middle at x."""
    shades = 1 - numbers.sigmoid()[:, None, None] * (1 - torch.tensor(to_rgb(colour)))
    ax.imshow(shades, extent=(x - 12, x + 12, 204, 132), aspect="auto", zorder=2)
    ax.text(x, 221, label, ha="center", va="center")


def arrow(ax, *corners, colour="black"):
    ax.plot(*zip(*corners[:-1]), color=colour, lw=1.3)
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", corners[-1], corners[-2], arrowprops=style)


def overview():
    """The method in one drawing, in pixels. A network's colour tells the stage that trains it."""
    fig = plt.figure(figsize=(10, 3.82))
    ax = fig.add_axes((0, 0, 1, 1))

    cell(ax, 15, 150, 112, "The food was", GREY)
    network(ax, 157, 143, 92, 50, "sentence\nencoder", GREY)
    network(ax, 345, 94, 350, 146, "diffusion: 4 steps from noise", GREEN, top=True)
    network(ax, 425, 14, 190, 44, "linear probe  p(negative | x)", ORANGE)
    network(ax, 670, 262, 140, 34, "prompt generator", BLUE)
    network(ax, 395, 312, 490, 90, "decoder", BLUE, top=True)
    ax.text(395, 36, "--guide negative", ha="right", va="center", family="monospace", color=ORANGE)
    ax.text(530, 76, "its gradient pushes every step", va="center", color=ORANGE)

    x_pref, x, noise = torch.randn((3, 9), generator=torch.Generator().manual_seed(5)) * 2
    embedding(ax, 297, x_pref, GREY, r"$x_\mathrm{pref}$")
    labels = "noise", "", "less noise", "", "proposal $x$"
    for i, label in enumerate(labels):
        at, share = 390 + 85 * i + 5 * (i == 4), i / 4
        colour = [share * a + (1 - share) * b for a, b in zip(to_rgb(GREEN), to_rgb(GREY))]
        embedding(ax, at, share**0.5 * x + (1 - share) ** 0.5 * noise, colour, label)
        if i:
            arrow(ax, (at - 70, 168), (at - 15, 168))

    for i, word in enumerate(("The", " food", " was")):
        cell(ax, 407 + 55 * i, 352, 52, word, GREY)
    for i in range(8):
        cell(ax, 576 + 37 * i, 352, 34, f"$s_{i + 1}$", GREEN)
    cell(ax, 918, 346, 160, "cold, and the\nservice was slow.", BLUE)

    arrow(ax, (127, 168), (154, 168))
    arrow(ax, (249, 168), (282, 168))
    arrow(ax, (312, 168), (342, 168))
    arrow(ax, (395, 36), (422, 36), colour=ORANGE)
    arrow(ax, (520, 58), (520, 91), colour=ORANGE)
    arrow(ax, (735, 232), (735, 259))
    arrow(ax, (735, 296), (735, 348))
    arrow(ax, (71, 186), (71, 370), (392, 370))
    arrow(ax, (885, 370), (915, 370))

    for i, (name, colour) in enumerate((
        ("stage 1", BLUE), ("stage 2", GREEN), ("stage 3", ORANGE), ("frozen", GREY)
    )):
        ax.text(840, 40 + 20 * i, name, color=colour, size=8.5)
    ax.set(xlim=(0, 1100), ylim=(420, 0), aspect="auto")
    ax.axis("off")


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
    for label, scale in (("paper's sampler: cosine", 1), (f"stage 1: cosine + 2 ln {noise_scale:g}", noise_scale)):
        log_snr = nano.cosine_log_snr(t, scale)
        density = -torch.gradient(t, spacing=(log_snr,))[0]  # dt / dlambda
        axes[1].plot(log_snr, density, label=label)
    axes[1].plot(levels, bins.value / bins.value.sum() / 0.3, label="stage 2: follows weight × error")
    axes[2].plot(levels, nano.loss_weight(levels), label="weight φ(λ)")
    axes[2].plot(levels, [error(level.expand(1000)).mean() for level in levels], c=GREY, label="least possible error of v")
    axes[2].plot(levels, bins.value, c=GREEN, label="weight × error, as NoiseBins found it")
    titles = "Signal and noise in z = α x + σ ε", "How often each level is used", "Where stage 2 has most to learn"
    for ax, title, top in zip(axes, titles, (1.5, 0.24, 1.5)):
        ax.set(title=title, xlim=(-15, 15), ylim=(0, top), yticks=(0, top / 3, top / 1.5), xlabel="log-SNR λ")
        ax.legend(loc="upper left")
    fig.supxlabel("Left: almost pure noise. Right: almost clean. Errors: data of 64 Gaussian clusters in 384 dimensions")


def guidance():
    """Unguided and guided samples of a mixture in the plane, beside the true posterior."""
    means = torch.tensor([[-1.3, 0.8], [-0.8, -1.0], [0.1, 0.1], [1.2, -0.9], [0.9, 1.2]])
    deviation, slope, n, axis = 0.3, torch.tensor([2.0, 1.5]), 4000, torch.linspace(-2.45, 2.45, 150)
    total = means.T.cov(correction=0) + deviation**2 * torch.eye(2)  # the covariance of the mixture

    def run(guides, way="estimate"):  # -> samples (n, 2), and the paths of 15 (15, steps + 1, 2)
        def denoiser(z_t, x_pref, alpha2, no_prefix):
            path.append(z_t.detach())
            return best_v(z_t, alpha2.logit(), means, deviation)

        settings, rng = nano.Sampling(60, cfg_scale=1, guide_through=way), torch.Generator().manual_seed(1)
        covariance, path = nano.Covariance(*torch.linalg.eigh(total)), []
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
    fig.supxlabel("○ noise → ● sample: paths of z from the same 15 starts.   Dashed line: the probe's p(y | x) = 1/2")


def watch():
    """One sentence through the sampler under two guides, as sample.py --watch follows it."""
    start, likeliest, frame = "This film", nano.Sampling(temperature=0), {"xticks": [], "yticks": []}
    frame |= {"ylim": (4.5, -0.6), "xlim": (0, 1.4), "frame_on": False}
    _, axes = plt.subplots(2, 2, figsize=(11.4, 4.2), width_ratios=(1, 9), subplot_kw=frame)
    for (left, right), guide, colour in zip(axes, ("negative", "positive"), (ORANGE, BLUE)):
        ((probe, label, _),) = nano.parse_guide(guide, MODEL.probes)
        steps, lines = [], []
        ((text, _),) = MODEL.generate([start], guide, on_step=lambda *step: steps.append(step))
        for y, (prefixes, _, e) in enumerate(steps):
            p = probe.log_prob(e[0])[label].exp().item()
            left.bar_label(left.barh(y, p, color=colour), [f"{p:.2f}"], padding=2)
            lines += MODEL.write(prefixes, e, 32, likeliest, torch.Generator().manual_seed(1338))

        for y, line in enumerate([*lines, text]):
            line = textwrap.shorten(start + line, 112, placeholder=" …")
            right.text(0, y, line, va="center", weight="bold" if y == len(lines) else None)
        levels = [f"λ = {log_snr:.0f}".replace("-", "−") for _, log_snr, _ in steps]
        left.set_yticks(range(5), [*levels, "written"])
        left.set_title(f"p({guide})")
        right.set_title(f"--guide {guide}: the decoder's likeliest words at each step")


def soft_prompt():
    """What the decoder reads, and what each place predicts: where there is a loss, Decoder.forward says."""
    tokens, kept = MODEL.tokenizer.encode_ordinary("The food was cold, and the service slow."), []
    tokens, split = torch.tensor([[*tokens, MODEL.tokenizer.eot_token]]), torch.tensor([3])
    row = insert(tokens, -torch.arange(1, 9)[None], split)[0, :-1].tolist()  # soft tokens: -1 to -8
    names = [MODEL.tokenizer.decode([i]).strip() if i >= 0 else f"$s_{-i}$" for i in row] + ["end of\ntext"]
    MODEL.decoder.gpt.register_forward_pre_hook(lambda *a: kept.extend(a[2]["keep"][0]), with_kwargs=True)
    MODEL.decoder(tokens, torch.tensor([tokens.shape[1]]), split, torch.zeros(1, 384), torch.ones(1))

    _, ax = plt.subplots(figsize=(11.4, 2.8), subplot_kw={"frame_on": False, "yticks": []})
    bars = ax.bar(range(18), 1, 0.9, color=[GREY] * 3 + [GREEN] * 8 + [BLUE] * 7, alpha=0.5)
    ax.bar_label(bars, names[:-1], label_type="center")
    for i in (i for i, keep in enumerate(kept) if keep):
        ax.annotate(names[i + 1], (i, 1), (i, 1.7), ha="center", arrowprops={"arrowstyle": "<-"})
    gap = [i for i, keep in enumerate(kept) if not keep]
    ax.text(sum(gap) / len(gap), 1.35, "no loss here: what follows is a soft token", ha="center", color=GREY)

    source = "soft tokens = prompt generator(z = α x + σ ε, α²)\nthe last one predicts the continuation's first word"
    notes = "prefix tokens never\nsee the soft tokens", source, "continuation tokens see\nall that stands before them"
    ax.set_xticks((1, 6.5, 14), notes)
    title = "The decoder reads the boxes from left to right. Each arrow: what that place learns to predict"
    ax.set(xlim=(-0.5, 17.6), ylim=(-0.1, 2.3), title=title)


if __name__ == "__main__":
    torch.manual_seed(0)
    for picture in (overview, noise, guidance, watch, soft_prompt):
        picture()
        plt.savefig(f"assets/{picture.__name__}.png", dpi=110)
