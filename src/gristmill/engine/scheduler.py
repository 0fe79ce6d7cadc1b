"""Who computes what in the next step: every response in flight its next token, then prompts, in pieces, up to a number of tokens.

Responses join and leave at every step. Nobody overtakes: what waits at the head is served first, and when pages run out the last to
come gives its own back and waits again (its tokens are read anew later, its random numbers stay its own).
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from gristmill.core.errors import InputError
from gristmill.engine.block_manager import PAGE_SIZE, Pages
from gristmill.engine.sampler import sample_key
from gristmill.engine.sequence import Job, Sequence, Slots

COLDEST = 1e-3  # below, logits would overflow, and the likeliest token is as good as certain


@dataclass
class Step:
    """What one forward pass computes.

    Attributes:
        sequences: those that have tokens in it, the first `decoding` of them one each.
        starts, counts: first position and number of tokens of each.
        drawn: for each token to draw, its sequence's place in `sequences`; behind the decoding ones come prompts read to their end.
        heirs: for each token to draw, who gets it: the sequence itself or a twin.
    """

    sequences: list[Sequence] = field(default_factory=list)
    decoding: int = 0
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    heirs: list[Sequence] = field(default_factory=list)


class Scheduler:
    """The waiting and the running.

    Args:
        slots, pages: what there is to give.
        step_tokens: most tokens of a step.
    """

    def __init__(self, slots: Slots, pages: Pages, step_tokens: int) -> None:
        self.slots, self.pages, self.step_tokens = slots, pages, step_tokens
        self.waiting: list[tuple[tuple[int, int, int], int, Sequence]] = []
        self.running: list[Sequence] = []  # in order of coming
        self.copies: list[tuple[int, int]] = []  # pages to copy before the next step: from, to
        self.preemptions = 0
        self._ticket = 0

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def add(self, job: Job) -> None:
        """Let all samples of a request wait.

        Raises:
            InputError: it could never be answered with the pages that there are.
        """
        longest = len(job.prompt) + job.limit
        if -(-longest // PAGE_SIZE) > self.pages.count:
            raise InputError(
                f"Request {job.request.id!r} may take {longest} tokens and the cache holds {self.pages.count * PAGE_SIZE}: shorten it, "
                "lower max_tokens, or give the engine more cache."
            )
        for sample in range(job.request.sampling.n):
            self._wait(Sequence(job, sample))

    def cancel(self, job: Job) -> None:
        """Forget a request, whatever it is doing."""
        job.cancelled = True  # those that wait are left out when their turn comes
        for sequence in [s for s in self.running if s.job is job]:
            self._stop(sequence)
        for sequence in self.running:
            for twin in [t for t in sequence.twins if t.job is job]:
                sequence.twins.remove(twin)
                self._free_slot(twin)

    def retire(self, sequence: Sequence) -> None:
        """A response has ended."""
        self._stop(sequence)

    def schedule(self) -> Step:
        """The next step. Tokens that it computes count as computed from here on."""
        step = Step()
        self._decode(step)
        budget = self.step_tokens - step.decoding
        for sequence in self.running:
            if budget <= 0:
                break
            if sequence.computed < sequence.length:
                budget -= self._read(step, sequence, budget)
        begun: dict[bytes, Sequence] = {}
        while self.waiting and self.slots.free and budget > 0:
            sequence = self.waiting[0][2]
            if sequence.job.cancelled:
                heapq.heappop(self.waiting)
                continue
            prompt = None if sequence.tokens is not None else sequence.job.prompt.tobytes()
            twin_of = begun.get(prompt) if prompt is not None else None
            if twin_of is not None:
                if not self._room(len(twin_of.twins) + 2):
                    break
                heapq.heappop(self.waiting)
                self._take_slot(sequence)
                twin_of.twins.append(sequence)
                if twin_of in step.heirs:  # its prompt ends in this step
                    step.drawn.append(step.sequences.index(twin_of))
                    step.heirs.append(sequence)
                continue
            # samples of one prompt begin together, so that it is read once
            if len(self.slots.free) < min(sequence.job.waiting, self.slots.count) or not self._admit(sequence):
                break
            heapq.heappop(self.waiting)
            budget -= self._read(step, sequence, budget)
            if prompt is not None:
                begun[prompt] = sequence
        return step

    def take_twins(self, step: Step) -> None:
        """Twins of prompts that were read to their end run on their own from now on."""
        for sequence in [s for s in step.heirs if s.twins]:
            full = len(sequence.job.prompt) // PAGE_SIZE
            twins, sequence.twins = sequence.twins, []
            for twin in twins:
                for shared in sequence.pages[:full]:
                    self.pages.share(shared)
                self._own(twin, sequence.pages[:full])
                if len(sequence.pages) > full:
                    page = self.pages.take()
                    if page is None:  # as if it had never begun
                        self._send_back(twin)
                        continue
                    self.copies.append((sequence.pages[full], page))
                    self._own(twin, [page])
                twin.computed, twin.named, twin.content = len(sequence.job.prompt), sequence.named, sequence.content
                twin.stale = sequence.stale
                self.running.append(twin)
                self.running.sort(key=lambda s: s.order)

    # ---- the parts of a step ----

    def _decode(self, step: Step) -> None:
        """Responses whose next token is due, each with a page for it."""
        place = 0
        while place < len(self.running):
            sequence = self.running[place]
            length = sequence.length
            if sequence.computed == length - 1 >= len(sequence.job.prompt):
                if (length - 1) // PAGE_SIZE >= len(sequence.pages):
                    self._name_pages(sequence)
                    if (page := self._take(sequence)) is None:
                        assert not sequence.pages, "who is sent back has no pages"
                        continue  # it was the last itself
                    self._own(sequence, [page])
                step.sequences.append(sequence)
                sequence.computed = length
            place += 1
        step.decoding = len(step.sequences)
        step.starts = [s.computed - 1 for s in step.sequences]
        step.counts = [1] * step.decoding
        step.drawn = list(range(step.decoding))
        step.heirs = list(step.sequences)

    def _read(self, step: Step, sequence: Sequence, budget: int) -> int:
        """Read what fits of a prompt; its number of tokens."""
        length = sequence.length
        count = min(budget, length - sequence.computed)
        missing = -(-(sequence.computed + count) // PAGE_SIZE) - len(sequence.pages)
        if missing > 0:
            if self.pages.available < missing:  # others need them more: wait a step
                count = len(sequence.pages) * PAGE_SIZE - sequence.computed
                if count <= 0:
                    return 0
            else:
                self._own(sequence, [page for _ in range(missing) if (page := self.pages.take()) is not None])
        step.sequences.append(sequence)
        step.starts.append(sequence.computed)
        step.counts.append(count)
        sequence.computed += count
        self._name_pages(sequence)
        if sequence.computed == length:
            step.drawn += [len(step.sequences) - 1] * (1 + len(sequence.twins))
            step.heirs += [sequence, *sequence.twins]
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and the pages that hold its beginning. False if there is no room for all of its prompt."""
        tokens = sequence.job.prompt if sequence.tokens is None else sequence.tokens
        found: list[int] = []
        content = sequence.content
        for begin in range(0, len(tokens) - PAGE_SIZE, PAGE_SIZE):  # one token at least is computed
            hit = self.pages.find(content, tokens[begin : begin + PAGE_SIZE].tobytes())
            if hit is None:
                break
            found.append(hit[0])
            content = hit[1]
        for page in found:
            self.pages.share(page)
        if not self._room(-(-(len(tokens) + 1) // PAGE_SIZE) - len(found)):
            self.pages.release(found)
            return False
        self._take_slot(sequence)
        self._own(sequence, found)
        sequence.computed, sequence.named, sequence.content = len(found) * PAGE_SIZE, len(found), content
        self.running.append(sequence)
        if len(self.running) > 1 and self.running[-2].order > sequence.order:
            self.running.sort(key=lambda s: s.order)
        return True

    def _room(self, pages: int) -> bool:
        """Whether that many pages can be taken beside what prompts that are being read still need. An empty house has always room."""
        owed = sum(max(0, -(-s.length // PAGE_SIZE) - len(s.pages)) + len(s.twins) for s in self.running if s.computed < s.length)
        return not self.running or self.pages.available >= pages + owed

    # ---- pages and slots ----

    def _take(self, sequence: Sequence) -> int | None:
        """A page for a running sequence; the last of the running is sent back for it if there is none. None if that was itself."""
        while (page := self.pages.take()) is None:
            victim = self.running[-1]
            self._send_back(victim)
            if victim is sequence:
                return None
            if not self.running:
                return None
        return page

    def _send_back(self, sequence: Sequence) -> None:
        """Take everything from a sequence but its tokens, and let it wait at the head."""
        length, prompt = sequence.length, len(sequence.job.prompt)
        if length > prompt:
            sequence.tokens = self.slots.tokens[sequence.slot, :length].copy()
            sequence.logprobs = self.slots.logprobs[sequence.slot, prompt:length].copy()
        twins, sequence.twins = sequence.twins, []
        self._stop(sequence)
        self.preemptions += 1
        for waiting in (sequence, *twins):
            if waiting is not sequence:
                self._free_slot(waiting)
            waiting.computed = waiting.named = waiting.content = 0
            waiting.stale = False
            self._wait(waiting)

    def _stop(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        self._name_pages(sequence)
        self.pages.release(sequence.pages)
        sequence.pages = []
        self._free_slot(sequence)
        for twin in sequence.twins:  # its prompt was not read to the end: somebody else must
            self._free_slot(twin)
            if not twin.job.cancelled:
                self._wait(twin)
        sequence.twins = []

    def _wait(self, sequence: Sequence) -> None:
        self._ticket += 1
        sequence.job.waiting += 1
        heapq.heappush(self.waiting, (sequence.order, self._ticket, sequence))

    def _take_slot(self, sequence: Sequence) -> None:
        slots, job = self.slots, sequence.job
        slot = sequence.slot = slots.free.pop()
        job.waiting -= 1
        tokens = job.prompt if sequence.tokens is None else sequence.tokens
        prompt, sampling = len(job.prompt), job.request.sampling
        slots.tokens[slot, : len(tokens)] = tokens
        if sequence.logprobs is not None:
            slots.logprobs[slot, prompt : len(tokens)] = sequence.logprobs
        sequence.length = len(tokens)
        slots.ints[slot] = prompt, prompt + job.limit, sampling.top_k
        slots.floats[slot] = (
            sampling.temperature if sampling.temperature >= COLDEST else 0.0,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        slots.keys[slot] = sample_key(job.request.seed, job.request.id, sequence.sample)

    def _free_slot(self, sequence: Sequence) -> None:
        self.slots.free.append(sequence.slot)
        sequence.slot = -1

    def _own(self, sequence: Sequence, pages: Iterable[int]) -> None:
        for page in pages:
            self.slots.table[sequence.slot, len(sequence.pages)] = page
            sequence.pages.append(page)

    def _name_pages(self, sequence: Sequence) -> None:
        """Make pages known that have become full."""
        if sequence.stale:
            return
        tokens = self.slots.tokens[sequence.slot]
        while (sequence.named + 1) * PAGE_SIZE <= sequence.computed:
            begin = sequence.named * PAGE_SIZE
            key = tokens[begin : begin + PAGE_SIZE].tobytes()
            sequence.content = self.pages.name(sequence.pages[sequence.named], sequence.content, key)
            sequence.named += 1
