"""The report of ``leafkernels.report`` from training with TRL, every so many steps."""

import importlib.util
import logging
import os
from typing import Any

import torch

import leafkernels
from leafkernels._core.checks import check_count

_logger = logging.getLogger(__name__)


def check_report(trainer: Any, is_own: bool) -> None:
    """Raise where ``report_every`` cannot be done; ``is_own``: the credit is that of ``estimator``."""
    every = trainer.args.report_every
    if every is None:
        return
    check_count("report_every", every, 1)
    if not is_own:
        raise ValueError(
            f"report_every must be None where {type(trainer).__name__} overrides token_advantages: the report shows "
            f"the schemes of leafkernels.ESTIMATORS; got {every}"
        )
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("report_every needs jinja2; pip install 'leafkernels[html]'")
    trainer.next_report = 0


def write_report(
    trainer: Any, call: dict[str, Any], batch: dict[str, Any], has_logprobs: bool, options: dict[str, Any]
) -> None:
    """Write ``report-STEP.html`` into ``output_dir`` on the main process, when it is due.

    Args:
        call: the arguments of the estimator: whole groups, of one process or those that this rank owns.
        batch: what TRL made; of one process it has the prompts of the same rows.
        has_logprobs: whether the log-probabilities of ``call`` are such.
        options: those of the estimator.
    """
    args, step, accelerator = trainer.args, trainer.state.global_step, trainer.accelerator
    if args.report_every is None or trainer._mode != "train" or step < trainer.next_report:
        return
    trainer.next_report = step - step % args.report_every + args.report_every
    if not accelerator.is_main_process or not len(call["rewards"]):
        return
    notes, texts = [], None
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if accelerator.num_processes == 1:
        firsts = slice(None, None, call["group_size"])
        pairs = zip(batch["prompt_ids"][firsts], batch["prompt_mask"][firsts], strict=True)
        texts = [tokenizer.decode(ids[mask.bool()].tolist(), skip_special_tokens=True) for ids, mask in pairs]
    else:
        notes.append(
            f"These are the prompts of rank 0 of {accelerator.num_processes} ranks; advantages that are normalised "
            "over a batch are shown as of these alone."
        )
    if not has_logprobs:
        call = call | {"logprobs": torch.full_like(call["logprobs"], torch.nan)}
        notes.append(f"{args.estimator} needs no log-probabilities, so that no scheme has boundaries here.")
    page = leafkernels.report(
        **call,
        tokenizer=tokenizer,
        prompts=texts,
        title=f"Step {step}",
        note=" ".join(notes),
        estimator=args.estimator,
        **options,
    )
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        page.save(os.path.join(args.output_dir, f"report-{step}.html"))
    except OSError as error:  # a full disk is no reason to lose a training
        _logger.warning("The report of step %d is missing: %s", step, error)
