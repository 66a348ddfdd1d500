"""Pictures of the tables of eval.py."""

import importlib.util
import math
import re

from plumbing.files import write_file

SHARES = {"share": "share of texts with the attribute", "both": "share of texts with both attributes"}


def plot(table, y, path):
    """Draws the figure y (by default the first) against corpus perplexity, a panel for each attribute.

    table: {row: {figure: (mean, error)}}. Rows that differ only in their last number, such as `weight 20` and
    `weight 80`, make a curve, whose points grow from the first to the last.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: that needs matplotlib (pip install matplotlib)")
        return
    from matplotlib.figure import Figure

    first_row = next(iter(table.values()))
    y = y or next(iter(first_row))
    panels, legend = curves_of(table, y)
    num_columns = min(4, len(panels))
    num_lines = math.ceil(len(panels) / num_columns)
    width = 10 if num_columns > 1 else 6.5  # inches
    height = num_lines * (0.8 + 0.6 * width / num_columns)
    fig = Figure((width, height), layout="constrained")
    axes = fig.subplots(num_lines, num_columns, sharex=True, sharey=True, squeeze=False).flatten()
    for ax in axes[len(panels) :]:
        ax.axis("off")

    handles = {}
    for ax, (panel, curves) in zip(axes, panels.items()):
        ax.set_title(panel, fontsize=10)
        ax.tick_params(labelbottom=True, labelsize=8)
        ax.grid(color="0.92")
        for name, points in curves.items():
            perplexities, heights = zip(*points)
            sizes = [14 + 16 * i for i in range(len(points))]
            index = list(legend).index(name)
            style = {"color": f"C{index}", "marker": "os^Dv"[index % 5]}
            (handles[name],) = ax.plot(perplexities, heights, linewidth=1.2, markersize=3, **style)
            ax.scatter(perplexities, heights, sizes, zorder=3, **style)

    if y in SHARES:
        axes[0].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    fig.supxlabel("corpus perplexity", fontsize=9)
    fig.supylabel(SHARES.get(y, y), fontsize=9)
    options = {"loc": "outside upper center", "ncols": min(5, 2 * num_columns), "fontsize": 9}
    fig.legend([handles[name] for name in legend], legend.values(), frameon=False, **options)
    write_file(path, lambda f: fig.savefig(f, format="png", dpi=150))


def curves_of(table, y):
    """-> {attribute: {curve: [(perplexity, y), ...]}}, {curve: its name and numbers}."""
    panels = {}
    numbers = {}  # {curve: its numbers, as the keys of a dictionary, which keeps their order}
    for row, figures in table.items():
        if y not in figures:
            continue
        panel, _, way = row.rpartition(": ")
        name, number = re.fullmatch(r"(.*?) ?([\d.]*)", way).groups()
        curves = panels.setdefault(panel, {})
        unguided = curves.get(name.removeprefix("network, "), [])[:1]  # both ways to guide begin there
        point = (figures["corpus perplexity"][0], figures[y][0])
        curves.setdefault(name, unguided).append(point)
        numbers.setdefault(name, {})[number] = None
    return panels, {name: f"{name} {', '.join(found)}" for name, found in numbers.items()}
