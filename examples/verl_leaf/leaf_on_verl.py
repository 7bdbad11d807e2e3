"""What each process of a run of verl with LEAF imports."""

from verl.trainer.ppo.v1 import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from leafkernels.integrations.verl import LeafAdvantage


@register_trainer("leaf_sync")
class LeafTrainer(LeafAdvantage, PPOTrainerSync):
    """Brings token ids and log-probabilities to the estimator, which verl 0.9 does not."""
