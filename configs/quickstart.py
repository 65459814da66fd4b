"""An SAE on real Gemma activations of real text, on a laptop.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

import ml_collections

from gemma_scope_jax import config


def get_config() -> ml_collections.ConfigDict:
    c = config.defaults()
    c.gemma_dtype = "float32"
    c.data.context_length = 256
    c.bank.layers = (9,)
    c.bank.width = 4096
    c.bank.sparsity_coefficients = (5e-4,)
    c.bank.bandwidth = 0.04
    c.bank.initial_threshold = 0.04
    c.bank.dead_after_updates = 400
    c.train.tokens = 120 * 4096
    c.train.sequences_per_step = 16
    c.train.batch = 256
    c.ring.capacity = 10 * 4096
    c.normalizer.rows = 128
    c.normalizer.center = True
    c.normalizer.outlier_medians = 16.0
    c.optimizer.learning_rate = 2e-3
    c.optimizer.beta2 = 0.95
    c.optimizer.warmup_updates = 50
    c.optimizer.decay_fraction = 0.2
    c.optimizer.sparsity_warmup_updates = 600
    c.log.checkpoint_every = 20
    c.evaluation.rows = 64
    return c
