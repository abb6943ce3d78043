"""A reference model that waits on the CPU: where its weights are in which pass, its log-probs, and what is refused."""

import weakref

import pytest
import torch
from trl import GRPOConfig

import train
from conftest import ROOT
from dataset.dataset import load_train_dataset
from test_grpo_trainer import length_reward
from trainer import reference
from trainer.grpo_trainer import AudioGRPOTrainer


class OtherDevice:
    """Stands for a device that this machine lacks: what is copied there is followed until nobody holds it any more."""

    def __init__(self):
        self.addresses: set[int] = set()  # of the tensors there
        self.copied = 0  # tensors so far

    def copy(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        made = tensor.clone()
        self.copied += 1
        self.addresses.add(made.data_ptr())
        weakref.finalize(made.untyped_storage(), self.addresses.discard, made.data_ptr())
        return made


def make_trainer(small_model, questions, folder, dtype: str = "float32", **kwargs) -> AudioGRPOTrainer:
    """Two steps of two passes over one question each, from one batch of rollouts a step."""
    args = GRPOConfig(
        str(folder), num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2,
        max_completion_length=8, learning_rate=1e-2, beta=0.1, bf16=dtype == "bfloat16", use_cpu=True,
        report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": dtype},
    )  # fmt: skip
    return AudioGRPOTrainer(str(small_model), [length_reward], args, load_train_dataset(questions), **kwargs)


def logged(trainer) -> list[dict]:
    return [
        {key: value for key, value in entry.items() if "time" not in key and "second" not in key}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_weights_are_on_the_device_in_its_own_pass_alone(small_model, questions, tmp_path, monkeypatch, dtype):
    plain = make_trainer(small_model, questions, tmp_path, dtype)
    plain.train()
    device = OtherDevice()
    monkeypatch.setattr(reference, "to_device", device.copy)
    trainer = make_trainer(small_model, questions, tmp_path, dtype, ref_offload=True)
    weights = list(trainer.ref_model.parameters())
    assert {parameter.dtype for parameter in weights} == {getattr(torch, dtype)}
    passes = {"policy": 0, "reference": 0}

    def in_references_pass(*args):
        passes["reference"] += 1
        assert {parameter.data_ptr() for parameter in weights} == device.addresses
        assert len(device.addresses) == len(weights)

    def in_any_other(*args):
        passes["policy"] += 1
        assert not device.addresses

    trainer.ref_model.model.register_forward_hook(in_references_pass)
    trainer.model.model.language_model.register_forward_hook(in_any_other)  # rollouts, too
    trainer.train()
    assert passes["reference"] == 4 and passes["policy"] > 4
    assert device.copied == 2 * len(weights), "once for each batch of rollouts, and nothing is copied back"
    assert not device.addresses
    assert logged(trainer) == logged(plain) and logged(plain)[1]["kl"] > 0


def test_the_weights_leave_the_device_after_an_error_too(monkeypatch):
    device = OtherDevice()
    monkeypatch.setattr(reference, "to_device", device.copy)
    model = torch.nn.Linear(3, 2)
    waiting = reference.WaitingReference(model, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of memory"), waiting.fetched():
        assert len(device.addresses) == 2
        raise RuntimeError("out of memory")
    assert not device.addresses and model.weight.shape == (2, 3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--beta 0", "--ref_offload true with --beta 0: .* no reference"),
        (
            "--use_peft true",
            "--ref_offload true with --use_peft true: the reference is the model with its adapters off",
        ),
        ("--sync_ref_model true", "--ref_offload true with --sync_ref_model true"),
        ("--deepspeed conf/ds_zero3.json", "--ref_offload true with ZeRO-3: .* CONFIG=conf/ds_zero3_offload.json"),
        ("--deepspeed conf/ds_zero2.json", None),
    ],
)
def test_where_there_is_no_whole_reference_that_stays_as_it_is(tmp_path, monkeypatch, flags, said):
    from transformers.integrations import deepspeed

    if "deepspeed" in flags:
        pytest.importorskip("deepspeed")
    monkeypatch.chdir(ROOT)
    words = ["--use_cpu", "true", "--output_dir", str(tmp_path), "--ref_offload", "true", *flags.split()]
    try:
        if said is None:
            assert train.make_parser().parse_args_and_config(words)[2].ref_offload
            return
        with pytest.raises(ValueError, match=said) as error:
            train.make_parser().parse_args_and_config(words)
        assert "\n" not in str(error.value)
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_the_trainer_refuses_it_as_well(small_model, questions, tmp_path):
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True, beta=0.0)
    with pytest.raises(ValueError, match="--ref_offload true with --beta 0"):
        AudioGRPOTrainer(str(small_model), [length_reward], args, load_train_dataset(questions), ref_offload=True)
