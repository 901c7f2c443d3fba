"""Tokens that stop between two layers, wait there, and may go on in a later pass.

A pass starts with all tokens of a sequence *in play*. After each layer a route policy (`RoutePolicy.rows`) says which of them
go on. A layer runs on those tokens in play that it has not run on before: new ones, and older ones that had stopped before
it and are in play again. Its rows attend the tokens in play up to their own position, nothing else that the layer holds.

So a token has run through the first layers up to some layer, is in the cache of all these, and *waits* before the next one:
what that one will run on (its hidden state, its rotation, whatever the decoder gives a layer for each token) lies in
`KVLayer.waiting`. No layer runs on a token twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.errors import UnsupportedModelError
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.placed_attention import placed_attention
from kvpress.kernels.prompt_attention import prompt_attention
from kvpress.observe import Scores
from kvpress.passes import Pass, active_pass
from kvpress.policy import Depth
from kvpress.tokens import Ragged, Tokens
from kvpress.wrapper import Wrapper

if TYPE_CHECKING:
    from kvpress.layer import KVLayer


@dataclass(frozen=True)
class Rows:
    """Tokens of one sequence, and what a layer is given for each of them.

    Attributes:
        positions: int64 [n], ascending.
        inputs: each [n, ...]; the hidden states first.
    """

    positions: Tensor
    inputs: list[Tensor]

    def those(self, chosen: Tensor) -> "Rows":
        """Some of them, by bool [n] or int64 [m]."""
        return Rows(self.positions[chosen], [one[chosen] for one in self.inputs])


def merged(*parts: Rows | None) -> Rows | None:
    """The tokens of some parts in the order of their positions; None for none."""
    some = [part for part in parts if part is not None and len(part.positions)]
    if len(some) < 2:
        return some[0] if some else None
    positions = torch.cat([part.positions for part in some])
    inputs = [torch.cat([one.to(own[0]) for one in own]) for own in zip(*(part.inputs for part in some), strict=True)]
    return Rows(positions, inputs).those(positions.argsort())


# ------------------------------------------------------------------ what waits before a layer


def wake(layer: "KVLayer", row: int, in_play: Tensor) -> Rows | None:
    """Take the tokens of a sequence that wait before a layer and are in play, bool [tokens]; None for none."""
    if not layer.waiting:
        return None
    positions = layer.waiting["positions"][row]
    found = ((positions >= 0) & in_play[positions.clamp(min=0)]).nonzero().flatten()
    if not len(found):
        return None
    woken = Rows(positions[found], [layer.waiting[f"input{i}"][row, found] for i in range(len(layer.waiting) - 1)])
    layer.waiting["positions"][row, found] = -1
    return woken


def wait(layer: "KVLayer", row: int, batch: int, tokens: Rows) -> None:
    """Let tokens of one of so many sequences wait before a layer, in places that are free."""
    waiting, count = layer.waiting, len(tokens.positions)
    if not count:
        return
    inputs = {f"input{i}": one.detach() for i, one in enumerate(tokens.inputs)}
    if not waiting:
        waiting["positions"] = tokens.positions.new_full((batch, count), -1)
        waiting.update({name: one.new_zeros(batch, count, *one.shape[1:]) for name, one in inputs.items()})
    if len(waiting) != 1 + len(inputs):
        raise UnsupportedModelError(
            f"this model gave its layers {len(waiting) - 1} inputs for each token in an earlier pass and gives them {len(inputs)} "
            f"now, so tokens that stopped cannot go on; kvpress cannot run {layer.roles.route.describe()} on it"
        )
    free = (waiting["positions"][row] < 0).nonzero().flatten()
    if len(free) < count:
        held = waiting["positions"].shape[1]
        more = count - len(free) + held // 32
        waiting["positions"] = functional.pad(waiting["positions"], (0, more), value=-1)
        for name in inputs:
            waiting[name] = torch.cat(
                (waiting[name], waiting[name].new_zeros(batch, more, *waiting[name].shape[2:])), 1
            )
        free = torch.cat((free, torch.arange(held, held + more, device=free.device)))
    free = free[:count]
    waiting["positions"][row, free] = tokens.positions
    for name, one in inputs.items():
        waiting[name][row, free] = one.to(waiting[name])


# ------------------------------------------------------------------ a pass


class Sequence:
    """One sequence in a pass.

    Args:
        before: how many tokens it had before the pass; new ones are at this position and behind.
        columns: int64 [new], the columns of the new tokens in the call.

    Attributes:
        positions: int64 [n], the tokens in play, ascending; none where the pass brings nothing.
        new: those of them that are new, int64 [m].
        older: of the tokens that the present layer runs on those that are not new; None for none.
        after: the tokens in play behind the present layer, where some stop in it; None for all.
    """

    def __init__(self, before: int, columns: Tensor) -> None:
        self.before, self.columns = before, columns
        self.tokens = before + len(columns)
        self.older: Rows | None = None
        self.after: Tensor | None = None
        self.keep(torch.arange(self.tokens if len(columns) else 0, device=columns.device))

    def keep(self, positions: Tensor) -> None:
        """Have these tokens in play and no others."""
        self.positions, self.new = positions, positions[positions >= self.before]

    @property
    def rows(self) -> Tensor:
        """What the present layer runs on, int64 [m], ascending: older tokens, then new ones."""
        return self.new if self.older is None else torch.cat((self.older.positions, self.new))

    @property
    def count(self) -> int:
        """How many these are."""
        return len(self.new) + (0 if self.older is None else len(self.older.positions))

    @property
    def new_columns(self) -> Tensor:
        """The columns of the call of the new tokens in play."""
        return self.columns[self.new - self.before]

    def marks(self, positions: Tensor) -> Tensor:
        """Bool [tokens], True at these positions."""
        marks = torch.zeros(self.tokens, dtype=torch.bool, device=self.columns.device)
        marks[positions] = True
        return marks


class InPlay:
    """The tokens in play in a pass, layer by layer.

    Args:
        current: the pass, with the tokens of the call. Each layer finds there, and in `ragged`, those that it runs on.

    Attributes:
        stopped: some token has stopped in this pass.
    """

    def __init__(self, current: Pass) -> None:
        self.current, self.call, self.layers = current, current.tokens, current.layers
        self.policy = self.layers[0].roles.route
        self.is_step = self.call.count == 1 and self.layers[0].texts.columns > 0
        self.stopped = False
        device, seen = self.call.positions.device, self.call.seen
        assert seen is not None
        every = torch.arange(self.call.count, device=device)
        columns = [every] * len(seen) if self.call.columns is None else self.call.columns
        self.sequences = [
            Sequence(tokens - len(own), own.to(device)) for tokens, own in zip(seen, columns, strict=True)
        ]

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and columns of the call."""
        return len(self.sequences), self.call.count

    @property
    def newest_columns(self) -> Tensor:
        """The column of each sequence's newest token in the call, int64 [batch]; the last one where the call brings none."""
        last = [
            one.columns[-1] if len(one.columns) else one.columns.new_tensor(self.call.count - 1)
            for one in self.sequences
        ]
        return torch.stack(last)

    # ------------------------------------------------------------------ a layer, from its call to its result

    def run(self, index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a layer on the tokens in play that it has not run on before.

        Args:
            index: of the layer.
            forward: its own forward. It is called as the decoder did if these are just the tokens of the call, else with
                tensors in which they lie end to end in one row.
            args, kwargs: how the decoder called the layer, for the tokens of the call.

        Returns:
            What the layer gives for the tokens of the call, [batch, count, hidden], alone or first in a tuple. A token that it
            did not run on has there what it came with.
        """
        batch, count = len(self.sequences), self.call.count
        given = [(x, dim) for x in tensors_in((args, kwargs)) if (dim := batch_dim(x, batch, count)) is not None]
        if not given or given[0][0].ndim != 3 or given[0][0].shape[0] != batch:
            raise UnsupportedModelError(
                f"a layer was not called with hidden states [{batch}, {count}, hidden] first, so tokens cannot stop before it; "
                f"kvpress cannot run {self.policy.describe()} on this model"
            )
        for row, one in enumerate(self.sequences):
            one.after = None
            if len(one.columns):
                one.older = merged(one.older, wake(self.layers[index], row, one.marks(one.positions)))
        as_called = all(one.older is None and len(one.new) == count for one in self.sequences)
        try:
            if not as_called:
                self._lay_out(index)
                joined = {id(x): self._joined(i, x, dim) for i, (x, dim) in enumerate(given)}
                args, kwargs = with_tensors((args, kwargs), joined)
            output = forward(*args, **kwargs)
        finally:
            self.current.tokens, self.current.ragged = self.call, None
        result = output[0] if isinstance(output, tuple) else output
        own = result if as_called else result[0].split([one.count for one in self.sequences])
        if not as_called:
            result = given[0][0].to(result.dtype, copy=True)
            for row, one in enumerate(self.sequences):
                result[row, one.new_columns] = own[row][one.count - len(one.new) :]
        if index + 1 < len(self.layers):
            for row, one in enumerate(self.sequences):
                self._pass_on(row, one, self.layers[index + 1], given, own[row])
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def _lay_out(self, index: int) -> None:
        """Tell the pass how the tokens that a layer runs on lie in one row, and at which positions they are."""
        call, counts = self.call, [one.count for one in self.sequences]
        if index == 0:  # all of the call but padding
            assert call.columns is not None
            self.current.ragged = Ragged(call.columns, call.count)
            return
        width = max(counts)
        positions = torch.full((len(counts), width), -1, dtype=torch.int32, device=call.positions.device)
        for row, one in enumerate(self.sequences):
            positions[row, : counts[row]] = one.rows
        padded = min(counts) < width
        columns = [torch.arange(count, device=positions.device) for count in counts]
        self.current.tokens = Tokens(width, padded, positions, columns if padded else None, call.seen, call.seen_tensor)
        self.current.ragged = Ragged(columns, width) if len(counts) > 1 else None

    def _joined(self, number: int, x: Tensor, dim: int) -> Tensor:
        """What a layer is given for the tokens of the call, for those that it runs on: [..., 1, total, ...].

        Args:
            number: of this among the layer's inputs.
            x: [..., batch or 1, count, ...].
            dim: that of the batch.
        """
        parts = []
        for row, one in enumerate(self.sequences):
            if one.older is not None:
                parts.append(one.older.inputs[number].to(x.dtype).movedim(0, dim))
            parts.append(of_sequence(x, dim, row).index_select(dim, one.new_columns.to(x.device)))
        return torch.cat(parts, dim=dim).unsqueeze(dim)

    def _pass_on(
        self, row: int, one: Sequence, following: "KVLayer", given: list[tuple[Tensor, int]], own: Tensor
    ) -> None:
        """After a layer: which tokens of a sequence are in play before the next one, and which wait there.

        Args:
            row: of the sequence.
            following: the next layer.
            given: what this one was given for the tokens of the call.
            own: what it gave for those that it ran on, [m, hidden], or for all of the call, which are the same then.
        """
        older = one.older
        if older is not None:
            older = one.older = Rows(older.positions, [own[: len(older.positions)], *older.inputs[1:]])
        if one.after is None:
            return
        self.stopped = True
        stopping, batch, first_new = ~one.marks(one.after), len(self.sequences), 0
        if older is not None:
            stops, first_new = stopping[older.positions], len(older.positions)
            wait(following, row, batch, older.those(stops))
            one.older = older.those(~stops)
        stops = stopping[one.new]
        columns = one.new_columns[stops]
        inputs = [
            of_sequence(x, dim, row).index_select(dim, columns.to(x.device)).movedim(dim, 0) for x, dim in given[1:]
        ]
        wait(following, row, batch, Rows(one.new[stops], [own[first_new:][stops], *inputs]))
        one.keep(one.after)

    # ------------------------------------------------------------------ its attention

    def attend(self, layer: "KVLayer", query: Tensor, key: Tensor, value: Tensor, scores: Scores, past: int) -> Tensor:
        """The rows that a layer runs on over what it holds of the tokens in play, themselves included; each sequence alone.

        Args:
            layer: the layer, which holds the rows' keys and values already.
            query, key, value: [batch, heads or kv_heads, count, head_dim], of the tokens in `Pass.tokens`.
            past: slots that were in use before.

        Returns:
            [batch, heads, count, head_dim], zero where there is padding.
        """
        columns = self.current.tokens.columns
        whole = len(self.sequences) == 1 and columns is None
        # One sequence without padding needs no other tensor to put its rows into.
        output = query if whole else query.new_zeros(*query.shape[:3], value.shape[-1])
        if any(one.older is not None for one in self.sequences):
            layer.storage.ordered = False
        for row, one in enumerate(self.sequences):
            if not one.count:
                continue
            only = slice(row, row + 1)
            at = slice(None) if columns is None else columns[row].to(query.device)
            own_query, own_key, own_value = (x[only, :, at] for x in (query, key, value))
            reads = Reads(layer, only, one, own_query, own_key, own_value, scores, past)
            if whole:
                output = reads.attend()
            else:
                output[only, :, at] = reads.attend()
            if layer.index + 1 < len(self.layers):
                goes_on = self.policy.rows(Depth(layer.index, layer.count, one.positions, reads.newest_row))
                if goes_on is not None:
                    goes_on = goes_on.clone()
                    goes_on[-1] = True
                    one.after = one.positions[goes_on]
        self._count(layer)
        return output

    def _count(self, layer: "KVLayer") -> None:
        """Count for the report what the rows of a layer have read."""
        facts = layer.facts
        if self.is_step:
            facts.read += sum(len(one.positions) for one in self.sequences) / len(self.sequences)
            facts.readable += layer.texts.columns
            return
        for one in self.sequences:
            new = len(one.columns)
            facts.pairs += new * one.before + new * (new + 1) // 2
            facts.computed = facts.computed + torch.searchsorted(one.positions, one.rows, right=True).sum()


@dataclass(frozen=True)
class Reads:
    """What the rows of one sequence read of a layer.

    Attributes:
        layer: it holds their keys and values, too.
        only: which of the layer's sequences it is.
        sequence: the sequence.
        query, key, value: of the rows, [1, heads or kv_heads, m, head_dim].
        scores: how the model scores.
        past: slots that were in use before.
    """

    layer: "KVLayer"
    only: slice
    sequence: Sequence
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Scores
    past: int

    def attend(self) -> Tensor:
        """Their output, [1, heads, m, head_dim]."""
        one, m = self.sequence, self.query.shape[2]
        if m == len(one.positions):  # nothing else is in play
            return prompt_attention(self.query, self.key, self.value, **vars(self.scores))[0]
        index, stop = self._index(), self.past + m
        if one.older is None and index is None:
            valid = self.layer.valid(stop if m == 1 else self.past)
            valid = None if valid is None else valid[self.only]
            if m == 1:
                return self.layer.storage.attend(self.query, self.scores, stop=stop, valid=valid, rows=self.only)[0]
            keys, values = self.layer.storage.read(self.only, stop)
            return prompt_attention(self.query, keys, values, valid, **vars(self.scores))[0]
        index = self._slots() if index is None else index
        if m == 1:
            return self.layer.storage.attend(
                self.query, self.scores, stop=None, valid=None, index=index, rows=self.only
            )[0]
        keys, values = self.layer.storage.read(self.only, index=index)
        if one.older is None:
            return prompt_attention(self.query, keys, values, **vars(self.scores))[0]
        return placed_attention(self.query, keys, values, one.rows, one.positions, **vars(self.scores))

    def newest_row(self) -> Tensor:
        """What the newest token gives each token in play, the mean over the query heads: float32 [n]."""
        n = len(self.sequence.positions)
        keys = self.key if self.query.shape[2] == n else self.layer.storage.read(self.only, index=self._slots())[0]
        at = torch.tensor([[n - 1]], device=keys.device)
        mass = attention_mass(self.query[:, :, -1:], at, keys, None, **vars(self.scores))
        return mass[0].sum(0) / self.query.shape[1]

    def _index(self) -> Tensor | None:
        """The slots of the tokens in play; None if the layer holds no others."""
        storage = self.layer.storage
        held = storage.entries
        if not storage.uniform:
            held = int((storage.positions[self.only, 0, : storage.length] >= 0).sum())
        return None if held == len(self.sequence.positions) else self._slots()

    def _slots(self) -> Tensor:
        """The slots of the tokens in play, in the order of their positions: int64 [1, kv_heads, n]."""
        storage, one = self.layer.storage, self.sequence
        positions = storage.positions[self.only.start, 0, : storage.length].long()
        slots = torch.empty(one.tokens + 1, dtype=torch.int64, device=positions.device)
        # Empty slots are at -1, the one place too many.
        slots[positions] = torch.arange(storage.length, device=positions.device)
        return slots[one.positions].expand(1, storage.kv_heads, -1)


# ------------------------------------------------------------------ the arguments of a layer


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list | dict):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(item)


def with_tensors(tree: Any, others: dict[int, Tensor]) -> Any:
    """The same with other tensors in the place of those whose id is named."""
    if isinstance(tree, Tensor):
        return others.get(id(tree), tree)
    if isinstance(tree, dict):
        return {name: with_tensors(item, others) for name, item in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(with_tensors(item, others) for item in tree)
    return tree


def batch_dim(x: Tensor, batch: int, count: int) -> int | None:
    """Which dimension is that of the sequences, if `x` has something for each token: [..., batch or 1, count, ...]; or None.

    Rotations with several axes have these in front: [axes, batch, count, head_dim].
    """
    for dim in (1, 0) if x.ndim == 4 else (0,):
        if x.ndim > dim + 1 and x.shape[dim] in (1, batch) and x.shape[dim + 1] == count:
            return dim
    return None


def of_sequence(x: Tensor, dim: int, row: int) -> Tensor:
    """One sequence of [..., batch or 1, count, ...]: [..., count, ...]."""
    return x.select(dim, row if x.shape[dim] > 1 else 0)


class BlockInPlay(Wrapper):
    """A decoder layer's `forward` that runs on the tokens in play, in the passes that have some.

    Args:
        block: the layer.
        index: its number.
    """

    def __init__(self, block: Any, index: int) -> None:
        super().__init__(block, "forward")
        self._index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = active_pass()
        if not self.active or current is None or current.in_play is None:
            return self.inner(*args, **kwargs)
        return current.in_play.run(self._index, self.inner, args, kwargs)
