"""`biorewards rl`: post-train a flow generator with the verifiers as reward."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.score import parse_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

    from biorewards.assay import Assay
    from biorewards.reward import Suite
    from rl.distribution import Population
    from rl.pool import Data
    from rl.rewards import Judge
    from rl.run import Result

#: The phantom that the bundled model is post-trained on without --controls: none of the images it was trained on.
PHANTOM_IMAGES, PHANTOM_SIZE, PHANTOM_SEED = 1300, 48, 4242
#: That demonstration, minutes of a core (compounds that the base hits now and then); and a run of one's own generator.
DEMO = {
    "steps": 30, "groups": 8, "rollouts": 12, "rollout_steps": 4, "times": 1, "learning_rate": 3e-4,
    "compounds": "mistatol,quelanib,spredolin,velorin", "evaluate_every": 15, "evaluate_images": 160,
    "precision": "bf16",
}  # fmt: skip
USUAL = {
    "steps": 100, "groups": 16, "rollouts": 12, "rollout_steps": 6, "times": 2, "learning_rate": 5e-4,
    "evaluate_every": 10, "evaluate_images": 96, "precision": "no",
}  # fmt: skip
_COUNT = click.IntRange(min=1)
_SIZE = click.FloatRange(min=0, min_open=True)
_PRESETS = click.Choice(["paper", "distribution"])


@click.command(epilog="Example: biorewards rl --checkpoint cellflux.safetensors --controls bbbc021/ --out run/")
@click.option("--generator", "name", default="cellflux", show_default=True, help="A flow, or your own module:function.")
@click.option("--checkpoint", help="Its weights: a path or hf://owner/repo/path@revision. Default: the bundled model.")
@click.option("--set", "options", multiple=True, metavar="NAME=VALUE", help="An option of the generator. Repeatable.")
@click.option(
    "--controls",
    type=click.Path(path_type=Path),
    help="Control images; treated rows are what results are held against. Bundled model: phantoms drawn into --out.",
)
@click.option("--assay", "assay_name", help="phantom, bbbc021 or a folder (`fit`). Default: what --controls names.")
@click.option("--pixel-size", type=_SIZE, help="um per pixel of the controls. Default: as their folder says.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("rl-run"), show_default=True)
@click.option("--compounds", help="Only these, e.g. taxol,AZ138. Default: all (bundled model: 4).")
@click.option("--hold-out", help="Compounds that are evaluated and not trained on.")
@click.option("--preset", type=_PRESETS, default="paper", show_default=True, help="Rewards of an image, or of a set.")
@click.option("--rewards", "reward_names", help="Only these of the seven, e.g. moa,nucleus_size.")
@click.option("--weights", help="Of rewards in the total, e.g. moa=5,nucleus_size=0.5. Default: the paper's.")
@click.option("--reward", "extra", multiple=True, metavar="MODULE:NAME", help="A reward of your own. Repeatable.")
@click.option("--held-out", multiple=True, metavar="MODULE:NAME", help="A reward that is only watched. Repeatable.")
@click.option("--steps", type=_COUNT, help="Rollout sets. Default: 100 (bundled model: 30).")
@click.option("--groups", type=_COUNT, help="(control, compound) pairs a step. Default: 16 (bundled model: 8).")
@click.option("--rollouts", type=click.IntRange(min=2), help="Images a group (K). Default: 12.")
@click.option("--rollout-steps", type=_COUNT, help="Euler steps of a rollout. Default: 6 (bundled model: 4).")
@click.option("--times", type=_COUNT, help="Training times a rollout. Default: 2 (bundled model: 1).")
@click.option("--inner-steps", type=_COUNT, default=1, show_default=True, help="Optimiser steps a rollout set.")
@click.option(
    "--coupling",
    type=click.Choice(["fresh", "rollout", "control"]),
    default="fresh",
    show_default=True,
    help="Source of a training pair: the rollout's control with fresh noise, its own source, another control.",
)
@click.option("--loss", type=click.Choice(["x1", "velocity"]), default="x1", show_default=True)
@click.option(
    "--advantage",
    type=click.Choice(["total", "per-reward"]),
    default="total",
    show_default=True,
    help="per-reward: each reward is standardised in its group before the weights.",
)
@click.option("--learning-rate", type=_SIZE, help="Lower on a large network. Default: 5e-4 (bundled model: 3e-4).")
@click.option(
    "--mix-beta", type=_SIZE, default=0.1, show_default=True, help="Of v+ and v-; small: bold. Tune with --lag."
)
@click.option("--kl-weight", type=click.FloatRange(min=0), default=0.1, show_default=True, help="Pull to the base.")
@click.option(
    "--lag", default="0.9", show_default=True, help="Decay of the rollout policy: a number, none, ramp, late."
)
@click.option("--lora-rank", type=click.IntRange(min=0), default=0, show_default=True, help="Adapters (peft); 0: all.")
@click.option("--micro-batch", type=_COUNT, default=64, show_default=True, help="Images in memory at once.")
@click.option("--precision", type=click.Choice(["no", "bf16", "fp16"]), help="Default: no (bundled model: bf16).")
@click.option("--evaluate-every", type=_COUNT, help="In steps. Default: 10 (bundled model: 15).")
@click.option("--evaluate-images", type=_COUNT, help="On held-out controls. Default: 96 (bundled model: 160).")
@click.option("--save-every", type=_COUNT, default=10, show_default=True, help="In steps.")
@click.option("--guard", is_flag=True, help="Stop when figures that are not rewarded get worse twice running.")
@click.option("--track", multiple=True, help="Also tensorboard, wandb, mlflow or trackio. Repeatable.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out; give the same options.")
def command(**given: Any) -> None:
    """Post-train a flow generator (DiffusionNFT, as CellFluxRL does) with the verifiers as reward.

    Without arguments the bundled mini CellFlux is post-trained on the phantom for a few minutes. Groups of rollouts are
    scored as `biorewards score` scores; evaluation is on controls of held-out plates. Rewards that rise are no proof of
    better images: the report shows beside them what was not rewarded.

    Several GPUs: accelerate launch -m cli.main rl ..., or torchrun -m cli.main rl ...

    \b
    Written to --out:
      report.html            curves, grids, what changed
      generator.safetensors  the result (generate, best-of and audit take it); best.safetensors: of the best evaluation
      metrics.jsonl          every step and evaluation; metrics.parquet is the same
      state.safetensors      what --resume goes on from
      samples/, config.json
    """
    from cli.options import parse_settings

    options = parse_settings(given["options"])
    bundled = given["checkpoint"] is None
    if bundled and given["name"] != "cellflux":
        raise click.UsageError(
            f"--generator {given['name']} needs its --checkpoint. Only flows, such as cellflux, can be post-trained; "
            "what works with every generator (impa, phendiff, mit) is selection: biorewards best-of"
        )
    if not bundled and given["controls"] is None:
        raise click.UsageError("--checkpoint needs --controls: the images that its samples start from")

    import torch

    from rl.nft import Settings
    from rl.policy import check_trainable
    from rl.run import Schedule, train

    device = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: there is no CUDA device here; leave it out or pass cpu")
    names = ("steps", "groups", "rollouts", "rollout_steps", "times", "inner_steps", "coupling", "loss", "advantage",
             "learning_rate", "mix_beta", "kl_weight", "lag", "lora_rank", "micro_batch", "seed")  # fmt: skip
    given |= {name: value for name, value in (DEMO if bundled else USUAL).items() if given[name] is None}
    settings = Settings(**{name: given[name] for name in names})
    schedule = Schedule(given["evaluate_every"], given["save_every"], given["evaluate_images"], given["guard"])
    own, policy = load_policy(given["name"], given["checkpoint"], options, settings.rollout_steps)
    check_trainable(policy)
    accelerator = accelerator_of(given, device)
    with accelerator.main_process_first():
        controls = given["controls"] or drawn_phantom(given["out"])
    data, assay, notes = read(controls, given, own, settings.seed)
    judge, population, held_out, more = judges(data, assay, given)
    if accelerator.is_main_process:
        click.echo(
            f"{len(data.train.controls)} controls to train on, {len(data.test.controls)} held out, "
            f"{len(data.train.compounds)} compounds, {len(data.real.images)} real treated images; assay {assay.name}, "
            f"images x {data.scale:g} for it; {given['preset']} preset, fingerprint {judge.fingerprint}; "
            f"{accelerator.num_processes} process(es) on {accelerator.device}"
        )
        for note in (*notes, *more):
            click.echo(f"note: {note}", err=True)
    about = {
        "generator": f"{given['name']} {given['checkpoint'] or '(bundled mini model)'}", "controls": str(controls),
        "assay": assay.name, "preset": given["preset"], "weights": judge.suite.weights,
        "population": "" if population is None else population.origin,
    }  # fmt: skip
    try:
        result = train(
            policy, judge, data, settings, out=given["out"], accelerator=accelerator, schedule=schedule,
            population=population, held_out=held_out, sampler=own, resume=given["resume"], about=about,
        )  # fmt: skip
    except KeyboardInterrupt:
        click.echo(
            f"\nstopped; what was saved is kept in {given['out']}: the same command with --resume goes on", err=True
        )
        raise
    accelerator.end_training()
    if accelerator.is_main_process:
        print_result(result, judge, given["out"])


def load_policy(name: str, checkpoint: str | None, options: dict[str, Any], steps: int) -> tuple[Any, Any]:
    """The generator as it samples by itself, and as it is trained: a CellFlux without guidance, with the rollouts'
    solver, so that what is saved samples as it was trained."""
    import generators
    from generators.cellflux import CellFlux
    from generators.solvers import Solver

    own: Any = generators.load(name, checkpoint or generators.MINI_CELLFLUX, **options)
    policy = copy.copy(own)
    if isinstance(policy, CellFlux):
        policy.guidance, policy.solver = 0.0, Solver("euler", "uniform", steps)
    return own, policy


def accelerator_of(given: dict[str, Any], device: str) -> Accelerator:
    """One process, or as many as were launched. Raises ImportError, and click.UsageError for a tracker that is not
    installed."""
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ImportError('rl needs accelerate, which is not installed: pip install "biorewards[train]"') from None
    made = Accelerator(
        cpu=device == "cpu", mixed_precision=given["precision"], log_with=list(given["track"]) or None,
        project_dir=given["out"],
    )  # fmt: skip
    if given["track"]:
        if len(made.log_with) < len(given["track"]):
            found = [str(one) for one in made.log_with]
            raise click.UsageError(
                f"--track {', '.join(given['track'])}: installed of them: {found}; install the others"
            )
        plain = {k: v for k, v in given.items() if isinstance(v, str | int | float)}
        made.init_trackers("biorewards-rl", config=plain)
    return made


def drawn_phantom(out: Path) -> Path:
    """Phantom crops in out/phantom, drawn once."""
    from biorewards.phantom import write_dataset
    from cli.score_output import progress_bar

    folder = out / "phantom"
    if not (folder / "index.csv").exists():
        click.echo(f"drawing {PHANTOM_IMAGES} phantom crops into {folder}", err=True)
        with progress_bar(PHANTOM_IMAGES) as tell:
            done = iter(range(1, PHANTOM_IMAGES + 1))
            write_dataset(
                folder, PHANTOM_IMAGES, PHANTOM_SIZE, PHANTOM_SEED, lambda row: tell(next(done), PHANTOM_IMAGES)
            )
    return folder


def read(controls: Path, given: dict[str, Any], generator: Any, seed: int) -> tuple[Data, Assay, list[str]]:
    """Controls and real images, and the assay with statistics that fit their pixel size."""
    from biorewards.assay import Assay
    from biorewards.io.manifest import read_manifest
    from biorewards.io.reading import plan_reading
    from generators.generation import check_scale
    from rl.pool import read_data
    from rl.rewards import fitted

    found = read_manifest(controls)
    check_scale(generator, found)
    name = given["assay_name"] or found.hints.assay
    if name is None:
        raise click.UsageError(f"{controls} names no assay; say which with --assay (phantom, bbbc021, or a folder)")
    assay = Assay.load(name)
    reader = plan_reading(found, assay, pixel_size=given["pixel_size"])
    data = read_data(
        found, reader, assay, generator.compounds, hold_out=listed(given["hold_out"]),
        only=listed(given["compounds"]), seed=seed,
    )  # fmt: skip
    assay, more = fitted(assay, data.real, data.scale)
    notes = [*found.notes, *data.notes, *more]
    return data, assay, notes


def judges(
    data: Data, assay: Assay, given: dict[str, Any]
) -> tuple[Judge, Population | None, dict[str, Judge], list[str]]:
    """The judge, the population of the distribution preset, the judges that are only watched, and notes."""
    from biorewards import rewards as seven
    from biorewards.assay import MIN_IMAGES
    from biorewards.segmentation import load_segmenter
    from rl.distribution import Population
    from rl.pool import Real
    from rl.rewards import Judge, matched

    judge = Judge(suite_of(assay, given), assay, scale=data.scale)
    notes, held_out = [], {}
    wanted = sorted(set(data.test.targets.tolist()))
    there = data.real.target.bincount(minlength=len(assay.classes))
    complete = min(int(there[k]) for k in wanted) >= MIN_IMAGES
    population = None
    if given["preset"] == "distribution":
        if complete:
            rows = torch_isin(data.real.target, wanted)
            real = Real(data.real.images[rows], data.real.target[rows])
            population = Population.from_real(judge.names, judge(*real), real.target, assay.classes)
        else:
            population = Population.from_assay(judge.names, assay)
            notes.append(
                f"fewer than {MIN_IMAGES} real images of some class: the population is that of the assay's statistics, "
                "and moa keeps its probability"
            )
    if complete:
        other, _ = matched(assay.with_segmenter(load_segmenter("classical")), data.real, data.scale)
        held_out["classical segmenter"] = Judge(
            seven.suite(other, [name for name in seven.PAPER_WEIGHTS if name != "moa"]), other, scale=data.scale
        )
    for path in given["held_out"]:
        held_out[path] = Judge(load_object(path), assay, scale=data.scale)
    return judge, population, held_out, notes


def suite_of(assay: Assay, given: dict[str, Any]) -> Suite:
    """The seven or some of them, and rewards of the user's own."""
    from biorewards.reward import Suite
    from biorewards.rewards import PAPER_WEIGHTS, suite

    extra = [load_object(path) for path in given["extra"]]
    weights = parse_weights(given["weights"]) or {}
    ours = {name: weight for name, weight in weights.items() if name in PAPER_WEIGHTS}
    seven = suite(assay, listed(given["reward_names"]) or None, ours)
    if not extra and len(ours) == len(weights):
        return seven
    return Suite([*seven.rewards.values(), *extra], {**seven.weights, **weights}, assay.fingerprint)


