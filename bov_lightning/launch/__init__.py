"""Starting runs: SLURM jobs and sweeps."""
