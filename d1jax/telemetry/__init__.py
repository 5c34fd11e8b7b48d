"""The cost of a run in seconds, FLOPs and bytes; and alarms about its metrics."""
