"""trainer/nodes.py and the launchers of two nodes: real processes, told apart by what torchrun sets."""

import json
import os
import shutil
import subprocess

import pytest
from transformers.integrations import deepspeed

from conftest import ROOT
from model.checkpoints import check_whole
from running import environment, free_port
from test_resume import arguments, copied, finished, settings_of  # noqa: F401, fixtures
from train import make_parser
from trainer.nodes import use_own_disk
from trainer.resume import PARTIAL, checkpoints_in, choose_start, resumable_steps, step_of

# One of two nodes of one process: prints what each check says.
NODE = """
import dataclasses, json, os, sys
from pathlib import Path
sys.path.insert(0, "src")
import accelerate
accelerate.PartialState(cpu=True)
from datasets import Dataset
from trainer.nodes import check_same_clips, check_same_settings, on_each_disk, shares_disk
from types import SimpleNamespace
rank, folder = os.environ["RANK"], Path(sys.argv[1])

@dataclasses.dataclass
class Flags:
    save_steps: int
    output_dir: str

def say(check, *arguments):
    try:
        print(json.dumps(check(*arguments)), flush=True)
    except ValueError as error:
        print(json.dumps(str(error)), flush=True)

say(shares_disk, folder / "one")
say(shares_disk, folder / f"of {rank}")
for own, steps in (("x", 5), (rank, 5), ("x", 5 + int(rank))):
    files = {"data_file (content)": "--data_file q.jsonl"}
    say(check_same_settings, {"data_file (content)": own}, [Flags(steps, rank)], files)
(folder / f"of {rank}" / "b.wav").write_text("12" + rank * int(rank))
for names in (["a.wav"], ["a.wav", "b.wav"], [f"only on {rank}.wav"]):
    if names[0].startswith("only") and rank == "0":
        (folder / "of 0" / names[0]).touch()
    rows = {"row": [7 + i for i in range(len(names))], "audio_path": [str(folder / f"of {rank}" / n) for n in names]}
    say(check_same_clips, Dataset.from_dict(rows))
for own in (False, True):
    args = SimpleNamespace(should_save=own or rank == "0", save_on_each_node=own)
    say(on_each_disk, lambda: f"computed on {rank}", args)
"""


