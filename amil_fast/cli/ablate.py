"""``amil ablate``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amil_fast.cli.common import (
    change_config,
    print_plain,
    print_written,
    progress_bar,
    read_config,
)
from amil_fast.utils.files import write_json, write_text


def register(app):
    """Adds the command to ``app``."""
    app.command()(ablate)


def ablate(
    out: Annotated[Path, typer.Option(help="Folder for the runs, ablation.json, ablation.md and ablation.png.")],
    preset: Annotated[str | None, typer.Option(help="Preset of `amil train`, the base configuration.")] = None,
    config: Annotated[Path | None, typer.Option(help="A train.json file, instead of --preset.")] = None,
    root: Annotated[Path | None, typer.Option(help="The data set's folder.")] = None,
    archive: Annotated[
        Path | None,
        typer.Option("--archive", "--packed", help="A crop archive written by `amil pack`, instead of --root."),
    ] = None,
    groups: Annotated[
        str, typer.Option(help="Comma-separated: ideas, pooling, levels, routing, adversary, schedule.")
    ] = "ideas,pooling",
    seeds: Annotated[str, typer.Option(help="Comma-separated; each configuration is trained with every seed.")] = "0,1",
    epochs: Annotated[int | None, typer.Option(help="Number of epochs.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of concurrent runs; they share the cores equally.")] = 1,
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, as for `amil train`.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
):
    """Train with and without each of the paper's components, over several seeds, and compare.

    Each row is a training with one setting changed. Run the command again to resume an interrupted study. Exit codes: 0
    success, 2 error, 130 interrupted.

    Example: `amil ablate --preset lspet-small --archive lspet.pack --out runs/ablation --epochs 10 --jobs 2`

    Example: `amil ablate --preset lspet-small --root data/lspet --out runs/levels --groups levels,routing`
    """
    from amil_fast.pose.training import ablation
    from amil_fast.pose.training import preset as get_preset

    console = Console(quiet=quiet)
    if (preset is None) == (config is None):
        raise ValueError("expected one of --preset and --config")
    base = get_preset(preset) if preset else read_config(config)
    options = {"data.root": root, "data.archive": archive, "schedule.epochs": epochs}
    base = change_config(base, options, settings)
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ValueError(f"seeds: expected integers separated by commas, got {seeds!r}") from None
    rows = ablation.plan(base, groups.split(","), numbers)
    with progress_bar(console, quiet) as progress:
        task = progress.add_task("runs", total=None)
        ablation.run(
            rows, out, jobs=jobs, on_run=lambda done, total: progress.update(task, completed=done, total=total)
        )
    table = ablation.results(rows, out)
    write_json(out / "ablation.json", table, indent=1)
    text = ablation.to_markdown(table)
    write_text(out / "ablation.md", text)
    ablation.draw(out / "ablation.png", table)
    print_plain(console, text)
    print_written(console, out / "ablation.md")
