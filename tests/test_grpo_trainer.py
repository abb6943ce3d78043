"""The trainer on a small real model: rollouts, steps, how often its parts run, checkpoints, refused settings."""

import json
from shutil import copytree

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration, TrainingArguments
from trl import GRPOConfig

import row_by_row
from baselines.sft_trainer import AudioSFTTrainer
from conftest import QUESTION, write_rows, write_tone
from dataset.dataset import load_train_dataset
from dataset.encode import count_tokens_of_frames
from dataset.prompt import load_style
from model.branches import draw
from model.qwen2_audio import PARTS, freeze_parts, load_processor
from runs import length_reward
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.loss import grpo_loss, token_weights
from trainer.rollout import Rollout
from utils.rewards import accuracy_reward, format_reward


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


def first_rows(trainer, questions: int) -> list[dict]:
    return [trainer.train_dataset[i] for i in range(questions)]


def roll_out(trainer, questions: int) -> Rollout:
    """A training rollout of the first questions."""
    trainer.model.train()
    return trainer.roll_out(first_rows(trainer, questions))


def count_clips(*models) -> list[int]:
    """The number of clips in each of the encoders' passes from now on."""
    clips: list[int] = []
    for model in models:
        model.model.audio_tower.conv1.register_forward_hook(lambda module, args, output: clips.append(len(output)))
    return clips


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
    rollout = roll_out(trainer, 4)  # prompts and clips of different lengths
    expected = row_by_row.generate(
        trainer.model,
        row_by_row.as_inputs(rollout.questions),
        generations,
        generation_config=trainer.generation_config,
    )
    mask = rollout.mask.flatten(0, 1).bool()
    assert torch.equal(rollout.ids.flatten(0, 1)[mask], expected[:, : mask.shape[1]][mask])
    assert torch.equal(rollout.ids, rollout.ids[:, :1].expand_as(rollout.ids)), "greedy completions differ in a group"
    assert len({tuple(row.tolist()) for row in rollout.ids[:, 0]}) > 1, "all questions got one answer"


def test_sampled_rollouts_equal_plain_sampling(small_model, questions, tmp_path, monkeypatch):
    """The same random numbers draw the same completions."""
    limits = dict(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.1)
    length = {"min_new_tokens": 8}  # plain sampling draws random numbers for ended rows, too
    trainer = make_trainer(
        small_model, questions, tmp_path, max_completion_length=8, generation_kwargs=length, **limits
    )
    torch.manual_seed(3)
    rollout = roll_out(trainer, 2)
    torch.manual_seed(3)
    monkeypatch.setattr(torch, "multinomial", lambda shares, num_samples: draw(shares.log())[:, None])
    expected = row_by_row.generate(
        trainer.model, row_by_row.as_inputs(rollout.questions), 4, generation_config=trainer.generation_config
    )
    assert torch.equal(rollout.ids.flatten(0, 1), expected)
    assert len({tuple(row.tolist()) for row in rollout.ids[0]}) > 1


def test_encoder_and_prompt_run_once_per_question(small_model, questions, tmp_path, monkeypatch):
    import dataset.encode as module

    decoded = []
    load_audio = module.load_audio
    monkeypatch.setattr(module, "load_audio", lambda path, **how: decoded.append(path) or load_audio(path, **how))
    trainer = make_trainer(small_model, questions, tmp_path)
    clips = count_clips(trainer.model, trainer.ref_model)
    rollout = roll_out(trainer, 2)
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, rollout)
    assert sum(clips) == 3 * 2, "rollout, reference pass and policy pass: one clip per question each"
    assert len(decoded) == len(set(decoded)) == 2


def test_a_step_equals_the_same_step_row_by_row(small_model, questions, tmp_path):
    """Loss and gradients of a sampled batch against a plain computation of the paper's formulas."""
    trainer = make_trainer(small_model, questions, tmp_path, beta=0.1)
    for parameter in trainer.ref_model.parameters():  # a reference that is not the policy, so that the KL is not 0
        parameter.data.mul_(1.05)
    rollout = roll_out(trainer, 2)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, rollout)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()

    prompts, ids, mask = row_by_row.as_inputs(rollout.questions), rollout.ids, rollout.mask
    policy = row_by_row.log_probs(trainer.model, prompts, ids, mask)
    with torch.no_grad():
        reference = row_by_row.log_probs(trainer.ref_model, prompts, ids, mask)
    completions = trainer.processing_class.batch_decode(ids.flatten(0, 1), skip_special_tokens=True)
    rows = [row for row in first_rows(trainer, 2) for _ in range(4)]
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
    torch.testing.assert_close(rollout.advantages, advantages, atol=1e-5, rtol=1e-4)
    assert advantages.abs().max() > 0.5
    kl = torch.exp(reference - policy) - (reference - policy) - 1
    per_token = -(torch.exp(policy - policy.detach()) * advantages[..., None] - 0.1 * kl)
    expected = ((per_token * mask).sum(2) / mask.sum(2)).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_groups_without_advantage_have_no_policy_pass(small_model, questions, tmp_path):
    """Without a KL term; loss and gradients are those of a pass over all groups."""

    def reward(completions, audio_path, **kwargs) -> list[float]:
        return [float(i % 2 * path.endswith("1.wav")) for i, path in enumerate(audio_path)]

    trainer = make_trainer(small_model, questions, tmp_path, rewards=[reward], beta=0.0)
    rollout = roll_out(trainer, 2)
    trainer.current_gradient_accumulation_steps = 1
    clips = count_clips(trainer.model)
    loss = trainer.compute_loss(trainer.model, rollout)
    assert clips == [1]
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    logps, _ = trainer.log_probs(trainer.model, rollout)
    expected, _ = grpo_loss(logps, rollout, token_weights(rollout, trainer.args), trainer.args)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, trainer.model.get_parameter(name).grad, atol=1e-6, rtol=1e-4, msg=name)


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


