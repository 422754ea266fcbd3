"""Proxies on a host of their own, told line by line what harm to do:

    {"listen": ADDRESS, "ports": {PORT: [HOST, PORT]}}   first of all
    {"port": PORT, "fault": FIELDS}                      of a `Fault`, or null
    {"port": PORT, "fault": null, "cut": true}           and what is connected is reset before

Answered by how often faults of that port took place since the one before was set.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack

from tests.proxy import Fault, FaultyProxy


def main() -> None:
    job = json.loads(sys.stdin.readline())
    with ExitStack() as closing:
        proxies = {
            int(port): closing.enter_context(FaultyProxy(tuple(to), listen=(job["listen"], int(port))))
            for port, to in job["ports"].items()
        }
        print("{}", flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            proxy = proxies[order["port"]]
            hits = proxy.hits
            if order.get("cut"):
                proxy.cut()
            if "fault" in order:
                proxy.fault = Fault(**order["fault"]) if order["fault"] else None
            print(json.dumps({"hits": hits}), flush=True)


if __name__ == "__main__":
    main()
