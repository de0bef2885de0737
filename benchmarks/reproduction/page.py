"""The results as Markdown and as SVG."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.reproduction.sizes import PAPER
from biorewards.report.figures import ticks
from rl.monitor import SHORT

TEACHABLE = (
    ": of different classes, those whose class the base hits about every other time on validation plates. Where it "
    "always or never does, rollouts are alike in MoA and post-training has nothing to learn from. The statistics that "
    "all is judged by are of all classes."
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 260, 52, 130, 14, 34
COLOURS = ("#777777", "#b3450b", "#1b6e8c", "#5a7d1e")


def cell(value: list[float] | None, digits: int = 2) -> str:
    """A figure with its interval."""
    if value is None:
        return ""
    return f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"


def grid(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(line) + " |" for line in lines)]
    )


def rows_table(rows: dict[str, Any], metrics: list[str]) -> str:
    """A row a metric, a column a row of the results."""
    digits = {"kernel": 4}
    return grid(
        ["", *rows],
        [[SHORT.get(m, m), *(cell(row.get(m), digits.get(m, 2)) for row in rows.values())] for m in metrics],
    )


def markdown(found: dict[str, Any]) -> str:
    """The page."""
    about, rows, size = found["about"], found["table1"], found["about"]["size"]
    names = list(about["weights"])
    main = [name for name in rows if not name.endswith("Euler steps") and "own solver" not in name]
    base = [name for name in rows if name == "base" or name.endswith("Euler steps") or "own solver" in name]
    held = [m for m in rows["base"] if m.startswith(("held-out", "classical"))] if "base" in rows else []
    shown = [*names, "total", "moa_accuracy", "frechet", "kernel"]
    seconds = sum(about["seconds"].values())
    parts = [
        "# The paper's experiments, in kind",
        f"Printed by `{about['command']}`; {len(about['seconds'])} pieces, {seconds / 60:.0f} minutes on "
        f"{about['machine']['device']} ({about['machine']['threads']} thread). Phantom crops of {size['pixels']} px, "
        f"{about['prompts']} (control, compound) prompts from {about['controls']} controls on {about['plates']} plates "
        "that nothing was trained or chosen on, the same for every row. Intervals are 95 % bootstraps over plates, "
        f"then controls within them, then seeds. A run is {size['steps']} steps of {size['groups']} x "
        f"{size['rollouts']} rollouts, {size['rollout_steps']} unguided Euler steps each, and so is everything drawn "
        "but where it says so.",
        f"Compounds: {', '.join(about['compounds'])}" + (TEACHABLE if size["compounds"] else "."),
    ]
    if about["unfinished_from"]:
        parts.append(f"**Not finished**: stopped before `{about['unfinished_from']}`; what follows is what there is.")
    seeds = ", ".join(f"{name} {row['seeds']}" for name, row in rows.items() if row["seeds"] > 1)
    parts += ["## Table 1", rows_table({name: rows[name] for name in main}, shown)]
    parts += [f"Seeds: {seeds}; all others one." if seeds else "One seed.", papers()]
    if found["choice"]:
        told = ", ".join(
            f"{k}: {v['total']:.2f} (base {v['base']:.2f})" for k, v in found["choice"]["candidates"].items()
        )
        parts.append(
            f"Settings were chosen on validation plates of the training phantom after {about['size']['choice']} steps: "
            f"**{found['choice']['chosen']}**. Totals there: {told}."
        )
    parts += ["## Differences, paired", rows_table(found["differences"], shown)]
    parts += [
        "## Not rewarded",
        "The second MoA classifier (another architecture and seed, other plates) puts "
        f"{about['second_accuracy']:.2f} of the real test images into their class. "
        "Classical: the same rewards with the classical segmenter's masks.",
        rows_table({name: rows[name] for name in main}, [*held, "pixel distance", "nothing found"]),
        "Spread ratios, generated over real:",
        grid(
            ["", *main],
            [[SHORT.get(k, k), *(f"{rows[n]['spread'].get(k, float('nan')):.2f}" for n in main)]
             for k in (rows["base"]["spread"] if "base" in rows else {})],
        ),
        "## The base at other step counts", rows_table({name: rows[name] for name in base}, shown),
    ]  # fmt: skip
    for title, key in (
        ("Figure 6: KL weight", "kl_weight"), ("Figure 6: mixing beta", "mix_beta"),
        ("Table 2: one reward at a time", "single"),
    ):  # fmt: skip
        if found[key]:
            parts += [f"## {title}", rows_table(found[key], [*names, "total", "frechet"])]
    if found["curves"]:
        parts.append("## Figure 5: best of N")
        for name, curve in found["curves"].items():
            lines = [[str(row["n"]), *(f"{row[n][0]:.2f}" for n in names), cell(row["total"])] for row in curve]
            parts.append(f"{name}:\n\n" + grid(["N", *(SHORT.get(n, n) for n in names), "total"], lines))
        parts.append("![Total by N](reproduction_n.svg)")
    parts += ["## What was asked for", "```json\n" + json.dumps(found["verdict"], indent=1) + "\n```"]
    return "\n\n".join(parts) + "\n"


def papers() -> str:
    """The paper's own table."""
    lines = [
        [SHORT.get(name, name), *("" if v is None else f"{v:g}" for v in values)] for name, values in PAPER.items()
    ]
    return (
        "The paper's figures, for BBBC021 and verifiers of its own (Frechet and kernel distances in Inception "
        "features); only directions compare:\n\n"
        + grid(["", "CellFlux", "CellFluxRL", "CellFluxRL + best-of-4"], lines)
    )


def figures(found: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG: the total by N, with the real images' as a rule."""
    curves = found["curves"]
    if not curves:
        return {}
    every = [v for curve in curves.values() for row in curve for v in row["total"][1:]]
    real = found["table1"].get("real", {}).get("total")
    low, high = min([*every, *(real[:1] if real else [])]), max([*every, *(real[:1] if real else [])])
    last = max(len(curve) for curve in curves.values()) - 1 or 1

    def x(k: int) -> float:
        return round(LEFT + k / last * (WIDTH - LEFT - RIGHT), 1)

    def y(v: float) -> float:
        return round(TOP + (high - v) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM), 1)

    out = ['<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="11" '
           f'viewBox="0 0 {WIDTH} {HEIGHT}">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']  # fmt: skip
    for v in ticks(low, high, 5):
        out.append(f'<path d="M{LEFT} {y(v)}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(v) + 4}" text-anchor="end">{v:g}</text>')
    out += [f'<text x="{x(k)}" y="{HEIGHT - 16}" text-anchor="middle">{2**k}</text>' for k in range(last + 1)]
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">N</text>')
    if real:
        out.append(f'<path d="M{LEFT} {y(real[0])}H{WIDTH - RIGHT}" stroke="black" stroke-dasharray="4 3"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 6}" y="{y(real[0]) + 4}">real</text>')
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        line = " ".join(f"{x(k)},{y(row['total'][0])}" for k, row in enumerate(curve))
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for k, row in enumerate(curve):
            out.append(f'<path d="M{x(k)} {y(row["total"][1])}V{y(row["total"][2])}" stroke="{colour}"/>')
        end = curve[-1]["total"][0]
        out.append(f'<text x="{x(len(curve) - 1) + 6}" y="{y(end) + 4}" fill="{colour}">{name}</text>')
    return {"reproduction_n.svg": "\n".join([*out, "</svg>"]) + "\n"}