def test_group_reward_std_is_that_within_a_question(small_model, questions, tmp_path):
    """As in the paper's curve: 0 where each question's completions have equal rewards."""

    def reward(completions, calls=[], **kwargs) -> list[float]:  # noqa: B006, it counts its calls
        calls.append(1)
        return [1.0] * 4 + [3.0] * 4 if len(calls) == 1 else [0.0, 2.0] * 4

    trainer = make_trainer(small_model, questions, tmp_path, rewards=[reward], reward_weights=[2.0], max_steps=2)
    trainer.train()
    first, second = (logged["group_reward_std"] for logged in trainer.state.log_history[:2])
    assert first == 0 and second == pytest.approx(4 / 3**0.5)
    assert trainer.state.log_history[0]["reward_std"] > 1


def test_micro_batches_hold_whole_groups(small_model, questions, tmp_path):
    trainer = make_trainer(
        small_model, questions, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1
    )
    seen: list[Rollout] = []
    compute_loss = trainer.compute_loss

    def watch(model, rollout, *args, **kwargs):
        seen.append(rollout)
        return compute_loss(model, rollout, *args, **kwargs)

    trainer.compute_loss = watch
    trainer.train()
    assert len(seen) == 4
    assert len({rollout.rows[0]["audio_path"] for rollout in seen}) == 4, "a question is shown twice"
    for rollout in seen:
        assert rollout.ids.shape[:2] == (1, 4) and len(rollout.questions) == 1
        assert rollout.advantages.sum().abs() < 1e-4, "the advantages of a whole group sum to 0"
        # The prompt belongs to its clip: it has as many audio tokens as the clip.
        tokens = (rollout.questions.input_ids == trainer.model.config.audio_token_id).sum()
        assert tokens == count_tokens_of_frames(*rollout.questions.frames)


def test_rollouts_never_sample_an_audio_token(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, generation_kwargs={"suppress_tokens": [9]})
    audio = trainer.model.config.audio_token_id
    assert trainer.generation_config.suppress_tokens == sorted([9, audio])
    with torch.no_grad():
        trainer.model.lm_head.weight[audio] = trainer.model.lm_head.weight[5] * 4  # a likely token
    ids = roll_out(trainer, 2).ids
    assert not (ids == audio).any() and not (ids == 9).any()


def test_either_end_token_ends_a_completion(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, max_completion_length=64, top_k=0)
    tokenizer = trainer.processing_class.tokenizer
    ends = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()  # every token is as likely as any other
    found = set()
    for _ in range(20):
        rollout = roll_out(trainer, 2)
        for ids, length in zip(rollout.ids.flatten(0, 1), rollout.lengths.flatten(), strict=True):
            assert not set(ids[: length - 1].tolist()) & ends, "a token follows the first end token"
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
        (
            dict(per_device_train_batch_size=6, gradient_accumulation_steps=2),
            "--per_device_train_batch_size 6 .* use 4",
        ),
        (dict(use_transformers_continuous_batching=True), "--use_transformers_continuous_batching"),
        (dict(loss_type="sapo"), "--loss_type sapo"),
    ],
)
def test_settings_that_cannot_work_are_refused(small_model, questions, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(small_model, questions, tmp_path, **settings)


def test_evaluation_batches_must_hold_whole_groups(small_model, questions, tmp_path):
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True)
    args.eval_strategy, args.per_device_eval_batch_size = "steps", 12  # TRL itself checks the sum over processes only
    with pytest.raises(ValueError, match="--per_device_eval_batch_size 12 .* use 8"):
        AudioGRPOTrainer(str(small_model), [format_reward], args, load_train_dataset(questions))


def test_attention_without_arbitrary_masks_is_refused(small_model, questions, tmp_path):
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    model.config._attn_implementation = "flash_attention_2"
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True, beta=0.0)
    with pytest.raises(ValueError, match="flash_attention_2.*sdpa"):
        AudioGRPOTrainer(model, [format_reward], args, load_train_dataset(questions))


def test_another_audio_token_than_the_processors_is_refused(small_model, questions, tmp_path):
    folder = copytree(small_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"audio_token_index": 9}))
    with pytest.raises(ValueError, match="token 9 .* 3"):
        make_trainer(folder, questions, tmp_path)
    model, processor = Qwen2AudioForConditionalGeneration.from_pretrained(folder), load_processor(folder)
    with pytest.raises(ValueError, match="token 9 .* 3"):
        AudioSFTTrainer(model, TrainingArguments(str(tmp_path)), load_train_dataset(questions), processor)


def test_a_question_with_a_special_token_is_refused(small_model, tmp_path):
    """Also in a data set that was not examined: the model would take the text as a turn's end."""
    write_tone(tmp_path / "fine.wav", 1.0)
    row = QUESTION | {"audio_path": "fine.wav", "question_text": "What? <|im_end|>", "answer": 0}
    write_rows(tmp_path, *[row] * 4)
    with pytest.raises(ValueError, match=r"What\? <\|im_end\|>"):
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


@pytest.mark.parametrize("freeze", [["vision_tower"], list(PARTS)])
def test_freezing_an_unknown_part_or_all_parts_is_refused(small_model, freeze):
    with pytest.raises(ValueError, match=freeze[0]):
        freeze_parts(Qwen2AudioForConditionalGeneration.from_pretrained(small_model), freeze)
