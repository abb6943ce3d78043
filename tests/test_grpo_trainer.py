"""The trainer on a small real model: rollouts, steps, what runs how often, checkpoints, and what is refused."""

import json
from shutil import copytree

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration, TrainingArguments
from trl import GRPOConfig

import row_by_row
from ask import ask
from conftest import QUESTION, write_tone
from dataset.dataset import load_train_dataset
from dataset.prompt import load_style
from dataset.rows import DataError
from model.branches import draw
from model.qwen2_audio import PARTS, freeze_parts, load_processor
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.sft_trainer import AudioSFTTrainer
from utils.rewards import accuracy_reward, format_reward


def length_reward(completions, **kwargs) -> list[float]:
    """Differs within most groups, also for a model that knows nothing: the share of letters before the middle."""
    return [sum(c < "n" for c in text) / max(len(text), 1) for text in completions]


def make_trainer(model, data, output_dir, style="answer", rewards=None, **settings) -> AudioGRPOTrainer:
    defaults = dict(
        num_generations=4, per_device_train_batch_size=8, max_completion_length=8, beta=0.04, learning_rate=1e-3,
        loss_type="grpo", use_bias_correction_kl=False, bf16=False, use_cpu=True, report_to="none", logging_steps=1,
        activation_checkpointing=False, top_k=50,
    )  # fmt: skip
    return AudioGRPOTrainer(
        str(model),
        rewards or [accuracy_reward, format_reward, length_reward],
        args=GRPOConfig(str(output_dir), **defaults | settings),
        train_dataset=data if isinstance(data, Dataset) else load_train_dataset(data, style),
    )


def first_rows(trainer, questions: int, generations: int) -> list[dict]:
    return [trainer.train_dataset[i] for i in range(questions) for _ in range(generations)]


@pytest.fixture
def count_calls():
    """Counts the forward passes of a module, and the rows of each."""
    handles, rows = [], []

    def watch(module, argument):
        def hook(module, args, kwargs, output):
            value = kwargs.get(argument, args[0] if args else None)
            rows.append(len(value))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return rows

    yield watch
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("generations", [2, 5])
def test_greedy_rollouts_equal_plain_generate(small_model, questions, tmp_path, generations):
    greedy = dict(generation_kwargs={"do_sample": False})
    trainer = make_trainer(
        small_model,
        questions,
        tmp_path,
        num_generations=generations,
        per_device_train_batch_size=4 * generations,
        **greedy,
    )
    trainer.model.train()
    output = trainer._generate_and_score_completions(first_rows(trainer, 4, generations))  # ragged prompts and clips
    expected = row_by_row.generate(
        trainer.model,
        row_by_row.as_inputs(trainer._questions),
        generations,
        generation_config=trainer.generation_config,
    )
    mask = output["completion_mask"].flatten(0, 1).bool()
    assert torch.equal(output["completion_ids"].flatten(0, 1)[mask], expected[:, : mask.shape[1]][mask])
    first_of_group = output["completion_ids"][:, :1].expand_as(output["completion_ids"])
    assert torch.equal(output["completion_ids"], first_of_group), "greedy completions of a group are the same"
    assert len({tuple(row.tolist()) for row in output["completion_ids"][:, 0]}) > 1, "all questions got one answer"


def test_sampled_rollouts_equal_plain_sampling(small_model, questions, tmp_path, monkeypatch):
    """The same random numbers draw the same completions: the distribution, and what limits it, are the same."""
    limits = dict(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.1)
    length = {"min_new_tokens": 8}  # no row leaves, whose random numbers the plain way would go on to draw
    trainer = make_trainer(
        small_model, questions, tmp_path, max_completion_length=8, generation_kwargs=length, **limits
    )
    trainer.model.train()
    torch.manual_seed(3)
    output = trainer._generate_and_score_completions(first_rows(trainer, 2, 4))
    torch.manual_seed(3)
    monkeypatch.setattr(torch, "multinomial", lambda shares, num_samples: draw(shares.log())[:, None])
    expected = row_by_row.generate(
        trainer.model, row_by_row.as_inputs(trainer._questions), 4, generation_config=trainer.generation_config
    )
    assert torch.equal(output["completion_ids"].flatten(0, 1), expected)
    assert len({tuple(row.tolist()) for row in output["completion_ids"][0]}) > 1


