"""Draws the pictures of README.md and method.md, from the root of the repository: python docs/figures.py

No data is needed. The pictures show the shipped models, figures measured earlier, or data whose best denoiser
is a formula.
"""

import sys
import textwrap

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, ".")
import model as nano
from train_decoder import noise_scale
from train_diffusion import VAL_LOG_SNR

BLUE = "#3b6fb6"
ORANGE = "#d9702a"
GREEN = "#3a8f5f"
GREY = "#8a8a8a"
WIDTH = 11.4  # of most pictures, in inches

plt.rcParams.update(
    {
        "axes.prop_cycle": plt.cycler(color=(BLUE, ORANGE, GREEN, GREY)),
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "figure.constrained_layout.use": True,
        "figure.labelsize": 9.5,
        "legend.frameon": False,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
)


# ---------- overview.png ------------------------------------------------------------------------------------


def overview():
    """The method in one drawing, in pixels. A network has the colour of the stage that trains it."""
    plt.figure(figsize=(10, 420 / 110)).set_layout_engine("none")
    ax = plt.axes((0, 0, 1, 1), xlim=(0, 1100), ylim=(420, 0))
    ax.axis("off")
    middle = {"ha": "center", "va": "center"}

    boxes(ax)
    ax.text(502, 332, "decoder: says it", **middle)
    ax.text(531, 114, "diffusion: proposes what to say in 4 steps", **middle)
    ax.text(531, 35, "linear probe:  p(negative | $x$)", **middle)
    ax.text(205, 168, "sentence\nencoder", **middle)
    ax.text(760, 275, "prompt generator: turns it into 8 soft tokens", **middle)
    ax.text(70, 133, "prefix", **middle)
    ax.text(1020, 335, "continuation", **middle)
    ax.text(305, 35, "--guide negative", color=ORANGE, **middle)
    ax.text(658, 75, "its gradient pushes every step", color=ORANGE, **middle)

    words(ax)
    embeddings(ax)
    arrows(ax)


def boxes(ax):
    """The networks, and a legend that says when each is trained."""
    for x, y, width, height, colour, trained_in in (
        (427, 308, 489, 96, BLUE, "stage 1: decoder, prompt generator"),
        (355, 90, 353, 150, GREEN, "stage 2: diffusion"),
        (405, 12, 252, 46, ORANGE, "stage 3: linear probe"),
        (158, 144, 94, 48, GREY, "never: sentence encoder (frozen)"),
        (580, 258, 360, 34, BLUE, None),
    ):
        box = FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=9",
            facecolor=(colour, 0.15),
            edgecolor=colour,
            linewidth=1.6,
            label=trained_in,
        )
        ax.add_patch(box)
    ax.legend(title="Trained in", fontsize=8.5, title_fontsize=8.5, alignment="left", loc="upper right")


def words(ax):
    """Boxes with text: the prefix, what the decoder reads, and the continuation."""
    cells = [  # (x of the middle, y of the top, width, text, colour)
        (70, 148, 114, "The food was", GREY),
        (467, 350, 51, "The", GREY),
        (522, 350, 51, "food", GREY),
        (577, 350, 51, "was", GREY),
        *((634 + 36 * i, 350, 32, f"$s_{i + 1}$", GREEN) for i in range(8)),
        (1020, 350, 144, "cold, and the\nservice was slow.", BLUE),
    ]
    for x, y, width, text, colour in cells:
        bar = ax.bar(x, 40, width, y, color=colour, alpha=0.5)
        ax.bar_label(bar, [text], label_type="center")


def embeddings(ax):
    """Columns of 8 numbers, light or dark: the prefix's, then noise, which gives way to the proposal."""
    x_pref, noise, x = 0.2 + 0.8 * torch.rand(3, 8, generator=torch.Generator().manual_seed(5))
    labels = r"$x_\mathrm{pref}$", "noise", "", "less noise", "", "proposal $x$"
    for i, label in enumerate(labels):
        signal = max(0, i - 1) / 4
        for colour, shades in ((GREY, (noise if i else x_pref) * (1 - signal)), (GREEN, x * signal)):
            colours = [(colour, shade) for shade in shades.tolist()]
            ax.bar(310 + 90 * i, 9, 24, range(132, 204, 9), color=colours)
        ax.text(310 + 90 * i, 221, label, ha="center", va="center")


