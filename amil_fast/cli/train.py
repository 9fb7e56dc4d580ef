"""``amil train``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amil_fast.cli.common import change_config, print_plain, print_written, read_config


def register(app):
    """Adds the command to ``app``."""
    app.command()(train)


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run: last/, best/, history.jsonl, tensorboard/.")],
    preset: Annotated[
        str | None,
        typer.Option(help="paper-lsp, paper-mpii, lspet, lspet-small or demo (synthetic figures, no data needed)."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A train.json file of another run, instead of --preset.")] = None,
    dataset: Annotated[str | None, typer.Option(help="lsp, lspet, mpii, mpii-mat, coco or synthetic.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the data set, in its published layout.")] = None,
    archive: Annotated[
        Path | None,
        typer.Option("--archive", "--packed", help="A crop archive written by `amil pack`, instead of --root."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Number of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Crops per optimization step, over all processes.")] = None,
    input_size: Annotated[int | None, typer.Option(help="Side of the crops in pixels.")] = None,
    pooling: Annotated[
        str | None, typer.Option(help="Pooling of generator and discriminator: adjust, mean, max, none, ...")
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="MI-RNet blocks of the generator; 0 is the baseline.")] = None,
    adversarial: Annotated[bool | None, typer.Option(help="Train against a discriminator.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    workers: Annotated[int | None, typer.Option(help="Data loader processes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, sample order and augmentation.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="Initialize from a generator (a folder such as best/, or a .safetensors file).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out, if there is one.")] = False,
    checkpoint_minutes: Annotated[float | None, typer.Option(help="Minutes between checkpoints.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.key=value, e.g. optimizer.lr=5e-4.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
):
    """Train the pose generator, and a discriminator against it.

    Settings are taken from `--preset` (or `--config`), then options, then `--set`. `amil evaluate` and `amil predict`
    accept `best/` and `last/` in `--out`. Ctrl-C saves the state; `--resume` continues with the run's settings unless
    options override them. Exit codes: 0 success, 2 error, 130 interrupted.

    Example: `amil train --preset demo --out runs/demo`

    Example: `amil train --preset lspet-small --root data/lspet --out runs/lspet --set optimizer.lr=5e-4`

    Example: `torchrun --nproc-per-node 2 -m amil_fast.cli train --preset lspet-small --archive lspet.pack --out two`
    """
    from amil_fast.pose.training import TrainConfig, from_dict
    from amil_fast.pose.training import preset as get_preset
    from amil_fast.pose.training import train as run
    from amil_fast.utils.training_state import STATE, load_config

    console = Console(quiet=quiet)
    if preset is not None and config is not None:
        raise ValueError("expected --preset or --config, got both")
    if resume and (out / "last" / STATE).is_file():
        chosen = from_dict(load_config(out / "last"))
    elif config is not None:
        chosen = read_config(config)
    elif preset is not None:
        chosen = get_preset(preset)
    else:
        chosen = TrainConfig()
    if adversarial is False:
        chosen = chosen.override({"discriminator": None})
    elif adversarial and chosen.discriminator is None:
        chosen = chosen.override({"discriminator": {}})
    options = {
        "data.dataset": dataset,
        "data.root": root,
        "data.archive": archive,
        "data.batch_size": batch_size,
        "data.input_size": input_size,
        "data.workers": workers,
        "generator.pooling": pooling,
        "discriminator.pooling": pooling if chosen.discriminator else None,
        "generator.blocks": blocks,
        "optimizer.lr": lr,
        "schedule.epochs": epochs,
        "run.precision": precision,
        "run.seed": seed,
        "run.init": init,
        "run.checkpoint_minutes": checkpoint_minutes,
    }
    chosen = change_config(chosen, options, settings)
    summary = run(chosen, out, console, resume=resume)
    if summary is not None:
        _show(console, summary, out)


def _show(console, summary, out):
    print_plain(console, f"trained {summary['step']} steps in {summary['seconds']:.0f} s")
    if "validation" in summary:
        from amil_fast.pose.evaluation import headline, scores_of_groups

        scores = summary["validation"]
        name = headline(scores["metric"])
        groups = [f"{group} {_cell(value)}" for group, value in scores_of_groups(scores[name]).items()]
        print_plain(console, f"best generator, {name}: {'  '.join(groups)}")
        counted = f"{scores['samples']} people"
        if scores["unmeasured"]:
            counted += f"; {scores['unmeasured']} without a normalizer left out"
        print_plain(console, counted)
    print_written(console, out / "best")


def _cell(value):
    return "-" if value is None else f"{value:.1f}"
