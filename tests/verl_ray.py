"""A step of verl's trainer without model and GPU: ``python verl_ray.py CONFIG.yaml RESULT.json``, run by test_verl.py.

Real are Ray and its workers, the agent loops and rewards in them, TransferQueue, the replay buffer, filling and reordering
of the batch, and the trainer's advantages. Rollouts are written down here, and no weights are updated.
"""

import json
import sys

import numpy as np
import ray
import transfer_queue
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, get_trainer_cls
from verl.utils import tensordict_utils
from verl.utils.dataset.rl_dataset import collate_fn
from verl.workers.rollout.replica import TokenOutput

# What the policy says, one after the other. 3 is the answer; the judge flags what says "wrong".
SAID = ["One.\n\nwrong.\n\n#### 3", "wrong wrong.\n\n#### 4", "Fine.\n\nFine.\n\n#### 3", "So\n\nwrong #### 3"]


class WrittenDown:
    """In place of verl's client of rollout servers."""

    def __init__(self, ids):
        self.ids, self.turn = ids, 0

    async def generate(self, request_id, *, prompt_ids, sampling_params, **_):
        ids = self.ids[self.turn % len(self.ids)]
        self.turn += 1
        return TokenOutput(token_ids=ids, log_probs=[-1.0] * len(ids))


def prompts(uids, **more):
    """A batch as the trainer makes it of its data."""
    row = {
        "raw_prompt": [{"role": "user", "content": "1 + 2 = ?"}],
        "data_source": "openai/gsm8k",
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"question": "1 + 2 = ?", "answer": "1 + 2 = 3"},
    }
    batch = collate_fn([{**row, "index": index} for index in range(len(uids))])
    made = tensordict_utils.get_tensordict({**batch, "uid": np.array(uids, dtype=object)})
    for name, value in {"global_steps": 1, **more}.items():
        tensordict_utils.assign_non_tensor_data(made, name, value)
    return made


def sample(trainer, manager, uids, partition, **more):
    """Rollouts of prompts, as the trainer asks for them."""
    tags = [{"is_prompt": True, "status": "pending", "global_steps": 1} for _ in uids]
    transfer_queue.kv_batch_put(keys=uids, partition_id=partition, tags=tags)
    manager.generate_sequences(prompts(uids, **more))
    return trainer.replay_buffer.sample(global_steps=1, partition_id=partition, batch_size=len(uids))[0]


def fetch(batch, *fields):
    got = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))
    return {name: [getattr(row, "tolist", lambda row=row: row)() for row in got[name].unbind(0)]
            if hasattr(got[name], "unbind") else got[name].tolist() for name in fields}  # fmt: skip


def main(config, result):
    config = OmegaConf.load(config)
    environment = OmegaConf.to_container(config.ray_kwargs.ray_init.runtime_env)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    transfer_queue.init(config.transfer_queue)
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    rewards = RewardLoopManager(config).reward_loop_worker_handles
    tokenizer = AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path)
    client = WrittenDown([[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in SAID])
    manager = AgentLoopManagerTQ.create(config=config, llm_client=client, reward_loop_worker_handles=rewards)
    wrapped = trainer.capo_manager(manager)

    batch = sample(trainer, wrapped, ["a", "b"], "train")
    batch = upsample_batch_to_divisible_size(batch, 3, tokenizer.eos_token_id)
    batch.reorder(list(range(len(batch)))[::-1])
    fields = ["rollout_log_probs"]
    data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=fields)
    data["old_log_probs"] = data.pop("rollout_log_probs")
    transfer_queue.kv_batch_put(keys=batch.keys, partition_id="train", fields=data)
    metrics = {}
    trainer._compute_advantage(batch, metrics)
    found = fetch(batch, "uid", "responses", "response_mask", "rm_scores", "advantages")
    validated = fetch(sample(trainer, wrapped, ["v"], "val", validate=True), "extra_fields")
    told = {
        **found,
        "metrics": {name: value for name, value in metrics.items() if name.startswith("capo/")},
        "mode": trainer.trainer_mode,
        "trainer": type(trainer).__name__,
        "judged_in_validation": ["capo" in fields for fields in validated["extra_fields"]],
    }
    with open(result, "w") as file:
        json.dump(told, file)
    transfer_queue.close()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
