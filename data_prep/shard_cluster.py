"""The same shards on a cluster: Dask distributed hands them out, one process a thread makes them, image by image."""

import pickle
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

from data_prep.shard_crew import CrewError, Outcome, Worker, outcomes

_IDLE: dict[tuple[bytes, float], list[Worker]] = {}  # in a cluster's worker: processes for its next shard

Items = list[tuple[int, Any]]  # of a shard, with their numbers


def on_cluster(
    work: Callable[[Any], Any], shards: Iterator[Items], address: str, *, workers: int, timeout: float
) -> Generator[tuple[int, Outcome], None, None]:
    """(number, outcome) of each item, by shards, a few of which wait for each thread of the cluster.

    `address` is a scheduler's, or "local" for one of `workers` processes on this machine. The cluster's machines must
    have this code and see the images. A shard whose worker is lost is made by another.
    """
    try:
        from dask.distributed import Client, LocalCluster, as_completed
    except ImportError:
        raise ImportError("--cluster needs Dask: pip install 'geoaug[cluster]'") from None
    pickled = pickle.dumps(work)  # so that only the processes that run it import what it needs
    with ExitStack() as stack:
        cluster: Any = address
        if address == "local":
            cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
            stack.enter_context(cluster)
        client = stack.enter_context(Client(cluster, set_as_default=False))
        ahead = 2 * max(1, sum(client.nthreads().values()))
        first = [client.submit(make_shard, pickled, items, timeout, pure=False) for items in islice(shards, ahead)]
        running = as_completed(first, loop=client.loop)
        for future in running:
            try:
                yield from future.result()
            except CrewError:
                raise
            except Exception as error:  # of Dask's own: a worker lost again and again, a scheduler that is gone
                raise CrewError(f"the cluster: {type(error).__name__}: {error}") from None
            for items in islice(shards, 1):
                running.add(client.submit(make_shard, pickled, items, timeout, pure=False))


def make_shard(work: bytes, items: Items, timeout: float) -> list[tuple[int, Outcome]]:
    """The outcomes of a shard out of one process, which is kept for the next shard."""
    return list(outcomes(work, items, workers=1, timeout=timeout, idle=_IDLE.setdefault((work, timeout), [])))
