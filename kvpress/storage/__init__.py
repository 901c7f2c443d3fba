"""How the keys and values of one layer are held. Nothing here knows a policy or a model."""

from kvpress.storage.base import Storage, spare_slots
from kvpress.storage.pages import Pages
from kvpress.storage.slots import Slots

__all__ = ["Pages", "Slots", "Storage", "spare_slots"]
