"""`python -m torchcache_server`."""

from torchcache_server.process.main import main

if __name__ == "__main__":
    main()
