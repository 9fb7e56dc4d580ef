"""``amil demo``: runs :mod:`amil_fast.demo` with a progress bar and a table."""

from rich.console import Console
from rich.table import Table

from amil_fast import demo
from amil_fast.cli.mil import fail, progress_bar

_EPOCHS = 30


def show_demo(folder, seed):
    console = Console()
    console.print(
        "[bold]A made-up multiple-instance problem[/] (drawn at random here, no data set): a bag is positive iff one "
        "of its 5 to 40 instances is a key instance. The model sees the bags' labels only."
    )
    with progress_bar(console, quiet=False) as progress:
        task = progress.add_task("training", total=_EPOCHS)

        def on_epoch(epoch, loss):
            progress.update(task, advance=1, description=f"training, loss {loss:.3f}")

        try:
            scores = demo.run(folder, epochs=_EPOCHS, seed=seed, on_epoch=on_epoch)
        except OSError as error:
            fail(f"{folder}: can't be written: {error.strerror}")
    table = Table(
        title=f"MI-RNet with adjust pooling, {scores['bags']} test bags", caption=f"{scores['seconds']:.1f} s"
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("accuracy", f"{scores['accuracy']:.3f}")
    table.add_row("area under the ROC curve", f"{scores['auc']:.3f}")
    table.add_row("heaviest instance of a recognised positive bag is a key instance", _number(scores["pointing"]))
    table.add_row("the same by chance", _number(scores["by_chance"]))
    console.print(table)
    for name in ("mil_weights.png", "mil_scores.json"):
        console.print(f"written: {folder / name}", markup=False, highlight=False, soft_wrap=True)


def _number(value):
    return "-" if value is None else f"{value:.3f}"
