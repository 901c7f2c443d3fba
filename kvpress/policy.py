"""What a policy is: a frozen dataclass of hyper-parameters and pure functions from tensors to scores.

A policy plays a *role*: eviction says what a cache layer keeps, selection says what of it a decode step reads, prefill says
what the rows of a prompt read, route says what is run, storage says how keys and values are held. Policies of different roles
can act together, and one may play several. A policy without a role may still say at which positions entries are attended
(`places`); else it leaves everything exact, as `Full`. The runtime owns all state: it lives with the cache, never on the policy.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.decode_scores import Moved
from kvpress.kernels.union_select import union_select
from kvpress.observe import Mass, Noise, Nothing, Observer, Window
from kvpress.places import Consecutive, DualChunk, Own, Places, Sinks
from kvpress.storage import NewStats, Slots, Storage
from kvpress.texts import Texts

__all__ = [
    "Attended",
    "Budget",
    "Call",
    "Consecutive",
    "Depth",
    "Dropped",
    "DualChunk",
    "Entries",
    "EvictionPolicy",
    "Feed",
    "Feeds",
    "Look",
    "Mass",
    "Merge",
    "Noise",
    "Nothing",
    "Observer",
    "Own",
    "Pattern",
    "Places",
    "Policy",
    "PrefillPolicy",
    "Quota",
    "RoutePolicy",
    "Selected",
    "SelectionPolicy",
    "Sinks",
    "StoragePolicy",
    "Texts",
    "View",
    "Window",
]

Budget = float | int
"""A float in (0, 1] is a share of the prompt's length, an int is entries per layer and kv head."""


def check_budget(value: Any, name: str = "budget", minimum: int = 1) -> None:
    """Raise `PolicyError` unless `value` is an int of at least `minimum` or a float in (0, 1] (0.0 if minimum is 0)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PolicyError(
            f"{name}={value!r} is a {type(value).__name__}; give a float share in (0, 1] or an int >= {minimum}"
        )
    if isinstance(value, int) and value < minimum:
        raise PolicyError(
            f"{name}={value} is too small; an int means entries per layer and kv head, at least {minimum}"
        )
    if isinstance(value, float):
        if math.isnan(value):
            raise PolicyError(f"{name}=nan is not a number; give a float share in (0, 1] or an int >= {minimum}")
        if value < 0 or (value == 0 and minimum > 0):
            raise PolicyError(f"{name}={value} is too small; a float is a share of the prompt in (0, 1]")
        if value > 1:
            remedy = f"; for {value:g} entries write {name}={int(value)}" if value.is_integer() else ""
            raise PolicyError(f"{name}={value} is above 1; a float is a share of the prompt in (0, 1]{remedy}")


def check_count(value: Any, name: str, minimum: int) -> None:
    """Raise `PolicyError` unless `value` is an int (not a bool) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise PolicyError(f"{name}={value!r} does not work; give an int of at least {minimum}")


def check_choice(value: Any, name: str, choices: tuple[Any, ...]) -> None:
    """Raise `PolicyError` unless `value` is one of `choices`."""
    if value not in choices:
        raise PolicyError(f"{name}={value!r} does not work; choose one of {', '.join(map(repr, choices))}")


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float, and neither a bool nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def check_factor(value: Any, name: str) -> None:
    """Raise `PolicyError` unless `value` is a number in [0, 1]."""
    if not is_number(value) or not 0 <= value <= 1:
        raise PolicyError(f"{name}={value!r} does not work; give a number from 0 to 1")


def check_block_size(value: Any, name: str = "block_size", usual: str = "64 or 128") -> None:
    """Raise `PolicyError` unless `value` is a power of two."""
    check_count(value, name, 1)
    if value & (value - 1):
        raise PolicyError(f"{name}={value} is no power of two; give {usual}")


def check_share(value: Any, name: str) -> None:
    """Raise `PolicyError` unless `value` is a number in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:
        raise PolicyError(f"{name}={value!r} does not work; give a number above 0 and at most 1")


def check_at_least_zero(value: Any, name: str) -> None:
    """Raise `PolicyError` unless `value` is a number of at least 0, which may be infinite."""
    if not is_number(value) or value < 0:
        raise PolicyError(f"{name}={value!r} does not work; give a number of at least 0")


def check_finite(value: Any, name: str, above: float = -math.inf) -> None:
    """Raise `PolicyError` unless `value` is a finite number above `above`."""
    if not is_number(value) or not above < value < math.inf:
        limit = "" if above == -math.inf else f" above {above:g}"
        raise PolicyError(f"{name}={value!r} does not work; give a finite number{limit}")


def check_room(budget: Budget, protected: int, name: str) -> None:
    """Raise `PolicyError` unless an int `budget` is larger than the newest entries that the field `name` protects."""
    if isinstance(budget, int) and budget <= protected:
        raise PolicyError(
            f"budget={budget} has no room beside {name}={protected}; give a budget above {protected} or a smaller {name}"
        )


def check_pooling(kernel_size: Any, pooling: Any) -> None:
    """Raise `PolicyError` unless `pool_scores` can pool so."""
    check_count(kernel_size, "kernel_size", 1)
    check_choice(pooling, "pooling", ("avg", "max"))
    if kernel_size % 2 == 0:
        raise PolicyError(f"kernel_size={kernel_size} is even; give an odd width, as {kernel_size + 1}")


def read_table(path: str | Path, name: str) -> Any:
    """What is in a JSON file that a field names.

    Raises:
        PolicyError: naming the field, if the file cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"{name}={str(path)!r} cannot be read: {error.strerror}; give a JSON file") from error
    except ValueError as error:
        raise PolicyError(f"{name} file {path} is no JSON ({error}); write it with `kvpress calibrate`") from error


