"""Lanes: the ways for bytes to travel between this process and a server."""
