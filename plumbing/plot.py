"""Pictures of the tables of eval.py."""

import importlib.util
import re

from plumbing.files import write_file

SHARES = {"share": "share of texts with the attribute", "both": "share of texts with both attributes"}


def plot(table, y, path):
    """Draws the figure y (by default the first) against corpus perplexity, a panel for each attribute.

    table: {row: {figure: (mean, error)}}. Rows that differ only in their last number, such as `weight 20` and
    `weight 80`, make a curve, whose points grow from the first to the last.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return print("no picture: that needs matplotlib (pip install matplotlib)")
    from matplotlib.figure import Figure

    y = y or next(iter(next(iter(table.values()))))
    panels, legend = curves_of(table, y)
    columns = min(4, len(panels))
    lines, width = -(-len(panels) // columns), 10 if columns > 1 else 6.5  # inches
    fig = Figure((width, lines * (0.8 + 0.6 * width / columns)), layout="constrained")
    axes = fig.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for ax in axes[len(panels) :]:
        ax.axis("off")
    handles = {}
    for ax, (panel, curves) in zip(axes, panels.items()):
        ax.set_title(panel, fontsize=10)
        ax.tick_params(labelbottom=True, labelsize=8)
        ax.grid(color="0.92")
        for name, points in curves.items():
            x, heights = zip(*points)
            index = list(legend).index(name)
            style = {"color": f"C{index}", "marker": "os^Dv"[index % 5]}
            (handles[name],) = ax.plot(x, heights, linewidth=1.2, markersize=3, **style)
            ax.scatter(x, heights, [14 + 16 * i for i in range(len(x))], zorder=3, **style)
    if y in SHARES:
        axes[0].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    fig.supxlabel("corpus perplexity", fontsize=9)
    fig.supylabel(SHARES.get(y, y), fontsize=9)
    options = {"ncols": min(5, 2 * columns), "fontsize": 9, "frameon": False}
    fig.legend([handles[name] for name in legend], legend.values(), loc="outside upper center", **options)
    write_file(path, lambda f: fig.savefig(f, format="png", dpi=150))


def curves_of(table, y):
    """-> {attribute: {curve: [(perplexity, y), ...]}}, {curve: its name and numbers}."""
    panels, numbers = {}, {}
    for row, figures in table.items():
        panel, _, way = row.rpartition(": ")
        name, number = re.fullmatch(r"(.*?) ?([\d.]*)", way).groups()
        if y in figures:
            curves = panels.setdefault(panel, {})
            unguided = curves.get(name.removeprefix("network, "), [])[:1]  # both ways to guide begin there
            curves.setdefault(name, unguided).append((figures["corpus perplexity"][0], figures[y][0]))
            numbers.setdefault(name, {})[number] = None
    return panels, {name: f"{name} {', '.join(found)}" for name, found in numbers.items()}
