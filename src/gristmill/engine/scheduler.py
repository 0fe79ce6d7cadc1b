"""Continuous-batching scheduler: waiting queue and running set, chunked prefill beside decoding, preemption by recomputation.

Sequences join and leave at every step: every running one decodes its next token, and has a draft of those after it verified if it has one;
then prompts are prefilled in chunks, up to a number of tokens. The first in order is served first, and nobody overtakes it while it waits
for room. When blocks run out, the last in order is preempted: it frees its own blocks and waits again. Its tokens are prefilled anew
later, and its random numbers stay its own.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from gristmill.core.errors import InputError
from gristmill.engine.block_manager import BLOCK_SIZE, BlockManager
from gristmill.engine.sampler import sample_key
from gristmill.engine.sequence import LIMIT, BatchState, RequestState, Sequence
from gristmill.engine.speculative import SpeculativeConfig, propose
from gristmill.engine.token_budget import MIN_PROMPT_TOKENS, TokenBudget

# Where the order is by age, a request is as if it had come after so many tokens of work for each of its prompt's, and that many later for
# each step of priority below. So short prompts overtake long ones, and none is overtaken for ever.
TOKENS_PER_PROMPT_TOKEN = 4
TOKENS_PER_PRIORITY = 256
MAX_ROWS_WITH_DRAFTS = 64  # of a step: beyond, a row costs about as much as a token does without drafts
MIN_TEMPERATURE = 1e-3  # below, logits would overflow, and the likeliest token is as good as certain


@dataclass
class SchedulerOutput:
    """Work of one step: the tokens that one forward pass computes, and which of them are sampled from.

    Attributes:
        sequences: those that have tokens in it, the first `num_decodes` of them one each; then `num_drafted` with drafts.
        starts, num_tokens: first position and number of tokens of each.
        num_drafts: of each how many of its tokens are a draft: they, and the token before, are all sampled behind.
        sample_rows: for each token to sample, the place in `sequences` that it is sampled from; behind the decodes come ended prefills.
        sample_sequences: for each token to sample, who gets it: the sequence itself or a sibling.
    """

    sequences: list[Sequence] = field(default_factory=list)
    num_decodes: int = 0
    num_drafted: int = 0
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_drafts: list[int] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)
    sample_sequences: list[Sequence] = field(default_factory=list)

    @property
    def num_decoded_tokens(self) -> int:
        """Tokens that are decoded, drafts among them; the others are of prompts."""
        return sum(self.num_tokens[: self.num_decodes + self.num_drafted])


class Scheduler:
    """Waiting queue and running set.

    Args:
        batch_state, block_manager: slots and blocks that there are to give.
        max_batched_tokens: of a step. All that decode have their token in any case, and prompts MIN_PROMPT_TOKENS.
        max_loras: adapters of a step.
        token_budget: says how many tokens of prompts a step reads, within that; None: as many as there are.
        by_age: order by the work done before a request came, its priority and its prompt's length; else by priority, then arrival.
        speculative: how drafts are made; None: there are none.
    """

    def __init__(
        self,
        batch_state: BatchState,
        block_manager: BlockManager,
        max_batched_tokens: int,
        *,
        max_loras: int = 8,
        token_budget: TokenBudget | None = None,
        by_age: bool = False,
        speculative: SpeculativeConfig | None = None,
    ) -> None:
        self.batch_state, self.block_manager, self.max_batched_tokens = batch_state, block_manager, max_batched_tokens
        self.max_loras, self.token_budget, self.by_age, self.speculative = max_loras, token_budget, by_age, speculative
        self.waiting: list[tuple[tuple[int, int, int], int, Sequence]] = []
        self.running: list[Sequence] = []  # in scheduling order
        self.block_copies: list[tuple[int, int]] = []  # copy-on-write before the next step: from, to
        self.num_preemptions = 0
        self._num_enqueued = 0
        self._age = 0  # tokens scheduled so far

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def add(self, state: RequestState) -> None:
        """Enqueue all samples of a request.

        Raises:
            InputError: it could never be answered with the blocks that there are.
        """
        max_length = len(state.prompt_ids) + state.max_tokens
        if -(-max_length // BLOCK_SIZE) > self.block_manager.num_blocks:
            raise InputError(
                f"Request {state.request.id!r} may take {max_length} tokens and the cache holds "
                f"{self.block_manager.num_blocks * BLOCK_SIZE}: shorten it, lower max_tokens, or give the engine more cache."
            )
        priority = state.request.priority
        state.rank = -priority
        if self.by_age:
            state.rank = self._age + TOKENS_PER_PROMPT_TOKEN * len(state.prompt_ids) - TOKENS_PER_PRIORITY * priority
        for sample in range(state.request.sampling.n):
            self._enqueue(Sequence(state, sample, prefix_id=state.root))

    def cancel(self, state: RequestState) -> None:
        """Abort a request, whatever it is doing."""
        state.cancelled = True  # those that wait are left out when their turn comes
        for sequence in [s for s in self.running if s.state is state]:
            self._free(sequence)
        for sequence in self.running:
            for sibling in [s for s in sequence.siblings if s.state is state]:
                sequence.siblings.remove(sibling)
                self._release_slot(sibling)

    def finish(self, sequence: Sequence) -> None:
        """Free a sequence that has ended."""
        self._free(sequence)

    def schedule(self) -> SchedulerOutput:
        """The next step. Tokens that it computes count as computed from here on."""
        step = SchedulerOutput()
        self._schedule_decodes(step)
        num_decoded = step.num_decoded_tokens
        budget = max(self.max_batched_tokens - num_decoded, min(MIN_PROMPT_TOKENS, self.max_batched_tokens))
        num_waiting = min(len(self.running) + len(self.waiting), self.batch_state.num_slots) - len(step.sequences)
        if self.token_budget is not None and num_waiting:
            budget = self.token_budget.prompt_tokens(num_decoded, num_waiting, budget)
        self._schedule_prompts(step, budget)
        self._age += sum(step.num_tokens)
        return step

    def _schedule_prompts(self, step: SchedulerOutput, budget: int) -> None:
        """Chunks of prompts, of running and of waiting sequences, in order."""
        prefills = deque(s for s in self.running if s.num_computed < s.length)
        begun: dict[tuple[int, bytes], Sequence] = {}
        blocked = False  # the first that waits has no room
        while budget > 0:
            while self.waiting and self.waiting[0][2].state.cancelled:
                heapq.heappop(self.waiting)
            sequence = self.waiting[0][2] if self.waiting and self.batch_state.free_slots and not blocked else None
            if prefills and (sequence is None or prefills[0].order < sequence.order):
                budget -= self._prefill(step, prefills.popleft(), budget)
                continue
            if sequence is None:
                return
            prompt = None if sequence.saved_tokens is not None else (sequence.state.root, sequence.state.prompt_ids.tobytes())
            parent = begun.get(prompt) if prompt is not None else None
            if parent is not None:
                if not self._can_allocate(len(parent.siblings) + 2):
                    blocked = True
                    continue
                heapq.heappop(self.waiting)
                self._assign_slot(sequence)
                parent.siblings.append(sequence)
                if parent in step.sample_sequences:  # its prefill ends in this step
                    step.sample_rows.append(step.sequences.index(parent))
                    step.sample_sequences.append(sequence)
                continue
            # samples of one prompt begin together, so that it is prefilled once
            num_samples = min(sequence.state.num_waiting, self.batch_state.num_slots)
            if len(self.batch_state.free_slots) < num_samples or not self._has_lora_slot(sequence) or not self._admit(sequence):
                blocked = True
                continue
            heapq.heappop(self.waiting)
            budget -= self._prefill(step, sequence, budget)
            if prompt is not None:
                begun[prompt] = sequence

    def fork_siblings(self, step: SchedulerOutput) -> None:
        """Let siblings of ended prefills run on their own: full blocks are shared, the last one is copied."""
        for sequence in [s for s in step.sample_sequences if s.siblings]:
            num_full = len(sequence.state.prompt_ids) // BLOCK_SIZE
            siblings, sequence.siblings = sequence.siblings, []
            for sibling in siblings:
                for shared in sequence.block_ids[:num_full]:
                    self.block_manager.share(shared)
                self._append_blocks(sibling, sequence.block_ids[:num_full])
                if len(sequence.block_ids) > num_full:
                    block = self.block_manager.allocate()
                    if block is None:  # as if it had never begun
                        self._preempt(sibling)
                        continue
                    self.block_copies.append((sequence.block_ids[num_full], block))
                    self._append_blocks(sibling, [block])
                sibling.num_computed = len(sequence.state.prompt_ids)
                sibling.num_registered, sibling.prefix_id = sequence.num_registered, sequence.prefix_id
                sibling.stale = sequence.stale
                self.running.append(sibling)
                self.running.sort(key=lambda s: s.order)

    # ---- the parts of a step ----

    def _schedule_decodes(self, step: SchedulerOutput) -> None:
        """Running sequences whose next token is due, each with a block for it."""
        place = 0
        while place < len(self.running):
            sequence = self.running[place]
            length = sequence.length
            if sequence.num_computed == length - 1 >= len(sequence.state.prompt_ids):
                if (length - 1) // BLOCK_SIZE >= len(sequence.block_ids):
                    self._register_full_blocks(sequence)
                    if (block := self._allocate_or_preempt(sequence)) is None:
                        assert not sequence.block_ids, "a preempted sequence has no blocks"
                        continue  # it was the last itself
                    self._append_blocks(sequence, [block])
                step.sequences.append(sequence)
                sequence.num_computed = length
            place += 1
        drafts = {} if self.speculative is None else self._draft(self.speculative, step.sequences)
        if drafts:
            step.sequences.sort(key=lambda s: s in drafts)  # stable
        step.num_drafted = len(drafts)
        step.num_decodes = len(step.sequences) - len(drafts)
        step.starts = [s.num_computed - 1 for s in step.sequences]
        step.num_drafts = [drafts.get(s, 0) for s in step.sequences]
        step.num_tokens = [1 + count for count in step.num_drafts]
        step.sample_rows = list(range(len(step.sequences)))
        step.sample_sequences = list(step.sequences)

    def _draft(self, config: SpeculativeConfig, sequences: list[Sequence]) -> dict[Sequence, int]:
        """Write drafts behind the tokens of sequences that decode, where there are blocks to spare; how many tokens each got.

        Those whose logits depend on the tokens before (penalties, biases, grammars) get none.
        """
        drafts: dict[Sequence, int] = {}
        room = min(MAX_ROWS_WITH_DRAFTS, self.max_batched_tokens) - len(sequences)
        for sequence in sequences:
            slot, length = sequence.slot, sequence.length
            most = min(sequence.max_draft or config.num_speculative_tokens, room, int(self.batch_state.ints[slot, LIMIT]) - length - 1)
            if most <= 0 or sequence.state.request.sampling.processes_logits:
                continue
            tokens = self.batch_state.token_ids[slot]
            lookup = {"max_ngram": config.prompt_lookup_max, "min_ngram": config.prompt_lookup_min}
            draft = propose(tokens[:length], most, **lookup)
            missing = -(-(length + len(draft)) // BLOCK_SIZE) - len(sequence.block_ids)
            if missing > 0:
                self._register_full_blocks(sequence)
                if not self._can_allocate(missing):
                    draft = draft[: len(sequence.block_ids) * BLOCK_SIZE - length]
                else:
                    self._append_blocks(sequence, [b for _ in range(missing) if (b := self.block_manager.allocate()) is not None])
            if len(draft):
                tokens[length : length + len(draft)] = draft
                drafts[sequence] = len(draft)
                room -= len(draft)
        return drafts

    def accept(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """End the verification of a draft: blocks that only rejected tokens are in are freed, and the next draft is as long as pays."""
        assert self.speculative is not None
        grown = min(self.speculative.num_speculative_tokens, 2 * num_drafts)
        sequence.max_draft = grown if num_accepted == num_drafts else max(1, num_accepted)
        used = -(-sequence.length // BLOCK_SIZE)
        self.block_manager.release(sequence.block_ids[used:])
        del sequence.block_ids[used:]

    def _prefill(self, step: SchedulerOutput, sequence: Sequence, budget: int) -> int:
        """Schedule the next chunk of a prefill; its number of tokens."""
        length = sequence.length
        count = min(budget, length - sequence.num_computed)
        missing = -(-(sequence.num_computed + count) // BLOCK_SIZE) - len(sequence.block_ids)
        if missing > 0:
            if self.block_manager.num_free_blocks < missing:  # others need them more: wait a step
                count = len(sequence.block_ids) * BLOCK_SIZE - sequence.num_computed
                if count <= 0:
                    return 0
            else:
                self._append_blocks(sequence, [b for _ in range(missing) if (b := self.block_manager.allocate()) is not None])
        step.sequences.append(sequence)
        step.starts.append(sequence.num_computed)
        step.num_tokens.append(count)
        step.num_drafts.append(0)
        sequence.num_computed += count
        self._register_full_blocks(sequence)
        if sequence.num_computed == length:
            step.sample_rows += [len(step.sequences) - 1] * (1 + len(sequence.siblings))
            step.sample_sequences += [sequence, *sequence.siblings]
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Move a waiting sequence to the running set, with the cached blocks of its prefix. False if all its prompt has no room."""
        tokens = sequence.state.prompt_ids if sequence.saved_tokens is None else sequence.saved_tokens
        cached: list[int] = []
        prefix_id = sequence.prefix_id
        for begin in range(0, len(tokens) - BLOCK_SIZE, BLOCK_SIZE):  # one token at least is computed
            hit = self.block_manager.lookup(prefix_id, tokens[begin : begin + BLOCK_SIZE].tobytes())
            if hit is None:
                break
            cached.append(hit[0])
            prefix_id = hit[1]
        for block in cached:
            self.block_manager.share(block)
        if not self._can_allocate(-(-(len(tokens) + 1) // BLOCK_SIZE) - len(cached)):
            self.block_manager.release(cached)
            return False
        self._assign_slot(sequence)
        self._append_blocks(sequence, cached)
        sequence.num_computed, sequence.num_registered, sequence.prefix_id = len(cached) * BLOCK_SIZE, len(cached), prefix_id
        self.running.append(sequence)
        if len(self.running) > 1 and self.running[-2].order > sequence.order:
            self.running.sort(key=lambda s: s.order)
        return True

    def _has_lora_slot(self, sequence: Sequence) -> bool:
        """Whether a step may have this sequence's adapter beside those of the running ones."""
        adapter = sequence.state.adapter
        if adapter is None:
            return True
        running = {s.state.adapter for s in self.running} - {None, adapter}
        return len(running) < self.max_loras

    def _can_allocate(self, num_blocks: int) -> bool:
        """Whether that many blocks are free beside what prefills under way still need. With nobody running there always are."""
        reserved = sum(
            max(0, -(-s.length // BLOCK_SIZE) - len(s.block_ids)) + len(s.siblings) for s in self.running if s.num_computed < s.length
        )
        return not self.running or self.block_manager.num_free_blocks >= num_blocks + reserved

    # ---- blocks and slots ----

    def _allocate_or_preempt(self, sequence: Sequence) -> int | None:
        """A block for a running sequence; the last of the running is preempted for it if there is none. None if that was itself."""
        while (block := self.block_manager.allocate()) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
            if not self.running:
                return None
        return block

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a sequence but its tokens, and let it wait at the head."""
        length, prompt = sequence.length, len(sequence.state.prompt_ids)
        if length > prompt:
            sequence.saved_tokens = self.batch_state.token_ids[sequence.slot, :length].copy()
            sequence.saved_logprobs = self.batch_state.logprobs[sequence.slot, prompt:length].copy()
        siblings, sequence.siblings = sequence.siblings, []
        self._free(sequence)
        self.num_preemptions += 1
        for waiting in (sequence, *siblings):
            if waiting is not sequence:
                self._release_slot(waiting)
            waiting.num_computed = waiting.num_registered = 0
            waiting.prefix_id = waiting.state.root
            waiting.stale = False
            self._enqueue(waiting)

    def _free(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        self._register_full_blocks(sequence)
        self.block_manager.release(sequence.block_ids)
        sequence.block_ids = []
        self._release_slot(sequence)
        for sibling in sequence.siblings:  # the prefill has not ended: somebody else must do it
            self._release_slot(sibling)
            if not sibling.state.cancelled:
                self._enqueue(sibling)
        sequence.siblings = []

    def _enqueue(self, sequence: Sequence) -> None:
        self._num_enqueued += 1
        sequence.state.num_waiting += 1
        heapq.heappush(self.waiting, (sequence.order, self._num_enqueued, sequence))

    def _assign_slot(self, sequence: Sequence) -> None:
        batch, state = self.batch_state, sequence.state
        slot = sequence.slot = batch.free_slots.pop()
        state.num_waiting -= 1
        tokens = state.prompt_ids if sequence.saved_tokens is None else sequence.saved_tokens
        prompt, sampling = len(state.prompt_ids), state.request.sampling
        batch.token_ids[slot, : len(tokens)] = tokens
        if sequence.saved_logprobs is not None:
            batch.logprobs[slot, prompt : len(tokens)] = sequence.saved_logprobs
        sequence.length = len(tokens)
        batch.ints[slot] = prompt, prompt + state.max_tokens, sampling.top_k
        batch.floats[slot] = (
            sampling.temperature if sampling.temperature >= MIN_TEMPERATURE else 0.0,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        batch.rng_keys[slot] = sample_key(state.request.seed, state.request.id, sequence.sample)

    def _release_slot(self, sequence: Sequence) -> None:
        self.batch_state.free_slots.append(sequence.slot)
        sequence.slot = -1

    def _append_blocks(self, sequence: Sequence, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.batch_state.block_tables[sequence.slot, len(sequence.block_ids)] = block
            sequence.block_ids.append(block)

    def _register_full_blocks(self, sequence: Sequence) -> None:
        """Put blocks that have become full into the prefix cache."""
        if sequence.stale:
            return
        tokens = self.batch_state.token_ids[sequence.slot]
        while (sequence.num_registered + 1) * BLOCK_SIZE <= sequence.num_computed:
            begin = sequence.num_registered * BLOCK_SIZE
            key = tokens[begin : begin + BLOCK_SIZE].tobytes()
            sequence.prefix_id = self.block_manager.register(sequence.block_ids[sequence.num_registered], sequence.prefix_id, key)
            sequence.num_registered += 1
