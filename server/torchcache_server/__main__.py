"""`python -m torchcache_server`."""

import os

# gRPC would print lines of its own beside our errors. It reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from torchcache_server.process.main import main

if __name__ == "__main__":
    main(prog_name="torchcache serve")