def entries_for(budget: Budget, tokens: int) -> int:
    """Entries that a budget allows for a prompt of `tokens` real tokens; a share is rounded down."""
    if isinstance(budget, int):
        return budget
    # The small term keeps a share exact that has no exact binary form: 0.29 of 100 is 29, not 28.
    return math.floor(budget * tokens + 1e-9)


def entries_of(budget: Budget, tokens: Tensor) -> Tensor:
    """`entries_for` of every number in an int tensor, int64 of the same shape; at least 1."""
    if isinstance(budget, int):
        return torch.full_like(tokens, budget, dtype=torch.int64)
    return (tokens.double() * budget + 1e-9).floor().long().clamp(min=1)


@dataclass(frozen=True)
class Quota:
    """What one sequence may keep in one layer and kv head.

    Attributes:
        total: entries kept in all, at least 1.
        recent: how many of them are the newest entries, kept whatever their score; at most `total`.
    """

    total: int
    recent: int


UNLIMITED = torch.iinfo(torch.int32).max


def quota_of(budget: Budget, tokens: int, recent: int = 0) -> Quota:
    """The quota of a budget, at least one entry, whose newest `recent` entries always stay, as far as it has so many."""
    total = max(1, entries_for(budget, tokens))
    return Quota(total, min(recent, total))


@dataclass(frozen=True)
class Entries:
    """The entries of one cache layer, as an eviction policy sees them.

    At the end of a prompt pass they come in position order with empty slots last; in a decode step in slot order.

    Attributes:
        positions: int32 [batch, kv_heads, n], original positions, -1 for an empty slot.
        competing: `candidates`, or what makes them when they are asked for.
        observed: name -> float32 [batch, kv_heads, n], what the policy's observer counted.
        tokens: int [batch], real tokens seen of each sequence.
        layer, layers: index among the layers that the policy acts on, and their number.
        fetch: gives keys and values.
    """

    positions: Tensor
    competing: Tensor | Callable[[], Tensor]
    observed: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    layer: int = 0
    layers: int = 1
    fetch: Callable[[], tuple[Tensor, Tensor]] | None = None

    @property
    def candidates(self) -> Tensor:
        """The entries that compete for what `Quota.recent` leaves over, bool [batch, kv_heads, n]."""
        return self.competing if isinstance(self.competing, Tensor) else self.competing()

    @property
    def mass(self) -> Tensor:
        """The attention that each entry got from the observed rows, summed over its group, float32 [batch, kv_heads, n]."""
        return self._of("mass")

    @property
    def last_rows(self) -> Tensor:
        """What the last rows alone gave, for an observer that counts them too, float32 [batch, kv_heads, n]."""
        return self._of("last_rows")

    @property
    def keys(self) -> Tensor:
        """Keys, rotated at their own positions, [batch, kv_heads, n, head_dim]. Fetched when asked for."""
        return self._fetched()[0]

    @property
    def values(self) -> Tensor:
        """Values, [batch, kv_heads, n, head_dim]. Fetched when asked for."""
        return self._fetched()[1]

    def _of(self, name: str) -> Tensor:
        if name not in self.observed:
            raise PolicyError(
                f"{name!r} was not observed; a policy that scores by it says so by `observes`: Mass() counts every row, and "
                "Window(32) the last rows of a prompt, for a policy that evicts after prompts only"
            )
        return self.observed[name]

    def _fetched(self) -> tuple[Tensor, Tensor]:
        assert self.fetch is not None
        return self.fetch()


@dataclass(frozen=True)
class Dropped:
    """Entries that are about to be dropped, and those that stay and may take them in.

    Attributes:
        entries: all slots in use.
        centres: int64 [batch, kv_heads, k], slots that stay.
        is_centre: bool [batch, kv_heads, k], False where there is none.
        rest: int64 [batch, kv_heads, m], slots to be dropped.
        is_rest: bool [batch, kv_heads, m], likewise.
    """

    entries: Entries
    centres: Tensor
    is_centre: Tensor
    rest: Tensor
    is_rest: Tensor


@dataclass(frozen=True)
class Merge:
    """Where dropped entries go, and how they are merged there.

    Attributes:
        target: int64 [batch, kv_heads, m], index into `Dropped.centres` for each of `Dropped.rest`, or -1 for nowhere.
        weights: float32 [batch, kv_heads, n], above 0, the weight of every slot in its merge.
        value_norms: whether a merged value has the centre's norm, as a merged key has, or is the weighted mean.
        sum_statistics: whether what was observed of the merged entries is summed, or the centre's own stays.
    """

    target: Tensor
    weights: Tensor
    value_norms: bool = False
    sum_statistics: bool = True


