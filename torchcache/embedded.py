"""The embedded pool on disk and in processes: who uses it, who serves it."""
