"""``amil mil heatmap``."""

from pathlib import Path
from typing import Annotated

import typer

from amil_fast.cli import mil_options as options
from amil_fast.cli.common import print_plain, print_written
from amil_fast.cli.mil_bags import class_names, load_model
from amil_fast.cli.options import Quiet
from amil_fast.mil.bag_sources import open_bags
from amil_fast.mil.heatmap import draw_heatmap, instance_values, patch_size_of, read_thumbnail
from amil_fast.mil.prediction import collapse_warning, predict_bags
from amil_fast.utils.files import DataError, write_text

_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def heatmap(
    model: options.Model,
    bags: options.Bags,
    out: Annotated[Path, typer.Option(help="Folder for one picture and one CSV file per bag.")] = Path("heatmaps"),
    bag: Annotated[list[str] | None, typer.Option(help="Name of a bag; can be repeated. By default all.")] = None,
    values: Annotated[
        str, typer.Option(help="weights of the instances, or scores of each instance alone.")
    ] = "weights",
    label: Annotated[str | None, typer.Option(help="Class of the scores, by default the positive or last one.")] = None,
    scale: Annotated[str, typer.Option(help="log, rank or linear.")] = "log",
    thumbnails: Annotated[Path | None, typer.Option(help="Folder with an image per bag, of the same name.")] = None,
    downsample: Annotated[
        float | None,
        typer.Option(help="Units of the coordinates per pixel of the thumbnails, unless the files store level0_width."),
    ] = None,
    patch_size: Annotated[
        float | None, typer.Option(help="Side of the patches in units of the coordinates; by default detected.")
    ] = None,
    max_instances: options.MaxInstances = 32768,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda if available.")] = None,
    quiet: Quiet = False,
):
    """Draw the weights or scores of instances at their coordinates, over a thumbnail if there is one.

    Prints the effective number of instances (1 / Σ w²) of every bag, and a warning if the model has collapsed to the
    mean or to one instance.

    Example: `amil mil heatmap runs/mine features/ --bag slide_7 --thumbnails thumbnails/ --downsample 64`
    """
    console = options.main_console(quiet)
    source = open_bags(bags, bag)
    net = load_model(model, device, source.num_features)
    names = class_names(net)
    if label is not None and label not in names:
        raise ValueError(f"label: expected one of {', '.join(names)}, got {label!r}")
    class_index = -1 if label is None else names.index(label)
    out.mkdir(parents=True, exist_ok=True)
    found = predict_bags(net, source, max_instances=max_instances, workers=0)
    with options.shown_progress(console, quiet) as show:
        for i, name in enumerate(source.names):
            coords = source.coords(i)
            if coords is None:
                raise DataError(f"{bags}: expected coordinates of the instances, found none for bag {name!r}")
            shown = instance_values(
                net, source.features(i), values, class_index=class_index, max_instances=max_instances
            )
            attributes = source.attributes(i)
            thumbnail, factor = _thumbnail(thumbnails, name, downsample, attributes)
            text = _line(net, name, found, i)
            draw_heatmap(
                out / f"{Path(name).name}.png",
                coords,
                shown,
                scale=scale,
                patch_size=patch_size or patch_size_of(coords, attributes),
                thumbnail=thumbnail,
                downsample=factor,
                title=text,
                label={"weights": "weight", "scores": "score"}[values],
            )
            lines = [f"{x:g},{y:g},{value:.6g}" for (x, y), value in zip(coords.tolist(), shown, strict=True)]
            write_text(out / f"{Path(name).name}.csv", "\n".join([f"x,y,{values}", *lines, ""]))
            print_plain(console, text)
            show("heatmaps", i + 1, len(source))
    if found.effective is not None:
        warning = collapse_warning(found.effective, found.sizes, net.config["pooling"])
        if warning:
            print_plain(console, f"warning: {warning}")
    print_written(console, out)


def _line(net, name, found, i):
    score = found.scores[i]
    if net.task == "regression":
        text = f"{name}: {score:.4g}"
    elif score.ndim == 0:
        text = f"{name}: p({class_names(net)[1]}) = {score:.3f}"
    else:
        text = f"{name}: p({class_names(net)[score.argmax()]}) = {score.max():.3f}"
    if found.effective is not None:
        text += f", {found.effective[i]:.1f} of {found.sizes[i]} instances effective"
    return text


def _thumbnail(folder, name, downsample, attributes):
    """Thumbnail of a bag and the units of the coordinates per pixel; ``(None, None)`` without a folder."""
    if folder is None:
        return None, None
    files = [folder / f"{Path(name).stem}{suffix}" for suffix in _IMAGES]
    existing = [file for file in files if file.is_file()]
    if not existing:
        raise DataError(f"{folder}: expected an image {Path(name).stem}{{{','.join(_IMAGES)}}}, found none")
    thumbnail = read_thumbnail(existing[0])
    if downsample is None and attributes.get("level0_width"):
        downsample = attributes["level0_width"] / thumbnail.shape[1]
    if downsample is None:
        raise ValueError("downsample: expected the units of the coordinates per pixel of the thumbnail (--downsample)")
    return thumbnail, downsample
