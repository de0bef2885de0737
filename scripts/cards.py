"""The cards of the bundled verifiers: `biorewards validate` on drawn and on real cells, as Markdown for docs/cards.

    python scripts/cards.py --out docs/cards --data ../shared/data

Three sets: `phantom` on fresh phantom crops; `bbbc021` on the real 96 px crops (DMSO and colchicine) that its reference
stands on; `bbbc021-68px`, the same segmenter on real 68 px crops, whose reference is fitted to other plates of the same
size. Without --data only the first is made. No image goes into a card. Stopped, the same command with --work goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from real_crops import CHANNELS, RANGE, write_crops68  # noqa: E402

from biorewards.audit.lesions import LESIONS  # noqa: E402
from biorewards.io.tables import write_text  # noqa: E402
from biorewards.phantom import write_dataset  # noqa: E402
from biorewards.validate.check import Finding  # noqa: E402
from biorewards.validate.wording import figure, lesion_title, number_of, sentence, title, verdict  # noqa: E402
from cli.main import run  # noqa: E402

#: Crops of the phantom, and a seed that nothing else in the repository uses.
PHANTOM, SEED = 600, 20391
ABOUT = {
    "phantom": f"{PHANTOM} fresh phantom crops (seed {SEED}); lesions are made with the true masks.",
    "bbbc021": "Real 96 px crops of BBBC021 (DMSO and colchicine), among them those that the reference stands on: "
    "figures that compare with the reference are optimistic. Lesions are made with the masks of the segmenter itself.",
    "bbbc021-68px": "Real 68 px crops of BBBC021 (DMSO and cycloheximide). The reference is fitted to half of the "
    "plates, the other half is judged. Lesions are made with the masks of the segmenter itself.",
}


def main() -> None:
    """Make every set, then write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "cards")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, help="Folder for images and finished checks; default: a temporary one.")
    parser.add_argument("--n", type=int, default=32, help="Images damaged at every dose.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for name, options in sets(work, args.data).items():
            print(f"== {name}", flush=True)
            command = ["validate", *options, "--out", str(work / f"{name}-out"), "--n", str(args.n), "--device", "cpu"]
            if run(command) not in (0, 1):
                sys.exit(f"{name}: validate could not be run")
            write(args.out / name, name, json.loads((work / f"{name}-out" / "validate.json").read_text("utf-8")),
                  work / f"{name}-out" / "cards")  # fmt: skip
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1000:.0f} kB")


def sets(work: Path, data: Path) -> dict[str, list[str]]:
    """name -> options of `validate`; the images are made where they are not there yet."""
    if not (work / "phantom" / "index.csv").is_file():
        shutil.rmtree(work / "phantom", ignore_errors=True)
        write_dataset(work / "phantom", PHANTOM, 96, SEED)
    found = {"phantom": ["--assay", "phantom", "--real", str(work / "phantom")]}
    if not (data / "bbbc021_pairs96").is_dir():
        print(f"{data} holds no bbbc021_pairs96: cards of bbbc021 are left as they are", file=sys.stderr)
        return found
    pairs = work / "pairs96"
    if not (pairs / "crops.csv").is_file():
        table = pd.read_csv(data / "bbbc021_pairs96" / "crops.csv", dtype=str, keep_default_na=False)
        # Panels with blacked corners are no pictures of cells there.
        table = table[(table["corners_masked"] == "0") & (table["moa"] != "")]
        for file in table["file"]:
            (pairs / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / "bbbc021_pairs96" / file, pairs / file)
        table[["file", "compound", "moa"]].to_csv(pairs / "crops.csv", index=False)
    found["bbbc021"] = ["--assay", "bbbc021", "--real", str(pairs), "--channels", CHANNELS]
    small = work / "crops68"
    if not small.is_dir():
        write_crops68(data, work / "crops68.partial")
        (work / "crops68.partial").rename(small)
        table = pd.read_csv(small / "manifest.csv", dtype=str, keep_default_na=False)
        (small / "manifest.csv").unlink()
        for half, split in (("fit", "train"), ("judged", "val")):
            (small / half).mkdir()
            own = table[table["split"] == split].drop(columns="split")
            for file in own["file"]:
                (small / file).rename(small / half / file)
            own.to_csv(small / half / "manifest.csv", index=False)
    if not (work / "bbbc021-68px" / "assay.json").is_file():
        fit = ["fit", str(small / "fit"), "--out", str(work / "bbbc021-68px"), "--images-seen", "0", "--channels",
               CHANNELS, "--intensity-range", RANGE]  # fmt: skip
        if run(fit) != 0:
            sys.exit("bbbc021-68px: the assay could not be fitted")
    found["bbbc021-68px"] = ["--assay", str(work / "bbbc021-68px"), "--real", str(small / "judged"), "--channels",
                             CHANNELS, "--intensity-range", RANGE]  # fmt: skip
    return found


def write(out: Path, name: str, answer: dict[str, Any], cards: Path) -> None:
    """README.md, one page a reward, and cards.json with every figure."""
    found = {check: [Finding.read(one) for one in own] for check, own in answer["checks"].items()}
    told = {reward: json.loads((cards / f"{reward}.json").read_text("utf-8")) for reward in answer["rewards"]}
    write_text(out / "README.md", summary(name, answer, found, told))
    for reward, card in told.items():
        write_text(out / f"{reward}.md", page(name, card))
    kept = {key: value for key, value in answer.items() if key != "checks"} | {"checks": compact(found)}
    write_text(out / "cards.json", json.dumps(kept, ensure_ascii=False, separators=(",", ":")) + "\n")