def arrows(ax):
    straight = [((128, 168), (156, 168)), ((253, 168), (295, 168)), ((325, 168), (353, 168))]
    straight += [((415 + 90 * i, 168), (475 + 90 * i, 168)) for i in range(4)]
    straight += [((760, 232), (760, 256)), ((760, 293), (760, 348)), ((917, 370), (946, 370))]
    guiding = [((376, 35), (403, 35)), ((531, 59), (531, 88))]
    style = {"arrowstyle": "-|>", "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    for start, end in straight:
        ax.annotate("", end, start, arrowprops=style | {"color": "black"})
    for start, end in guiding:
        ax.annotate("", end, start, arrowprops=style | {"color": ORANGE})
    bent = {"color": "black", "connectionstyle": "angle,angleA=90,angleB=0"}
    ax.annotate("", (425, 370), (70, 189), arrowprops=style | bent)


# ---------- noise.png ---------------------------------------------------------------------------------------


def noise():
    """Noise levels, how often each is used, and what NoiseBins learns of the best denoiser's loss.

    The data are Gaussian, with the covariance of the English model's embeddings.
    """
    meta, covariance, _ = nano.load_diffusion("pretrained/english", "cpu")
    bins = nano.NoiseBins()
    for _ in range(2000):
        log_snr, _ = bins.sample(1024)
        error = gaussian_error(log_snr, covariance.variance)
        bins.update(log_snr, nano.loss_weight(log_snr) * error)

    levels = (torch.arange(100) + 0.5) * 0.3 - 15  # the middles of the bins
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 4))
    signal_and_noise(axes[0], levels)
    densities(axes[1], levels, bins)
    errors(axes[2], levels, bins, covariance.variance, meta["history"][-1])
    for ax, top in zip(axes, (1.5, 0.24, 1.5)):
        ax.set(xlim=(-15, 15), ylim=(0, top), xlabel="noise level λ = log(α²/σ²):  noisy ← → clean")
        ax.set_yticks([0, top / 3, top / 1.5])
        ax.legend(loc="upper left", fontsize=8.5)


def gaussian_error(log_snr, variance):
    """Squared error of the best v at each log_snr (B,), for random data with these variances (E,) -> (B,)."""
    x = torch.randn(len(log_snr), len(variance)) * variance.sqrt()
    eps = torch.randn_like(x)
    z_t = nano.diffuse(x, eps, log_snr)
    alpha, sigma = nano.alpha_sigma(log_snr)
    best_x = alpha * variance / (alpha**2 * variance + sigma**2) * z_t
    best_eps = (z_t - alpha * best_x) / sigma
    difference = nano.velocity(best_x, best_eps, log_snr) - nano.velocity(x, eps, log_snr)
    return difference.square().mean(-1)


def signal_and_noise(ax, levels):
    alpha, sigma = nano.alpha_sigma(levels)
    ax.plot(levels, alpha**2, label="signal, α²")
    ax.plot(levels, sigma**2, label="noise, σ²")
    steps = torch.linspace(-4, 4, nano.Sampling.steps + 1)[:-1]
    ax.plot(steps, nano.alpha_sigma(steps)[0] ** 2, "ko", ms=4, label="the 4 steps of sample.py")
    ax.set(title="What z = α x + σ ε is made of", ylabel="share of the variance of z")


