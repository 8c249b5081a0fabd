from tests.cluster import dev_cluster, scrub_slurm, short_folder  # noqa: F401
