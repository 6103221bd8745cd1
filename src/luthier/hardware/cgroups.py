"""What a container lets this process have: limits of cgroup v1 and v2, and what is used of them.

Every reader takes the root of the file system, so that tests can lay out the files of machines they do not sit at.

Sources: the kernel's admin guide for cgroup v1 (memory.limit_in_bytes, memory.usage_in_bytes, cpu.cfs_quota_us) and v2
(memory.max, memory.current, cpu.max; limits of every ancestor hold). Both count the page cache as used, and give it
back when a program wants the memory: `inactive_file` and `active_file` of memory.stat.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["ROOT", "cgroup_cores", "cgroup_free", "cgroup_memory"]

ROOT = Path("/")
_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number just below 2**63
_CACHE = ("inactive_file", "active_file")


def cgroup_memory(root: Path = ROOT) -> int | None:
    """The container's memory limit in bytes, the least along its ancestors; None where there is none."""
    return min((limit for _, limit in _limits(root)), default=None)


def cgroup_free(root: Path = ROOT) -> int | None:
    """Bytes until the container's memory is full, the least along its ancestors; None where there is no limit.

    A group whose usage cannot be read counts as empty: its limit is then all that is known.
    """
    return min((max(0, limit - _used(folder)) for folder, limit in _limits(root)), default=None)


def cgroup_cores(root: Path = ROOT) -> float | None:
    """The container's share of CPU time in cores, the least along its ancestors; None where there is no limit."""
    shares = []
    for folder in _cgroups(root, "cpu"):
        words = _words(folder / "cpu.max")
        if not words:
            words = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]) > 0:  # -1, max: no limit
            shares.append(int(words[0]) / int(words[1]))
    return min(shares, default=None)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders whose limits hold for this process: its own group's and every ancestor's, of v1 and v2.

    Inside a container the path in /proc may not be mounted; then the mount's own top is the container's group.
    """
    listing = root / "proc" / "self" / "cgroup"
    mount = root / "sys" / "fs" / "cgroup"
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    tops = {mount: "", mount / controller: ""}
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            tops[mount] = path
        elif controller in names.split(","):
            tops[mount / controller] = path
    for top, path in tops.items():
        folder = top / path.lstrip("/")
        while folder != top and top in folder.parents:
            if folder.is_dir():
                yield folder
            folder = folder.parent
        yield top


def _words(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdecimal() else None


def _limits(root: Path) -> Iterator[tuple[Path, int]]:
    for folder in _cgroups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(folder / name)
            if limit is not None and limit < _UNLIMITED:
                yield folder, limit


def _used(folder: Path) -> int:
    """Bytes that programs hold in the group and all below it: usage without the page cache."""
    modern = _number(folder / "memory.current")
    usage = _number(folder / "memory.usage_in_bytes") if modern is None else modern
    if usage is None:
        return 0
    words = _words(folder / "memory.stat")
    stat = {name: int(value) for name, value in zip(words[::2], words[1::2], strict=False) if value.isdecimal()}
    # v1 counts the groups below only under names with total_; v2 always does.
    cache = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in _CACHE)
    return max(0, usage - cache)