def compact(found: dict[str, list[Finding]]) -> dict[str, Any]:
    """check -> what (with its threshold) -> reward ("" for the suite) -> [value, low, high, passed, n]."""
    told: dict[str, Any] = {}
    for check, own in found.items():
        for one in own:
            numbers = [one.value, *(one.interval or (None, None))]
            digits = [None if number is None or not math.isfinite(number) else round(number, 4) for number in numbers]
            place = told.setdefault(check, {}).setdefault(f"{one.what} [{one.threshold}]", {})
            place[one.reward or ""] = [*digits, one.passed, one.n]
    return told


def summary(name: str, answer: dict[str, Any], found: dict[str, list[Finding]], told: dict[str, Any]) -> str:
    """The page of a set."""
    rewards = answer["rewards"]
    lines = [f"# Verifiers of `{name}`", "", f"{ABOUT[name]} Written by `make cards`; how to read it: "
             "[Validating the verifiers](../../validate.md).", ""]  # fmt: skip
    lines += [sentence(answer["failed"], answer["passed"], answer["not_judged"]), ""]
    real = answer["real"]
    lines += [
        f"Real images: {real['images']}, {real['classes']} classes, {real['plates']} plates; {answer['n']} of them "
        f"damaged at every dose; seed {answer['seed']}; suite {answer['suite']}.",
        "",
    ]
    lines += ["| check | " + " | ".join(f"[{told[one]['title']}]({one}.md)" for one in rewards) + " | suite |"]
    lines += ["|---|" + "---|" * (len(rewards) + 1)]
    for check, own in found.items():
        lines.append(f"| {title(check)} | " + " | ".join(cell(own, one) for one in [*rewards, None]) + " |")
    lines += ["", "Passed of judged figures; **bold** where one fails, open where none could be judged.", ""]
    own = [one for part in found.values() for one in part if one.reward is None]
    if own:
        lines += ["## The suite", "", *rows(own)]
    lines += matrix(found.get("specificity", []), told)
    return "\n".join(lines).rstrip() + "\n"


def cell(own: list[Finding], reward: str | None) -> str:
    """Passed of judged."""
    here = [one for one in own if one.reward == reward]
    judged = [one for one in here if one.passed is not None]
    if not judged:
        return "open" if here else ""
    passed = sum(bool(one.passed) for one in judged)
    return f"{passed}/{len(judged)}" if passed == len(judged) else f"**{passed}/{len(judged)}**"


def matrix(findings: list[Finding], told: dict[str, Any]) -> list[str]:
    """The specificity matrix: fall of the mean reward over doses, in real sd."""
    details = {one.reward: one.details for one in findings if "responses" in one.details}
    if not details:
        return []
    lesions = list(dict.fromkeys(lesion for one in details.values() for lesion in one["responses"]))
    lines = [
        "## Specificity",
        "",
        "Fall of the mean reward over all doses, in real standard deviations; own lesions in bold, more than a third "
        "of the answer to these marked * (explained) or ! (not).",
        "",
    ]
    lines += ["| reward | " + " | ".join(map(lesion_title, lesions)) + " |", "|---|" + "---:|" * len(lesions)]
    for reward, one in details.items():
        cells = []
        for lesion in lesions:
            value, share = one["responses"].get(lesion), one["shares"].get(lesion)
            text = "" if value is None else number_of(value)
            mark = "*" if lesion in one["explained"] else "!" if share is not None and share > 1 / 3 else ""
            cells.append(f"**{text}**" if LESIONS[lesion].owner == reward else text + mark.replace("*", "\\*"))
        lines.append(f"| {told[str(reward)]['title']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def page(name: str, card: dict[str, Any]) -> str:
    """The card of a reward, failures first."""
    found = [Finding.read(one) for one in card["findings"]]
    lines = [f"# {card['title']} (`{card['reward']}`), `{name}`", "", "[All rewards](README.md)", ""]
    lines += ["## Context of use", "", card["context_of_use"], "", "**What it measures.** " + card["measures"], ""]
    lines += ["## Limits", "", *(f"- {text}" for text in card["limits"])]
    lines += [f"- Answers to {lesion_title(lesion)}, too: {why}." for lesion, why in card["explained"].items()]
    for heading, passed in (("Failed", False), ("Not judged", None), ("Passed", True)):
        own = [one for one in found if one.passed is passed]
        if own:
            lines += ["", f"## {heading}", "", *rows(own)]
    return "\n".join(lines).rstrip() + "\n"


def rows(found: list[Finding]) -> list[str]:
    """Findings as a table."""
    lines = ["| check | what | figure (95 % interval) | threshold | n | verdict |", "|---|---|---|---|---:|---|"]
    for one in found:
        what = f"{one.what} {one.reason[:1].upper()}{one.reason[1:]}." if one.reason else one.what
        cells = [title(one.check), what, figure(one), one.threshold, str(one.n or ""), verdict(one)]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
