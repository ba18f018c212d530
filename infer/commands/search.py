"""The command `alexnet search`. Imports its work inside its body."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("queries", metavar="QUERY...", nargs=-1, required=True)
@click.option("--in", "features", type=PATH, required=True, help="A file that predict --features wrote.")
@click.option("--model", type=PATH, help="The model that made it. Default: found under runs/ by its hash.")
@click.option("--top", type=int, default=5, show_default=True, help="Images to list for each query.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def search(queries: tuple[str, ...], features: Path, model: Path | None, top: int, as_json: bool) -> None:
    """List the images that look most like a QUERY image to a network.

    Their features, of one layer, are compared by cosine similarity with those of every image in the
    file; of equal ones, the first in the file comes first.

    \b
    alexnet export --features fc7
    alexnet predict images/ --features fc7 --output features.parquet
    alexnet search photo.jpg --in features.parquet
    """
    import msgspec

    from data_pipeline.common.text import visible
    from infer.search.images import search_images

    found = search_images(queries, features, model=model, top=top)
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    unreadable = f" ({found.num_unreadable} more could not be read)" if found.num_unreadable else ""
    click.echo(
        f"cosine similarity of {found.layer} ({found.network}) to {found.num_images} images{unreadable}"
    )
    for query in found.queries:
        click.echo(visible(query.path))
        for one in query.nearest:
            click.echo(f"  {one.similarity:7.4f}  {visible(one.path)}")
