"""Figures that the documentation quotes and no record holds as they are: means over seeds, medians, ratios.

Each is computed from the record of its benchmark, by the function that `DERIVATIONS` has for the first part of the
record's name, so a quoted figure always follows from the record. A test compares every table of the documentation.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Derived = dict[str, Any]
SEEDED = re.compile(r"(?P<label>.+), (?P<seed>\d+)")


def by_label(data: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Entries whose keys end in a seed, by what stands before it."""
    found: dict[str, list[Any]] = defaultdict(list)
    for key, value in data.items():
        if match := SEEDED.fullmatch(key):
            found[match["label"]].append(value)
    return dict(found)


def error_power(psnr: Iterable[float]) -> float:
    """Mean over images of the error power that their PSNR in dB says."""
    return statistics.fmean(10 ** (-value / 10) for value in psnr)


def ablation(data: Mapping[str, Any]) -> Derived:
    """Median and worst PSNR of all seeds' images, mean error power; means of the rest, planning over recording."""
    labels, found = by_label(data), dict[str, Any]()
    recording = labels.pop("recording", [])
    for label, runs in labels.items():
        every = [value for run in runs for value in run["psnr"]]
        found[label] = {
            "median": statistics.median(every),
            "worst": min(every),
            "power": error_power(every),
            **{key: statistics.fmean(run[key] for run in runs) for key in ("drift", "cpu_seconds")},
        }
        if recording:
            found[label]["over_recording"] = found[label]["cpu_seconds"] / statistics.fmean(recording)
    return found


