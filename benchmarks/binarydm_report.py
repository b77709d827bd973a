"""Tables and pictures of `binarydm.py`, from the JSON files of its runs.

python benchmarks/binarydm_report.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import load_file

COLUMNS = ("loss", "ema_loss", "feature_distance", "sample_mse", "jump", "second_scale", "seconds")
Runs = dict[tuple[int, str], list[dict]]


def read_runs(folder: Path) -> Runs:
    """Records by activation width and variant."""
    runs: Runs = defaultdict(list)
    for path in sorted(folder.glob("*-A*-*.json")):
        record = json.loads(path.read_text())
        runs[record["act_bits"], record["variant"]["name"]].append(record)
    return dict(sorted(runs.items(), key=lambda item: (-item[0][0], item[0][1])))


def _cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{spread}"


def table(runs: Runs, teacher: dict) -> str:
    """Markdown: mean and standard deviation over seeds, and ratios to the vanilla binarizer."""
    lines = [
        f"Teacher (float32, {teacher['parameters']} parameters): loss {teacher['loss']:.4g}, "
        f"feature distance {teacher['feature_distance']:.4g}",
        "",
        "| act. bits | variant | seeds | " + " | ".join(COLUMNS) + " | loss ratio | distance ratio |",
        "|" + "---|" * (len(COLUMNS) + 5),
    ]
    for (bits, name), records in runs.items():
        base = runs.get((bits, "vanilla"), records)
        ratios = [mean(r[k] for r in records) / mean(r[k] for r in base) for k in ("ema_loss", "feature_distance")]
        figures = " | ".join([*(_cell([r[c] for r in records]) for c in COLUMNS), *(f"{r:.3f}" for r in ratios)])
        lines.append(f"| {bits} | {name} | {len(records)} | {figures} |")
    for bits in sorted({b for b, _ in runs}):
        sizes = teacher[f"A{bits}"]
        smaller, all_layers = sizes["binary_part_ratio"], sizes["all_layers_ratio"]
        lines += ["", f"A{bits}: binarized weights {smaller:.1f}x smaller, all planned layers {all_layers:.1f}x;"]
        lines += [f"operations by the paper's count {sizes['operations_ratio']:.1f}x fewer"]
    return "\n".join(lines) + "\n"


def plot_curves(runs: Runs, path: Path) -> None:
    """Training loss over iterations, mean over seeds, one panel per activation width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    widths = sorted({bits for bits, _ in runs}, reverse=True)
    figure, axes = plt.subplots(1, len(widths), figsize=(6 * len(widths), 4), squeeze=False)
    for axis, bits in zip(axes[0], widths, strict=True):
        for (b, name), records in runs.items():
            if b == bits:
                losses = torch.tensor([[loss for _, loss in r["curve"]] for r in records]).mean(0)
                smooth = torch.nn.functional.avg_pool1d(losses[None], 3, 1, 1, count_include_pad=False)[0]
                axis.plot([step for step, _ in records[0]["curve"]], smooth, label=name, linewidth=1)
        axis.set(title=f"W1A{bits}", xlabel="iteration", ylabel="L_simple", yscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def plot_samples(folder: Path, runs: Runs, path: Path, columns: int = 16) -> None:
    """One row of samples per variant, from the same noise; the teacher's first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [("teacher", load_file(folder / "teacher-samples.safetensors")["samples"][:columns])]
    for (bits, name), records in runs.items():
        seed = records[0]["seed"]
        file = f"{name}-A{bits}-{seed}".replace(" ", "-").replace("+", "-") + ".safetensors"
        rows.append((f"W1A{bits} {name}", load_file(folder / file)["samples"][:columns]))
    figure, axes = plt.subplots(len(rows), 1, figsize=(columns * 0.6, len(rows) * 0.85))
    for axis, (label, samples) in zip(axes, rows, strict=True):
        strip = torch.cat(list(samples.add(1).div(2).clamp(0, 1)), dim=2).permute(1, 2, 0)
        axis.imshow(strip.squeeze(-1) if strip.shape[-1] == 1 else strip, cmap="gray", vmin=0, vmax=1)
        axis.set_title(label, fontsize=6, loc="left", pad=2)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=150)


def write_report(folder: Path) -> None:
    """``results.json``, ``results.md``, ``curves.png`` and ``samples.png``."""
    runs, teacher = read_runs(folder), json.loads((folder / "teacher.json").read_text())
    records = [record for group in runs.values() for record in group]
    (folder / "results.json").write_text(json.dumps({"teacher": teacher, "runs": records}) + "\n")
    text = table(runs, teacher)
    (folder / "results.md").write_text(text)
    plot_curves(runs, folder / "curves.png")
    plot_samples(folder, runs, folder / "samples.png")
    print(text)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
