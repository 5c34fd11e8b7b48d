"""Serving: requests of any length share the device, and leave it when they are done."""
