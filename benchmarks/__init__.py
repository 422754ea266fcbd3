"""Measurements side by side: ours and the bare limit take turns in one run; medians and their ratio count."""
