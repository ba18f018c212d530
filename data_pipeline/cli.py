"""`alexnet data …`. Every command imports its work inside its body."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from data_pipeline.common.errors import EXIT_SOME_UNREADABLE, SaveError, name_continuation

PATH = click.Path(path_type=Path)


@click.group()
def data() -> None:
    """Data sets."""


@data.command()
@click.argument("folder", metavar="[DIR]", type=PATH, required=False)
def demo(folder: Path | None) -> None:
    """Write the demo data: 1,797 handwritten digits as 64-pixel JPEGs, in train/ and val/.

    \b
    alexnet data demo
    """
    from data_pipeline.datasets.demo import DEMO_ROOT, write_demo

    write_demo(folder or DEMO_ROOT)
    click.echo(folder or DEMO_ROOT)


@data.command()
@click.argument("name")
@click.argument("folder", metavar="[DIR]", type=PATH, required=False)
@click.option(
    "--mirror", metavar="URL", help="A folder that serves the same file; its content is verified too."
)
def download(name: str, folder: Path | None, mirror: str | None) -> None:
    """Fetch a published dataset, verify it and unpack it, into data/NAME unless DIR says otherwise.

    The folder appears whole or not at all; run again after a break, the download goes on. A name that is not
    known is answered with those that are.

    \b
    alexnet data download tiny-imagenet
    """
    from data_pipeline.download.download import download as fetch_dataset

    with name_continuation("the same command goes on where it stopped"):
        click.echo(fetch_dataset(name, folder, mirror=mirror))


@data.command()
@click.argument("source", metavar="DIR", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--shard-size",
    default="512MB",
    show_default=True,
    metavar="SIZE",
    help="Of each tar, such as 512MB or 1GiB.",
)
@click.option(
    "--resize", "resize_px", type=int, help="Shorten longer short sides to so many pixels, as JPEG."
)
@click.option("--quality", default=90, show_default=True, help="JPEG quality of what is resized, 1 to 100.")
@click.option("--workers", default=2, show_default=True, help="Shards written at once.")
def shard(
    source: Path, out: Path, shard_size: str, resize_px: int | None, quality: int, workers: int
) -> None:
    """Write a dataset as tar shards in the WebDataset layout, which train exactly as the files do.

    The same input gives the same bytes; run again after a kill, it writes what is missing. OUT may be an
    address, s3:// or gs://, to which the shards are copied.

    \b
    alexnet data shard imagenet imagenet-shards --shard-size 512MB
    alexnet data shard imagenet s3://bucket/imagenet-256 --resize 256
    """
    from data_pipeline.remote.address import remote_url
    from data_pipeline.sharding.upload import write_remote_shards
    from data_pipeline.sharding.write import parse_size, write_shards

    url, shard_bytes = remote_url(out), parse_size(shard_size)
    write = partial(write_shards, source, out) if url is None else partial(write_remote_shards, source, url)
    with name_continuation("the same command writes the shards that are missing"):
        report = write(shard_bytes=shard_bytes, resize_px=resize_px, quality=quality, workers=workers)
    click.echo(
        f"{url or out}: {report.num_samples} samples in {report.num_shards} shards, {report.size_bytes} bytes"
    )
    if report.num_reused:
        click.echo(f"{report.num_reused} shards were there already", err=True)
    if resize_px is not None and report.num_unchanged:
        click.echo(f"{report.num_unchanged} images were not resized: small enough, or unreadable", err=True)
    if report.num_quarantined:
        click.echo(f"{report.num_quarantined} samples in quarantine were left out", err=True)


@data.command()
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--split", "splits", multiple=True, metavar="NAME", help="Only this split; may be repeated.")
@click.option("--workers", type=int, help="Processes that decode. Default: one on each core.")
@click.option("--list", "list_path", metavar="FILE", type=PATH, help="Write the list to this file instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(
    folder: Path, splits: tuple[str, ...], workers: int | None, list_path: Path | None, as_json: bool
) -> None:
    """Decode every image, and list those that cannot be decoded in DIR/quarantine.jsonl.

    Training leaves out what the list names, and says how many. Run again after files were repaired: they
    leave the list. The exit code is 3 where something is damaged. Shards are compared with their hashes, too.
    For data that is read-only the list is kept in the user's cache, where training on this machine finds it.

    \b
    alexnet data verify tiny-imagenet-200
    alexnet data verify imagenet-shards --split val --json
    """
    from data_pipeline.inspect.report import verify_as_json, verify_as_text
    from data_pipeline.inspect.verify import verify as verify_folder
    from data_pipeline.remote.shards import local_root

    report = verify_folder(local_root(folder, splits), splits, workers=workers, list_path=list_path)
    click.echo(verify_as_json(report) if as_json else verify_as_text(report))
    if report.why_elsewhere:
        click.echo(f"{report.why_elsewhere}; it is kept in the user's cache", err=True)
    if report.unsaved and report.is_clean:
        raise SaveError(report.unsaved)
    if report.unsaved:
        click.echo(f"warning: {report.unsaved}; name another file with --list FILE", err=True)
    if not report.is_clean:
        raise click.exceptions.Exit(EXIT_SOME_UNREADABLE)


@data.command()
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--grid", type=PATH, help="Write pictures of every class to this .html file.")
@click.option("--sample", type=int, metavar="N", help="Examine only N images of each split, always the same.")
@click.option("--workers", type=int, help="Processes that decode. Default: one on each core.")
def info(folder: Path, as_json: bool, grid: Path | None, sample: int | None, workers: int | None) -> None:
    """Show a data folder: classes, counts, sizes, formats, and the colours of its training images.

    Mean and deviation of the channels, and the principal components of RGB that the paper's colour noise
    wants, are exact over all pixels, or over those of a sample. The exit code is 3 where images could not
    be read.

    \b
    alexnet data info tiny-imagenet-200
    alexnet data info imagenet --sample 10000 --json
    alexnet data info tiny-imagenet-200 --grid classes.html
    """
    import msgspec

    from data_pipeline.common.console import make_console
    from data_pipeline.inspect.grid import check_grid_path, write_grid
    from data_pipeline.inspect.report import print_info
    from data_pipeline.inspect.stats import collect_info
    from data_pipeline.remote.shards import local_root

    if grid is not None:
        check_grid_path(grid)
    found, datasets = collect_info(local_root(folder), sample=sample, workers=workers)
    if grid is not None:
        write_grid(found, datasets[0], grid)
        click.echo(f"pictures: {grid}", err=True)
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        print_info(found, make_console())
    if any(split.num_unreadable for split in found.splits.values()):
        raise click.exceptions.Exit(EXIT_SOME_UNREADABLE)
