"""How the keys and values of one layer are held. Nothing here knows a policy or a model."""

from kvpress.storage.base import NewStats, Storage, spare_slots
from kvpress.storage.packed import PackedSlots
from kvpress.storage.pages import Pages
from kvpress.storage.slots import Slots

__all__ = ["NewStats", "PackedSlots", "Pages", "Slots", "Storage", "spare_slots"]
