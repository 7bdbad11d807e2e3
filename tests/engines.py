"""Trainers on two processes of a CPU: DDP, FSDP2 and DeepSpeed's ZeRO over gloo.

``engines.run("fsdp2", function, *arguments)``, with the fixture ``engines``, calls a function of a module's top level
on both processes, each with its rank first, and returns what it returned on each. Whatever trainer the function makes
runs on that engine; its config needs ``**engine_settings("fsdp2")``. The processes stay, so that a case costs a second
or two. DeepSpeed is looked for where Python looks, and in the folder that ``$LEAFKERNELS_DEEPSPEED`` names.
"""

import gc
import importlib.util
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

RANKS = 2
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
SECONDS = 400


class Engines:
    """Two processes for DDP and FSDP2, and two that have imported DeepSpeed; each pair starts when it is needed."""

    def __init__(self) -> None:
        self._pairs: dict[bool, list[tuple[Any, Connection]]] = {}

    def run(self, engine: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(rank, *arguments)`` returns on each rank; what it raises fails the test."""
        is_deepspeed = engine.startswith("zero")
        if is_deepspeed and _deepspeed() is None:
            pytest.skip("needs DeepSpeed, which is not installed and not in $LEAFKERNELS_DEEPSPEED")
        if is_deepspeed not in self._pairs:
            self._pairs[is_deepspeed] = _start(is_deepspeed)
        pair = self._pairs[is_deepspeed]
        for _, pipe in pair:
            pipe.send_bytes(pickle.dumps((engine, function, arguments)))
        answers = []
        for process, pipe in pair:
            if not pipe.poll(SECONDS):
                self.close()
                raise TimeoutError(f"{function.__name__} hangs on {engine}")
            try:
                answers.append(pickle.loads(pipe.recv_bytes()))
            except (EOFError, ConnectionError) as error:
                self.close()
                raise RuntimeError(f"a process of {engine} ended in {function.__name__}: {process.exitcode}") from error
        errors = [answer for ok, answer in answers if not ok]
        if errors:
            # One rank may wait for the other in a collective call: nothing can be asked of this pair any more.
            self.close()
            raise RuntimeError(f"{function.__name__} on {engine}:\n" + "\n".join(errors))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pair in self._pairs.values():
            for process, pipe in pair:
                pipe.close()
                process.kill()
                process.join()
        self._pairs.clear()


def _deepspeed() -> str | None:
    """The folder to add to Python's path, "" for none; None: there is no DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is not None:
        return ""
    folder = os.environ.get("LEAFKERNELS_DEEPSPEED", "")
    return folder if folder and (Path(folder) / "deepspeed").is_dir() else None


def _start(is_deepspeed: bool) -> list[tuple[Any, Connection]]:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    changes = {
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    # A process gets this one's path. transformers looks for DeepSpeed when it is imported, which is before _serve.
    folders = [folder] if is_deepspeed and (folder := _deepspeed()) else []
    pair = []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(is_deepspeed, theirs), daemon=True)
        with mock.patch.dict(os.environ, changes | {"RANK": str(rank), "LOCAL_RANK": str(rank)}):
            sys.path.extend(folders)
            process.start()
            del sys.path[len(sys.path) - len(folders) :]
        theirs.close()
        pair.append((process, ours))
    return pair


def _serve(is_deepspeed: bool, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    if is_deepspeed:
        import deepspeed

        # An operation for inference, which a compiler would make for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    else:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    while True:
        try:
            engine, function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        gc.freeze()  # what has been imported stays: every training ends with a look for garbage
        try:
            with _on(engine):
                answer = True, function(rank, *arguments)
        except BaseException:
            answer = False, f"rank {rank}:\n{traceback.format_exc()}"
        gc.collect()
        pipe.send_bytes(pickle.dumps(answer))


def deepspeed_settings(stage: int) -> dict[str, Any]:
    """What ``TrainingArguments(deepspeed=)`` takes; ``engine_settings`` gives it to a config."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def engine_settings(engine: str) -> dict[str, Any]:
    """Arguments that the trainer's config needs on an engine."""
    if not engine.startswith("zero"):
        return {}
    return {"deepspeed": deepspeed_settings(int(engine[-1]))}


@contextmanager
def _on(engine: str) -> Iterator[None]:
    """Whatever Accelerator is made here is of that engine."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    settings = {"ACCELERATE_USE_CPU": "true"}
    if engine == "fsdp2":
        settings |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_SYNC_MODULE_STATES": "false",
        }
    elif engine.startswith("zero"):
        settings = {"ACCELERATE_USE_DEEPSPEED": "true"}
    make = AcceleratorState.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        if engine == "fsdp2" and not AcceleratorState._shared_state:
            # accelerate takes FSDP for devices of a list, on which a CPU is not; DDP would run without a word.
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        make(self, *args, **kwargs)

    AcceleratorState.__init__ = made  # type: ignore[method-assign]
    try:
        with mock.patch.dict(os.environ, settings):
            yield
    finally:
        AcceleratorState.__init__ = make  # type: ignore[method-assign]
        AcceleratorState._reset_state(engine == "fsdp2")
        GradientState._reset_state()
        if engine.startswith("zero"):
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()


def whole(tensor: Any) -> Any:
    """A tensor of this process, from one that FSDP2 has spread over all of them; every rank calls."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained_weights(trainer: Any) -> dict[str, Any]:
    """Name -> whole weight of all that was trained, in float64 on this process; every rank calls."""
    found = {}
    for name, weight in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if not weight.requires_grad:
            continue
        if hasattr(weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                found[name] = weight.detach().double().clone()
        else:
            found[name] = whole(weight.detach()).double().clone()
    return found