@dataclass(frozen=True)
class View:
    """One cache layer as a selection or prefill policy sees it, before its attention; this pass's entries are in it.

    A prefill policy sees the entries of a prompt in the order of their positions, none of them empty (`valid` is None); its
    rows are the last ones. It keeps nothing, `state` is empty and lost; what it hands on is for the same rows in later layers.

    In a decode step all widths and shapes that a policy makes come from the budget and from the shapes that it is given, never
    from the numbers in a tensor, or the step could not be compiled: `width` says what else is allowed.

    Attributes:
        layer, layers: index among the layers that the policy acts on, and their number.
        query: [batch, heads, rows, head_dim], rotated at its own positions; not rotated, and float32, under
            `Consecutive` places.
        positions: int32 [batch, kv_heads, n], -1 for an empty slot.
        valid: bool [batch, kv_heads, n], or None when no slot is empty.
        seen: int32 [batch], real tokens seen of each sequence, those of this pass included.
        scale, softcap: how the model turns q.k into scores.
        turn: (x [batch, heads, n, head_dim], shift [batch], or what broadcasts to [batch, heads, n]) -> x rotated by so many
            positions; only under `Consecutive` places.
        state: what the policy keeps for this layer from step to step. It lives with the cache and starts empty, also after
            every prompt pass; a tensor must have the batch as its first dimension. See `keep`.
        shared: what the policy hands from layer to layer in one pass; empty at the first layer that it is asked in.
        fetch: gives `keys`.
        length: slots in use, of the n: those behind were never used. An int, or int64 [] in a compiled step.
        newest: the slot of the newest entry, likewise (int64 [1]).
        places: positions are below it.
        phase: what `SelectionPolicy.phase` said of this step.
        moved: (query, slots) each, in a decode step under an eviction policy that re-indexes its sinks: what the attention
            uses instead of `query` for the slots where the bool [batch, kv_heads, n] is True, or for the first so many.
        aligned: a slot holds the same token in every layer and kv head, since nothing evicts.
        in_front: the entries of a kv head are in the first slots, with no empty ones between.
        waits: the host may wait for numbers in a tensor.
    """

    layer: int
    layers: int
    query: Tensor
    positions: Tensor
    valid: Tensor | None
    seen: Tensor
    scale: float
    softcap: float | None
    turn: Callable[[Tensor, Tensor], Tensor] | None
    state: dict[str, Any]
    shared: dict[str, Any]
    fetch: Callable[[], Tensor]
    length: int | Tensor
    newest: int | Tensor
    places: int
    phase: Any = None
    moved: Moved = ()
    aligned: bool = False
    in_front: bool = True
    waits: bool = True

    @property
    def keys(self) -> Tensor:
        """Keys of the slots, [batch, kv_heads, n, head_dim]; not rotated under `Consecutive` places. Fetched when asked for."""
        return self.fetch()

    def newest_of(self, x: Tensor) -> Tensor:
        """Of numbers of every slot, [batch, kv_heads, n, ...], those of the newest entry: [batch, kv_heads, ...]."""
        return x[:, :, self.newest] if isinstance(self.newest, int) else x.index_select(2, self.newest)[:, :, 0]

    @property
    def newest_slot(self) -> Tensor:
        """The slot of the newest entry, int64 [batch, kv_heads, 1]."""
        slot = torch.as_tensor(self.newest, device=self.positions.device)
        return slot.view(1, 1, 1).expand(*self.positions.shape[:2], 1)

    @property
    def newest_there(self) -> Tensor:
        """Whether the newest entry is one, and not padding: bool [batch, kv_heads, 1]."""
        return self.newest_of(self.positions)[..., None] >= 0

    def width(self, most: int) -> int | None:
        """The width of a result that holds at most so many: None for as many as it turns out to hold."""
        return None if self.waits else most

    def keep(self, name: str, value: Tensor) -> None:
        """Keep a tensor in `state`, in the memory of the one before where it has that shape, for a step that is replayed."""
        held = self.state.get(name)
        if isinstance(held, Tensor) and held.shape == value.shape and held.dtype == value.dtype:
            held.copy_(value)
        else:
            self.state[name] = value.clone()


@dataclass(frozen=True)
class Selected:
    """What a step reads of one layer.

    Attributes:
        index: int64 [batch, kv_heads, k], slots, each at most once per kv head; None to read everything. Under `Consecutive` places
            in the order of their positions, and as many in each kv head.
        member: bool [batch, kv_heads or heads, k], False where a kv head has fewer than k, or where a query head of the
            group does not read the slot; None when all are read by all.
        count: int [batch, kv_heads], how many of the k are read by some head; None for all k.
        scanned: entries (K and V) per kv head and step whose worth of memory was read to choose, for the report.
    """

    index: Tensor | None = None
    member: Tensor | None = None
    count: Tensor | None = None
    scanned: float | Tensor = 0.0