def test_encoder_and_prompt_run_once_per_question(small_model, questions, tmp_path, count_calls, monkeypatch):
    import dataset.encode as module

    decoded = []
    load_audio = module.load_audio
    monkeypatch.setattr(module, "load_audio", lambda path, *rest: decoded.append(path) or load_audio(path, *rest))
    trainer = make_trainer(small_model, questions, tmp_path)
    trainer.model.train()
    policy = count_calls(trainer.model.model.audio_tower.conv1, "input")
    reference = count_calls(trainer.ref_model.model.audio_tower.conv1, "input")
    assert policy is reference
    output = trainer._generate_and_score_completions(first_rows(trainer, 2, 4))
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, output)
    assert sum(policy) == 3 * 2, "rollout, reference pass and policy pass: one encoder row per question each"
    assert len(decoded) == len(set(decoded)) == 2


def test_a_step_equals_the_same_step_row_by_row(small_model, questions, tmp_path):
    """Loss and gradients of a sampled batch against a plain computation of the paper's formulas."""
    trainer = make_trainer(small_model, questions, tmp_path, beta=0.1)
    for parameter in trainer.ref_model.parameters():  # a reference that is not the policy, so that the KL is not 0
        parameter.data.mul_(1.05)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(first_rows(trainer, 2, 4))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()

    prompts, ids, mask = row_by_row.as_inputs(trainer._questions), batch["completion_ids"], batch["completion_mask"]
    policy = row_by_row.log_probs(trainer.model, prompts, ids, mask)
    with torch.no_grad():
        reference = row_by_row.log_probs(trainer.ref_model, prompts, ids, mask)
    completions = trainer.processing_class.batch_decode(ids.flatten(0, 1), skip_special_tokens=True)
    rows = first_rows(trainer, 2, 4)
    rewards = torch.tensor(
        [
            sum(values)
            for values in zip(
                accuracy_reward(completions, [row["solution"] for row in rows]),
                format_reward(completions, [row["style"] for row in rows]),
                length_reward(completions),
                strict=True,
            )
        ]
    ).view(2, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"], advantages, atol=1e-5, rtol=1e-4)
    assert advantages.abs().max() > 0.5
    kl = torch.exp(reference - policy) - (reference - policy) - 1
    per_token = -(torch.exp(policy - policy.detach()) * advantages[..., None] - 0.1 * kl)
    expected = ((per_token * mask).sum(2) / mask.sum(2)).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_training_changes_the_encoder_but_not_its_positions(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, max_steps=2, gradient_accumulation_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    still = set(before) - changed
    assert "model.audio_tower.embed_positions.weight" in still
    assert {"model.audio_tower.conv1.weight", "model.multi_modal_projector.linear.weight", "lm_head.weight"} <= changed
    assert all("embed" in name for name in still), still  # token embeddings may miss a row, but not as a whole
    logged = trainer.state.log_history[0]
    for key in ("loss", "grad_norm", "reward", "reward_std", "kl", "entropy", "completions/mean_length", "step_time"):
        assert key in logged
    assert logged["grad_norm"] > 0


def test_the_spread_that_is_logged_is_that_within_a_question(small_model, questions, tmp_path):
    """As the paper's curve; two questions of other rewards, but each with equal ones, have none."""

    def reward(completions, calls=[], **kwargs) -> list[float]:  # noqa: B006, it counts its calls
        calls.append(1)
        return [1.0] * 4 + [3.0] * 4 if len(calls) == 1 else [0.0, 2.0] * 4

    trainer = make_trainer(small_model, questions, tmp_path, rewards=[reward], reward_weights=[2.0], max_steps=2)
    trainer.train()
    first, second = (logged["group_reward_std"] for logged in trainer.state.log_history[:2])
    assert first == 0 and second == pytest.approx(4 / 3**0.5)
    assert trainer.state.log_history[0]["reward_std"] > 1


def test_a_clip_that_fails_in_training_is_named_and_its_question_replaced(small_model, tmp_path, caplog):
    for i in range(4):
        write_tone(tmp_path / f"{i}.wav", 1.0 + 0.1 * i)
    rows = [QUESTION | {"answer": 0, "audio_path": f"{i}.wav"} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = make_trainer(
        small_model, tmp_path / "train.jsonl", tmp_path / "out", gradient_accumulation_steps=2, max_steps=1
    )
    (tmp_path / "2.wav").write_text("the disk has failed since the run began")
    trainer.train()
    assert "2.wav: not an audio file" in caplog.text
    assert trainer.state.log_history[0]["clips/replaced"] >= 1
    for i in range(4):
        (tmp_path / f"{i}.wav").unlink()
    with pytest.raises(DataError, match="11 clips in a row.*no such audio file"):
        trainer._generate_and_score_completions(first_rows(trainer, 2, 4))


def test_groups_stay_whole_through_trls_shuffle(small_model, questions, tmp_path):
    trainer = make_trainer(
        small_model, questions, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1
    )
    seen = []
    compute_loss = trainer._compute_loss

    def watch(model, inputs):
        seen.append(dict(inputs))
        return compute_loss(model, inputs)

    trainer._compute_loss = watch
    trainer.train()
    assert len(seen) == 4
    for batch in seen:
        assert batch["completion_ids"].shape[:2] == (1, 4) and len(batch["input_features"]) == 1
        assert (batch["prompt_ids"] == batch["prompt_ids"][:, :1]).all(), "one prompt in a group"
        assert batch["advantages"].sum().abs() < 1e-4, "the advantages of a whole group sum to 0"
    features = torch.cat([batch["input_features"] for batch in seen])
    assert len(features.flatten(1).unique(dim=0)) == 4, "four different clips, none shown twice"
    for batch in seen:  # each prompt beside its own clip: as many audio tokens as the clip has
        tokens = (batch["prompt_ids"][0, 0] == trainer.model.config.audio_token_id).sum()
        (frames,) = batch["frames"]
        assert tokens == ((frames - 1) // 2 + 1 - 2) // 2 + 1
        assert batch["tokens"] == [batch["completion_mask"].sum()]


def test_rollouts_never_sample_an_audio_token(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, generation_kwargs={"suppress_tokens": [9]})
    audio = trainer.model.config.audio_token_id
    assert trainer.generation_config.suppress_tokens == sorted([9, audio])
    with torch.no_grad():
        trainer.model.lm_head.weight[audio] = trainer.model.lm_head.weight[5] * 4  # a model that would love to
    trainer.model.train()
    output = trainer._generate_and_score_completions(first_rows(trainer, 2, 4))
    assert not (output["completion_ids"] == audio).any() and not (output["completion_ids"] == 9).any()


def test_either_end_token_ends_a_completion(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, max_completion_length=64, top_k=0)
    tokenizer = trainer.processing_class.tokenizer
    ends = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert set(trainer.eos_token_ids) == ends
    trainer.model.train()
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()  # every token is as likely as any other
    found = set()
    for _ in range(20):
        output = trainer._generate_and_score_completions(first_rows(trainer, 2, 4))
        lengths = output["completion_mask"].sum(2)
        for ids, length in zip(output["completion_ids"].flatten(0, 1), lengths.flatten(), strict=True):
            assert not set(ids[: length - 1].tolist()) & ends, "nothing follows the first end token"
            found |= {int(ids[length - 1])} & ends
        if found == ends:
            break
    assert found == ends


def test_a_checkpoint_loads_by_itself_and_knows_its_style(small_model, questions, tmp_path):
    trainer = make_trainer(
        small_model, questions, tmp_path, style="think", max_steps=1, save_steps=1, save_only_model=True
    )
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    assert load_style(folder) == "think"
    assert set(load_file(folder / "model.safetensors")) == set(load_file(small_model / "model.safetensors"))
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder)
    for (name, saved), trained in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(saved, trained), name
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.feature_extractor.chunk_length == 2 and processor.chat_template
    assert not (folder / "optimizer.pt").exists()


def test_a_resumed_run_continues_the_interrupted_one(small_model, questions, tmp_path):
    settings = dict(max_steps=3, save_steps=2, lr_scheduler_type="constant")
    whole = make_trainer(small_model, questions, tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(small_model, questions, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, expected), found in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_evaluation_runs_on_whole_groups(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, per_device_eval_batch_size=8)
    metrics = trainer.evaluate(load_train_dataset(questions).select(range(3)))
    assert 0 <= metrics["eval_reward"] <= 3 and metrics["eval_loss"] == metrics["eval_loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(per_device_train_batch_size=6, gradient_accumulation_steps=2), "whole groups of 4: use 4"),
        (dict(use_transformers_continuous_batching=True), "cannot take audio"),
    ],
)
def test_settings_that_cannot_work_are_refused(small_model, questions, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(small_model, questions, tmp_path, **settings)


def test_evaluation_batches_must_hold_whole_groups(small_model, questions, tmp_path):
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True)
    args.eval_strategy, args.per_device_eval_batch_size = "steps", 12  # TRL itself checks the sum over processes only
    with pytest.raises(ValueError, match="per_device_eval_batch_size 12 .* use 8"):
        AudioGRPOTrainer(str(small_model), [format_reward], args, load_train_dataset(questions))


def test_attention_without_arbitrary_masks_is_refused(small_model, questions, tmp_path):
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    model.config._attn_implementation = "flash_attention_2"
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True, beta=0.0)
    with pytest.raises(ValueError, match="cannot take the mask of a shared prompt; use one of sdpa, eager"):
        AudioGRPOTrainer(model, [format_reward], args, load_train_dataset(questions))


def test_a_model_that_hears_another_token_than_its_processor_writes_is_refused(small_model, questions, tmp_path):
    folder = copytree(small_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"audio_token_index": 9}))
    with pytest.raises(ValueError, match="takes token 9 for sound .*, its processor writes 3"):
        make_trainer(folder, questions, tmp_path)
    model, processor = Qwen2AudioForConditionalGeneration.from_pretrained(folder), load_processor(folder)
    with pytest.raises(ValueError, match="takes token 9"):
        ask(model, processor, np.zeros(16_000, np.float32), "What?", ["a", "b"], "choice")
    with pytest.raises(ValueError, match="takes token 9"):
        AudioSFTTrainer(model, TrainingArguments(str(tmp_path)), load_train_dataset(questions), processor)