def densities(ax, levels, bins):
    t = torch.linspace(0.0002, 0.9998, 4999, dtype=torch.float64)
    for scale, label in (
        (1, "the paper's sampler: cosine"),
        (noise_scale, "stage 1: cosine, shifted by 2 ln 3"),
    ):
        log_snr = nano.cosine_log_snr(t, scale)
        ax.plot(log_snr, -torch.gradient(t, spacing=(log_snr,))[0], label=label)  # |dt / dlambda|
    ax.plot(levels, bins.value / bins.value.sum() / 0.3, label="stage 2: follows weight × error")
    ax.set(title="How often each level is used", ylabel="probability density")


def errors(ax, levels, bins, variance, trained):
    ax.plot(levels, nano.loss_weight(levels), label="weight φ")
    alpha, sigma = nano.alpha_sigma(levels)
    best = (variance / (alpha**2 * variance + sigma**2)).mean(-1)
    ax.plot(levels, best, color=GREY, label="error of the best denoiser of Gaussian data")
    ax.plot(levels, bins.value, color=GREEN, label="weight × this error, from NoiseBins")
    measured = [trained[name] for name in VAL_LOG_SNR]
    ax.plot(VAL_LOG_SNR.values(), measured, "ko", ms=4, clip_on=False, label="error of the English model")
    ax.set(title="Where the loss is", ylabel="squared error of v per dimension")


# ---------- guidance.png ------------------------------------------------------------------------------------

MEANS = torch.tensor([[-1.3, 0.8], [-0.8, -1.0], [0.1, 0.1], [1.2, -0.9], [0.9, 1.2]])
DEVIATION = 0.3
SLOPE = torch.tensor([2.0, 1.5])  # of the probe: p(y | x) = sigmoid(SLOPE . x)
SAMPLES = 4000


def guidance():
    """Unguided and guided samples of a mixture of Gaussians in the plane, beside the true posterior."""
    data = MEANS[torch.randint(5, (4 * SAMPLES,))] + DEVIATION * torch.randn(4 * SAMPLES, 2)
    accepted = torch.rand(len(data)) < (data @ SLOPE).sigmoid()  # rejection sampling
    covariance = nano.Covariance(*torch.linalg.eigh(data.T.cov()))
    probe = (lambda x: nano.F.logsigmoid(x @ SLOPE), 1.0)

    axis = torch.linspace(-2.45, 2.45, 150)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (150, 150, 2)
    squared = (grid[:, :, None] - MEANS).square().sum(-1)
    prior = torch.exp(-squared / (2 * DEVIATION**2)).sum(-1)
    posterior = prior * (grid @ SLOPE).sigmoid()

    fig, axes = plt.subplots(1, 4, figsize=(WIDTH, 3.5))
    x, paths = sample_mixture([], "estimate", covariance)
    scatter(axes[0], "Unguided: p(x)", x, BLUE, paths)
    x, paths = sample_mixture([probe], "estimate", covariance)
    scatter(axes[1], "Weight 1, at the estimate", x, ORANGE, paths)
    x, paths = sample_mixture([probe], "network", covariance)
    scatter(axes[2], "Weight 1, through the network", x, ORANGE, paths)
    scatter(axes[3], "The truth: p(x | y)", data[accepted][:SAMPLES], GREEN)
    for ax, density in zip(axes, (prior, posterior, posterior, posterior)):
        levels = [0.03, 0.2, 0.5, 0.8, 1]
        ax.contourf(axis, axis, density / density.max(), levels, cmap="Greys", alpha=0.35, zorder=0)
    fig.supxlabel(
        "○ noise → ● sample, from the same 15 starts.   Dashed line: p(y | x) = 1/2.   Grey: true density"
    )


def sample_mixture(directions, guide_through, covariance):
    """-> samples (SAMPLES, 2), and the paths of the first 15 (15, steps + 1, 2)."""
    path = []

    def denoiser(z_t, x_pref, alpha2, no_prefix):
        path.append(z_t.detach())
        return mixture_v(z_t, alpha2.logit())

    x = nano.sample(
        denoiser,
        x_pref=torch.zeros(SAMPLES, 2),
        no_prefix=torch.ones(SAMPLES, dtype=torch.bool),
        sampling=nano.Sampling(steps=60, cfg_scale=1, guide_through=guide_through),
        directions=directions,
        covariance=covariance,
        rng=torch.Generator().manual_seed(1),
    )
    return x, torch.stack([*path, x], dim=1)[:15]


