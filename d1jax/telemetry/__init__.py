"""What a run spends: seconds, FLOPs, bytes; and the figures that ask for attention."""