def test_a_question_with_a_special_token_is_refused_on_this_path_too(small_model, tmp_path):
    """A data set that nobody examined before: the text would be obeyed as a turn's end."""
    write_tone(tmp_path / "fine.wav", 1.0)
    row = QUESTION | {"audio_path": "fine.wav", "question_text": "What? <|im_end|>", "answer": 0}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 4)
    with pytest.raises(ValueError, match=r"What\? <\|im_end\|>.*special token"):
        make_trainer(small_model, tmp_path / "train.jsonl", tmp_path / "out", max_steps=1).train()


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (["audio_encoder"], {"audio_tower"}),
        (["projector", "language_model"], {"multi_modal_projector", "language_model", "lm_head"}),
    ],
)
def test_frozen_parts_stay_bit_identical_and_the_rest_changes(small_model, questions, tmp_path, freeze, frozen):
    args = GRPOConfig(
        str(tmp_path), num_generations=4, per_device_train_batch_size=8, max_completion_length=8, learning_rate=1e-3,
        bf16=False, use_cpu=True, report_to="none", max_steps=2, weight_decay=0.1,
    )  # fmt: skip
    trainer = AudioGRPOTrainer(str(small_model), [length_reward], args, load_train_dataset(questions), freeze=freeze)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        still = bool(frozen & set(name.split("."))) or "embed_positions" in name
        assert torch.equal(parameter, before[name]) == still, name


@pytest.mark.parametrize(("freeze", "message"), [(["ears"], "cannot freeze ears"), (list(PARTS), "nothing to train")])
def test_freezing_what_is_not_there_or_everything_is_refused(small_model, freeze, message):
    with pytest.raises(ValueError, match=message):
        freeze_parts(Qwen2AudioForConditionalGeneration.from_pretrained(small_model), freeze)
