"""The torch path of `kvpress.kernels.block_sparse_attention`, made to be fast on a CPU.

A query block sees most of what it lists whole: these entries are copied side by side and attended without a look at
causality, many query blocks in one call; on a CPU by PyTorch's flash kernel. Query blocks that list about as many go together,
because the shorter lists of a call are filled up. What is left is the edge: the one or two key blocks that the query block
itself lies in, where causality and the rows themselves have to be looked at. Both parts are merged by their log-sum-exp (LSE).
Entries are copied in whole blocks where only blocks are listed, else one by one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.kernels.exponentials import exp_, softmax_

# Numbers of K that are copied side by side at a time (4 MiB in float32).
TILE_NUMBERS = 1 << 20
# Marks of entries that are made at a time, one for each list, query block and entry.
TILE_MARKS = 1 << 22


def run_table(diagonals: Tensor, n: int, block_size: int) -> Tensor:
    """Which distances the diagonals cover, seen from the last row of a query block: those from d to d + block_size - 1.

    Args:
        diagonals: int [..., m]; what is not in [0, n) is none.

    Returns:
        bool [..., n + block_size].
    """
    outside = n + block_size
    starts = torch.where((diagonals >= 0) & (diagonals < n), diagonals, outside).long()
    # Covered: more begin than end up to here.
    change = torch.zeros(*starts.shape[:-1], outside + block_size + 1, dtype=torch.int32, device=starts.device)
    ones = torch.ones_like(starts, dtype=torch.int32)
    change.scatter_add_(-1, starts, ones).scatter_add_(-1, starts + block_size, -ones)
    return change.cumsum(dim=-1)[..., :outside] > 0


def _marks(numbers: Tensor, size: int) -> Tensor:
    """Bool [..., size], True at the numbers [..., m] that are in [0, size)."""
    inside = torch.where((numbers >= 0) & (numbers < size), numbers, size).long()
    table = torch.zeros(*numbers.shape[:-1], size + 1, dtype=torch.bool, device=numbers.device)
    return table.scatter_(-1, inside, True)[..., :size]


@dataclass(frozen=True)
class _Lists:
    """What is listed, as marks; the first dimension is that of the lists (of all sequences).

    Attributes:
        blocks: int [lists, query blocks, m].
        columns: bool [lists, n].
        runs, near: bool [lists, n + block_size], distances from the last row of a query block that the diagonals cover, or
            at which some row of the block reads one of `distances`.
        distances: bool [lists, n].
        past: the entry of the first row.
        device: where the rows are.
    """

    blocks: Tensor | None
    columns: Tensor | None
    runs: Tensor | None
    near: Tensor | None
    distances: Tensor | None
    past: int
    n: int
    block_size: int
    key_block_size: int
    device: torch.device

    @property
    def unit(self) -> int:
        """Entries that are listed or not together."""
        only_blocks = self.columns is None and self.runs is None and self.near is None
        return self.key_block_size if self.blocks is not None and only_blocks else 1

    def before(self, start: int, stop: int, width: int) -> tuple[Tensor | None, Tensor | None]:
        """Of the query blocks from `start` to `stop`: which of the first `width` entries they list, counted in units.

        Returns:
            whole: bool [lists, stop - start, width // unit], what all rows of a query block read; None for nothing.
            near: likewise, what some row of it reads by its distance.
        """
        size, whole = self.key_block_size, []
        if self.blocks is not None:
            marks = _marks(self.blocks[:, start:stop], width // size)
            whole.append(marks if self.unit == size else marks.repeat_interleave(size, dim=-1))
        if self.columns is not None:
            whole.append(self.columns[:, None, :width].expand(-1, stop - start, -1))
        if self.runs is not None:
            whole.append(self._by_distance(self.runs, start, stop, width))
        near = None if self.near is None else self._by_distance(self.near, start, stop, width)
        return reduce(torch.logical_or, whole) if whole else None, near

    def _by_distance(self, table: Tensor, start: int, stop: int, width: int) -> Tensor:
        """A table over distances from the last row, as one over the first `width` entries, for each query block."""
        size = self.block_size
        flipped = functional.pad(table.flip(1), (0, self.n))  # in the order of entries
        offset = self.n - self.past - stop * size + size  # where the entries of the last query block begin
        return flipped[:, offset:].unfold(1, width, size)[:, : stop - start].flip(1)

    def at_edge(self, start: int, stop: int, entries: Tensor, at: Tensor) -> Tensor:
        """Which entries rows read.

        Args:
            entries: int64 [query blocks, width], whole key blocks, one after the other.
            at: int64 [query blocks, block_size], the entries of the rows.

        Returns:
            bool [lists, query blocks, block_size, width].
        """
        apart = at[..., None] - entries[:, None]
        visible = (apart == 0)[None]
        if self.blocks is not None:
            size = self.key_block_size
            from_first = self.blocks[:, start:stop] - entries[:, :1] // size
            wanted = _marks(from_first, entries.shape[1] // size).repeat_interleave(size, dim=-1)
            visible = visible | wanted[:, :, None]
        inside = entries.clamp(max=self.n - 1)
        if self.columns is not None:
            visible = visible | self.columns[:, inside][:, :, None]
        if self.runs is not None:
            last = self.past + torch.arange(start, stop, device=entries.device)[:, None] * self.block_size
            from_last = (last + self.block_size - 1 - entries).clamp(min=0)
            visible = visible | self.runs[:, from_last][:, :, None]
        if self.distances is not None:
            visible = visible | self.distances[:, apart.clamp(0, self.n - 1)]
        return visible & (apart >= 0)


def _marked(
    count: int,
    blocks: Tensor | None,
    columns: Tensor | None,
    diagonals: Tensor | None,
    distances: Tensor | None,
    rows: int,
    n: int,
    block_size: int,
    key_block_size: int | None,
    device: torch.device,
) -> _Lists:
    """The lists as marks, `count` of each sequence."""

    def own(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat_interleave(count // x.shape[1], dim=1).flatten(0, 1)

    columns, diagonals, distances = own(columns), own(diagonals), own(distances)
    return _Lists(
        blocks=own(blocks),
        columns=None if columns is None else _marks(columns, n),
        runs=None if diagonals is None else run_table(diagonals, n, block_size),
        near=None if distances is None else run_table(distances, n, block_size),
        distances=None if distances is None else _marks(distances, n),
        past=n - rows,
        n=n,
        block_size=block_size,
        key_block_size=key_block_size or block_size,
        device=device,
    )


def listed_rows(
    first: int,
    last: int,
    rows: int,
    n: int,
    *,
    blocks: Tensor | None = None,
    columns: Tensor | None = None,
    diagonals: Tensor | None = None,
    distances: Tensor | None = None,
    block_size: int = 64,
    key_block_size: int | None = None,
) -> Tensor:
    """What the rows from `first` to `last` of a call read, as a mask: part of what `listed_keys` defines, without its loops.

    Returns:
        bool [batch, heads or kv_heads, last - first, n - rows + last]: the entries up to the last of these rows; for each head
        where some list tells them apart.
    """
    given = [x for x in (blocks, columns, diagonals, distances) if x is not None]
    batch, count, size, device = len(given[0]), max(x.shape[1] for x in given), block_size, given[0].device
    lists = _marked(count, blocks, columns, diagonals, distances, rows, n, size, key_block_size, device)
    start, stop = first // size, -(-last // size)
    at = lists.past + torch.arange(start * size, stop * size, device=device).view(-1, size)
    width = n - rows + last
    entries = torch.arange(-(-width // size) * size, device=device).expand(stop - start, -1)
    reads = lists.at_edge(start, stop, entries, at).flatten(1, 2)
    return reads[:, first - start * size : last - start * size, :width].unflatten(0, (batch, count))


def listed_pairs(
    rows: int,
    n: int,
    *,
    skip: int = 0,
    blocks: Tensor | None = None,
    columns: Tensor | None = None,
    diagonals: Tensor | None = None,
    distances: Tensor | None = None,
    block_size: int = 64,
    key_block_size: int | None = None,
) -> Tensor:
    """How many pairs of a row and an entry `block_sparse_attention` computes for these lists, of a head on average.

    The host does not wait for the device. With `distances` all pairs are looked at.

    Args:
        rows, n: of the call.
        skip: rows in front that do not count.

    Returns:
        float64 [], summed over the sequences.
    """
    given = [x for x in (blocks, columns, diagonals, distances) if x is not None]
    count = max(x.shape[1] for x in given)
    heads, size, device = len(given[0]) * count, block_size, given[0].device
    lists = _marked(count, blocks, columns, diagonals, distances, rows, n, block_size, key_block_size, device)
    pairs = torch.zeros((), dtype=torch.int64, device=device)
    # Marks of each row, and not of each query block, where rows of a block read different entries.
    share = 1 if lists.distances is None else size
    for start, stop in _stretches(lists, -(-rows // size), heads * share):
        firsts = lists.past + torch.arange(start, stop, device=device)[:, None] * size
        at = firsts + torch.arange(size, device=device)
        counts = (at >= lists.past + skip) & (at < n)
        edges = firsts // size * size
        entries = edges + torch.arange(size if lists.past % size == 0 else 2 * size, device=device)
        if lists.distances is None:
            # The last row reads what is listed for all, and each row itself.
            listed = lists.at_edge(start, stop, entries, at[:, -1:])[:, :, 0] & (entries < n)
            readers = (counts[..., None] & (at[..., None] >= entries[:, None])).sum(1)
            own = (at - entries[:, :1]).expand(len(listed), -1, -1)
            pairs += (listed * readers).sum() + (counts & ~listed.gather(2, own)).sum()
        else:
            edge = lists.at_edge(start, stop, entries, at) & (entries < n)[:, None]
            pairs += (edge & counts[..., None]).sum()
        width = (lists.past + (stop - 1) * size) // size * size  # entries before the last edge
        if not width:
            continue
        whole, _ = lists.before(start, stop, width)
        if lists.distances is None:
            if whole is not None:
                unit = width // whole.shape[-1]
                whole = whole & (torch.arange(0, width, unit, device=device) < edges)
                pairs += (whole.sum(-1) * counts.sum(-1)).sum() * unit
            continue
        apart = (at[..., None] - torch.arange(width, device=device)).clamp(0, n - 1)
        read = lists.distances[:, apart]
        if whole is not None:
            read |= whole[:, :, None]
        pairs += (read & counts[..., None] & (torch.arange(width, device=device) < edges[:, None])).sum()
    return pairs.double() / count


def attend_lists(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    blocks: Tensor | None,
    columns: Tensor | None,
    diagonals: Tensor | None,
    distances: Tensor | None,
    block_size: int,
    key_block_size: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `kvpress.kernels.block_sparse_attention.block_sparse_attention`, on any device."""
    batch, heads, rows, _ = query.shape
    lists, parts, kv_row = _laid_out(query, key, blocks, columns, diagonals, distances, block_size, key_block_size)
    count, query_blocks = len(parts) // batch, parts.shape[1]
    output = query.new_empty(*parts.shape[:-1], value.shape[-1], dtype=torch.float32)
    lse = output.new_empty(parts.shape[:-1])
    flash = (
        query.device.type == "cpu"
        and query.dtype != torch.float64
        and query.shape[-1] == value.shape[-1]
        and softcap is None
        and distances is None
    )
    tables = [_table(x, lists) for x in (key, value)]
    for start, stop in _stretches(lists, query_blocks, len(parts)):
        of_stretch = slice(start, stop)
        some = parts[:, of_stretch]
        found, found_lse = _edge(some, key, value, lists, kv_row, start, stop, scale, softcap, flash)
        pairs = _before(some, tables, lists, kv_row, start, stop, scale, softcap, flash)
        found, found_lse = found.flatten(0, 1), found_lse.flatten(0, 1)
        for which, part, part_lse in pairs:
            before = found_lse[which]
            both = torch.logaddexp(before, part_lse)
            found[which] = found[which] * exp_(before - both)[..., None] + part * exp_(part_lse - both)[..., None]
            found_lse[which] = both
        output[:, of_stretch], lse[:, of_stretch] = (
            found.view_as(output[:, of_stretch]),
            found_lse.view(some.shape[:-1]),
        )

    output = output.view(batch, count, query_blocks, -1, block_size, value.shape[-1]).transpose(2, 3)
    output = output.reshape(batch, heads, query_blocks * block_size, -1)[:, :, :rows]
    lse = lse.view(batch, count, query_blocks, -1, block_size).transpose(2, 3).reshape(batch, heads, -1)[:, :, :rows]
    if sinks is not None:
        both = torch.logaddexp(lse, sinks.float()[None, :, None])
        output, lse = output * exp_(lse - both)[..., None], both
    return output.to(query.dtype), lse.contiguous()


def _laid_out(
    query: Tensor,
    key: Tensor,
    blocks: Tensor | None,
    columns: Tensor | None,
    diagonals: Tensor | None,
    distances: Tensor | None,
    block_size: int,
    key_block_size: int | None,
) -> tuple[_Lists, Tensor, Tensor]:
    """The lists of all sequences, one for each head, or where no form tells them apart for each kv head.

    Returns:
        the lists; the rows as `_in_parts` gives them; int64 [lists], the row of each list in K and V [batch * kv_heads].
    """
    heads, (batch, kv_heads, n, _) = query.shape[1], key.shape
    given = [x for x in (blocks, columns, diagonals, distances) if x is not None]
    count = heads if any(x.shape[1] == heads for x in given) else kv_heads  # lists of a sequence
    sizes = query.shape[2], n, block_size, key_block_size
    lists = _marked(count, blocks, columns, diagonals, distances, *sizes, query.device)
    kv_row = torch.arange(batch * count, device=query.device) * kv_heads // count
    return lists, _in_parts(query, count, block_size, 0.0), kv_row


def _table(x: Tensor, lists: _Lists) -> Tensor:
    """K or V, a row for each whole unit."""
    return x[:, :, : lists.n // lists.unit * lists.unit].reshape(-1, lists.unit * x.shape[-1])


def _in_parts(rows: Tensor, count: int, block_size: int, filled: float) -> Tensor:
    """Rows [batch, heads, q, d] as [lists, query blocks, heads that share the list, block_size, d], filled up."""
    batch, heads, q, d = rows.shape
    blocks = -(-q // block_size)
    rows = functional.pad(rows, (0, 0, 0, blocks * block_size - q), value=filled)
    return rows.reshape(batch, count, heads // count, blocks, block_size, d).transpose(2, 3).flatten(0, 1)


def _stretches(lists: _Lists, query_blocks: int, count: int) -> Iterator[tuple[int, int]]:
    """Query blocks that are attended together, from the last ones on: as many as a tile of marks has room for."""
    stop = query_blocks
    while stop:
        width = max(1, (lists.past + stop * lists.block_size) // lists.unit)
        start = max(0, stop - max(1, TILE_MARKS // (count * width)))
        yield start, stop
        stop = start


def _before(
    parts: Tensor,
    tables: list[Tensor],
    lists: _Lists,
    kv_row: Tensor,
    start: int,
    stop: int,
    scale: float,
    softcap: float | None,
    flash: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Attention of query blocks to what they list before their edge, in calls of some pairs of a list and a query block.

    Args:
        parts: [lists, query blocks, heads, block_size, head_dim].
        tables: K and V, a row for each unit.

    Yields:
        int64 [pairs], which they are; their output, float32 [pairs, heads, block_size, head_dim]; its LSE.
    """
    rows = parts.flatten(0, 1)
    numbers = parts.shape[-1] if flash else max(parts.shape[-1], parts.shape[2] * parts.shape[3])
    for pairs, taken, seen in _calls(lists, len(parts), start, stop, numbers):
        keys, values = (_taken(table, lists, kv_row, pairs, taken, stop - start) for table in tables)
        if not flash:
            yield pairs, *_attend(rows[pairs], keys, values, seen, scale, softcap)
            continue
        mask = None
        if seen is not None:
            mask = keys.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        shared = (x.expand(-1, parts.shape[2], -1, -1) for x in (keys, values))
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows[pairs], *shared, 0.0, False, attn_mask=mask, scale=scale
        )
        yield pairs, part, part_lse.float()


def _calls(
    lists: _Lists, count: int, start: int, stop: int, numbers: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """What query blocks list before their edge, as many pairs of a list and a query block at a time as a tile has room for.

    Args:
        count: of lists.
        numbers: that a tile has for each entry.

    Yields:
        int64 [pairs], which they are; int64 [pairs, m], the units that each takes; and which of their entries are read, bool
        [pairs, 1, 1 or block_size, m * unit], None for all.
    """
    size, unit, device = lists.block_size, lists.unit, lists.device
    firsts = lists.past + torch.arange(start, stop, device=device) * size
    edges = firsts // size * (size // unit)  # units before the edge
    width = int(edges[-1])
    if not width:
        return
    whole, near = lists.before(start, stop, width * unit)
    if whole is None and near is None:
        return
    listed = near if whole is None else whole if near is None else whole | near
    assert listed is not None
    listed = (listed & (torch.arange(width, device=device) < edges[:, None])).flatten(0, 1)
    counts = listed.sum(-1)
    begins = counts.cumsum(0) - counts
    units = listed.nonzero()[:, 1]
    first = firsts.repeat(count)
    order = counts.argsort(descending=True, stable=True)
    lengths = counts[order].tolist()
    place = 0
    while place < len(lengths) and lengths[place]:
        most = lengths[place]
        pairs = order[place : place + max(1, TILE_NUMBERS // (most * unit * numbers))]
        pairs = pairs[counts[pairs] > 0]
        place += len(pairs)
        real = torch.arange(most, device=device) < counts[pairs, None]
        # A list is filled up with its own first unit, which is masked: nothing that nobody listed is read.
        taken = units[begins[pairs, None] + torch.arange(most, device=device).where(real, 0)]
        seen = None if real.all() else real.repeat_interleave(unit, dim=1)[:, None, None]
        if lists.distances is not None:
            apart = (first[pairs, None] + torch.arange(size, device=device))[..., None] - taken[:, None]
            of_list = (pairs // (stop - start))[:, None, None]
            visible = lists.distances[of_list, apart.clamp(max=lists.n - 1)]  # rows beyond the last are nobody's
            if whole is not None:
                visible |= whole.flatten(0, 1)[pairs[:, None], taken][:, None]
            seen = visible[:, None] if seen is None else visible[:, None] & seen
        yield pairs, taken, seen


def _taken(table: Tensor, lists: _Lists, kv_row: Tensor, pairs: Tensor, taken: Tensor, blocks: int) -> Tensor:
    """Of K or V, a row for each unit, what pairs take, side by side: [pairs, 1, m * unit, head_dim].

    Args:
        blocks: query blocks of a stretch.
    """
    at = taken + (kv_row[pairs // blocks] * (lists.n // lists.unit))[:, None]
    return table.index_select(0, at.flatten()).view(len(pairs), 1, taken.shape[1] * lists.unit, -1)


def _edge(
    parts: Tensor,
    key: Tensor,
    value: Tensor,
    lists: _Lists,
    kv_row: Tensor,
    start: int,
    stop: int,
    scale: float,
    softcap: float | None,
    flash: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of query blocks to the entries from the key block of their first row on.

    Args:
        parts: [lists, query blocks, heads, block_size, head_dim].

    Returns:
        output: float32 [lists, query blocks, heads, block_size, head_dim], and lse: float32, likewise.
    """
    output = parts.new_empty(*parts.shape[:-1], value.shape[-1], dtype=torch.float32)
    lse = output.new_empty(parts.shape[:-1])
    causal = torch.ones(lists.block_size, lists.block_size, dtype=torch.bool, device=parts.device).tril()
    for some, first, visible in _edges(parts, lists, start, stop):
        rows, (keys, values) = parts[:, some], (_side_by_side(x, kv_row, first, visible) for x in (key, value))
        if flash and visible.shape[-1] == lists.block_size and bool((visible == causal).all()):  # no mask is needed
            keys, values = (x.flatten(0, 1)[:, None].expand(-1, rows.shape[2], -1, -1) for x in (keys, values))
            found, found_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows.flatten(0, 1), keys, values, 0.0, True, scale=scale
            )
            output[:, some], lse[:, some] = (x.unflatten(0, rows.shape[:2]) for x in (found, found_lse))
            continue
        # What no row reads adds nothing, not even NaN.
        values = values.masked_fill(~visible.any(2)[..., None], 0.0)
        output[:, some], lse[:, some] = _attend(
            rows, keys[:, :, None], values[:, :, None], visible[:, :, None], scale, softcap
        )
    return output, lse


def _edges(parts: Tensor, lists: _Lists, start: int, stop: int) -> Iterator[tuple[slice, int, Tensor]]:
    """The entries from the key block of a query block's first row on, some query blocks at a time.

    Yields:
        which query blocks they are; the first entry of the first one, each next one's is a block later; and whether rows
        read them, bool [lists, query blocks, block_size, width], some of which are after the last entry.
    """
    size, device = lists.block_size, parts.device
    firsts = lists.past + torch.arange(start, stop, device=device)[:, None] * size
    width = size if lists.past % size == 0 else 2 * size
    entries = firsts // size * size + torch.arange(width, device=device)
    at = (firsts + torch.arange(size, device=device)).clamp_(max=lists.n - 1)  # rows beyond the last repeat it
    step = max(1, TILE_NUMBERS // (len(parts) * width * max(parts.shape[-1], parts.shape[2] * size)))
    for begin in range(0, stop - start, step):
        some = slice(begin, begin + step)
        visible = lists.at_edge(start + begin, min(stop, start + begin + step), entries[some], at[some])
        yield some, (lists.past // size + start + begin) * size, visible


def _side_by_side(x: Tensor, kv_row: Tensor, first: int, visible: Tensor) -> Tensor:
    """Of K or V the entries that `_edges` means: [lists, query blocks, width, head_dim]. Those after the last are zeros."""
    query_blocks, size, width = visible.shape[1:]
    last = first + (query_blocks - 1) * size + width
    some = x.flatten(0, 1)[:, first:last]
    some = functional.pad(some, (0, 0, 0, last - first - some.shape[1])).index_select(0, kv_row)
    return some.unfold(1, width, size).transpose(2, 3)


def mass_of_lists(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    scale: float,
    blocks: Tensor | None,
    columns: Tensor | None,
    diagonals: Tensor | None,
    distances: Tensor | None,
    block_size: int,
    key_block_size: int | None,
    softcap: float | None,
) -> Tensor:
    """As `kvpress.kernels.block_sparse_mass.block_sparse_mass`."""
    batch, kv_heads, n, _ = key.shape
    lists, parts, kv_row = _laid_out(query, key, blocks, columns, diagonals, distances, block_size, key_block_size)
    # Rows that fill up the last query block give nothing.
    limits = _in_parts(lse[..., None], len(parts) // batch, block_size, float("inf"))[..., 0]
    table = _table(key, lists)
    mass = torch.zeros(batch * kv_heads * n, dtype=torch.float32, device=query.device)
    numbers = max(parts.shape[-1], parts.shape[2] * block_size)
    for start, stop in _stretches(lists, parts.shape[1], len(parts)):
        some, limit = parts[:, start:stop], limits[:, start:stop]
        for which, first, visible in _edges(some, lists, start, stop):
            keys = _side_by_side(key, kv_row, first, visible)[:, :, None]
            given = _given(some[:, which], keys, limit[:, which], visible[:, :, None], scale, softcap)
            places = torch.arange(visible.shape[1], device=key.device)[:, None] * block_size
            entries = first + places + torch.arange(visible.shape[3], device=key.device)
            _add(mass, kv_row[:, None, None] * n + entries.clamp(max=n - 1), given)
        rows_of, limit_of = some.flatten(0, 1), limit.flatten(0, 1)
        for pairs, taken, seen in _calls(lists, len(parts), start, stop, numbers):
            keys = _taken(table, lists, kv_row, pairs, taken, stop - start)
            given = _given(rows_of[pairs], keys, limit_of[pairs], seen, scale, softcap)
            entries = (taken[..., None] * lists.unit + torch.arange(lists.unit, device=query.device)).flatten(1)
            _add(mass, kv_row[pairs // (stop - start)][:, None] * n + entries, given)
    return mass.view(batch, kv_heads, n)


def _given(
    rows: Tensor, keys: Tensor, lse: Tensor, visible: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """What rows [..., heads, q, head_dim] with lse [..., heads, q] give entries [..., 1, m, head_dim]: [..., m]."""
    weights = exp_(_scores(rows, keys, visible, scale, softcap) - lse[..., None])
    return weights.sum(dim=(-3, -2))


def _add(mass: Tensor, index: Tensor, given: Tensor) -> None:
    """Add to some of a row of numbers, some of them several times, in an order that is always the same."""
    index, given = index.expand_as(given).flatten(), given.flatten()
    if mass.device.type == "cpu":
        mass.index_add_(0, index, given)
    else:  # it sorts, where index_add_ leaves the order to chance
        mass.index_put_((index,), given, accumulate=True)


def _scores(rows: Tensor, keys: Tensor, visible: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Scores in float32, -inf for what is not seen."""
    scores = torch.matmul(rows.float() * scale, keys.float().transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if visible is None else scores.masked_fill_(~visible, float("-inf"))


def _attend(
    rows: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention in float32; a row that sees nothing has an output of 0 and an LSE of -inf.

    Args:
        rows: [..., heads, q, head_dim].
        keys, values: [..., 1, m, head_dim].
        visible: bool, broadcast to [..., heads, q, m]; None for all.
    """
    weights, lse = softmax_(_scores(rows, keys, visible, scale, softcap))
    return torch.matmul(weights, values.float()), lse