def latency(data: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with the first call in seconds."""
    return [{**row, "first call s": row["latency"]["first"] / 1e3} for row in data]


def bootstrap_means(values: np.ndarray, count: int = 2000) -> np.ndarray:
    """Means over ``values [S, N]`` with rows and columns drawn again, ``[count]``."""
    rng, (rows, columns) = np.random.default_rng(0), values.shape
    chosen = rng.integers(0, columns, (count, 1, columns))
    return values[rng.integers(0, rows, (count, rows, 1)), chosen].mean((1, 2))


def transforms(data: Mapping[str, Any]) -> Derived:
    """PSNR of every combination, and what an ingredient multiplies the error power of an image by, with an interval.

    The unit is an image of a seed: its ratio is the geometric mean over the combinations of the other ingredients. The
    interval is that of 2000 bootstrap means over images and seeds, both drawn.
    """
    labels = by_label(data)
    seeds = min(len(runs) for runs in labels.values())  # of all combinations, should the run have been cut
    psnr = {label: np.array([run["psnr"] for run in runs[:seeds]]) for label, runs in labels.items()}  # [seeds, images]
    parts = {frozenset(label.split(" + ")) - {"none"}: values for label, values in psnr.items()}
    combinations = {label: {"median": float(np.median(v)), "worst": float(v.min())} for label, v in psnr.items()}
    effects = {}
    for name in sorted(frozenset().union(*parts)):
        others = [each for each in parts if name not in each and each | {name} in parts]
        conditions = {"": others}
        for other in sorted(frozenset().union(*others)):
            conditions[f" without {other}"] = [each for each in others if other not in each]
            conditions[f" with {other}"] = [each for each in others if other in each]
        for condition, chosen in conditions.items():
            ratio = np.mean([parts[each] - parts[each | {name}] for each in chosen], 0) / 10
            bounds = np.quantile(bootstrap_means(ratio), (0.025, 0.975))  # of log10, [seeds, images]
            effects[name + condition] = [float(10**value) for value in (ratio.mean(), *bounds)]
    return {"combinations": combinations, "effects": effects}


def dynamic(data: Mapping[str, Any]) -> Derived:
    """Median and worst PSNR over the images of all seeds, and how many layers have ranges per token."""
    found: Derived = {}
    for label, runs in by_label(data).items():
        every = [value for run in runs for value in run["psnr"]]
        layers = [[len(run["dynamic"]), run["linear"]] for run in runs]
        found[label] = {"median": statistics.median(every), "worst": min(every), "layers": layers}
    return found


def tfmq(data: Mapping[str, Any]) -> Derived:
    """Means over seeds; images over the stock tool's best, features over nearest rounding."""
    means = {
        label: {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        for label, runs in by_label(data).items()
    }
    over: Derived = {"seeds": [run[key] for run in data.values() for key in ("image_mse", "cosine") if key in run]}
    for start, base, key in (
        ("images, ", "images, Brevitas, MSE weights, zero points, learned rounding", "image_mse"),
        ("features, ", "features, nearest", "cosine"),
    ):
        over |= {label: row[key] / means[base][key] for label, row in means.items() if label.startswith(start)}
    return {"means": means, "over": over}


def adp(data: Mapping[str, Any]) -> Derived:
    """Mean error of every width and method, and the mean of its ratios to one static range."""
    errors: dict[tuple[int, str], list[float]] = defaultdict(list)
    rows = [row for key, value in data.items() if key.startswith("seed ") for row in value["rows"]]
    for row in rows:
        errors[row["bits"], row["method"]].append(row["error"])
    return {
        f"A{bits}, {method}": {
            "bytes": [row["bytes"] for row in rows if (row["bits"], row["method"]) == (bits, method)],
            "error": statistics.fmean(found),
            "over static": statistics.fmean(e / s for e, s in zip(found, errors[bits, "static"], strict=False)),
        }
        for (bits, method), found in errors.items()
    }


def mixdq_plans(data: Mapping[str, Any]) -> Derived:
    """What is recorded of every rule, and dB of the exact program over one threshold at sizes that are in both."""
    exact, threshold = (dict(data[f"true SQNR in dB, {rule}"]) for rule in ("exact (ours)", "one threshold (Apple)"))
    over = [exact[size] - threshold[size] for size in exact if size in threshold]
    rules = {key: value for key, value in data.items() if key.startswith("true SQNR")}
    return {"over one threshold": over, "prediction": data["prediction"], **rules}


def solvers(data: Mapping[str, Any]) -> Derived:
    """Median and largest CPU seconds, how many were proven, and percent above the best proven objective."""
    answers = {name: value for name, value in data.items() if name != "settings"}
    count = len(next(iter(answers.values())))
    best = [min(found[i][0] for found in answers.values() if found[i][1]) for i in range(count)]
    return {
        name: {
            "median": statistics.median(each[3] for each in found),
            "largest": max(each[3] for each in found),
            "proven": [sum(each[1] for each in found), count],
            "percent above": max(100 * (each[0] / b - 1) for each, b in zip(found, best, strict=True)),
            "times": max(each[0] / b for each, b in zip(found, best, strict=True)),
        }
        for name, found in answers.items()
    }


def tmpq(data: Mapping[str, Any]) -> Derived:
    """Ours over every other row, by seed: on images of the search, on others, of medians of others."""
    found: Derived = {}
    for part, ours in (("half", "chosen"), ("equal cost", "joint")):
        for seed, each in enumerate(data.get("seeds", ())):
            rows = each[part]["rows"]
            for name, row in rows.items():
                found[f"{part}, {name}, {seed}"] = [a / b for a, b in zip(rows[ours], row, strict=True)]
    return found


def temporal_table(data: Mapping[str, Any]) -> Derived:
    """Millions of parameters, MB of float32, seconds of a step and percent of them gained."""
    found: Derived = {}
    for name, row in data.items():
        if name != "settings":
            counts = [row["parameters"] / 1e6, row["t alone"] / 1e6, 4 * row["t alone"] / 1e6]
            live, looked_up = row.get("live CPU ms"), row.get("table CPU ms")
            times = [live, looked_up, live / 1e3, looked_up / 1e3, 100 * (1 - looked_up / live)] if live else []
            found[name] = counts + times
    return found


def size(data: Mapping[str, Any]) -> Derived:
    """How many times smaller the file is; kB and MB."""
    full = data["sizes"]["fp32"]["file"]
    return {
        label: {"smaller": full / row["file"], "sqnr": row["sqnr"]}
        | {f"{key}, {unit}": row[key] / by for key in row if row[key] for unit, by in (("kB", 1e3), ("MB", 1e6))}
        for label, row in data["sizes"].items()
    }


def binarydm(data: Mapping[str, Any]) -> Derived:
    """Mean, spread over seeds, and the mean over the vanilla binarizer's, by variant and activation width."""
    runs: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for run in data["runs"]:
        variant = run["variant"]
        runs[variant if isinstance(variant, str) else variant["name"], run["act_bits"]].append(run)
    found: Derived = {}
    for (name, bits), each in runs.items():
        for key in ("ema_loss", "feature_distance", "second_scale", "jump"):
            values, base = ([run[key] for run in runs.get((n, bits), each)] for n in (name, "vanilla"))
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            mean = statistics.fmean(values)
            found[f"{name}, A{bits}, {key}"] = [mean, spread, mean / (statistics.fmean(base) or 1)]
    return found


def peers(data: Mapping[str, Any]) -> Derived:
    """The table, as images are judged together, not one by one; and every method's mean error power."""
    powers = {
        label: error_power(value for run in runs for value in run["psnr"])
        for label, runs in by_label(data).items()
        if all("psnr" in run for run in runs)  # what failed has none
    }
    return {"table": data["table"], "power": powers}


def by_images(data: Mapping[str, Any]) -> Derived:
    """Median and worst PSNR of all seeds' images, mean error power, and the median over seeds of each one's."""
    found: Derived = {}
    for label, runs in by_label(data).items():
        powers = [error_power(run["psnr"]) for run in runs]
        every = [value for run in runs for value in run["psnr"]]
        found[label] = {
            "median": statistics.median(every),
            "worst": min(every),
            "power": statistics.fmean(powers),
            "median of seeds": statistics.median(powers),
            **({"predicted": statistics.median(run["predicted"] for run in runs)} if "predicted" in runs[0] else {}),
        }
    return found


def first_picture(data: Mapping[str, Any]) -> Derived:
    """Seconds of each stage and of all, on the wall and of CPU time."""
    return {kind: {**data[kind], "all": sum(data[kind].values())} for kind in ("seconds", "cpu") if kind in data}


DERIVATIONS: dict[str, Callable[[Mapping[str, Any]], Derived]] = {
    each.__name__: each
    for each in (
        ablation,
        dynamic,
        tfmq,
        adp,
        mixdq_plans,
        solvers,
        tmpq,
        temporal_table,
        size,
        binarydm,
        peers,
        transforms,
        first_picture,
        latency,
    )
} | dict.fromkeys(("group_widths", "group_steps", "group_wider", "sampler_correction", "caching"), by_images)


def derive(name: str, data: Any) -> Any:
    """What the record called ``name`` says: what is derived from it, or all it holds where nothing has to be."""
    derivation = DERIVATIONS.get(name.split("-")[0])
    return derivation(data) if derivation else data
