"""Fixtures of the cluster for this folder's tests."""

from tests.cluster import accounted_cluster, dev_cluster, scrub_slurm, short_folder  # noqa: F401  (fixtures, found by name)
