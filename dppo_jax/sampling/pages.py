"""Which pages of the cache are whose: free lists, counts of holders, and the prefix cache.

Host bookkeeping only; the keys and values lie in `paged_cache`.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


def prefix_keys(tokens: np.ndarray, page_size: int) -> list[bytes]:
    """A key for each full page of `tokens`, of its tokens and of all before it.

    Two contexts share a page's keys and values exactly where they agree up to the page's end.
    """
    keys, chain = [], b""
    whole = np.ascontiguousarray(tokens, np.int32)
    for end in range(page_size, len(whole) + 1, page_size):
        page = whole[end - page_size : end].tobytes()
        chain = hashlib.blake2b(chain + page, digest_size=16).digest()
        keys.append(chain)
    return keys


class Pages:
    """The pages 0..count-1, each free, held by one or more sequences, or remembered.

    A remembered page has no holder, yet its contents may be asked for again by their key; it is
    given away, the longest unused first, where no page is free.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count))[::-1]  # low numbers go first
        self._holders = [0] * count
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # remembered, oldest first

    @property
    def available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + len(self._unheld)

    @property
    def held(self) -> int:
        return self.count - self.available

    def holders(self, page: int) -> int:
        return self._holders[page]

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one holder each; None, and nothing changed, where there are fewer."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if not self._free:
                oldest, _ = self._unheld.popitem(last=False)
                self._forget(oldest)
            pages.append(self._free.pop())
            self._holders[pages[-1]] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} has no holder to share it"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less of each."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is released more often than held"
            self._holders[page] -= 1
            if not self._holders[page]:
                if page in self._key_of:
                    self._unheld[page] = None
                else:
                    self._free.append(page)

    def remember(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """These held pages have these contents; contents that are known already stay where they
        are."""
        for key, page in zip(keys, pages, strict=True):
            assert self._holders[page] > 0, f"page {page} is not held"
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key], self._key_of[page] = page, key

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest run of known keys from the first; the caller holds them now."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._holders[page] += 1
            self._unheld.pop(page, None)
            pages.append(page)
        return pages

    def forget_all(self) -> None:
        """No contents are known any more: the parameters that made them are gone."""
        for page in list(self._key_of):
            self._forget(page)
        self._unheld.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
        if not self._holders[page]:
            self._free.append(page)