def mixture_v(z_t, log_snr):
    """The best v at z_t (B, 2), where data are an even mixture of N(MEANS[k], DEVIATION^2)."""
    alpha, sigma = nano.alpha_sigma(log_snr)
    variance = (alpha * DEVIATION) ** 2 + sigma**2  # of z_t within a component
    log_p = (alpha * z_t @ MEANS.T - alpha**2 * MEANS.square().sum(-1) / 2) / variance  # of each component
    mean = log_p.softmax(-1) @ MEANS
    x = mean + alpha * DEVIATION**2 / variance * (z_t - alpha * mean)  # E[x | z_t]
    eps = (z_t - alpha * x) / sigma
    return nano.velocity(x, eps, log_snr)


def scatter(ax, title, x, colour, paths=None):
    share = (x @ SLOPE > 0).float().mean()
    ax.scatter(*x[:1000].T, s=3, color=colour, alpha=0.5, lw=0)
    if paths is not None:
        ax.plot(*paths.permute(2, 1, 0), "k", lw=0.9)
        ax.plot(*paths[:, 0].T, "ko", mfc="white", ms=5)
        ax.plot(*paths[:, -1].T, "ko", mfc=colour, ms=6)
    ax.axline((0, 0), slope=-SLOPE[0] / SLOPE[1], color="black", ls="--")
    ax.set(xlim=(-2.45, 2.45), ylim=(-2.45, 2.45), xticks=[], yticks=[])
    ax.set_title(f"{title}\n{share:.0%} right of the line")


# ---------- watch.png ---------------------------------------------------------------------------------------


def watch():
    """One prefix through the sampler under two guides: what sample.py --watch prints, and the text."""
    model = nano.DGLM("pretrained/english", "cpu")
    frame = {"xlim": (0, 1.4), "ylim": (4.5, -0.6), "xticks": [], "yticks": [], "frame_on": False}
    _, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.6), width_ratios=(1, 9), subplot_kw=frame)
    watch_guide(model, "The museum", "negative", ORANGE, *axes[0])
    watch_guide(model, "The museum", "sports", BLUE, *axes[1])


def watch_guide(model, prefix, guide, colour, ax, ax_words):
    steps = []
    ((text, _),) = model.generate([prefix], guide, on_step=lambda *step: steps.append(step))
    (direction,) = nano.parse_guide(guide, model.probes)
    likeliest = nano.Sampling(temperature=0)
    labels = []
    for y, (prefixes, log_snr, e) in enumerate(steps):
        bar = ax.barh(y, direction.log_prob(e)[0].exp(), color=colour)
        ax.bar_label(bar, fmt="%.2f", padding=2)
        (words,) = model.write(prefixes, e, 32, likeliest, torch.Generator().manual_seed(1338))
        ax_words.text(0, y, textwrap.fill(prefix + words, 125), va="center", size=9)
        labels.append(f"λ = {log_snr:.0f}")
    ax_words.text(0, len(steps), textwrap.fill(prefix + text, 115), va="center", size=9, weight="bold")
    ax.set_yticks(range(len(steps) + 1), [*labels, "written"])
    ax.set_title(f"p({guide})")
    ax_words.set_title(f"--guide {guide}: the decoder's likeliest words for the prediction of each step")


# ---------- soft_prompt.png ---------------------------------------------------------------------------------


