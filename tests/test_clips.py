"""A clip that cannot be read during training is replaced by another question's."""

import pytest

from conftest import QUESTION, write_rows, write_tone
from dataset.rows import DataError
from run.clips import replace_broken_clips
from test_grpo_trainer import make_trainer, roll_out


def test_a_broken_clip_is_named_and_its_question_replaced(small_model, tmp_path, capsys):
    for i in range(4):
        write_tone(tmp_path / f"{i}.wav", 1.0 + 0.1 * i)
    rows = [QUESTION | {"answer": 0, "audio_path": f"{i}.wav"} for i in range(4)]
    write_rows(tmp_path, *rows)
    trainer = make_trainer(
        small_model, tmp_path / "train.jsonl", tmp_path / "out", gradient_accumulation_steps=2, max_steps=1
    )
    replace_broken_clips(trainer)
    (tmp_path / "2.wav").write_text("not a wav file")
    trainer.train()
    assert "2.wav" in capsys.readouterr().out
    assert trainer.state.log_history[0]["clips/replaced"] == 1
    paths = [row["audio_path"] for row in roll_out(trainer, 3).rows]
    assert len(paths) == 3 and not any(path.endswith("2.wav") for path in paths)
    for i in range(4):
        (tmp_path / f"{i}.wav").unlink()
    with pytest.raises(DataError, match="11 clips"):
        roll_out(trainer, 2)
