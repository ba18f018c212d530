"""Addresses, as they are written and as a path garbles them."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.remote.address import remote_url
from train.config.load import make_config


@pytest.mark.parametrize("text", ["s3://b/x", "gs://b/x/y", "https://h:8080/x", "http://h"])
def test_an_address_survives_being_a_path(text: str) -> None:
    assert remote_url(text) == remote_url(Path(text)) == remote_url(f"{text}/") == text
    assert make_config("demo", data=Path(text)).data.root == text


@pytest.mark.parametrize(
    "text", ["s3", "s3:", "/s3://b", "./s3:/b", "ftp://h/x", "file:///etc", "S3://b", "a b"]
)
def test_other_texts_are_places_here(text: str) -> None:
    assert remote_url(text) is None


def test_a_query_has_no_room_for_names() -> None:
    with pytest.raises(UserError, match="without what follows"):
        remote_url("https://h/x?token=1")
