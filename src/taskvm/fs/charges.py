"""How much of a disk the files of a mount take, as far as a guest has added to them. Pure.

Rule 1: a file or directory takes its length in whole blocks and one block at least, so that what is empty is not free;
    holes that the guest makes count, for it may fill them. A hole of a file that was there before counts when it is
    filled, by the blocks that the file has then.
Rule 2: extended attributes take their bytes, in whole blocks for each file.
Rule 3: what has gone gives back what it took by then. What others change between two requests is not the guest's.
Rule 4: remembered is only what the attributes do not tell: files that are small, sparse, removed or have attributes.
"""

from __future__ import annotations

import stat

import msgspec

from taskvm.fs.attributes import BLOCK
from taskvm.wire.fuse_replies import Attr

_SECTOR = 512  # the unit of st_blocks, whatever the file system


class Charge(msgspec.Struct):
    """What one inode takes. `length` is what its length is counted as, without the holes that were there before."""

    length: int
    least: int
    attributes: int = 0
    taken: int = 0
    removed: bool = False


class Charges:
    """All that a guest has added, in bytes."""

    def __init__(self) -> None:
        self.used: int = 0
        self.by_ino: dict[int, Charge] = {}

    def growth(self, attr: Attr, offset: int, size: int) -> int:
        """Return how much more the inode may take when `size` bytes are put at `offset`."""
        charge = self._of(attr)
        end = max(attr.st_size, offset + size)
        filled = _in_blocks(offset + size) - offset // BLOCK * BLOCK if size else 0
        after = Charge(charge.length + end - attr.st_size, charge.least, charge.attributes)
        return _cost(after, end, attr.st_blocks * _SECTOR + filled) - charge.taken

    def attribute_growth(self, attr: Attr, more: int) -> int:
        """Return how much more the inode takes with `more` bytes of attributes."""
        before = self._of(attr).attributes
        return _in_blocks(max(0, before + more)) - _in_blocks(before)

    def add(self, attr: Attr) -> None:
        """Count what the guest has made."""
        self._put(attr, Charge(attr.st_size, BLOCK))

    def settle(self, before: Attr, after: Attr) -> None:
        """Count what a request has changed of an inode."""
        charge = self._of(before)
        charge.length = max(0, charge.length + after.st_size - before.st_size)
        self._put(after, charge)

    def settle_attributes(self, attr: Attr, more: int) -> None:
        """Count attributes that were added, or taken away."""
        charge = self._of(attr)
        charge.attributes = max(0, charge.attributes + more)
        self._put(attr, charge)

    def keep(self, attr: Attr) -> None:
        """Remember what has lost its last name and is open: it counts until `release`."""
        charge = self._of(attr)
        charge.removed = True
        self._put(attr, charge)

    def remove(self, attr: Attr) -> None:
        """Give back what an inode took that is gone."""
        self.used -= self._of(attr).taken
        self.by_ino.pop(attr.st_ino, None)

    def release(self, ino: int) -> None:
        """Give back what was kept."""
        charge = self.by_ino.pop(ino, None)
        if charge is not None:
            self.used -= charge.taken

    def _of(self, attr: Attr) -> Charge:
        charge = self.by_ino.get(attr.st_ino) or _fresh(attr)
        charge.taken = max(charge.taken, _cost_of(charge, attr))  # rule 3: others have added to it
        return charge

    def _put(self, attr: Attr, charge: Charge) -> None:
        cost = _cost_of(charge, attr)
        self.used += cost - charge.taken
        charge.taken = cost
        if charge.removed or charge.attributes or cost != _fresh(attr).taken:
            self.by_ino[attr.st_ino] = charge
        else:
            self.by_ino.pop(attr.st_ino, None)


def _fresh(attr: Attr) -> Charge:
    """Return the charge of what nothing is remembered of: all that it takes has been there."""
    blocks = attr.st_blocks * _SECTOR
    # A directory has no holes, also where it has no blocks (tmpfs).
    whole = stat.S_ISDIR(attr.st_mode)
    charge = Charge(attr.st_size if whole else min(attr.st_size, blocks), BLOCK if blocks else 0)
    charge.taken = _cost_of(charge, attr)
    return charge


def _cost_of(charge: Charge, attr: Attr) -> int:
    return _cost(charge, attr.st_size, attr.st_blocks * _SECTOR)


def _cost(charge: Charge, size: int, blocks: int) -> int:
    # Blocks beyond the length are the file system's own, which takes them back (XFS), or those of attributes.
    contents = max(charge.least, _in_blocks(charge.length), min(blocks, _in_blocks(size)))
    return contents + _in_blocks(charge.attributes)


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
