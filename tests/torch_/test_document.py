"""What docs/torch.md shows works."""

import re
from pathlib import Path

import torch

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "torch.md").read_text(encoding="utf-8")


def test_the_script_trains():
    (script,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(compile(script, "docs/torch.md", "exec"), names)
    assert names["scaler"].skipped == 0
    for parameter in names["model"].parameters():
        assert type(parameter.grad) is torch.Tensor and parameter.grad.any()
