"""Two machines of a Ray cluster, on this one: prints its address, and ends it when stdin ends."""

from __future__ import annotations

import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster


def main(scratch: str) -> None:
    """Start two machines of one core each, the head and another.

    Args:
        scratch: where Ray's sockets and logs go; a short path, $RAY_TMPDIR/ray.
    """
    Path(scratch).mkdir(parents=True)
    common = {"include_dashboard": False, "object_store_memory": 80 << 20}
    common |= {"num_cpus": 1, "num_gpus": 0}
    cluster = Cluster(initialize_head=True, head_node_args={"temp_dir": scratch, **common})
    cluster.add_node(**common)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)  # noqa: T201
    sys.stdin.read()
    cluster.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
