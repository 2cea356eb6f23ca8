"""Run directories, their metrics, and a run's state for the screen."""
