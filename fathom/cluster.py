"""The Ray cluster that RAY_ADDRESS names, or one of this machine's cores alone."""

import os

import ray


def join_cluster(count: int) -> float:
    """Join, and return the share of the cores for each of `count` processes; it is also how many threads each should have."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here = {} if "RAY_ADDRESS" in os.environ else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    ray.init(log_to_driver=True, **here)
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    return cores // count or cores / count
