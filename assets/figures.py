"""Draws the README's pictures into assets/, from the repository's root: python assets/figures.py

No data is needed: noise.png and guidance.png are of mixtures of Gaussians, whose best denoiser is known in
closed form, soft_prompt.png and watch.png of the model in pretrained/reviews.
"""

import sys
import textwrap

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, ".")
import model as nano
from train_decoder import noise_scale

MODEL = nano.DGLM("pretrained/reviews", "cpu")
BLUE, ORANGE, GREEN, GREY = COLOURS = "#3b6fb6", "#d9702a", "#3a8f5f", "#8a8a8a"
plt.rcParams.update({"axes.prop_cycle": plt.cycler(color=COLOURS), "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.titlesize": 10.5, "axes.titlelocation": "left", "legend.frameon": False})
plt.rcParams.update({"figure.labelsize": 9.5, "xtick.major.size": 0, "ytick.major.size": 0})


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
    for label, scale in (("paper's sampling", 1), ("stage 1", noise_scale)):
        log_snr = nano.cosine_log_snr(t, scale)
        density = -torch.gradient(t, spacing=(log_snr,))[0]  # dt / dlambda
        axes[1].plot(log_snr, density, label=f"{label}: cosine, scale {scale:g}")
    axes[1].plot(levels, bins.value / bins.value.sum() / 0.3, label="stage 2: learnt bins*")
    axes[2].plot(levels, nano.loss_weight(levels), label="weight")
    axes[2].plot(levels, [error(level.expand(1000)).mean() for level in levels], c=GREY, label="least error*")
    axes[2].plot(levels, bins.value, c=GREEN, label="learnt bins: weight × error*")
    titles = "Signal and noise in z = α x + σ ε", "How often each level is used", "What stage 2's bins learn"
    for ax, title, top in zip(axes, titles, (1.5, 0.24, 1.5)):
        ax.set(title=title, xlim=(-15, 15), ylim=(0, top), yticks=(0, top / 3, top / 1.5), xlabel="log-SNR λ")
        ax.legend(loc="upper left")
    fig.supxlabel("Noise is on the left, clean is on the right.   * data: 64 Gaussians in 384 dimensions")