@pytest.mark.slow
@pytest.mark.measured
def test_nodes_hold_their_files_against_one_another(preloaded, tmp_path):
    (tmp_path / "node.py").write_text(NODE)
    torchrun = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=1, GROUP_WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1")
    torchrun["MASTER_PORT"] = free_port()
    nodes = [
        subprocess.Popen(
            ["python", tmp_path / "node.py", tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=environment(PRELOADED=preloaded, RANK=rank, GROUP_RANK=rank, **torchrun),
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=200)[0].splitlines() for node in nodes]
    said = [[json.loads(line) for line in lines if line[0] in '"nft'] for lines in said]
    assert len(said[0]) == len(said[1]) == 10, "a check that one of them fails, both fail"
    one, own, same, file, flag, clips, size, missing, first = said[0][:9]
    assert (one, own, same, clips) == (True, False, None, None) and not list((tmp_path / "one").iterdir())
    assert file.startswith("--data_file q.jsonl: 0 on node 0 (") and ", 1 on node 1 (" in file
    assert flag.startswith("--save_steps: 5 on node 0 (") and ", 6 on node 1 (" in flag
    assert "b.wav (line 8): 2 bytes on node 0 (" in size and ", 3 bytes on node 1 (" in size
    assert "only on 0.wav (line 7): 0 bytes on node 0 (" in missing and ", missing on node 1 (" in missing
    assert first == "computed on 0" and [lines[-1] for lines in said] == ["computed on 0", "computed on 1"]


def test_a_step_that_another_node_has_not_is_passed_over(copied, capsys):  # noqa: F811
    assert resumable_steps(copied) == {1, 2, 3}
    (copied / "checkpoint-3" / "optimizer.pt").unlink()
    assert resumable_steps(copied) == {1, 2}
    start = choose_start(arguments(copied), settings_of(copied), everywhere={1, 3})
    assert step_of(start) == 1
    assert "checkpoint-2: another node has none of this step" in capsys.readouterr().out


def test_on_disks_of_their_own_zero3_is_refused_and_zero2_saves_on_each(tmp_path):
    names = pytest.importorskip("deepspeed.runtime.constants")  # by which DeepSpeed reads its settings
    flags = ["--use_cpu", "true", "--output_dir", str(tmp_path), "--deepspeed"]
    try:
        *_, args, _ = make_parser().parse_args_and_config([*flags, str(ROOT / "conf/ds_zero3.json")])
        with pytest.raises(ValueError, match=f"{tmp_path}: the nodes do not share its disk, and ZeRO-3 .*ds_zero2"):
            use_own_disk(args)
        *_, args, _ = make_parser().parse_args_and_config([*flags, str(ROOT / "conf/ds_zero2.json")])
        use_own_disk(args)
        assert args.save_on_each_node
        settings = args.hf_deepspeed_config.config[names.CHECKPOINT]
        assert settings == {names.USE_NODE_LOCAL_STORAGE_CHECKPOINT: True}
    finally:
        deepspeed.unset_hf_deepspeed_config()


FLAGS = (
    "--use_cpu", "true", "--questions_per_step", "2", "--num_generations", "2", "--max_completion_length", "4",
    "--learning_rate", "1e-2", "--save_steps", "1", "--max_steps", "3", "--report_to", "none",
)  # fmt: skip
# Kills the second node's process in the first start's second save; `nodes` below starts it with this on its path.
KILLED = """
import os, signal
rename = os.rename
def killed(source, target):
    if str(target).endswith("checkpoint-2") and os.environ["GROUP_RANK"] + os.environ["TORCHELASTIC_RESTART_COUNT"] == "10":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = killed
"""


def start_nodes(places: list[dict], **common) -> list[tuple[int, str]]:
    """The launcher on two nodes, each with its own variables: exit status and output of each."""
    port = free_port()
    nodes = [
        subprocess.Popen(
            ["sh", "run_grpo.sh", *FLAGS], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment(NODE_NUM=2, NODE_RANK=rank, MASTER_PORT=port, GPU_NUM=1, CONFIG="", **common, **own),
        )
        for rank, own in enumerate(places)
    ]  # fmt: skip
    said = [node.communicate(timeout=400)[0] for node in nodes]
    return [(node.returncode, text) for node, text in zip(nodes, said, strict=True)]


@pytest.mark.slow
def test_two_nodes_with_disks_of_their_own_go_on_after_one_is_killed(preloaded, small_model, questions, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(KILLED)
    common = dict(MODEL_NP=small_model, DATA_FILE=questions, RESTARTS=1, PYTHONPATH=tmp_path, PRELOADED=preloaded)
    ended = start_nodes([{"OUT_DIR": tmp_path / "a"}, {"OUT_DIR": tmp_path / "b"}], **common)
    assert [status for status, _ in ended] == [0, 0], ended
    assert all(said.count("restart 1 of 1\n") == 1 for _, said in ended), ended
    assert "the nodes do not share its disk" in ended[0][1]
    for name in ("a", "b"):
        out = tmp_path / name
        assert [step_of(path) for path in checkpoints_in(out)] == [1, 2, 3] and resumable_steps(out) == {3}
        check_whole(out)
        assert not (out / PARTIAL).exists()
    weights = [(tmp_path / name / "checkpoint-3" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_node_with_another_file_ends_both(preloaded, small_model, questions, tmp_path):
    shutil.copytree(questions.parent, tmp_path / "data")
    other = tmp_path / "data" / questions.name
    other.write_text(other.read_text().replace("dog", "cow"))
    common = dict(MODEL_NP=small_model, OUT_DIR=tmp_path / "out", RESTARTS=2, PRELOADED=preloaded)
    ended = start_nodes([{"DATA_FILE": questions}, {"DATA_FILE": other}], **common)
    for status, said in ended:
        assert status == 1 and "Traceback" not in said and "restart" not in said, said
    assert f"--data_file {questions}: " in ended[0][1] and " on node 1 (" in ended[0][1]
    assert os.listdir(tmp_path / "out") == [], "no lock and no probe is left"