def load_object(path: str) -> Any:
    """A reward given as module:attribute; a class is called without arguments. Raises click.UsageError."""
    module, colon, name = path.partition(":")
    try:
        found = getattr(import_module(module), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise click.UsageError(f"{path}: {error}") from None
    if found is None:
        raise click.UsageError(f"{path!r}: write MODULE:NAME, e.g. my_rewards:Brightness")
    return found() if isinstance(found, type) else found


def listed(text: str | None) -> list[str]:
    """ "a, b" -> ["a", "b"]; [] for nothing."""
    return [one.strip() for one in (text or "").split(",") if one.strip()]


def torch_isin(values: Any, wanted: list[int]) -> Any:
    """(N,) bool: which values are wanted."""
    import torch

    return torch.isin(values, torch.tensor(wanted))


def print_result(result: Result, judge: Judge, out: Path) -> None:
    """Before, now and real on stdout, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    from biorewards.report.wording import number
    from rl.evaluation import gained

    table = Table(box=None, pad_edge=False)
    for column in ("held-out controls", "base", "now", "gain, 95 %", "real"):
        table.add_column(column, justify="left" if column == "held-out controls" else "right", no_wrap=True)
    spreads = [key for key in result.last if key.startswith(("spread/", "held_out/"))]
    for key in ("total", *(f"reward/{name}" for name in judge.names), *spreads, "distance", "diversity"):
        base, now, real = (number(line.get(key)) for line in (result.first, result.last, result.real))
        table.add_row(key.removeprefix("reward/"), base, now, gained(result.last, key), real)
    Console().print(table)
    click.echo(f"{result.ended}; report: {out / 'report.html'}; weights: {out / 'generator.safetensors'}")
    click.echo("next: biorewards generate --generator cellflux --checkpoint " + str(out / "generator.safetensors"))
