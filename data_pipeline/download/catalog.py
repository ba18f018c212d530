"""The datasets that `alexnet data download` fetches: addresses, sizes and published checksums.

| name | published by | checksums from |
|---|---|---|
| tiny-imagenet | Stanford CS231n | Avalanche (MD5); independent projects agree on SHA-256 and size |
| imagenette, -320, -160 | fast.ai | torchvision (MD5), TensorFlow Datasets (SHA-256, size) |
| cifar10, cifar100 | A. Krizhevsky, binary versions | the author's page (MD5); other projects (sizes) |

The checksums were read in those sources; none of the archives was downloaded for this table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Layout = Literal["as it is", "cifar10", "cifar100"]

_FAST_AI = "https://s3.amazonaws.com/fast-ai-imageclas"
_TORONTO = "https://www.cs.toronto.edu/~kriz"

IMAGENETTE_CLASS_NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
"""Names for people; the archives name classes by synset id only."""


@dataclass(frozen=True)
class Archive:
    """One downloadable dataset.

    Attributes:
        url: where it is published; a mirror has a file of the same name.
        folder: the folder inside the archive that becomes the data folder.
        md5: published checksum, or "" where there is a sha256.
        sha256: published checksum, or "" where there is an md5.
        size_bytes: published size.
        layout: what has to be done after unpacking.
        max_bytes: most bytes that may come out of it.
        max_files: most files that may come out of it.
        class_names: names of the classes for people, by synset id, where the archive has none.
    """

    url: str
    folder: str
    md5: str = ""
    sha256: str = ""
    size_bytes: int | None = None
    layout: Layout = "as it is"
    max_bytes: int = 4_000_000_000
    max_files: int = 200_000
    class_names: dict[str, str] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]


def _imagenette(suffix: str, md5: str, sha256: str, size_bytes: int) -> Archive:
    name = f"imagenette2{suffix}"
    return Archive(
        f"{_FAST_AI}/{name}.tgz", name, md5, sha256, size_bytes, class_names=IMAGENETTE_CLASS_NAMES
    )


CATALOG: dict[str, Archive] = {
    "tiny-imagenet": Archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "tiny-imagenet-200",
        "90528d7ca1a48142e341f4ef8d21d0de",
        "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
        248_100_043,
    ),
    "imagenette": _imagenette(
        "",
        "fe2fc210e6bb7c5664d602c3cd71e612",
        "6cbfac238434d89fe99e651496f0812ebc7a10fa62bd42d6874042bf01de4efd",
        1_557_161_267,
    ),
    "imagenette-320": _imagenette(
        "-320",
        "3df6f0d01a2c9592104656642f5e78a3",
        "569b4497c98db6dd29f335d1f109cf315fe127053cedf69010d047f0188e158c",
        341_663_724,
    ),
    "imagenette-160": _imagenette(
        "-160",
        "e793b78cc4c9e9a4ccc0c1155377a412",
        "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
        99_003_388,
    ),
    "cifar10": Archive(
        f"{_TORONTO}/cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        "c32a1d4ab5d03f1284b67883e8d87530",
        size_bytes=170_052_171,
        layout="cifar10",
        max_bytes=400_000_000,
        max_files=100,
    ),
    "cifar100": Archive(
        f"{_TORONTO}/cifar-100-binary.tar.gz",
        "cifar-100-binary",
        "03b5dce01913d631647c71ecec9e9cb8",
        size_bytes=168_513_733,
        layout="cifar100",
        max_bytes=400_000_000,
        max_files=100,
    ),
}