def soft_prompt():
    """What the decoder reads, and what each place predicts: where there is a loss, Decoder.forward says."""
    model = nano.DGLM("pretrained/reviews", "cpu", with_probes=False)
    tokens = model.tokenizer.encode_ordinary("The food was cold, and the service slow.")
    tokens = torch.tensor([[*tokens, model.tokenizer.eot_token]])
    split = torch.tensor([3])
    row = nano.insert(tokens, -torch.arange(1, 9)[None], split)[0, :-1].tolist()  # soft tokens: -1 to -8
    names = [model.tokenizer.decode([i]).strip() if i >= 0 else f"$s_{-i}$" for i in row]
    names.append("end of\ntext")

    kept = []  # whether each place has a target
    watch_keep = model.decoder.gpt.register_forward_pre_hook
    with watch_keep(lambda gpt, _, kwargs: kept.extend(kwargs["keep"][0]), with_kwargs=True):
        model.decoder(tokens, torch.tensor([tokens.shape[1]]), split, torch.zeros(1, 384), torch.ones(1))

    _, ax = plt.subplots(figsize=(WIDTH, 2.8), subplot_kw={"frame_on": False, "yticks": []})
    bars = ax.bar(range(18), 1, 0.9, color=[GREY] * 3 + [GREEN] * 8 + [BLUE] * 7, alpha=0.5)
    ax.bar_label(bars, names[:-1], label_type="center")
    for i, keep in enumerate(kept):
        if keep:
            ax.annotate(names[i + 1], (i, 1), (i, 1.7), ha="center", arrowprops={"arrowstyle": "<-"})
    gap = [i for i, keep in enumerate(kept) if not keep]
    ax.plot((gap[0] - 0.45, gap[-1] + 0.45), (1.15, 1.15), color=GREY)
    ax.text((gap[0] + gap[-1]) / 2, 1.3, "no loss: the next token is a soft one", ha="center", color=GREY)

    notes = [
        "prefix tokens never\nsee the soft tokens",
        "soft tokens = generator(z, α²): the last one predicts\nthe first word of the continuation",
        "the continuation sees\neverything to its left",
    ]
    ax.set(xlim=(-0.5, 17.6), ylim=(-0.1, 2.3), xticks=(1, 6.5, 14), xticklabels=notes)
    ax.set_title(
        "The decoder reads from left to right. Above each box: the next token, which it learns to predict"
    )


# ---------- little_data.png ---------------------------------------------------------------------------------

LABELLED_ROWS = (25, 50, 100, 200, 1000, 5000)

# % of the texts with the attribute, for three random draws of each number of rows
REVIEWS_NEGATIVE = ((64, 66, 59), (86, 76, 86), (77, 82, 90), (90, 86, 87), (86, 88, 94), (93, 83, 90))
REVIEWS_POSITIVE = ((89, 66, 77), (78, 89, 96), (97, 96, 88), (100, 98, 93), (100, 96, 99), (99, 99, 99))
ENGLISH_JOY = ((50, 10, 42), (45, 18, 20), (68, 28, 25), (35, 35, 55), (50, 30, 65), (42, 50, 48))


def little_data():
    """Control against the number of labelled rows that a probe was trained on."""
    _, ax = plt.subplots(figsize=(8, 3.2))
    for label, shares, colour in (
        ("positive, reviews model", REVIEWS_POSITIVE, BLUE),
        ("negative, reviews model", REVIEWS_NEGATIVE, ORANGE),
        ("joy, English model", ENGLISH_JOY, GREEN),
    ):
        shares = torch.tensor(shares, dtype=torch.float)
        ax.plot(LABELLED_ROWS, shares.mean(1), "o-", color=colour, label=label)
        ax.fill_between(LABELLED_ROWS, shares.amin(1), shares.amax(1), color=colour, alpha=0.2, lw=0)
    ax.set(xscale="log", xticks=LABELLED_ROWS, xticklabels=LABELLED_ROWS, xlabel="labelled rows (log scale)")
    ax.minorticks_off()
    ax.set(ylim=(0, 102), ylabel="texts with the attribute, %")
    ax.set_title("How much labelled text does a probe need?")
    ax.legend(loc="lower right")


if __name__ == "__main__":
    torch.manual_seed(0)
    for picture in (overview, noise, guidance, watch, soft_prompt, little_data):
        picture()
        plt.savefig(f"docs/{picture.__name__}.png", dpi=110)
