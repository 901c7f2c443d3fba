"""What an installed kvpress must do, without network, in seconds: `make release-check` runs it in empty environments.

Run it outside of the repository, where nothing but the installed package can be found.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpress
from kvpress.policies import H2O, Full


def main() -> None:
    """Raise an error where something is wrong."""
    installed = Path(kvpress.__file__).resolve()
    assert "site-packages" in installed.parts, f"this is {installed}, not what was installed"
    version = importlib.metadata.version("kvpress-toolkit")
    assert version == kvpress.__version__, f"the distribution is {version}, the package {kvpress.__version__}"

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 64, (2, 40))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with kvpress.patch(model, Full()):
        assert torch.equal(model.generate(ids, **options), expected), "Full differs from the model's own result"
    with kvpress.patch(model, H2O(budget=16)) as handle:
        model.generate(ids, **options)
        assert handle.report().total.kept == 2 * 16, handle.report()
    for name in kvpress.available():
        kvpress.make_policy(name)

    command = Path(sys.executable).parent / "kvpress"
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"kvpress {version}", said
    subprocess.run([command, "policies"], capture_output=True, check=True)
    print(f"kvpress {version} works on Python {sys.version.split()[0]} with torch {torch.__version__}")


if __name__ == "__main__":
    main()
