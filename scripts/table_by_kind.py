"""Print the mean of every reward by kind of row: `python scripts/table_by_kind.py demo-out/phantom.csv`.

The kinds come from the column `Kind` of the demo's manifest, which the score table keeps as `Metadata_Kind`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from biorewards.io.tables import read_table

KINDS = ("treated", "control", "copy-of-control", "noise", "blank")


def main(path: Path) -> None:
    """Print the table."""
    scores = read_table(path)
    rewards = [name for name in scores if name.startswith("Reward_") and name != "Reward_total_label_free"]
    means = scores.groupby("Metadata_Kind")[rewards].mean()
    table = Table(title="mean reward by kind of row")
    table.add_column("kind", no_wrap=True)
    table.add_column("n", justify="right")
    for name in rewards:
        table.add_column(name.removeprefix("Reward_").replace("_", " "), justify="right")
    for kind in KINDS:
        n = int((scores["Metadata_Kind"] == kind).sum())
        table.add_row(kind, str(n), *("-" if value != value else f"{value:.2f}" for value in means.loc[kind]))
    Console(width=130).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
