"""The documented example of a new loss works."""

import re

import pytest

from conftest import ROOT
from test_grpo_trainer import make_trainer, roll_out
from trainer import loss


def test_the_documented_loss_trains(small_model, questions, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.setattr(loss, "LOSSES", dict(loss.LOSSES))
    exec(code, vars(loss) | {"LOSSES": loss.LOSSES})
    (name,) = loss.LOSSES.keys() - {"grpo", "bnpo", "dr_grpo", "dapo", "cispo"}
    trainer = make_trainer(small_model, questions, tmp_path, loss_type=name, beta=0.0)
    trainer.current_gradient_accumulation_steps = 1
    rollout = roll_out(trainer, 2)
    expected = -(rollout.advantages[..., None] * rollout.mask).sum() / rollout.mask.sum()
    assert trainer.compute_loss(trainer.model, rollout).item() == pytest.approx(expected.item(), abs=1e-6)
