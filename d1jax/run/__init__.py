"""A run's state on disk and its reports: work directory, checkpoints, metrics, trackers and interrupts."""
