"""``amil demo``: runs the demos of :mod:`amil_fast.mil` and :mod:`amil_fast.pose` with progress bars and tables."""

from rich.console import Console
from rich.table import Table

from amil_fast.cli.common import print_written, progress_bar
from amil_fast.mil import demo as mil_demo

_EPOCHS = 30


def show_demo(folder, seed, image=None):
    """Runs both demos; ``image``: photo for the shipped weights."""
    console = Console()
    _show_bags(console, folder, seed)
    _show_figures(console, folder, seed, image)


def _show_bags(console, folder, seed):
    console.print(
        "[bold]Multiple-instance learning on synthetic bags[/]: a bag of 5 to 40 instances is positive if one of them "
        "is a key instance. Only the labels of the bags are used for training."
    )
    with progress_bar(console, quiet=False) as progress:
        task = progress.add_task("training", total=_EPOCHS)

        def on_epoch(epoch, loss):
            progress.update(task, advance=1, description=f"training, loss {loss:.3f}")

        scores = mil_demo.run(folder, epochs=_EPOCHS, seed=seed, on_epoch=on_epoch)
    table = Table(
        title=f"MI-RNet with adjust pooling, {scores['bags']} test bags", caption=f"{scores['seconds']:.1f} s"
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("accuracy", f"{scores['accuracy']:.3f}")
    table.add_row("area under the ROC curve", f"{scores['auc']:.3f}")
    table.add_row("instance of largest weight is a key instance (true positives)", _number(scores["pointing"]))
    table.add_row("same for a random instance", _number(scores["by_chance"]))
    console.print(table)
    _written(console, folder, ("mil_weights.png", "mil_scores.json"))


def _show_figures(console, folder, seed, image):
    from amil_fast.pose import demo as pose_demo

    console.print(
        "\n[bold]Pose estimation on synthetic figures[/]: generator and discriminator, trained against each other. "
        "This takes up to three minutes on two cores with AVX-512 BF16 or AMX, several times as long on others."
    )
    result = pose_demo.run(folder, console, seed=seed, image=image)
    console.print(
        f"PCK@0.2 on {result.num_figures} held-out figures: {result.pck:.1f} % after {result.seconds:.0f} s of training"
    )
    _written(console, folder, [path.name for path in result.written])


def _written(console, folder, names):
    for name in names:
        print_written(console, folder / name)


def _number(value):
    return "-" if value is None else f"{value:.3f}"
