"""What a training run attaches to the algorithm. Without the call of `attach` the same algorithm runs bare. To omit an
attachment, remove its line here; `startup.py` needs `KeepCheckpoints` and `StopOnSignal`."""

from transformers import Trainer

from dataset.questions import Benchmark
from model.qwen2_audio import base_model


def attach(trainer: Trainer, settings: dict, eval_questions: Benchmark | None = None, rounds: int = 0) -> None:
    """Attach to a trainer what its arguments ask for, by callbacks and by wrapping its public attributes.

    Args:
        trainer: `AudioGRPOTrainer` or `AudioSFTTrainer`.
        settings: recorded in every checkpoint, and compared when the run resumes.
        eval_questions: answered greedily by `trainer.evaluate`.
        rounds: further rounds of rollouts that replace questions whose rewards are all equal.
    """
    from .accuracy import GreedyAccuracy
    from .checkpoints import KeepCheckpoints
    from .clips import replace_broken_clips
    from .console import StepLines
    from .curves import PlotCurves
    from .nonfinite import SkipNonFinite
    from .resample import resample_uniform_groups
    from .signals import StopOnSignal

    if getattr(base_model(trainer.model), "is_quantized", False):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # TRL has rounded the adapters to bfloat16, in which steps of 1e-6 are lost
                parameter.data = parameter.data.float()
    if hasattr(trainer, "generation_config"):  # raises a `ValueError` for impossible values, such as a temperature of 0
        base_model(trainer.model)._get_logits_processor(trainer.generation_config, 1)
    replace_broken_clips(trainer)
    if getattr(trainer.args, "use_vllm", False):
        from .vllm import sample_by_vllm

        sample_by_vllm(trainer)
    if rounds:
        resample_uniform_groups(trainer, rounds)
    keep = KeepCheckpoints(trainer, settings)
    if eval_questions:
        trainer.evaluate = keep.saves_first(GreedyAccuracy(trainer, eval_questions))
    for callback in (
        StopOnSignal(),
        keep,  # after the signals: it may postpone a checkpoint
        SkipNonFinite(trainer, trainer.args.max_skipped),
        StepLines(trainer),
        PlotCurves(),
    ):
        trainer.add_callback(callback)
