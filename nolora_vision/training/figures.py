"""Pictures of runs, as PNG files: learning curve, confusion matrix, comparison of methods, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def pyplot() -> Any | None:
    """matplotlib without a screen, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def learning_curve(path: Path, history: Sequence[Mapping[str, float]], *, best_epoch: int, title: str) -> bool:
    """Loss and top-1 over epochs, training and validation, the chosen epoch marked; False without matplotlib."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, key, label in ((axes[0], "loss", "cross-entropy"), (axes[1], "top1_percent", "top-1 (%)")):
        for split, style in (("train", "o--"), ("val", "o-")):
            points = [(row["epoch"], row[f"{split}_{key}"]) for row in history if f"{split}_{key}" in row]
            axis.plot(*zip(*points, strict=True), style, label=split)
        axis.axvline(best_epoch, color="grey", linewidth=0.8, linestyle=":", label="chosen epoch")
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def confusion_matrix(
    path: Path, labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], *, title: str
) -> bool:
    """Share of each true class by predicted class, in percent; numbers and names as far as they can be read."""
    plt = pyplot()
    if plt is None:
        return False
    n = len(class_names)
    counts = np.zeros((n, n), dtype=np.int64)
    np.add.at(counts, (labels, predictions), 1)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(14.0, max(5.0, 0.5 * n + 2))
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    image = axis.imshow(shares, vmin=0, vmax=100, cmap="Blues")
    figure.colorbar(image, ax=axis, shrink=0.7, label="% of the true class")
    if n <= 20:
        for i, j in np.ndindex(n, n):
            if counts[i, j]:
                axis.text(
                    j,
                    i,
                    f"{shares[i, j]:.0f}",
                    ha="center",
                    va="center",
                    color="white" if shares[i, j] > 50 else "black",
                )
    size = 9 if n <= 40 else 5
    axis.set_xticks(range(n), class_names, rotation=90, fontsize=size, parse_math=False)  # a $ in a name is a $
    axis.set_yticks(range(n), class_names, fontsize=size, parse_math=False)
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_title(title, parse_math=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def method_comparison(path: Path, results: Sequence[Mapping[str, Any]], *, title: str) -> bool:
    """Left: test top-1 of every seed, with the mean, over trainable parameters; right: validation top-1 by epoch.

    Args:
        results: with method, trainable_without_head, head, test_top1_percent and val_top1_percent_by_epoch by seed.
    """
    plt = pyplot()
    if plt is None:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, result in enumerate(results):
        size = result["trainable_without_head"] + result["head"]
        scores, colour = result["test_top1_percent"], f"C{i}"
        left.plot([size] * len(scores), scores, "o", color=colour, alpha=0.5)
        left.plot([size], [np.mean(scores)], "_", color=colour, markersize=22, label=result["method"])
        curves = np.asarray(result["val_top1_percent_by_epoch"])
        epochs = np.arange(1, curves.shape[1] + 1)
        right.plot(epochs, curves.mean(0), color=colour, label=result["method"])
        right.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
    left.set(xscale="log", xlabel="trainable parameters, with the head", ylabel="test top-1 (%)")
    left.set_title("each seed, and the mean (bar)", fontsize=10)
    right.set(xlabel="epoch", ylabel="validation top-1 (%)")
    right.set_title("mean and range of the seeds", fontsize=10)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def speed_ratios(path: Path, tables: Sequence[Mapping[str, Any]], *, title: str) -> bool:
    """Time against the frozen model for each method, a panel for each table; bars are medians, whiskers quartiles.

    Args:
        tables: with part, subject, dtype and rows of name and ratio_to_frozen.
    """
    plt = pyplot()
    if plt is None:
        return False
    columns = min(2, len(tables))
    lines = -(-len(tables) // columns)
    most = max(len(table["rows"]) for table in tables)
    size = 5.5 * columns, 0.27 * most * lines + 1
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    for axis, table in zip(axes.flat, tables, strict=False):
        rows = table["rows"][::-1]
        ratios = [row["ratio_to_frozen"] for row in rows]
        medians = [q["median"] for q in ratios]
        whiskers = [[q["median"] - q["low"] for q in ratios], [q["high"] - q["median"] for q in ratios]]
        colours = ["C0" if row["name"].startswith("ours") else "0.6" for row in rows]
        axis.barh([row["name"] for row in rows], medians, xerr=whiskers, color=colours, ecolor="0.3")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(left=0)  # bars are compared by their length
        axis.set_title(f"{table['part']}, {table['subject']}, {table['dtype']}", fontsize=10)
        axis.tick_params(labelsize=8)
    figure.supxlabel("time / time of the frozen model")
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
