"""Checkpoints that load by themselves, for both trainers.

Saved are the weights under the base checkpoint's tensor names whatever engine trained them, the processor's files as
they came, and the prompt style; so loaded to resume. A checkpoint gets its name when it is whole and on the disk.
Optimizer state and engines are left to transformers' `Trainer`; what a run needs to go on is `resume.py`'s.
"""

import os
import shutil
from functools import partial
from pathlib import Path

from peft import PeftModel
from transformers.trainer_utils import SchedulerType, rotate_checkpoints

from dataset.prompt import save_style
from model.checkpoints import complete_checkpoint, keep_base_names
from model.qwen2_audio import base_model

from .resume import PARTIAL, STATE, checkpoints_in, drop_state, move_files, record_state
from .room import check_room, write_together
from .universal import count_parts, load_other_parts

BY_RESULT = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # schedules that wait for an evaluation


class SelfContainedCheckpoints:
    """Mixin, to stand before the trainer class; expects its `processing_class` to be the processor."""

    prompt_style: str | None = None  # recorded in every checkpoint; None: no record
    run_settings: dict | None = None  # recorded in every checkpoint with training state; None: any may go on
    _unfinished: Path | None = None  # stands for the output folder while a checkpoint is written
    _saved: str | None = None  # the last checkpoint of this process

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint under another name, see that it is on the disk, and give it its own: whoever is killed in
        between leaves the checkpoints as they were. Older ones then lose their training state, as the arguments say.
        """
        out = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        if self._saved == name:  # asked for by the step and by the epoch's end, or before and after an evaluation
            self._update_state(out / name)
            return
        if self.accelerator.is_local_main_process:
            shutil.rmtree(out / PARTIAL, ignore_errors=True)
        needed = check_room(self, out / name)
        write = partial(super()._save_checkpoint, model, trial)  # where `_unfinished` says
        waits = self.is_deepspeed_enabled or bool(self.state.best_global_step)
        self._unfinished = out / PARTIAL
        try:
            write_together(self, out / name, out / PARTIAL, needed, write, waits)
        finally:
            self._unfinished = None
        if self.state.best_model_checkpoint == str(out / PARTIAL / name):  # as Trainer saw it
            self.state.best_model_checkpoint = str(out / name)

        def finish() -> None:
            if self.args.should_save:  # on each node, where they have disks of their own
                self.state.save_to_json(str(out / PARTIAL / name / STATE))
                self._finish_checkpoint(out / PARTIAL / name, out / name)

        write_together(self, out / name, out / PARTIAL, needed, finish)
        if self.args.should_save:  # only now: a state that another node cannot go on from replaces none
            self._drop_older(out / name)
        self._saved = name

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler: bool = False) -> dict[str, float]:
        """Evaluate a step after its checkpoint, if it has one, is saved: an evaluation takes long and may fail.
        A schedule that goes by the evaluation's result is part of the checkpoint, which then must wait for it."""
        if self.control.should_save and self.args.lr_scheduler_type not in BY_RESULT:
            self._save_checkpoint(self.model, trial)
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _update_state(self, checkpoint: Path) -> None:
        """Put what has been logged since, and which checkpoint is the best one, into one that is there."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
        if self.args.should_save and checkpoint.is_dir():  # others may have moved it away
            written = checkpoint.parent / PARTIAL
            written.mkdir(exist_ok=True)
            self.state.save_to_json(str(written / STATE))
            sync(written)
            move_files(written, checkpoint)
        self.accelerator.wait_for_everyone()

    def _finish_checkpoint(self, written: Path, checkpoint: Path) -> None:
        if not self.args.save_only_model:
            record_state(written, self.run_settings or {})
        sync(written)
        if checkpoint.is_dir():  # one that was passed over for a damage, or of the same step
            shutil.rmtree(checkpoint)
        os.rename(written, checkpoint)
        sync(checkpoint.parent, files=False)
        shutil.rmtree(written.parent, ignore_errors=True)

    def _drop_older(self, checkpoint: Path) -> None:
        if getattr(self.args, "keep_optimizer", "all") != "all":
            for other in checkpoints_in(checkpoint.parent):
                if other != checkpoint:
                    drop_state(other)
        # Trainer's own call found but one checkpoint, the unfinished. Dropping state changes a folder's time.
        rotate_checkpoints(
            str(checkpoint.parent), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights, processor and prompt style: what AutoProcessor and the model class load by themselves."""
        base = base_model(self.model)
        keep_base_names(base)
        if self.args.save_on_each_node:
            base.should_save_on_this_rank = bool  # of what `Trainer` says; by itself it is the first process alone
        # Set aside, the processor is not saved by `Trainer`, which would write it anew.
        processor, self.processing_class = self.processing_class, None
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self.processing_class = processor
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            if self.prompt_style is not None:
                save_style(folder, self.prompt_style)
            complete_checkpoint(folder, processor)

    def save_result(self) -> None:
        """Save the trained model into the output folder, where its files replace others when all are on the disk."""
        out = Path(self.args.output_dir)
        needed = check_room(self, out / "model", state=False)

        def finish() -> None:
            if self.args.should_save:
                sync(out / PARTIAL)
                move_files(out / PARTIAL, out)

        write = partial(self.save_model, str(out / PARTIAL))
        write_together(self, out / "model", out / PARTIAL, needed, write, waits=self.is_deepspeed_enabled)
        write_together(self, out / "model", out / PARTIAL, needed, finish)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Load weights to resume from. The checkpoint's names are the base model's, which `Trainer` would not find in
        transformers 5's model, warn, and go on from the base weights."""
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype, use_safetensors=True)
            model.load_state_dict(saved.state_dict())

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Set up the engine and load its state, which as many processes wrote as there are, or others."""
        checkpoint = resume_from_checkpoint and Path(resume_from_checkpoint)
        if not (checkpoint and self.is_deepspeed_enabled and count_parts(checkpoint) not in (0, self.args.world_size)):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        load_other_parts(self, checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)  # the schedule alone, under DeepSpeed
        return prepared

    def _run_epoch(self, *, epoch: int, train_dataloader, **kwargs) -> None:
        """Train an epoch, its sampler told which. accelerate does not reach through the wrapper that skips the batches
        of a resumed epoch, if there are several processes: the questions would come in the first epoch's order."""
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _load_best_model(self) -> None:
        """For `load_best_model_at_end`, where no engine loads: as `_load_from_checkpoint`."""
        if self.is_deepspeed_enabled or isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def sync(folder: Path, files: bool = True) -> None:
    """Have the system write a folder to the disk: its entries, and all that is below it unless not `files`."""
    for path in [*(folder.rglob("*") if files else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
