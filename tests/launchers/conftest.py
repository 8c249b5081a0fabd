"""Fixtures of these tests, which pytest finds by their names here."""

from tests.cluster import accounted_cluster, dev_cluster, scrub_slurm, short_folder  # noqa: F401  (fixtures)
from tests.launchers.shims import shimmed  # noqa: F401  (a fixture)
