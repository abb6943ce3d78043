"""command_line.py: a mistake on a command line is answered in one sentence that names it."""

import pytest

import ask
import report
import test_mmau
from command_line import ArgumentParser, at_least
from dataset import check


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="tool.py")
    parser.add_argument("--max_steps", "--max-steps", type=int)
    parser.add_argument("--save_steps", type=int)
    parser.add_argument("--beta", type=float)
    parser.add_argument("--name", nargs="+")
    parser.add_argument("--style", choices=("think", "answer"))
    parser.add_argument("--workers", type=at_least(1))
    parser.add_argument("-i", "--input_dir")
    return parser


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--max_step 5", "there is no flag --max_step; did you mean --max_steps?"),
        ("--max_step=5", "there is no flag --max_step; did you mean --max_steps?"),
        ("--max_stesp 5", "there is no flag --max_stesp; did you mean --max_steps?"),
        ("-max_steps 5", "there is no flag -max_steps; did you mean --max_steps?"),
        ("--Beta 5", "there is no flag --Beta; did you mean --beta?"),
        ("--zzz 5", "there is no flag --zzz"),
        ("--beta 0.1 0.2", "'0.2' belongs to no flag"),
        ("--max_steps", "--max_steps: expected one argument"),
        ("--name --beta 1", "--name: expected at least one argument"),
        ("--max_steps 1e3", "--max_steps 1e3: expected a whole number"),
        ("--beta abc", "--beta abc: expected a number"),
        ("--workers 0", "--workers 0: expected a whole number from 1 on"),
        ("--workers x", "--workers x: expected a whole number from 1 on"),
        ("--style thin", "--style thin: expected one of think, answer"),
    ],
)
def test_a_mistake_is_one_sentence(parser, capsys, words, said):
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(words.split())
    assert exit.value.code == 2
    assert capsys.readouterr() == ("", f"tool.py: {said} (--help lists all flags)\n")


def test_what_is_right_is_taken(parser):
    args = parser.parse_args("--max-steps -5 --beta=-1e-3 --name a b --style think --workers 1 -i x".split())
    assert vars(args) == dict(
        max_steps=-5, beta=-1e-3, name=["a", "b"], style="think", workers=1, input_dir="x", save_steps=None
    )  # fmt: skip


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (test_mmau.parse_args, "--model_pat m", "--model_pat; did you mean --model_path?"),
        (test_mmau.parse_args, "--batch_size 3", "the following arguments are required: --model_path"),
        (test_mmau.parse_args, "--model_path m --batchsize 3", "--batchsize; did you mean --batch_size?"),
        (test_mmau.parse_args, "--model_path m --batch_size 0", "--batch_size 0: expected a whole number from 1 on"),
        (
            ask.parse_args,
            "--model_path m --audio a --question q --choice a b",
            "there is no flag --choice; did you mean --choices?",
        ),
        (check.parse_args, "f --dee", "there is no flag --dee; did you mean --deep?"),
    ],
)
def test_the_scripts_use_it(capsys, main, words, said):
    with pytest.raises(SystemExit):
        main(words.split())
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_negative_number_of_clips_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", "exp", "--clips", "-1"])
    with pytest.raises(SystemExit):
        report.main()
    assert "report.py: --clips -1: expected a whole number from 0 on" in capsys.readouterr().err
