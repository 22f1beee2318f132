"""SkyRL's GRPO with step-level credit; the options are those of ``skyrl.train.entrypoints.main_base``."""

import sys

import ray
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils.utils import initialize_ray, validate_cfg

from capo.integrations.skyrl import JudgedGenerator, with_credit
from capo.shaping import configured_credit


class Experiment(BasePPOExp):
    def get_generator(self, *args, **kwargs):
        return JudgedGenerator(super().get_generator(*args, **kwargs), configured_credit())

    def get_trainer(self, *args, **kwargs):
        return with_credit(super().get_trainer(*args, **kwargs))


@ray.remote(num_cpus=1)
def entrypoint(cfg):
    Experiment(cfg).run()


def main():
    cfg = SkyRLTrainConfig.from_cli_overrides(sys.argv[1:])
    validate_cfg(cfg)
    initialize_ray(cfg)
    ray.get(entrypoint.remote(cfg))


if __name__ == "__main__":
    main()
