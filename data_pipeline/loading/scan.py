"""Goes through all images of a split, chunk by chunk: for its sample table, `data verify` and `data info`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import ImageError
from data_pipeline.common.workers import map_ahead
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import MIN_CACHED, open_dataset
from data_pipeline.datasets.sample_table import SampleTable
from data_pipeline.datasets.table_cache import load_rows, load_table, save_table
from data_pipeline.decode.look import look_at
from data_pipeline.loading.readers import MAX_BYTES_PER_PIXEL
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.sampler import Int

Result = TypeVar("Result", bound=tuple[Any, ...])

CHUNK = 64
"""Images that a worker takes at once."""

MAX_PIXELS = Preprocessing().max_pixels
"""Larger images are refused by their header, as in training."""

_LOOK_CHUNK = 512
"""The same for looks, each of which costs a fiftieth of a decoded image."""
MANY = 10_000
"""So many images are looked at before the first process has started."""


@dataclass(frozen=True)
class Chunk:
    """Some samples of a split.

    Attributes:
        places: (N) which samples of the split.
        samples: the same, as a dataset of their own.
    """

    places: Int
    samples: Dataset

    def examine(self, look: Callable[[int, bytes], object], max_pixels: int = MAX_PIXELS) -> dict[int, str]:
        """Call a function with the number and the bytes of each image; either may fail with an `ImageError`.

        Returns:
            The reason of each failure, by the sample's place in the split.
        """
        failures = {}
        for i, place in enumerate(self.places.tolist()):
            try:
                look(i, self.samples.read(i, MAX_BYTES_PER_PIXEL * max_pixels))
            except ImageError as error:
                failures[place] = str(error)
        return failures


def make_chunks(dataset: Dataset, places: Int, size: int | None = None) -> Iterator[Chunk]:
    """Chunks of the samples at some places; of tar shards, each shard from its start to its end.

    Args:
        dataset: the split.
        places: (N) which of its samples.
        size: samples of a chunk; None for `CHUNK`.
    """
    size = size or CHUNK
    if (reader := dataset.reader) is not None:
        places = places[np.lexsort((reader.offsets[places], reader.shard_of[places]))]
    for first in range(0, len(places), size):
        chunk = places[first : first + size]
        yield Chunk(chunk, dataset.take(chunk))


def scan_split(
    function: Callable[[Chunk], Result], dataset: Dataset, places: Int, size: int, workers: int, title: str
) -> Generator[Result, None, None]:
    """A function of each chunk of the samples at some places; if they are many, in processes, with progress.

    Args:
        function: gives the places of the chunk, and more.
        dataset: the split.
        places: (N) which of its samples.
        size: samples of a chunk.
        workers: processes, >= 1.
        title: of the progress.
    Raises:
        WorkerError: a worker was killed.
    """
    many = len(places) >= MANY
    lean = replace(dataset, classes=(), labels_text=(), table=None)  # no worker needs them with each chunk
    with (
        show_progress(f"{title} {dataset.split}", len(places), shown=many) as progress,
        closing(map_ahead(function, make_chunks(lean, places, size), workers if many else 1)) as results,
    ):
        for result in results:
            yield result
            progress.advance(len(result[0]))


def with_table(dataset: Dataset, workers: int, min_cached: int = MIN_CACHED) -> Dataset:
    """Give a dataset its sample table: its own, the kept one, or one made by looking at every image.

    A table is made of the whole split and kept, so that another exclude list needs no other. Images that
    cannot be read are marked so; where training meets them it says why.

    Args:
        dataset: as `open_dataset` gives it.
        workers: processes that look, >= 1.
        min_cached: from how many samples on the table is kept for the next time.
    Raises:
        WorkerError: a worker was killed.
    """
    if dataset.table is not None:
        return dataset
    keep = len(dataset) + dataset.num_quarantined >= min_cached
    whole, places = dataset, None
    if keep and dataset.num_quarantined:
        whole = open_dataset(dataset.root, dataset.split, quarantine=False, min_cached=min_cached)
        places = _places_of(dataset.paths, whole.paths)
        if places is None:  # the data has changed since it was opened: the next start looks again
            whole, keep = dataset, False
    table = whole.table
    if table is None and keep:
        table = load_table(whole)
    if table is None:
        looked_ns = time.time_ns()
        table = look_at_all(whole, workers, load_rows(whole) if keep else None)
        if keep:
            save_table(whole, table, looked_ns)
    return replace(dataset, table=table if places is None else table.take(places))


def look_at_all(dataset: Dataset, workers: int, known: tuple[SampleTable, Int] | None = None) -> SampleTable:
    """Look at every image of a dataset, in processes if there are many.

    Args:
        dataset: the samples.
        workers: processes, >= 1.
        known: rows of an earlier look, as `load_rows` gives them: those images are not looked at.
    Returns:
        A row for each sample.
    Raises:
        WorkerError: a worker was killed.
    """
    wanted, places, tables = np.arange(len(dataset), dtype=np.int64), [], []
    if known is not None:
        table, rows = known
        wanted, kept = np.flatnonzero(rows < 0), np.flatnonzero(rows >= 0)
        places.append(kept)
        tables.append(table.take(rows[kept]))
    title = "look at images of"
    for part, table in scan_split(_look_at_chunk, dataset, wanted, _LOOK_CHUNK, workers, title):
        places.append(part)
        tables.append(table)
    return SampleTable.join(tables).take(np.argsort(np.concatenate(places)))


def _look_at_chunk(chunk: Chunk) -> tuple[Int, SampleTable]:
    lengths, looks = [], []
    for i in range(len(chunk.places)):
        try:
            data = chunk.samples.read(i)
        except ImageError:
            data = b""
        lengths.append(len(data))
        looks.append(look_at(data))
    return chunk.places, SampleTable.from_columns(lengths, *np.array(looks, dtype=np.int64).T)


def _places_of(names: Iterable[str], among: Iterable[str]) -> Int | None:
    """The place of each name among more names in the same order; None if one is not there."""
    others = enumerate(among)
    places = [next((place for place, other in others if other == name), -1) for name in names]
    return None if places and min(places) < 0 else np.array(places, dtype=np.int64)
