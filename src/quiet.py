"""Libraries that talk about themselves are silenced: their bars, notes of what is deprecated, the device they found.

What they warn of stays, once each. `--verbose true` brings all of it back.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging as transformers_logging

CHATTER = ("Setting accelerator to", "Setting ds_accelerator to")  # beginnings of DeepSpeed's lines


def silence_libraries() -> None:
    """From now on, in this process."""
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(CHATTER))
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def loading_shown() -> Iterator[None]:
    """A bar while a model is loaded, which may take minutes; on a terminal only."""
    shown = transformers_logging.is_progress_bar_enabled()
    if sys.stderr.isatty():
        transformers_logging.enable_progress_bar()
    try:
        yield
    finally:
        if not shown:
            transformers_logging.disable_progress_bar()
