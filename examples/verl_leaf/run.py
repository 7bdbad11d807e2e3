"""verl's main_ppo with LEAF, a tiny model and no GPU: ``python run.py [FOLDER] [steps=2] [settings of verl ...]``.

Needs verl 0.9 with its TransferQueue, in an environment without TRL (docs/trainers.md). Ray and verl take a minute or
two to start; then a step of 4 prompts x 4 answers takes seconds.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def make_model(folder: Path) -> None:
    """A Llama of two layers, and a tokenizer of characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    ids = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_data(file: Path, prompts: int) -> None:
    import pandas as pd

    rows = [
        {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": f"count {i}"}],
            "reward_model": {"style": "rule", "ground_truth": str(i)},
        }
        for i in range(prompts)
    ]
    pd.DataFrame(rows).to_parquet(file)


REWARD = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """The share of an answer's characters that are digits."""
    return sum(character.isdigit() for character in solution_str) / max(len(solution_str), 1)
'''


def settings(folder: Path, steps: int) -> list[str]:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        "algorithm.adv_estimator=leaf",
        "+algorithm.leaf.num_boundaries=2",
        "trainer.v1.trainer_mode=leaf_sync",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        "data.train_batch_size=4",
        "data.max_prompt_length=16",
        "data.max_response_length=16",
        "data.dataloader_num_workers=0",
        f"actor_rollout_ref.model.path={folder}/model",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        f"{actor}.strategy=fsdp2",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=16",
        f"{actor}.optim.lr=1e-3",
        f"{actor}.fsdp_config.model_dtype=fp32",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.use_torch_compile=False",
        f"{rollout}.name=transformers",
        f"{rollout}.n=4",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.agent.num_workers=1",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=16",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={folder}/reward.py",
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=1",
        "trainer.nnodes=1",
        f"trainer.total_training_steps={steps}",
        "trainer.logger=[console]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.default_local_dir={folder}/checkpoints",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "ray_kwargs.ray_init.num_cpus=8",
        "+ray_kwargs.ray_init.num_gpus=1",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "+ray_kwargs.ray_init._node_ip_address=127.0.0.1",
        "+ray_kwargs.ray_init.object_store_memory=200000000",
    ]


def main(folder: Path, steps: int, more: list[str]) -> int:
    make_model(folder / "model")
    make_data(folder / "train.parquet", 4 * steps)
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    environment = {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": "without_gpu",  # leaf_on_verl where there is a GPU
        "VERL_PLATFORM": "cpu",
        # verl has no engine for this platform; that for CUDA asks the platform for its device.
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_ENGINE_VENDOR": "nvidia",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings(folder, steps), *more]
    return subprocess.run(command, env=environment, cwd=folder, check=False).returncode


if __name__ == "__main__":
    arguments = sys.argv[1:]
    where = Path(arguments.pop(0) if arguments and "=" not in arguments[0] else tempfile.mkdtemp())
    where.mkdir(parents=True, exist_ok=True)
    count = int(arguments.pop(0).partition("=")[2]) if arguments and arguments[0].startswith("steps=") else 2
    sys.exit(main(where.resolve(), count, arguments))
