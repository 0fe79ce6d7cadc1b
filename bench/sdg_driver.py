"""gristmill in a benchmark of synthetic-data generators against a mock endpoint: rows in, journalled answers out.

The benchmark gives the address, the number of rows and the folders on the command line, and its module `rows` holds the rows.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from rows import MODEL, SYSTEM, args, prompt  # noqa: E402

from gristmill.data.chat import Message  # noqa: E402
from gristmill.generation.api import Request, SamplingParams  # noqa: E402
from gristmill.generation.cached import CachedClient  # noqa: E402
from gristmill.generation.endpoint import Endpoint, RowFailed, Target  # noqa: E402
from gristmill.runs.journal import Journal  # noqa: E402


async def main() -> int:
    options = args()
    system, sampling, failed = Message("system", SYSTEM), SamplingParams(), 0
    requests = (Request(f"{i:06d}", (system, Message("user", prompt(i))), sampling) for i in range(options.n))
    endpoint = Endpoint(
        [Target(options.base_url, MODEL)], concurrency=options.concurrency, timeout=options.timeout, retries=options.retries
    )
    with Journal(Path(options.workdir) / "journal.jsonl") as journal:
        async with endpoint:
            async for _, result in CachedClient(endpoint, journal).stream(requests):
                failed += isinstance(result, RowFailed)
        with open(options.out, "w") as out:
            for name in sorted(journal):
                if "out" in (record := journal[name]):
                    out.write(json.dumps({"id": int(name), "response": record["out"][0][0]}) + "\n")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