def selected_by_groups(view: View, reads: Tensor, most: int, scanned: float | Tensor = 0.0) -> Selected:
    """What query heads read, each by itself: the heads of a group read together what any of them reads.

    Args:
        view: the layer.
        reads: bool [batch, heads, n], the slots that each query head reads.
        most: that the heads of one group read together at most.
        scanned: as in `Selected`.
    """
    kv_heads = view.positions.shape[1]
    width, count = view.width(most), None
    index, member = union_select(reads, kv_heads, width=width)
    if width is not None:
        count = member.unflatten(1, (kv_heads, -1)).any(2).sum(-1).clamp(min=1)
    return Selected(index, member, count, scanned)


@dataclass(frozen=True)
class Pattern:
    """What rows of a prompt read: what `blocks`, `columns`, `diagonals` and `distances` list together, or else `index`, or else
    everything but what `skip` lets them leave out.

    Entries are numbered as in `View.keys`: the rows are the last ones. A row always reads itself, and nothing after itself.
    `kvpress.kernels.block_sparse_attention` has the definition of the lists.

    Attributes:
        blocks: int [batch, heads or kv_heads, row blocks, m], the blocks of entries that each block of rows reads, in any
            order, each at most once; -1 for none. A block of rows is block_size entries, counted from the first entry; the
            first one listed for is that of the first row, which may lie inside of it. Block j of entries is
            [j * key_block_size, (j + 1) * key_block_size).
        columns: int [batch, heads or kv_heads, m], entries that all rows read, -1 for none.
        diagonals: int [batch, heads or kv_heads, m], distances at which blocks of rows read: all rows of the block whose first
            row is entry a read the entries [a - d, a - d + block_size). -1 for none.
        distances: int [batch, heads or kv_heads, m], distances at which each row reads one entry, -1 for none; on a GPU without
            a kernel of its own.
        block_size: a power of two; below 16 it is slow on a GPU.
        key_block_size: a power of two up to `block_size`, which None stands for; on a GPU smaller ones have no kernel of their own.
        index: int64 [batch, kv_heads, k], entries in ascending order, each at most once, with those of the rows at the end.
        member: bool [batch, kv_heads, k], False where a kv head reads fewer than k of what `index` lists, whatever stands there;
            True for the rows themselves. None when all are read. Under `Consecutive` places as many in each kv head.
        skip: above 0, and nothing is listed: rows go over all entries in tiles of block_size, and leave out those in which no
            row has a weight of at least that beside its largest one so far. `kvpress.kernels.skip_attention` has the definition.
            Not beside an eviction policy that adds up the attention, or under `Consecutive` places.
    """

    blocks: Tensor | None = None
    columns: Tensor | None = None
    diagonals: Tensor | None = None
    distances: Tensor | None = None
    block_size: int = 64
    key_block_size: int | None = None
    index: Tensor | None = None
    member: Tensor | None = None
    skip: float = 0.0

    @property
    def lists(self) -> dict[str, Any]:
        """The lists by name, each a tensor or None, as the kernel takes them."""
        return {name: getattr(self, name) for name in ("blocks", "columns", "diagonals", "distances")}

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes of blocks by name, likewise."""
        return {"block_size": self.block_size, "key_block_size": self.key_block_size}


def host_has(tensor: Tensor) -> bool:
    """Whether the host has the numbers of a tensor: on a device it would have to wait for them."""
    return tensor.device.type == "cpu"


def on_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on a device, [len(numbers)]; the host does not wait until they are there."""
    made = torch.tensor(numbers, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def listed_blocks(reads: Tensor) -> Tensor:
    """Blocks as a `Pattern` lists them.

    Args:
        reads: bool [batch, heads, row blocks, blocks], which blocks each block of rows reads.

    Returns:
        int64 [batch, heads, row blocks, m], ascending with -1 behind the last one. m is that of the longest list on a CPU, and
        all blocks on a device.
    """
    width = int(reads.sum(-1).max()) if host_has(reads) else reads.shape[3]
    index, member = union_select(reads.flatten(0, 1), reads.shape[2], width=max(1, width))
    return index.masked_fill_(~member, -1)[..., :width].unflatten(0, reads.shape[:2])


@dataclass(frozen=True)
class Attended:
    """One layer's part of a prompt that was run with full attention, as a policy that is fitted to a model sees it.

    Attributes:
        query: [1, heads, n, head_dim], and key: [1, kv_heads, n, head_dim], rotated at their own positions.
        scale, softcap: how the model turns q.k into scores.
        turn: how far the layer's attention turns what it is added to: 1 - cos(x, x + output), mean over the tokens.
    """

    query: Tensor
    key: Tensor
    scale: float
    softcap: float | None
    turn: float


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):  # noqa: B024 (only roles have abstract methods)
    """Base of all policies; see `docs/architecture.md` and the README's section on writing one."""

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "exact"
    paper: ClassVar[str] = ""
    takes_budget: ClassVar[bool] = False
    takes_share: ClassVar[bool] = True
    """Whether a budget may be a share of the prompt, not only entries."""
    roles: ClassVar[tuple[str, ...]] = ()
    """The roles that it plays: those of the role classes that it derives from."""
    wraps: ClassVar[str | None] = None
    """The field that is a policy itself; a mapping may give it as it gives a policy."""

    def __init_subclass__(cls, role: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherited = [one for base in cls.__bases__ for one in getattr(base, "roles", ())]
        cls.roles = tuple(dict.fromkeys(inherited + [role] * (role is not None)))

    @classmethod
    def at_budget(cls, budget: Budget, **fields: Any) -> "Policy":
        """The policy that keeps (or, if it selects, reads) `budget` entries, an int or a share of the prompt.

        Raises:
            PolicyError: the budget does not work, or the policy takes none.
        """
        if not cls.takes_budget:
            raise PolicyError(f"{cls.name} takes no budget; leave budget={budget!r} out")
        return cls(budget=budget, **fields)  # type: ignore[call-arg]

    @classmethod
    def accepts_budget(cls, budget: Budget) -> bool:
        """Whether the policy takes a budget of this form, entries (int) or a share of the prompt (float)."""
        return cls.takes_budget and (cls.takes_share or isinstance(budget, int))

    @property
    def places(self) -> Places:
        """At which positions attention sees entries."""
        return Own()

    @property
    def leaves_prompts_exact(self) -> bool:
        """Whether a prompt's own attention is that of the dense model, so that one pass can serve several policies."""
        return True

    @property
    def heads(self) -> Literal["alone", "together", "shared"]:
        """Whether each kv head decides alone, all decide together and alike, or they share a layer's entries."""
        return "alone"

    def check_company(self, others: "Sequence[Policy]") -> None:  # noqa: B027 (most policies have nothing against company)
        """Raise `PolicyError` if the policy cannot act on one model together with the others, which play other roles."""

    def check_layers(self, layers: int) -> None:  # noqa: B027 (most policies work with any number)
        """Raise `PolicyError` if the policy cannot act on a model with so many attention layers."""

    calibrated: ClassVar[str | None] = None
    """The field that `kvpress calibrate` can choose for a model."""
    in_file: ClassVar[bool] = False
    """Whether that field may be the path of a JSON file with its value, as `kvpress calibrate` writes it then."""

    def calibration_values(self, layers: int) -> list[Any]:
        """What the calibrated field may be on a model with so many attention layers."""
        return []

    @property
    def head_values(self) -> Sequence[Any]:
        """What the calibrated field may say of one query head, where it says something of each; see `try_heads`."""
        return ()

    def try_heads(self, query: Tensor, key: Tensor, value: Tensor, **scores: Any) -> tuple[Tensor, Tensor]:
        """How near each of the `head_values` comes to exact attention on one layer's prompt.

        Args:
            query: [batch, heads, n, head_dim]; key and value: [batch, kv_heads, n, head_dim].
            scores: scale, softcap and sinks, as the kernels take them.

        Returns:
            error: float32 [values, heads], the norm of the difference of the outputs over that of the exact ones.
            recall: float32 [values, heads], the mean share of the attention of late rows that is read.
        """
        raise NotImplementedError

    @property
    def learns(self) -> bool:
        """Whether `kvpress calibrate` fits the policy to a model: whether the class has a `fit` of its own."""
        return type(self).fit is not Policy.fit

    def fit(self, prompts: Iterable[Sequence[Attended]]) -> "Policy":
        """The policy with those fields that belong to a model, found on its prompts.

        Where the calibrated field is written to a file, it is a number for each layer and head.

        Args:
            prompts: for each one its layers, those that the policy acts on. Each is dropped when the next one is asked for.
        """
        raise NotImplementedError

    @classmethod
    def parameters(cls) -> list[Field[Any]]:
        """The hyper-parameters, those of the method itself before those that all policies of its role have."""
        roles = [base for base in cls.__mro__[1:] if issubclass(base, Policy) and not base.name]
        common = {field.name for role in roles for field in fields(role)}
        return sorted(fields(cls), key=lambda field: field.name in common)

    def describe(self) -> str:
        """The name with every hyper-parameter that differs from its default, as `h2o(budget=0.2)`."""
        values = [(field, getattr(self, field.name)) for field in self.parameters()]
        shown = [
            f"{field.name}={shown_value(value)}"
            for field, value in values
            if field.default is MISSING or value != field.default
        ]
        return f"{self.name}({', '.join(shown)})"


def shown_value(value: Any) -> str:
    """A field's value in a message: a policy as it describes itself, a long list by its length and a digest."""
    if isinstance(value, Policy):
        return value.describe()
    shown = repr(value)
    if isinstance(value, tuple) and len(shown) > 100:
        return f"<{len(value)} lists, {sha256(shown.encode()).hexdigest()[:8]}>"
    return shown


@dataclass(frozen=True, kw_only=True)
class EvictionPolicy(Policy, role="eviction"):
    """A policy that decides which entries a cache layer keeps.

    After a pass the runtime keeps, per sequence, layer and kv head, the `Quota.recent` newest entries and the
    best-scored of the others up to `Quota.total`; ties go to the earlier position.

    Args:
        evict: "each_pass" brings the cache to its budget at the end of every prompt pass (chunk, turn);
            "after_prompt" waits for the first decode step, so that chunking a prompt never changes what is kept, at the
            price of holding the whole prompt until then; "each_row" attends and evicts a prompt's rows one after the other,
            as decode steps do, which is slow and makes the prompt's own output sparse.
    """

    kind: ClassVar[str] = "evicting"
    takes_budget: ClassVar[bool] = True

    evict: Literal["each_pass", "after_prompt", "each_row"] = "each_pass"

    def __post_init__(self) -> None:
        check_choice(self.evict, "evict", ("each_pass", "after_prompt", "each_row"))
        if self.evict == "each_row" and self.evict_every is None:
            raise PolicyError(
                f"evict='each_row' evicts as decode steps do, and {self.name} evicts after prompts only; use 'each_pass' or "
                "'after_prompt'"
            )

    @property
    def observes(self) -> Observer:
        """What is counted while a layer attends: `Nothing()`, `Mass(...)` or `Window(rows)`."""
        return Nothing()

    @property
    def evict_every(self) -> int | None:
        """Decode steps between evictions: an entry too many is tolerated until there are so many. None: decode appends."""
        return 1

    @property
    def leaves_prompts_exact(self) -> bool:
        return self.evict != "each_row"

    @property
    def keeps_a_share(self) -> bool:
        """Whether what stays depends on the length of the prompt, in some layer."""
        layers = range(64)
        short, long = ([self.quota(tokens, layer, len(layers)) for layer in layers] for tokens in (1, 1 << 40))
        return short != long

    @property
    def merges(self) -> bool:
        """Whether what is dropped may be merged into what stays: whether the class has a `merge` of its own."""
        return type(self).merge is not EvictionPolicy.merge

    def share(self, priority: Tensor, totals: Tensor) -> Tensor:
        """How many entries each kv head keeps, for a policy whose `heads` are "shared".

        Args:
            priority: float32 [batch, kv_heads, n], the entries' scores, finite; +inf for the newest, which stay whatever their
                score, and -inf for what is not there.
            totals: int [batch], `Quota.total` of each sequence: what a kv head keeps on average.

        Returns:
            int64 [batch, kv_heads], none more than the kv head has.
        """
        raise NotImplementedError(f"{type(self).__name__} shares entries among heads and does not say how")

    @abstractmethod
    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        """What may stay of a sequence that had `tokens` real tokens when its latest prompt pass ended.

        Args:
            tokens: real tokens (no padding) of the sequence.
            layer: index among the layers that the policy acts on, from 0.
            layers: number of such layers.
        """

    def score(self, entries: Entries) -> Tensor:
        """Score each entry, float [batch, kv_heads, n]; only the values at `entries.candidates` count.

        By default what the observed rows gave it, `Entries.mass`.
        """
        return entries.mass

    def merge(self, dropped: Dropped) -> Merge | None:
        """Where each dropped entry goes; None drops it. Asked of classes that define it."""
        return None


@dataclass(frozen=True, kw_only=True)
class KeepAll(EvictionPolicy):
    """No eviction: what plays the role where no policy does."""

    @property
    def evict_every(self) -> int | None:
        return None

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return Quota(UNLIMITED, 0)


@dataclass(frozen=True, kw_only=True)
class SelectionPolicy(Policy, role="selection"):
    """A policy that keeps everything and says, layer by layer, what a decode step reads."""

    kind: ClassVar[str] = "selecting"

    observes_reads: ClassVar[bool] = False
    """Whether `after_read` wants the attention weights."""
    notes: ClassVar[str | None] = None
    """What the policy keeps about slots from step to step, as an error calls it; None for nothing. It cannot be combined with
    policies that evict during decode then."""

    def check_company(self, others: "Sequence[Policy]") -> None:
        super().check_company(others)  # it may play another role, too
        for other in others:
            _check_sees_rotated_keys(self, other)
            if self.notes is not None and isinstance(other, EvictionPolicy) and other.evict_every is not None:
                raise PolicyError(
                    f"{other.describe()} frees slots in decode, and {self.notes} would no longer fit what is in them; use "
                    "a policy that evicts after the prompt only, as snapkv"
                )

    def phase(self, number: int) -> Any:
        """What the number of a decode step changes, as `View.phase`: a step is compiled for each answer, so let there be few.

        Args:
            number: of the step since the latest prompt pass, from 1; 0 for one after tokens were taken back, or after an
                unpatched run, when nothing is known of what came before.
        """
        return None

    @abstractmethod
    def select(self, view: View) -> Selected:
        """What a decode step reads in this layer."""

    def after_read(self, view: View, selected: Selected, mass: Tensor) -> None:
        """See the weights of a decode step, float32 [batch, heads, k] (all slots in use if all were read).

        Called for the last row of every prompt, too, before the decode step that follows it: with its query, and what was
        kept of the prompt as the entries.
        """


@dataclass(frozen=True, kw_only=True)
class ReadAll(SelectionPolicy):
    """No selection: what plays the role where no policy does."""

    def select(self, view: View) -> Selected:
        return Selected()


@dataclass(frozen=True, kw_only=True)
class PrefillPolicy(Policy, role="prefill"):
    """A policy that keeps everything and says, layer by layer, what the rows of a prompt read.

    Decode steps are exact, unless another role is played, too. Not asked, and attended exactly, are rows whose kv heads hold
    different numbers of entries (after `AdaKV`), rows before which entries stand at other places than their own (after
    StreamingLLM has evicted), rows fed again to correct decode steps, and passes without a cache.
    """

    kind: ClassVar[str] = "sparse prompt"

    @property
    def chunk(self) -> int | None:
        """Rows of a prompt that are planned together; None for all that come in one pass."""
        return None

    @property
    def leaves_prompts_exact(self) -> bool:
        return False

    def check_company(self, others: "Sequence[Policy]") -> None:
        super().check_company(others)  # it may play another role, too
        for other in others:
            _check_sees_rotated_keys(self, other)
            if isinstance(other, EvictionPolicy) and other.evict == "each_row":
                raise PolicyError(
                    f"{other.describe()} attends a prompt row by row, and {self.describe()} plans what many rows read; use "
                    "evict='each_pass' or 'after_prompt'"
                )

    @abstractmethod
    def plan(self, view: View) -> Pattern | None:
        """What rows of a prompt read in this layer; None for everything."""


@dataclass(frozen=True, kw_only=True)
class DensePrefill(PrefillPolicy):
    """Prompts read everything: what plays the role where no policy does."""

    @property
    def leaves_prompts_exact(self) -> bool:
        return True

    def plan(self, view: View) -> Pattern | None:
        return None


def _check_sees_rotated_keys(policy: Policy, other: Policy) -> None:
    if not other.places.own_keys and type(policy.places) is not type(other.places):
        raise PolicyError(
            f"{policy.describe()} compares queries with rotated keys, and {other.describe()} does not store them at their own "
            "positions; use a policy that leaves tokens where they are (rope='original' where it has that)"
        )


@dataclass(frozen=True)
class Feed:
    """One run of the decoder.

    Attributes:
        tokens: ids [batch, count], or embeddings [batch, count, hidden].
        positions: position ids with the axes that the model has, [..., batch or 1, count]; None where the model counts columns.
        back: how many of the newest columns are taken back from the cache first.
        first: the first row of its output that the caller gets, if it is the last run.
        columns: int64 [batch, count], which column of the call each token is, -1 (in front) for none: the other columns of
            the call are never stored. See `Call.only`. None where nothing is left out.
        last_layer: for a look: the run has nothing to do with the cache and ends in this layer (of those that the policies
            act on), whose `Look` the route is sent. None for a run of all layers.
    """

    tokens: Tensor
    positions: Tensor | None
    back: int = 0
    first: int = 0
    columns: Tensor | None = None
    last_layer: int | None = None

    @property
    def count(self) -> int:
        """Columns fed."""
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Look:
    """What a layer would have attended with in a run that ended there.

    Attributes:
        query: [batch, heads, count, head_dim], rotated; anything where there is padding.
        key: [batch, kv_heads, count, head_dim], likewise.
    """

    query: Tensor
    key: Tensor


@dataclass(frozen=True, kw_only=True)
class Call(Feed):
    """The run that a caller asked for.

    `positions` are the caller's, less the tokens of each sequence that were left out of earlier prompts.

    Attributes:
        places: int32 [batch, count], the number of each token among those of its sequence that were not left out, from 0
            over all passes; -1 for padding.
        layers: number of layers that the policies act on.
        rows: how many of the last rows the caller wants logits of, 0 for all; None if that is not known, as where the
            decoder is called without the model around it.
        is_chunk: it is a chunk of a prompt that `generate` has cut (`prefill_chunk_size`).
    """

    places: Tensor
    layers: int
    rows: int | None = None
    is_chunk: bool = False

    def only(self, columns: Tensor) -> Feed:
        """The run of some tokens as if there were no others: at consecutive positions, from that of a sequence's first token.

        The caller gets its last row, and goes on counting all columns.

        Args:
            columns: int64 [batch, k], ascending; -1 (in front) where a sequence has fewer than k.
        """
        chosen, at = columns >= 0, columns.clamp(min=0)
        places = self.places.clamp(min=0).long() if self.positions is None else self.positions
        places = places.expand(len(columns), -1)
        first = (self.places >= 0).to(torch.uint8).argmax(1, keepdim=True)
        positions = places.gather(1, first) + (chosen.cumsum(1) - 1).clamp(min=0)
        at = at if self.tokens.ndim == 2 else at[..., None].expand(-1, -1, self.tokens.shape[2])
        return Feed(self.tokens.gather(1, at), positions, first=columns.shape[1] - 1, columns=columns)


Feeds = Generator[Feed, Look | None, None]
"""The runs of a call, one after the other: a generator that is sent the `Look` of each run that is one, else None."""


@dataclass(frozen=True)
class Depth:
    """A layer after its attention, as a route policy sees it that lets tokens stop: one sequence alone, without padding.

    Attributes:
        layer, layers: index among the layers that the policies act on, and their number.
        positions: int64 [n], of the tokens in play, those that the layer attended; ascending, the newest one last.
        fetch_row: gives `row`.
    """

    layer: int
    layers: int
    positions: Tensor
    fetch_row: Callable[[], Tensor]

    @property
    def row(self) -> Tensor:
        """What the newest token attends to: float32 [n], the mean over the query heads. Computed when asked for."""
        return self.fetch_row()


@dataclass(frozen=True, kw_only=True)
class RoutePolicy(Policy, role="route"):
    """A policy that says what is run when the model is called, and which tokens go on from layer to layer."""

    kind: ClassVar[str] = "routing"

    @property
    def no_hybrids(self) -> str | None:
        """Why it cannot act on a model some of whose layers have no full attention, and what to do; None if it can."""
        return None

    @abstractmethod
    def feeds(self, call: Call, texts: Texts) -> Feeds:
        """The runs that take the place of the one that was asked for, one after the other; `call` itself to run it as it is.

        Args:
            call: the tokens of the call.
            texts: the cache's sequences, as the runs before have left them.
        """

    def rows(self, depth: Depth) -> Tensor | None:
        """Which of the tokens in play go on to the next layer, bool [n]; None for all, as by default.

        Asked after each layer but the last, in every pass with a cache, of classes that define it. The newest token goes on
        whatever the answer. What stops waits, with what the layer made of it; a later pass in which it goes on again runs
        it from there. Every pass starts with all tokens in play.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class OneRun(RoutePolicy):
    """What was asked for, in one run: what plays the role where no policy does."""

    def feeds(self, call: Call, texts: Texts) -> Feeds:
        yield call


@dataclass(frozen=True, kw_only=True)
class StoragePolicy(Policy, role="storage"):
    """A policy that says how the keys and values of a layer are held."""

    kind: ClassVar[str] = "storing"

    @abstractmethod
    def storage(self, layer: int, layers: int, new_stats: NewStats) -> Storage:
        """A storage that holds nothing yet, for one layer of one cache.

        Args:
            layer, layers: index among the layers that the policies act on, and their number.
            new_stats: makes what is counted of the entries, for the storage to keep with them.
        """


@dataclass(frozen=True, kw_only=True)
class InSlots(StoragePolicy):
    """Keys and values as the model makes them: what plays the role where no policy does."""

    def storage(self, layer: int, layers: int, new_stats: NewStats) -> Storage:
        return Slots(new_stats)


@dataclass(frozen=True)
class Roles:
    """The policies of a model, one for each role."""

    eviction: EvictionPolicy = KeepAll()
    selection: SelectionPolicy = ReadAll()
    prefill: PrefillPolicy = DensePrefill()
    route: RoutePolicy = OneRun()
    storage: StoragePolicy = InSlots()
    moves: "Policy | None" = None
    """The policy that has entries attended at other positions than their own. That needs no role; at most one does it."""

    @classmethod
    def of(cls, policies: "Sequence[Policy]") -> "Roles":
        """The roles that some policies play; the others are played by null objects."""
        roles = {role: policy for policy in policies for role in policy.roles}
        moves = next((policy for policy in policies if policy.places.moved), None)
        return cls(**roles, moves=moves)  # type: ignore[arg-type]

    def describe(self) -> str:
        """The policies that play a role; full() where none does."""
        acts = (
            (self.eviction, self.evicts),
            (self.selection, self.selects),
            (self.prefill, self.plans),
            (self.route, self.routes),
            (self.storage, self.stores),
            (self.moves, self.moves is not None),
        )
        return " + ".join(dict.fromkeys(one.describe() for one, does in acts if does and one)) or "full()"

    @property
    def evicts(self) -> bool:
        """Whether entries may be dropped."""
        return not isinstance(self.eviction, KeepAll)

    @property
    def selects(self) -> bool:
        """Whether a step may read less than everything."""
        return not isinstance(self.selection, ReadAll)

    @property
    def plans(self) -> bool:
        """Whether a prompt's rows may read less than everything."""
        return not isinstance(self.prefill, DensePrefill)

    @property
    def routes(self) -> bool:
        """Whether something else may be run than what was asked for."""
        return not isinstance(self.route, OneRun)

    @property
    def stops(self) -> bool:
        """Whether tokens may stop between two layers: whether the route's class has `rows` of its own."""
        return type(self.route).rows is not RoutePolicy.rows

    @property
    def stores(self) -> bool:
        """Whether keys and values are held otherwise than as the model makes them."""
        return not isinstance(self.storage, InSlots)

    @property
    def places(self) -> Places:
        """At which positions entries are attended."""
        return Own() if self.moves is None else self.moves.places


def pool_scores(scores: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Pool scores over neighbours, stride 1, keeping the length.

    Args:
        scores: float [batch, heads, n].
        kernel_size: odd width of the window.
        pooling: "avg" counts the zeros past the ends; "max" does not.

    Returns:
        float [batch, heads, n].
    """
    if pooling == "avg":
        return torch.nn.functional.avg_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)
    return torch.nn.functional.max_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)


def pooled_mass(entries: Entries, kernel_size: int, pooling: str) -> Tensor:
    """The observed attention mass, pooled over the candidates in position order, [batch, kv_heads, n]."""
    # Candidates come first in position order, so what is filled in behind them acts as the pooling's padding.
    outside = 0.0 if pooling == "avg" else float("-inf")
    return pool_scores(entries.mass.masked_fill(~entries.candidates, outside), kernel_size, pooling)
