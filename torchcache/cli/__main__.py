"""`python -m torchcache.cli` is the command `torchcache`."""

from torchcache.cli import main

main()
