"""What a run leaves on disk and says while it runs: its folder, checkpoints, metrics, trackers and interrupts."""
