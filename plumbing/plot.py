"""Pictures of the tables of eval.py."""

import importlib.util
import re

from plumbing.files import write_file


def plot(table, y, path):
    """Draws the figure y (by default each row's first) against corpus perplexity, a panel for each attribute.

    table: {row: {figure: (mean, error)}}. Rows that differ only in their last number, such as `weight 20` and
    `weight 80`, make a curve; the others are points.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return print("no picture: that needs matplotlib (pip install matplotlib)")
    import matplotlib.pyplot as plt

    panels, curves = {}, {}  # {attribute: {curve: [(number, perplexity, y), ...]}}, {curve: its colour}
    for row, figures in table.items():
        panel, _, way = row.rpartition(": ")
        name, number = re.fullmatch(r"(.*?) ?([\d.]*)", way).groups()
        height = y or next(iter(figures))
        if height in figures:
            point = number, figures["corpus perplexity"][0], figures[height][0]
            panels.setdefault(panel, {}).setdefault(name, []).append(point)
            curves.setdefault(name, f"C{len(curves)}")

    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (10, 0.8 + 2.4 * lines) if columns > 1 else (6, 4.5)
    fig, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", sharey=True)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (panel, each) in zip(axes.flat, panels.items()):
        ax.axis("on")
        ax.set_title(panel, fontsize=10)
        for name, points in each.items():
            numbers, x, heights = zip(*points)
            ax.plot(x, heights, "o-", color=curves[name], markersize=4)
            for number, *place in zip(numbers, x, heights):
                ax.annotate(number, place, (3, 3), textcoords="offset points", fontsize=7)
    fig.supxlabel("corpus perplexity", fontsize=10)
    fig.supylabel(y or "share of texts", fontsize=10)
    handles = [plt.Line2D([], [], color=colour, marker="o", markersize=4) for colour in curves.values()]
    fig.legend(handles, curves, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    write_file(path, lambda f: fig.savefig(f, format="png", dpi=100))
