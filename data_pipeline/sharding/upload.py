"""Writes shards to an address: into the user's cache first, from there file by file, the manifest last."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

import msgspec

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import place_in_cache
from data_pipeline.common.text import printable
from data_pipeline.remote.address import is_http, name_of
from data_pipeline.remote.objects import put_object, read_small_object
from data_pipeline.remote.shards import MAX_INDEX_BYTES, MAX_MANIFEST_BYTES
from data_pipeline.sharding.write import ShardReport, write_shards
from data_pipeline.shards.shard_format import MANIFEST, index_path, shard_files

log = logging.getLogger("data_pipeline")


def write_remote_shards(
    source: Path, url: str, *, shard_bytes: int, resize_px: int | None, quality: int, workers: int
) -> ShardReport:
    """Write every labelled split of a dataset as tar shards to an address.

    The shards are written to the user's cache, copied, and removed there. The manifest comes last: without it
    nobody reads a half of them. Run again after a break, it writes and copies what is missing.

    Args:
        source, shard_bytes, resize_px, quality, workers: as in `write_shards`.
        url: as `remote_url` gives it.
    Returns:
        Counts.
    Raises:
        UserError: an address that takes no files, or one that holds shards already.
        SaveError: a full disk, or a file that could not be copied.
    """
    if is_http(url):
        raise UserError(
            f"{url}: nothing is written over HTTP; write the shards to a folder, and copy it there"
        )
    if read_small_object(f"{url}/{MANIFEST}", MAX_MANIFEST_BYTES) is not None:
        raise UserError(f"{url} holds shards already, which are never replaced: name another place")
    settings = [url, str(source.resolve()), shard_bytes, resize_px, quality]
    id = hashlib.sha256(msgspec.json.encode(settings)).hexdigest()[:16]
    folder = place_in_cache(f"upload/{id}/{name_of(url)}", "the shards until they are copied")
    log.info("writing to %s first", printable(folder))
    report = write_shards(
        source, folder, shard_bytes=shard_bytes, resize_px=resize_px, quality=quality, workers=workers
    )
    _copy(folder, url)
    shutil.rmtree(folder.parent)
    return report


def _copy(folder: Path, url: str) -> None:
    shards = [path for split in sorted(folder.iterdir()) for path in shard_files(split)]
    with show_progress(f"copy to {url}", len(shards)) as progress:
        for shard in shards:
            address = f"{url}/{shard.parent.name}/{shard.stem}"
            # an index is copied after its shard, whose hash is in it: where it is, both are
            if read_small_object(f"{address}.json", MAX_INDEX_BYTES) != index_path(shard).read_bytes():
                put_object(shard, f"{address}.tar")
                put_object(index_path(shard), f"{address}.json")
            progress.advance(1, shard.name)
    put_object(folder / MANIFEST, f"{url}/{MANIFEST}")