def guidance():
    """Unguided and guided samples of a mixture in the plane, beside the true posterior."""
    means = torch.tensor([[-1.3, 0.8], [-0.8, -1.0], [0.1, 0.1], [1.2, -0.9], [0.9, 1.2]])
    deviation, slope, n, axis = 0.3, torch.tensor([2.0, 1.5]), 4000, torch.linspace(-2.45, 2.45, 150)

    def run(guides, way="estimate"):  # -> samples (n, 2), and the paths of 15 (15, steps + 1, 2)
        def denoiser(z_t, x_pref, alpha2, no_prefix):
            path.append(z_t.detach())
            return best_v(z_t, alpha2.logit(), means, deviation)

        settings, rng = nano.Sampling(60, cfg_scale=1, guide_through=way), torch.Generator().manual_seed(1)
        spread = torch.linalg.eigh(means.T.cov(correction=0) + deviation**2 * torch.eye(2))
        path = []
        x = nano.sample(denoiser, torch.zeros(n, 2), torch.ones(n) > 0, settings, guides, spread, rng=rng)
        return x, torch.stack([*path, x], dim=1)[:15]

    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (150, 150, 2)
    prior = torch.exp(-(grid[:, :, None] - means).square().sum(-1) / (2 * deviation**2)).sum(-1)
    posterior = prior * (grid @ slope).sigmoid()
    many = means[torch.randint(5, (4 * n,))] + deviation * torch.randn(4 * n, 2)
    exact = many[torch.rand(4 * n) < (many @ slope).sigmoid()][:n]  # rejection sampling
    probe = [(lambda x: nano.F.logsigmoid(x @ slope), 1.0)]
    panels = (
        ("Unguided, over p(x)", prior, BLUE, *run([])),
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
    """One sentence through the sampler under two guides, as sample.py --watch follows it."""
    ((probe, label, _),) = nano.parse_guide("negative", MODEL.probes)
    greedy, steps, start = nano.Sampling(temperature=0), [], "This film"
    frame = {"xlim": (0, 1.4), "ylim": (4.5, -0.6), "xticks": [], "yticks": [], "frame_on": False}
    _, axes = plt.subplots(2, 3, figsize=(11.4, 4.2), width_ratios=(1, 1, 6), subplot_kw=frame)
    for row, guide, colour in zip(axes, ("negative", "positive"), (ORANGE, BLUE)):
        ((text, proposal),) = MODEL.generate([start], guide, on_step=lambda *step: steps.append(step))
        for y, (prefix, _, x) in enumerate(steps[-4:]):
            (words,) = MODEL.write(prefix, x, 32, greedy, torch.Generator().manual_seed(1338))
            row[2].text(0, y, textwrap.shorten(f"… {words}", 90, placeholder=" …"), va="center")
            for ax, value in zip(row, (probe.log_prob(x[0])[label].exp(), x[0] @ proposal)):
                ax.bar_label(ax.barh(y, value, color=colour), [f"{value:.2f}"], padding=2)
        row[2].text(0, 4, textwrap.shorten(f"… {text}", 90, placeholder=" …"), va="center", weight="bold")
        row[0].set_yticks(range(5), [*(f"λ = {log_snr:.1f}" for _, log_snr, _ in steps[-4:]), "written"])
        titles = "p(negative)\nby the probe", "cosine to\nproposal", f"--guide {guide}\n{start} …"
        for ax, title in zip(row, titles):
            ax.set_title(title)


def soft_prompt():
    """What the decoder reads, and what each place predicts: where there is a loss, Decoder.forward says."""
    tokens, kept = MODEL.tokenizer.encode_ordinary("The food was cold, and the service slow."), []
    tokens, split = torch.tensor([[*tokens, MODEL.tokenizer.eot_token]]), torch.tensor([3])
    row = nano.insert(tokens, -torch.arange(1, 9)[None], split)[0, :-1].tolist()  # soft tokens: -1 to -8
    names = [MODEL.tokenizer.decode([i]).strip() if i >= 0 else f"s{-i}" for i in row] + ["end of\ntext"]
    MODEL.decoder.gpt.register_forward_pre_hook(lambda *a: kept.extend(a[2]["keep"][0]), with_kwargs=True)
    MODEL.decoder(tokens, torch.tensor([tokens.shape[1]]), split, torch.zeros(1, 384), torch.ones(1))
    _, ax = plt.subplots(figsize=(11.4, 2.8), subplot_kw={"frame_on": False, "yticks": []})
    bars = ax.bar(range(18), 1, 0.9, color=[GREY] * 3 + [ORANGE] * 8 + [BLUE] * 7, alpha=0.5)
    ax.bar_label(bars, names[:-1], label_type="center")
    for i, keep in enumerate(kept):
        text, colour, arrow = (names[i + 1], "k", {"arrowstyle": "<-"}) if keep else ("no\nloss", GREY, None)
        ax.annotate(text, (i, 1), (i, 1.7), ha="center", color=colour, arrowprops=arrow)
    source = "↑\nsoft prompt:   prompt generator  ←  z = α x + σ ε  and  α²"
    notes = "prefix: never sees\nthe soft prompt", source, "continuation: sees both,\nand its own past"
    ax.set_xticks((1, 6.5, 14), notes)
    ax.set(xlim=(-0.5, 17.6), ylim=(-0.1, 2.3), title="Causal: each box predicts from itself and its past")


if __name__ == "__main__":
    torch.manual_seed(0)
    for picture in (noise, guidance, watch, soft_prompt):
        picture()
        plt.savefig(f"assets/{picture.__name__}.png", dpi=110)
