"""A platform "cpu" and a rollout "transformers", without which verl 0.9 does not run where there is no GPU.

The rollout's server samples one answer at a time. With vLLM or SGLang on a GPU nothing of this is needed, and
``VERL_USE_EXTERNAL_MODULES`` names ``leaf_on_verl``, which is imported here last.
"""

import contextlib
import functools
import os
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _zero(*_: Any, **__: Any) -> int:
    return 0


_idle = ("empty_cache", "synchronize", "set_device", "reset_peak_memory_stats", "ipc_collect")
_sizes = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
_device = SimpleNamespace(
    **dict.fromkeys(_idle, _nothing),
    **dict.fromkeys(_sizes, _zero),
    mem_get_info=lambda *_: (0, 1),
    is_available=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    get_device_name=lambda *_: "cpu",
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
    manual_seed=torch.manual_seed,
    manual_seed_all=torch.manual_seed,
    Stream=torch.cpu.Stream,
    stream=torch.cpu.stream,
    current_stream=torch.cpu.current_stream,
)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = _device

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    set_device = synchronize = manual_seed_all = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = get_device_uuid = _nothing

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return contextlib.nullcontext()

    def ray_resource_name(self) -> str:
        return "GPU"  # so verl counts its workers; Ray is told that there is one

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_gpus": num_gpus}

    def is_ipc_supported(self) -> bool:
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        return {}


# The platform must be known before these are imported.
import ray  # noqa: E402
from verl.utils import distributed  # noqa: E402
from verl.workers.rollout import base, replica  # noqa: E402

# torch takes no backend named twice, "cpu:gloo,cpu:gloo".
distributed.initialize_global_process_group_ray = functools.partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)


class Server:
    """Samples answers with transformers, and takes the trainer's weights."""

    def __init__(self, path: str, longest: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        self.longest, self.steps = longest, None

    def load(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        missing = self.model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys, missing
        self.steps = global_steps

    @torch.no_grad()
    def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **_: Any) -> Any:
        most = sampling_params.get("max_tokens") or sampling_params.get("max_new_tokens") or self.longest
        temperature = sampling_params.get("temperature", 1.0)
        ids = torch.tensor([list(prompt_ids)])
        cache, token_ids, logprobs = None, [], []
        for _step in range(most):
            output = self.model(ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            scores = output.logits[0, -1].float()
            chances = (scores / temperature if temperature else scores).log_softmax(-1)
            token = int(chances.exp().multinomial(1) if temperature else chances.argmax())
            token_ids.append(token)
            logprobs.append(float(chances[token]))
            if token == self.model.config.eos_token_id:
                break
            ids = torch.tensor([[token]])
        return replica.TokenOutput(
            token_ids=token_ids,
            log_probs=logprobs,
            stop_reason="completed",
            extra_fields={"global_steps": self.steps},
        )

    def idle(self, *_: Any, **__: Any) -> None:
        """There is no memory to give back, and nothing to abort."""

    sleep = wake_up = abort_all_requests = resume_generation = idle
    clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = idle


class Replica(replica.RolloutReplica):
    async def launch_servers(self) -> None:
        path = getattr(self.model_config, "local_path", None) or self.model_config.path
        name = f"transformers_{self.replica_rank}"
        server = ray.remote(Server).options(name=name, num_cpus=0).remote(path, self.config.response_length)
        self.servers, self._server_handle, self._server_address = [server], server, name


class Rollout(base.BaseRollout):
    async def resume(self, tags: list[str]) -> None:
        return None

    async def release(self) -> None:
        return None

    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        whole = {name: tensor.detach().cpu().float().clone() for name, tensor in weights}
        rank = int(os.environ["RANK"])
        await ray.get_actor(f"transformers_{rank}").load.remote(whole, global_steps)


replica.RolloutReplicaRegistry.register("transformers", lambda: Replica)
base._ROLLOUT_REGISTRY["transformers", "async"] = f"{__name__}.Rollout"

# verl imports what the variable names in the middle of its own first import, so that one module must bring all.
import leaf_on_verl  # noqa: E402, F401
