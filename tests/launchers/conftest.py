from tests.cluster import accounted_cluster, dev_cluster, scrub_slurm, short_folder  # noqa: F401
