"""What a job needs on chips that are not at hand: its programs compiled ahead of time, and read."""
