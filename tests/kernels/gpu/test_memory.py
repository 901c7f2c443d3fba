"""No Triton kernel is launched with a rows x entries matrix: four times the entries take about four times the memory."""

import pytest

from kvpress.kernels.gpu import topk_select as topk_module
from support.accelerator import DEVICE
from support.kernel_calls import LINEAR, Largest, qkv

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")


@pytest.mark.parametrize("name", [*LINEAR, "topk_select-long"])
def test_memory_grows_with_the_entries(name, monkeypatch):
    if name == "topk_select-long":
        monkeypatch.setattr(topk_module, "ONE_TILE", 0)  # as a row that several programs share
    numbers = []
    for entries in (64, 256):
        tensors = (x.to(DEVICE) for x in qkv(entries, entries))
        with Largest() as largest:
            LINEAR[name.removesuffix("-long")](*tensors, "triton")
        numbers.append(largest.numbers)
    assert numbers[1] < 4.5 * numbers[0], largest.operation
