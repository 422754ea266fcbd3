"""Object storage for a host of its own: SeaweedFS on its loopback, behind whatever stands before it.

{"folder": FOLDER}                           first of all; answered by its port, its bucket and the keys to it
{"put": FOLDER, "sizes": {NAME: BYTES}, "called": WHAT}      objects whose content is that of WHAT + NAME
{"digits": FOLDER, "count": N}               pictures to train on
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from urllib.parse import urlsplit

from examples.demo import digits
from examples.seaweedfs import SeaweedFS
from tests.integration.self_describing import content


def main() -> None:
    job = json.loads(sys.stdin.readline())
    with SeaweedFS(Path(job["folder"]), start_timeout_s=120) as weed:
        bucket = weed.make_bucket()
        port = urlsplit(weed.endpoint_url).port
        print(json.dumps({"port": port, "bucket": bucket, "keys": weed.environment()}), flush=True)
        for line in sys.stdin:
            match json.loads(line):
                case {"put": folder, "sizes": sizes, "called": called}:
                    files = ((name, content(called + name, 0, size)) for name, size in sizes.items())
                case {"digits": folder, "count": count}:
                    files = itertools.islice(digits(), count)
            for name, data in files:
                weed.client.put_object(Bucket=bucket, Key=f"{folder}/{name}", Body=data)
            print("{}", flush=True)


if __name__ == "__main__":
    main()
