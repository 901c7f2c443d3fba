"""Launch shapes: the heuristic's, unless a file for this GPU has another one."""

import json

import pytest
import torch

from kvpress.kernels import launch_shapes
from kvpress.kernels.launch_shapes import launch_shape, read_shapes, trying, tuned_file

CPU = torch.device("cpu")


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes shapes for a GPU called "Some GPU 1/2", which then is the one in use."""
    monkeypatch.setattr(launch_shapes, "TUNED", tmp_path)
    monkeypatch.setattr(launch_shapes, "gpu_name", lambda device: "Some GPU 1/2")
    read_shapes.cache_clear()

    def write(shapes):
        tuned_file("Some GPU 1/2").write_text(json.dumps({"gpu": "", "triton": "", "shapes": shapes}))

    yield write
    read_shapes.cache_clear()


def test_without_a_file(tuned):
    assert launch_shape("kernel", CPU, 128, 2, block_n=64, num_warps=4) == {"block_n": 64, "num_warps": 4}


def test_a_file_has_the_last_word(tuned):
    """For its kernel and sizes, and only the numbers that it names."""
    tuned({"kernel 128x2": {"block_n": 32}, "plain": {"num_warps": 8}})
    assert launch_shape("kernel", CPU, 128, 2, block_n=64, num_warps=4) == {"block_n": 32, "num_warps": 4}
    assert launch_shape("kernel", CPU, 64, 2, block_n=64, num_warps=4) == {"block_n": 64, "num_warps": 4}
    assert launch_shape("plain", CPU, num_warps=4) == {"num_warps": 8}


def test_without_a_gpu_no_file_is_read(tuned, monkeypatch):
    tuned({"plain": {"num_warps": 8}})
    monkeypatch.setattr(launch_shapes, "gpu_name", lambda device: "")
    assert launch_shape("plain", CPU, num_warps=4) == {"num_warps": 4}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shapes": {"a": 1}}', '{"shapes": {"a": {"b": 0}}}', "[1"])
def test_a_broken_file_is_named(tuned, content):
    path = tuned_file("Some GPU 1/2")
    path.write_text(content)
    with pytest.raises(ValueError, match=r"Some_GPU_1_2\.json .*benchmarks/tune\.py"):
        launch_shape("plain", CPU, num_warps=4)


def test_trying_wins_and_hears_who_asks(tuned):
    tuned({"kernel 128x2": {"block_n": 32}})
    with trying("kernel", {"block_n": 16}) as asked:
        assert launch_shape("kernel", CPU, 128, 2, block_n=64) == {"block_n": 16}
        assert launch_shape("other", CPU, block_n=64) == {"block_n": 64}
    assert asked == {"kernel 128x2"}
    assert launch_shape("kernel", CPU, 128, 2, block_n=64) == {"block_n": 32}


def test_files_in_the_package_are_sound():
    """What is shipped can be read."""
    for path in launch_shapes.TUNED.glob("*.json"):
        assert read_shapes(path)
