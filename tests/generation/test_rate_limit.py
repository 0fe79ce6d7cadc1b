"""The limit follows the refusals, and rows that were sent before go first."""

import asyncio

from gristmill.generation.rate_limit import RateLimit


def test_the_limit_ignores_stray_refusals_and_halves_when_they_are_many() -> None:
    async def run() -> None:
        limit = RateLimit(64)
        for n in range(6400):
            limit.record(refused=n % 20 == 0)
        assert limit.limit == 64
        for _ in range(64 + 32):
            limit.record(refused=True)
        assert limit.limit == 16
        for _ in range(1000):
            limit.record(refused=False)
        assert limit.limit == 64
        for _ in range(10000):
            limit.record(refused=True)
        assert limit.limit == 1

    asyncio.run(run())


def test_rows_that_were_sent_before_get_the_next_slot() -> None:
    order: list[str] = []

    async def run() -> None:
        limit = RateLimit(1)
        await limit.acquire(again=False)

        async def row(name: str, again: bool) -> None:
            await limit.acquire(again)
            order.append(name)
            limit.release()

        rows = [asyncio.ensure_future(row(name, name == "again")) for name in ("first", "gone", "second", "again")]
        await asyncio.sleep(0)
        rows[1].cancel()
        limit.release()
        await asyncio.gather(*rows, return_exceptions=True)
        assert limit.in_flight == 0

    asyncio.run(run())
    assert order == ["again", "first", "second"]
