"""Kernels are launched on the device where the tensors are, with the shapes of that device, whichever is the current one.

There need not be any GPU: the tensors have a device and no numbers, and torch.cuda's functions are stand-ins.
"""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

from kvpress.kernels import launch_shapes
from kvpress.kernels.gpu import launch as launch_module
from support import gpu_launches as launches

ROOT = Path(launch_module.__file__).parent


class Cuda:
    """Three GPUs with 10, 20 and 30 multiprocessors, of which the first is the current one."""

    def __init__(self):
        self.current, self.asked, self.switches = 0, set(), 0

    def current_device(self):
        return self.current

    def get_device_name(self, device):
        self.asked.add(device.index)
        return ""

    def get_device_properties(self, device):
        self.asked.add(device.index)
        return type("Properties", (), {"multi_processor_count": 10 * (device.index + 1)})

    def device(self, device):
        cuda = self

        class Guard:
            def __enter__(self):
                self.before, cuda.current = cuda.current, device.index
                cuda.switches += 1

            def __exit__(self, *error):
                cuda.current = self.before

        return Guard()


@pytest.fixture
def cuda(monkeypatch):
    gpus = Cuda()
    for name in ("current_device", "get_device_name", "get_device_properties", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpus, name))
    for cached in (launch_shapes.gpu_name, launch_module.multiprocessors):
        cached.cache_clear()
    launch_shapes.forget_plans()
    yield gpus
    for cached in (launch_shapes.gpu_name, launch_module.multiprocessors):
        cached.cache_clear()
    launch_shapes.forget_plans()


class Held:
    """Stands for a tensor: it has a device, and no CUDA is needed to make it."""

    def __init__(self, device):
        self.device = torch.device(device)


@pytest.mark.parametrize(("device", "switches"), [("cuda:2", 1), ("cuda:0", 0), ("cpu", 0)])
def test_a_kernel_runs_where_its_tensors_are(device, switches, cuda):
    """On the third GPU while the first is the current one, which it is again afterwards, also after an error."""
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((cuda.current, grid, args[1:], options))

    tensor = Held(device)
    launch_module.launch(Kernel(), (3, 4), tensor, 5, BLOCK=6)
    assert seen == [(tensor.device.index or 0, (3, 4), (5,), {"BLOCK": 6})]
    with pytest.raises(TypeError):
        launch_module.launch(None, (1,), tensor)
    assert cuda.current == 0 and cuda.switches == 2 * switches


def test_the_first_argument_is_a_tensor(monkeypatch):
    """Of every launch: it says which device."""
    first = []
    monkeypatch.setattr(launches, "as_launched", lambda kernel, args, options: first.append((kernel, args[0])))
    with launches.noting(), FakeTensorMode(allow_non_fake_inputs=True):
        for calls in launches.CALLS.values():
            for call in calls[:2]:
                call()
    assert len(first) > 20
    assert [kernel for kernel, one in first if not isinstance(one, torch.Tensor)] == []


def test_splits_are_those_of_the_device(cuda):
    """Twice as many multiprocessors, twice as many programs."""
    split = launches.gpu("decode_attention").split_count
    assert [split(131072, 2, torch.device("cuda", index)) for index in range(3)] == [10, 20, 30]
    assert cuda.asked == {0, 1, 2} and cuda.current == 0


def test_shapes_are_those_of_the_device(cuda, monkeypatch, tmp_path):
    """Of two kinds of GPU in one machine each has its own."""
    monkeypatch.setattr(launch_shapes, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    launch_shapes.tuned_file("GPU 1").write_text('{"shapes": {"decode_attention 16x128x2": {"block_n": 32}}}')
    config = launches.gpu("decode_attention").config
    assert [config(4, 128, 2, torch.device("cuda", index)).block_n for index in range(3)] == [64, 32, 64]


def test_nothing_is_launched_in_another_way():
    """Every kernel goes through `launch`."""
    files = [path for path in ROOT.glob("*.py") if path.stem != "launch"]
    assert len(files) > 10
    for path in files:
        source = path.read_text(encoding="utf-8")
        assert re.search(r"_kernel\s*\[", source) is None, path
        assert "launch(" in source, path
