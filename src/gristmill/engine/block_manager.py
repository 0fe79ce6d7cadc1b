"""Which page of the cache belongs to whom: pages are counted, found again by what they hold, and given to others when nobody reads them.

A page holds PAGE_SIZE positions of all layers. A full page is known by its own tokens and all tokens before it, so that prompts that
begin alike share pages without anyone saying so. Full pages are never written again; a page that is not full has one owner.
"""

from collections import OrderedDict

PAGE_SIZE = 32  # positions; as in kernels.cpp
ROOT = 0  # what stands before the first page
KEPT = 64  # unread pages that are kept in any case


class Pages:
    """Reference counts of `count` pages, and the pages known by their content.

    A content is a number that is never given twice: that of (the content before, the tokens). A page that nobody reads keeps its
    content until it is needed; the one unread for longest goes first. While fewer pages are in use than unread, those are taken before
    memory that was never touched.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._touched = 0  # pages from here on were never used
        self._free: list[int] = []  # the last freed first: its memory is warm
        self._readers = [0] * count
        self._content = [ROOT] * count
        self._key: dict[int, tuple[int, bytes]] = {}  # of a content
        self._known: dict[tuple[int, bytes], tuple[int, int]] = {}  # -> page, content
        self._unread: OrderedDict[int, None] = OrderedDict()
        self._last_content = ROOT

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return self.count - self._touched + len(self._free) + len(self._unread)

    @property
    def in_use(self) -> int:
        """Pages that somebody reads."""
        return self.count - self.available

    def take(self) -> int | None:
        """A page of one's own, or None if all are in use."""
        fresh = self._touched < self.count
        if self._free:
            page = self._free.pop()
        elif self._unread and (not fresh or len(self._unread) > max(KEPT, self.in_use)):
            page, _ = self._unread.popitem(last=False)
            self._forget(page)
        elif fresh:
            page = self._touched
            self._touched += 1
        else:
            return None
        self._readers[page] = 1
        return page

    def share(self, page: int) -> None:
        """One reader more."""
        if not self._readers[page]:
            del self._unread[page]
        self._readers[page] += 1

    def release(self, pages: list[int]) -> None:
        """One reader less, of each."""
        for page in reversed(pages):  # the end of a text is less likely to be read again than its beginning
            self._readers[page] -= 1
            if self._readers[page]:
                continue
            if self._content[page] == ROOT:
                self._free.append(page)
            else:
                self._unread[page] = None

    def find(self, before: int, tokens: bytes) -> tuple[int, int] | None:
        """The page that holds these tokens after that content, and its own content. It is not yet shared."""
        return self._known.get((before, tokens))

    def name(self, page: int, before: int, tokens: bytes) -> int:
        """Make a full page known; returns its content. A page beside one that holds the same stays unknown."""
        key = (before, tokens)
        if key in self._known:
            return self._known[key][1]
        self._last_content += 1
        self._content[page] = self._last_content
        self._key[self._last_content] = key
        self._known[key] = (page, self._last_content)
        return self._last_content

    def forget_all(self) -> None:
        """No page is known any more: the weights have changed."""
        for page in list(self._unread):
            self._free.append(page)
        self._unread.clear()
        self._content = [ROOT] * self.count
        self._known.clear()
        self._key.clear()

    def _forget(self, page: int) -> None:
        content = self._content[page]
        if content != ROOT:
            del self._known[self._key.pop(content)]
            self._content[page] = ROOT
